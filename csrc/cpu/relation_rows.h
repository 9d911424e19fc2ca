// Rows of tokens and of their maps: norms, differences, and the gradient through the normalisation.
#pragma once
#include "common.h"
#include "cpu/blocks.h"
#include "cpu/matmul.h"
#include "cpu/panels.h"
#include "cpu/vector.h"
#include "isa.h"
#include "thresholds.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace fastkd {
namespace {

Threshold kStrip{"relation.strip_rows", 64};         // rows of a strip of the maps, at most
Threshold kColumns{"relation.strip_columns", 1024};  // of a piece of it: two float32 pieces are 512 KB, a share of L2
Threshold kPanelRows{"relation.panel_rows", 256};    // rows of a block of the maps on our own kernels, at most,
Threshold kPanelBytes{"relation.panel_bytes", 600 << 10};     // and what they may take of L2
Threshold kWideBytes{"relation.wide_bytes", 8 << 20};         // of groups' rows that are converted at once, at most
Threshold kFewGroups{"relation.few_groups", 8};               // a thread: more hide that some threads have one less
Threshold kSharedBlocks{"relation.shared_blocks", 16 << 20};  // operations of a group whose blocks threads share,
Threshold kSharedRows{"relation.shared_rows", 4 * kPanel};    // which has as many rows at least,
Threshold kSharedMaps{"relation.shared_maps", 4 << 20};       // and of one whose maps they share
Threshold kMatrixRows{"relation.matrix_rows", 57};    // from which on bfloat16 maps fill the tiles of a matrix unit
Threshold kGramRows{"relation.gram_rows", 128};       // rows of a block of the Gram algorithm
Threshold kGramColumns{"relation.gram_columns", 96};  // columns of a block of a Gram's triangle

enum class Rectify { kNone, kBoth, kTeacher };

// One network's tokens (B, N, D) as G groups of n rows.
struct Groups {
  Tensor x;
  int64_t G, n, D, per_image, group_stride, row_stride, image_stride;
  bool across;  // a group is a token position across images

  Groups(const Tensor& x, const std::string& scope)
      : x(x), D(x.size(2)), per_image(x.size(1)), across(scope == "inter") {
    const int64_t B = x.size(0), N = x.size(1);
    image_stride = x.stride(0);
    if (scope == "intra") {
      G = B, n = N, group_stride = x.stride(0), row_stride = x.stride(1);
    } else if (across) {
      G = N, n = B, group_stride = x.stride(1), row_stride = x.stride(0);
    } else {
      G = 1, n = B * N, group_stride = 0, row_stride = x.stride(1);
      if (B > 1 && image_stride != N * row_stride) row_stride = -1;  // images do not follow each other
    }
  }

  int64_t offset(int64_t g, int64_t i) const {
    return row_stride >= 0 ? g * group_stride + i * row_stride
                           : i / per_image * image_stride + i % per_image * x.stride(1);
  }

  // Which of the B N tokens row i of group g is.
  int64_t token(int64_t g, int64_t i) const { return across ? i * per_image + g : g * n + i; }

  // Whether rows can be given to a matrix product where they are.
  bool in_place(ScalarType dtype) const {
    const bool fits = n == 1 || (row_stride >= D && row_stride <= std::numeric_limits<int>::max());
    return x.scalar_type() == dtype && (x.stride(2) == 1 || D == 1) && fits;
  }

