// Single-threaded row-major matrix products for use inside parallel_for, on the micro-kernels that torch ships.
#pragma once

#include "cpu/panels.h"
#include "isa.h"
#include "tensor.h"
#include "thresholds.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

// Weak: a torch linked against another BLAS may not carry them, and addmm serves there.
extern "C" {
__attribute__((weak)) void sgemm_(
    const char*,
    const char*,
    const int*,
    const int*,
    const int*,
    const float*,
    const float*,
    const int*,
    const float*,
    const int*,
    const float*,
    float*,
    const int*);
__attribute__((weak)) void dgemm_(
    const char*,
    const char*,
    const int*,
    const int*,
    const int*,
    const double*,
    const double*,
    const int*,
    const double*,
    const int*,
    const double*,
    double*,
    const int*);
}

// Weak, as they are no part of PyTorch's stable interface: a torch that has them no more, or others, goes without.
namespace at::native::cpublas {
__attribute__((weak)) bool could_pack(c10::ScalarType dtype);
__attribute__((weak)) void brgemm(
    int64_t m,
    int64_t n,
    int64_t k,
    int64_t lda,
    int64_t ldb,
    int64_t ldc,
    bool add,
    const c10::BFloat16* a,
    const c10::BFloat16* b,
    float* c,
    bool is_vnni);
__attribute__((weak)) void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace fastkd {

enum class Op { kAsIs, kTransposed };

// C (m, n) = alpha op(A) (m, k) op(B) (k, n) + beta C; beta = 0 leaves C unread.
template <typename T>
void gemm(
    Op op_a,
    Op op_b,
    int64_t m,
    int64_t n,
    int64_t k,
    T alpha,
    const T* a,
    int64_t lda,
    const T* b,
    int64_t ldb,
    T beta,
    T* c,
    int64_t ldc) {
  // Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ.
  const char *ta = op_b == Op::kAsIs ? "N" : "T", *tb = op_a == Op::kAsIs ? "N" : "T";
  const int im = static_cast<int>(n), in = static_cast<int>(m), ik = static_cast<int>(k);
  const int ia = static_cast<int>(ldb), ib = static_cast<int>(lda), ic = static_cast<int>(ldc);
  if constexpr (std::is_same_v<T, float>) {
    if (sgemm_) return sgemm_(ta, tb, &im, &in, &ik, &alpha, b, &ia, a, &ib, &beta, c, &ic);
  } else {
    if (dgemm_) return dgemm_(ta, tb, &im, &in, &ik, &alpha, b, &ia, a, &ib, &beta, c, &ic);
  }
  const auto view = [](const T* p, int64_t rows, int64_t cols, int64_t ld, Op op) {
    const int64_t strides[] = {op == Op::kAsIs ? ld : 1, op == Op::kAsIs ? 1 : ld};
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(
        const_cast<T*>(p), Sizes{rows, cols}, {strides, 2}, cpu, CppTypeToScalarType<T>::value);
  };
  const auto A = view(a, m, k, lda, op_a), B = view(b, k, n, ldb, op_b), C = view(c, m, n, ldc, Op::kAsIs);
  require(aoti_torch_cpu_addmm_out(C.get(), C.get(), A.get(), B.get(), beta, alpha));
}

// 1: where the CPU has a unit for them; 2: everywhere, element by element, for tests of what is built on them.
inline Threshold kBf16Products{"matmul.bf16_products", 1};

// Columns of a packed operand, padded to whole tiles.
inline int64_t packed_columns(int64_t n) {
  return (n + 15) / 16 * 16;
}

// Elements of two rows in turn; the second may be absent, and counts as 0.
static FASTKD_MULTIVERSION void interleave_rows(
    const uint16_t* first,
    const uint16_t* second,
    int64_t n,
    uint32_t* out) {
  if (second) {
    for (int64_t j = 0; j < n; ++j) out[j] = first[j] | static_cast<uint32_t>(second[j]) << 16;
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = first[j];
  }
}

// B (k, n) in the order the tile unit reads: pairs of rows interleaved, [k/2][packed_columns(n)][2]; zeros beyond.
// `transposed`: src is Bᵀ (n, k), k even.
inline void pack_bf16(const BFloat16* src, int64_t ld, int64_t k, int64_t n, bool transposed, BFloat16* out) {
  const int64_t cols = packed_columns(n);
  if (transposed) {  // pairs are adjacent: a transpose of 32-bit words, in squares that stay in cache
    constexpr int64_t kSquare = 16;
    int64_t done = 0;
    if (has_avx512()) {
      const int64_t bytes = ld * sizeof *src;
      done = transpose_words(reinterpret_cast<const char*>(src), bytes, n, k / 2, cols, reinterpret_cast<float*>(out));
    }
    for (int64_t j0 = 0; j0 < n; j0 += kSquare)
      for (int64_t p0 = done; p0 < k / 2; p0 += kSquare)
        for (int64_t p = p0; p < std::min(p0 + kSquare, k / 2); ++p)
          for (int64_t j = j0; j < std::min(j0 + kSquare, n); ++j)
            std::memcpy(static_cast<void*>(out + (p * cols + j) * 2), src + j * ld + 2 * p, 2 * sizeof(BFloat16));
  } else {
    for (int64_t p = 0; p < (k + 1) / 2; ++p) {
      const auto* first = reinterpret_cast<const uint16_t*>(src + 2 * p * ld);
      interleave_rows(first, 2 * p + 1 < k ? first + ld : nullptr, n, reinterpret_cast<uint32_t*>(out) + p * cols);
    }
  }
  for (int64_t p = 0; p < (k + 1) / 2; ++p)
    std::memset(static_cast<void*>(out + (p * cols + n) * 2), 0, (cols - n) * 2 * sizeof(BFloat16));
}

// What the unit computes.
inline void emulate_bf16(
    int64_t m,
    int64_t n,
    int64_t k,
    const BFloat16* a,
    int64_t lda,
    const BFloat16* packed,
    int64_t ld_packed,
    float* c,
    int64_t ldc) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) {
      const float left = a[i * lda + p];
      const BFloat16* right = packed + p / 2 * ld_packed * 2 + p % 2;
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += left * static_cast<float>(right[2 * j]);
    }
}

