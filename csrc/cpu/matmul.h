// Single-threaded row-major matrix products for use inside at::parallel_for, on the micro-kernels that torch ships.
#pragma once

#include "cpu/panels.h"
#include "isa.h"
#include "thresholds.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>

// Weak: a torch linked against another BLAS may not carry them, and at::mm_out serves there.
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
    const auto x = at::from_blob(const_cast<T*>(p), {rows, cols}, {ld, 1}, c10::CppTypeToScalarType<T>::value);
    return op == Op::kAsIs ? x : x.t();
  };
  const auto A = op_a == Op::kAsIs ? view(a, m, k, lda, op_a) : view(a, k, m, lda, op_a);
  const auto B = op_b == Op::kAsIs ? view(b, k, n, ldb, op_b) : view(b, n, k, ldb, op_b);
  auto C = view(c, m, n, ldc, Op::kAsIs);
  at::addmm_out(C, C, A, B, beta, alpha);
}

// 1: where the CPU has a unit for them; 2: everywhere, element by element, for tests of what is built on them.
inline Threshold kBf16Products{"matmul.bf16_products", 1};

// Whether this CPU multiplies bfloat16 matrices (AMX), and torch was built to.
inline bool has_bf16_products() {
  if (kBf16Products > 1) return true;
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  return at::native::cpublas::could_pack(at::kBFloat16);
#else
  return false;
#endif
}

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
inline void pack_bf16(const at::BFloat16* src, int64_t ld, int64_t k, int64_t n, bool transposed, at::BFloat16* out) {
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
            std::memcpy(static_cast<void*>(out + (p * cols + j) * 2), src + j * ld + 2 * p, 2 * sizeof(at::BFloat16));
  } else {
    for (int64_t p = 0; p < (k + 1) / 2; ++p) {
      const auto* first = reinterpret_cast<const uint16_t*>(src + 2 * p * ld);
      interleave_rows(first, 2 * p + 1 < k ? first + ld : nullptr, n, reinterpret_cast<uint32_t*>(out) + p * cols);
    }
  }
  for (int64_t p = 0; p < (k + 1) / 2; ++p)
    std::memset(static_cast<void*>(out + (p * cols + n) * 2), 0, (cols - n) * 2 * sizeof(at::BFloat16));
}

// What the unit computes.
inline void emulate_bf16(
    int64_t m,
    int64_t n,
    int64_t k,
    const at::BFloat16* a,
    int64_t lda,
    const at::BFloat16* packed,
    int64_t ld_packed,
    float* c,
    int64_t ldc) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) {
      const float left = a[i * lda + p];
      const at::BFloat16* right = packed + p / 2 * ld_packed * 2 + p % 2;
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += left * static_cast<float>(right[2 * j]);
    }
}

// C (m, n) = A (m, k) B + add C, with B packed; k even. C has packed_columns(n) columns at least.
inline void gemm_bf16(
    int64_t m,
    int64_t n,
    int64_t k,
    const at::BFloat16* a,
    int64_t lda,
    const at::BFloat16* packed,
    int64_t ld_packed,
    bool add,
    float* c,
    int64_t ldc) {
  if (kBf16Products > 1) {
    for (int64_t i = 0; i < m && !add; ++i) std::fill_n(c + i * ldc, n, 0.f);
    return emulate_bf16(m, n, k, a, lda, packed, ld_packed, c, ldc);
  }
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  at::native::cpublas::brgemm(m, n, k, lda, ld_packed, ldc, add, a, packed, c, /*is_vnni=*/true);
#endif
}

inline void release_bf16() {
  if (kBf16Products > 1) return;
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  at::native::cpublas::brgemm_release();
#endif
}

}  // namespace fastkd