  int64_t ld() const { return n == 1 ? D : row_stride; }
};

template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION acc_t square_sum(const scalar_t* src, int64_t stride, int64_t D) {
  acc_t sum = 0;
  if (stride == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += static_cast<acc_t>(src[d]) * static_cast<acc_t>(src[d]);
  } else {
    for (int64_t d = 0; d < D; ++d) sum += static_cast<acc_t>(src[d * stride]) * static_cast<acc_t>(src[d * stride]);
  }
  return sum;
}

// Rows [begin, end) of group g, times scale[i - begin] where given, to out with leading dimension ld.
template <typename acc_t>
void convert_rows(const Groups& x, int64_t g, int64_t begin, int64_t end, const acc_t* scale, acc_t* out, int64_t ld) {
  FASTKD_DISPATCH(x.x.scalar_type(), "convert_rows", [&] {
    const auto* p = x.x.const_data_ptr<scalar_t>();
    if (!scale && x.x.stride(2) == 1 && x.row_stride == x.D && ld == x.D) {  // one long row
      convert_row<scalar_t, acc_t>(p + x.offset(g, begin), 1, (end - begin) * x.D, 1, out);
      return;
    }
    for (int64_t i = begin; i < end; ++i)
      convert_row<scalar_t, acc_t>(
          p + x.offset(g, i), x.x.stride(2), x.D, scale ? scale[i - begin] : acc_t(1), out + (i - begin) * ld);
  });
}

template <typename acc_t>
FASTKD_INLINE acc_t inverse_of(acc_t norm, acc_t eps) {
  const acc_t inverse = norm > eps ? 1 / norm : acc_t(0);
  return norm <= std::numeric_limits<acc_t>::max() ? inverse : std::numeric_limits<acc_t>::quiet_NaN();
}

// 1/||x_i|| of rows [begin, end) of group g; 0 where the norm is at most eps, NaN where its square is no number of
// acc_t, 1 where rows are not normalised.
template <typename acc_t>
void inverse_norms(const Groups& x, int64_t g, int64_t begin, int64_t end, bool normalize, double eps, acc_t* out) {
  if (!normalize) return void(std::fill_n(out, end - begin, acc_t(1)));
  FASTKD_DISPATCH(x.x.scalar_type(), "inverse_norms", [&] {
    const auto* p = x.x.const_data_ptr<scalar_t>();
    for (int64_t i = begin; i < end; ++i) {
      const acc_t norm = std::sqrt(square_sum<scalar_t, acc_t>(p + x.offset(g, i), x.x.stride(2), x.D));
      out[i - begin] = inverse_of(norm, static_cast<acc_t>(eps));
    }
  });
}

// An element of E from its two products, squared; p becomes that of W. scale_s: r_i r_j, scale_t: q_i q_j.
template <Rectify rectify, typename acc_t>
FASTKD_INLINE acc_t squared_difference(acc_t& p, acc_t pt, acc_t scale_s, acc_t scale_t, acc_t c) {
  const acc_t map_s = p * scale_s;
  acc_t map_t = pt * scale_t;
  if (rectify != Rectify::kNone) map_t = std::max(map_t, acc_t(0));
  acc_t e = map_s - map_t;
  if (rectify == Rectify::kBoth) e = std::max(map_s, acc_t(0)) - map_t;
  p = rectify == Rectify::kBoth && map_s < 0 ? acc_t(0) : c * e * scale_s;
  return e * e;
}

// Row i of E from its two products; p becomes that of W. Returns Σ_j E_ij².
template <typename acc_t, Rectify rectify>
FASTKD_MULTIVERSION acc_t
difference_row(acc_t* p, const acc_t* pt, const acc_t* r, const acc_t* q, acc_t r_i, acc_t q_i, acc_t c, int64_t n) {
  acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += squared_difference<rectify>(p[j], pt[j], r_i * r[j], q_i * q[j], c);
  return sum;
}

// Inverse norms of columns, and the factor of the gradient.
struct Scales {
  const float *r, *q;
  float c;
};

// The same for a few rows of n elements, n whole vectors; the first `twice` of each row count twice.
template <Rectify rectify>
FASTKD_MULTIVERSION float difference_rows(
    float* p,
    const float* pt,
    int64_t ld,
    int64_t rows,
    int64_t n,
    int64_t twice,
    const float* r_rows,
    const float* q_rows,
    Scales x) {
  Lanes<float> off(0), on(0);
  for (int64_t i = 0; i < rows; ++i, p += ld, pt += ld) {
    const float r_i = r_rows[i], q_i = q_rows[i];
    for (int64_t first = 0; first < twice; first += kLanes)
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t j = first + l;
        off[l] += squared_difference<rectify>(p[j], pt[j], r_i * x.r[j], q_i * x.q[j], x.c);
      }
    for (int64_t first = twice; first < n; first += kLanes)
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t j = first + l;
        on[l] += squared_difference<rectify>(p[j], pt[j], r_i * x.r[j], q_i * x.q[j], x.c);
      }
  }
  return 2 * off.sum() + on.sum();
}