// Whether this CPU multiplies bfloat16 matrices (AMX) and torch has the function that is known here: its name is all
// that is known of it, so a small product of whole numbers is tried.
inline bool has_bf16_products() {
  if (kBf16Products > 1) return true;
  static const bool has = [] {
    using namespace at::native::cpublas;
    if (could_pack == nullptr || brgemm == nullptr || brgemm_release == nullptr) return false;
    constexpr int64_t n = 32;
    if (!could_pack(ScalarType::BFloat16)) return false;
    std::vector<BFloat16> a(n * n), b(n * n), packed(n * n);
    std::vector<float> right(n * n, 0.f), found(n * n, 1.f);
    for (int64_t i = 0; i < n * n; ++i) a[i] = static_cast<float>(i % 7 - 3), b[i] = static_cast<float>(i % 5 - 2);
    pack_bf16(b.data(), n, n, n, /*transposed=*/false, packed.data());
    emulate_bf16(n, n, n, a.data(), n, packed.data(), n, right.data(), n);
    try {
      brgemm(n, n, n, n, n, n, /*add=*/false, a.data(), packed.data(), found.data(), /*is_vnni=*/true);
      brgemm_release(true);
    } catch (const std::exception&) {
      return false;
    }
    return found == right;
  }();
  return has;
}

// C (m, n) = A (m, k) B + add C, with B packed; k even. C has packed_columns(n) columns at least.
inline void gemm_bf16(
    int64_t m,
    int64_t n,
    int64_t k,
    const BFloat16* a,
    int64_t lda,
    const BFloat16* packed,
    int64_t ld_packed,
    bool add,
    float* c,
    int64_t ldc) {
  if (kBf16Products > 1) {
    for (int64_t i = 0; i < m && !add; ++i) std::fill_n(c + i * ldc, n, 0.f);
    return emulate_bf16(m, n, k, a, lda, packed, ld_packed, c, ldc);
  }
  at::native::cpublas::brgemm(m, n, k, lda, ld_packed, ldc, add, a, packed, c, /*is_vnni=*/true);
}

inline void release_bf16() {
  if (kBf16Products == 1) at::native::cpublas::brgemm_release(true);
}

}  // namespace fastkd
