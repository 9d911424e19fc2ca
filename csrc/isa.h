#pragma once

#include <climits>  // defines __GLIBC__

// FASTKD_MULTIVERSION before a function compiles it for AVX-512, AVX2 + FMA and the baseline; the loader binds the
// version that this CPU runs. Free functions and function templates:
//
//   template <typename acc_t>
//   FASTKD_MULTIVERSION acc_t sum_squares(const acc_t* x, int64_t n) { ... }
//
// Only the function itself and what is inlined into it are versioned: a lambda given to parallel_for is a function
// of its own, so it should call a versioned function rather than hold the loop.
// Levels, not CPU names: "arch=haswell" matches Haswell alone and leaves every later CPU on the baseline.
// FASTKD_AVX512 compiles a function for AVX-512 alone, to be called where has_avx512(); FASTKD_AVX512_BF16 with its
// products of bfloat16 pairs, which has_avx512_bf16() tells.
// GCC 12 or later on x86-64 Linux. Clang rejects target_clones on templates, and musl, macOS and Windows have no ifunc:
// there one baseline version is built.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__CUDACC__)
#define FASTKD_HAS_MULTIVERSION 1
#define FASTKD_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FASTKD_AVX512 __attribute__((target("arch=x86-64-v4")))
#define FASTKD_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#else
#define FASTKD_HAS_MULTIVERSION 0
#define FASTKD_MULTIVERSION
#define FASTKD_AVX512
#define FASTKD_AVX512_BF16
#endif

namespace fastkd {

// Whether functions compiled for AVX-512 alone exist and run on this CPU.
inline bool has_avx512() {
#if FASTKD_HAS_MULTIVERSION
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("x86-64-v4"));
  return has;
#else
  return false;
#endif
}

// The same, with products of pairs of bfloat16 numbers.
inline bool has_avx512_bf16() {
#if FASTKD_HAS_MULTIVERSION
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// The version that versioned functions run on this CPU: "avx512", "avx2" or "default".
inline const char* isa_in_use() {
  if (has_avx512()) return "avx512";
#if FASTKD_HAS_MULTIVERSION
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "default";
}

}  // namespace fastkd