// Of a row of a whole map: Σ_j E_ij² and Σ_j W_ij <s_i, s_j>.
struct RowSums {
  float square, dot;
};

// A row of W, n whole vectors, from its products.
template <Rectify rectify>
FASTKD_MULTIVERSION RowSums whole_row(float* p, const float* pt, int64_t n, float r_i, float q_i, Scales x) {
  Lanes<float> square(0), dot(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const float product = p[j];
      square[l] += squared_difference<rectify>(p[j], pt[j], r_i * x.r[j], q_i * x.q[j], x.c);
      dot[l] += p[j] * product;
    }
  return {square.sum(), dot.sum()};
}

// f of rectify as a constant.
template <typename F>
auto with_constant(Rectify rectify, const F& f) {
  switch (rectify) {
    case Rectify::kNone:
      return f(std::integral_constant<Rectify, Rectify::kNone>());
    case Rectify::kBoth:
      return f(std::integral_constant<Rectify, Rectify::kBoth>());
    default:
      return f(std::integral_constant<Rectify, Rectify::kTeacher>());
  }
}

// w as the sum of two bfloat16 rows: one alone would show in the gradient. Truncated, which the second makes good.
FASTKD_MULTIVERSION void split_row(const float* w, int64_t n, uint16_t* high, uint16_t* low) {
  for (int64_t j = 0; j < n; ++j) {
    uint32_t bits, rest_bits;
    std::memcpy(&bits, w + j, sizeof bits);
    high[j] = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    float top;
    std::memcpy(&top, &bits, sizeof top);
    const float rest = w[j] - top;
    std::memcpy(&rest_bits, &rest, sizeof rest_bits);
    low[j] = static_cast<uint16_t>(rest_bits >> 16);
  }
}

// x, rounded. Of bfloat16 the bits: an object of that class between would keep a loop from being vectorised.
template <typename acc_t, typename out_t>
FASTKD_INLINE void assign(out_t& to, acc_t x) {
  if constexpr (std::is_same_v<out_t, BFloat16>) {
    to.x = torch::headeronly::detail::round_to_nearest_even(x);
  } else {
    to = static_cast<out_t>(x);
  }
}

// n numbers, rounded to what a gradient is stored in.
template <typename acc_t, typename out_t>
FASTKD_MULTIVERSION void round_all(const acc_t* x, int64_t n, out_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) assign(out[i], x[i]);
}

// dS_i = c (U_i - s_i r_i² <s_i, U_i>); c U_i where rows are not normalised. out may be u.
template <typename scalar_t, typename acc_t, typename out_t>
FASTKD_MULTIVERSION void finish_row(
    const acc_t* u,
    const scalar_t* s,
    int64_t stride,
    int64_t D,
    acc_t r,
    acc_t c,
    bool normalize,
    out_t* out) {
  const auto project = [&](auto step) FASTKD_INLINE_LAMBDA {
    acc_t dot = 0;
    if (normalize) {
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; ++d) dot += u[d] * static_cast<acc_t>(s[d * step]);
      dot *= r * r;
    }
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) assign(out[d], c * (u[d] - dot * static_cast<acc_t>(s[d * step])));
  };
  if (stride == 1) {
    project(std::integral_constant<int64_t, 1>());  // known to the compiler
  } else {
    project(stride);
  }
}

}  // namespace
}  // namespace fastkd
