// Single-threaded row-major matrix products for use inside parallel_for, on our own kernels or those that torch ships.
#pragma once

#include "cpu/panels.h"
#include "cpu/vector.h"
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

// 1: where a library's take no AVX-512; 2: wherever AVX-512 is; 3: nowhere.
inline Threshold kOwnProducts{"matmul.own_products", 1};

// Elements from one row of n to the next, whole vectors: rows that are powers of two apart would meet in the cache.
inline int64_t pitch_of(int64_t n) {
  const int64_t whole = padded(n);
  return whole % 256 == 0 ? whole + kLanes : whole;
}

inline Threshold kDepth{"matmul.depth", 256};  // terms of a sum that are added up one by one

// Whether products of float32 and float64 matrices are formed by our own kernels: MKL takes AVX-512 on Intel's CPUs
// alone, and on a Zen 5 runs at under half the rate of ours.
inline bool has_own_products() {
#if FASTKD_HAS_MULTIVERSION
  static const bool is_slow = !__builtin_cpu_is("intel") || !sgemm_;
  return has_avx512() && (kOwnProducts == 2 || (kOwnProducts == 1 && is_slow));
#else
  return false;
#endif
}

// C (m, n) = alpha op(A) (m, k) op(B) (k, n), or added to C, by the library that torch is linked against.
template <typename T>
void library_gemm(
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
    bool add,
    T* c,
    int64_t ldc) {
  // Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ.
  const char *ta = op_b == Op::kAsIs ? "N" : "T", *tb = op_a == Op::kAsIs ? "N" : "T";
  const int im = static_cast<int>(n), in = static_cast<int>(m), ik = static_cast<int>(k);
  const int ia = static_cast<int>(ldb), ib = static_cast<int>(lda), ic = static_cast<int>(ldc);
  const T beta = add ? 1 : 0;
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

// C (m, n) = alpha op(A) (m, k) B (k, n), or added to C.
template <typename T>
void gemm(
    Op op_a,
    int64_t m,
    int64_t n,
    int64_t k,
    T alpha,
    const T* a,
    int64_t lda,
    const T* b,
    int64_t ldb,
    bool add,
    T* c,
    int64_t ldc) {
  if (!has_own_products()) return library_gemm<T>(op_a, Op::kAsIs, m, n, k, alpha, a, lda, b, ldb, add, c, ldc);
  const int64_t row = op_a == Op::kAsIs ? lda : 1, step = op_a == Op::kAsIs ? 1 : lda;
  Ahead nothing;
  nothing.clear();
  int64_t p = 0;
  do {  // a sum of thousands of terms one by one would lose digits
    const int64_t depth = std::min<int64_t>(k - p, kDepth);
    const OutOf<T> out{c, ldc, add || p > 0, alpha};
    multiply<T>(m, n, {a + p * step, row, step, depth}, {b + p * ldb, ldb, kWidth<T>}, out, nothing);
    p += depth;
  } while (p < k);
}

// Xᵀ (n, m) of X (m, n), in squares that stay in L1.
template <typename scalar_t>
static FASTKD_MULTIVERSION void transpose(
    const scalar_t* x,
    int64_t m,
    int64_t n,
    int64_t ld,
    scalar_t* out,
    int64_t ld_out) {
  for (int64_t i0 = 0; i0 < m; i0 += kLanes)
    for (int64_t j0 = 0; j0 < n; j0 += kLanes)
      for (int64_t j = j0; j < std::min(j0 + kLanes, n); ++j)
        for (int64_t i = i0; i < std::min(i0 + kLanes, m); ++i) out[j * ld_out + i] = x[i * ld + j];
}

// 32-bit words (n, k), rows ld bytes apart, transposed to (k, cols), in squares that stay in cache; cols >= n is whole
// vectors.
inline void transpose_rows(const void* from, int64_t ld, int64_t n, int64_t k, int64_t cols, void* to) {
  constexpr int64_t kSquare = 16, kWord = 4;
  const auto* src = static_cast<const char*>(from);
  auto* out = static_cast<char*>(to);
  const int64_t done = has_avx512() ? transpose_words(src, ld, n, k, cols, static_cast<float*>(to)) : 0;
  for (int64_t j0 = 0; j0 < n; j0 += kSquare)
    for (int64_t p0 = done; p0 < k; p0 += kSquare)
      for (int64_t p = p0; p < std::min(p0 + kSquare, k); ++p)
        for (int64_t j = j0; j < std::min(j0 + kSquare, n); ++j)
          std::memcpy(out + (p * cols + j) * kWord, src + j * ld + p * kWord, kWord);
}

// Rows B (n, k) for products A Bᵀ: packed as Bᵀ where those are our own, and otherwise as they lie.
template <typename T>
class RightRows {
 public:
  void assign(const T* rows, int64_t ld, int64_t n, int64_t k) {
    rows_ = rows, ld_ = ld, k_ = k, is_own_ = has_own_products();
    if (!is_own_) return;
    pitch_ = pitch_of(n);
    packed_.resize(k * pitch_);
    if constexpr (std::is_same_v<T, float>) {
      transpose_rows(rows, ld * sizeof(T), n, k, pitch_, packed_.data());
    } else {
      transpose(rows, n, k, ld, packed_.data(), pitch_);
    }
  }

  // C (m, columns) = A (m, k) times the transpose of `columns` rows from `first` on.
  void multiply(int64_t m, const T* a, int64_t lda, int64_t first, int64_t columns, T* c, int64_t ldc) const {
    if (is_own_) return gemm<T>(Op::kAsIs, m, columns, k_, 1, a, lda, packed_.data() + first, pitch_, false, c, ldc);
    const T* b = rows_ + first * ld_;
    library_gemm<T>(Op::kAsIs, Op::kTransposed, m, columns, k_, 1, a, lda, b, ld_, false, c, ldc);
  }

 private:
  Buffer<T> packed_;  // (k, pitch)
  const T* rows_ = nullptr;
  int64_t ld_ = 0, k_ = 0, pitch_ = 0;
  bool is_own_ = false;
};

// 1: where the CPU has instructions for them; 2: everywhere, element by element, for tests of what is built on them; 3:
// nowhere; 4: as 2, but as if in pairs alone.
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
  if (transposed) {  // pairs are adjacent
    transpose_rows(src, ld * sizeof *src, n, k / 2, cols, out);
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

// What a CPU has for products of bfloat16 matrices. With pairs (AVX512-BF16), at twice the rate of float32, they gain
// where little else is done; with tiles (AMX) everywhere.
enum class Bf16 { kNothing, kPairs, kTiles };

// Whether maps of bfloat16 rows are formed by our own kernels from the rows as they are.
inline bool has_bf16_pairs() {
  return kBf16Products == 1 ? has_avx512_bf16() : kBf16Products != 3;
}

// Whether torch's function multiplies as it is known here: its name is all that is known of it, so a small product of
// whole numbers is tried.
inline bool multiplies_bf16() {
  constexpr int64_t n = 32;
  std::vector<BFloat16> a(n * n), b(n * n), packed(n * n);
  std::vector<float> right(n * n, 0.f), found(n * n, 1.f);
  for (int64_t i = 0; i < n * n; ++i) a[i] = static_cast<float>(i % 7 - 3), b[i] = static_cast<float>(i % 5 - 2);
  pack_bf16(b.data(), n, n, n, /*transposed=*/false, packed.data());
  emulate_bf16(n, n, n, a.data(), n, packed.data(), n, right.data(), n);
  at::native::cpublas::brgemm(n, n, n, n, n, n, /*add=*/false, a.data(), packed.data(), found.data(), /*is_vnni=*/true);
  at::native::cpublas::brgemm_release(true);
  return found == right;
}

// What this CPU has, if torch has the function and oneDNN is not switched off at the moment.
inline Bf16 bf16_products() {
  if (kBf16Products > 1) return kBf16Products == 2 ? Bf16::kTiles : kBf16Products == 4 ? Bf16::kPairs : Bf16::kNothing;
  using namespace at::native::cpublas;
  if (could_pack == nullptr || brgemm == nullptr || brgemm_release == nullptr) return Bf16::kNothing;
  const bool has_tiles = could_pack(ScalarType::BFloat16);
  if (!has_tiles && !has_avx512_bf16()) return Bf16::kNothing;
  try {
    static const bool is_right = multiplies_bf16();  // tried again after an exception
    constexpr int64_t n = 16;
    const BFloat16 a[n * 2] = {}, b[n * 2] = {};
    float c[n * n];
    brgemm(n, n, 2, 2, n, n, /*add=*/false, a, b, c, /*is_vnni=*/true);
    brgemm_release(true);
    return !is_right ? Bf16::kNothing : has_tiles ? Bf16::kTiles : Bf16::kPairs;
  } catch (const std::exception&) {
    return Bf16::kNothing;
  }
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
