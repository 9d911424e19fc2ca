// Relation loss: 1/(G n²) Σ_g ||f(ŜŜᵀ) - f(T̂T̂ᵀ)||² and its gradient, in one sweep over strips of the maps.
//
// Rows stay as they lie in memory: with r, q the inverse norms, E_ij = r_i r_j <s_i, s_j> - q_i q_j <t_i, t_j>, and with
// W_ij = r_i E_ij r_j, U = W S, the gradient is dS_i = 4/(G n²) (U_i - s_i r_i² <s_i, U_i>). W is symmetric: a strip of its
// upper triangle serves the rows it starts in (W S) and, transposed, the rows below (Wᵀ S).
#include "common.h"
#include "cpu/matmul.h"
#include "isa.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kStrip = 64;       // rows of a strip of the maps, at most
constexpr int64_t kColumns = 1024;   // columns of a piece of a strip: two float32 pieces are 512 KB, a share of L2
constexpr int64_t kGramRows = 128;   // rows of a block of the Gram algorithm
constexpr int64_t kGramColumns = 96;  // columns of a block of a Gram's triangle

enum class Rectify { kNone, kBoth, kTeacher };

// One network's tokens (B, N, D) as G groups of n rows.
struct Groups {
  at::Tensor x;
  int64_t G, n, D, per_image, group_stride, row_stride, image_stride;

  Groups(const at::Tensor& x, const std::string& scope) : x(x), D(x.size(2)), per_image(x.size(1)) {
    const int64_t B = x.size(0), N = x.size(1);
    image_stride = x.stride(0);
    if (scope == "intra") {
      G = B, n = N, group_stride = x.stride(0), row_stride = x.stride(1);
    } else if (scope == "inter") {
      G = N, n = B, group_stride = x.stride(1), row_stride = x.stride(0);
    } else {
      G = 1, n = B * N, group_stride = 0, row_stride = x.stride(1);
      if (B > 1 && image_stride != N * row_stride) row_stride = -1;  // images do not follow each other
    }
  }

  int64_t offset(int64_t g, int64_t i) const {
    return row_stride >= 0 ? g * group_stride + i * row_stride : i / per_image * image_stride + i % per_image * x.stride(1);
  }

  // Whether rows can be given to a matrix product where they are.
  bool in_place(at::ScalarType dtype) const {
    return x.scalar_type() == dtype && (x.stride(2) == 1 || D == 1) && (row_stride >= D || n == 1);
  }

  int64_t ld() const {
    return std::max(row_stride, D);
  }
};

template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void convert_row(const scalar_t* src, int64_t stride, int64_t D, acc_t scale, acc_t* out) {
  if (stride == 1) {
    for (int64_t d = 0; d < D; ++d) out[d] = static_cast<acc_t>(src[d]) * scale;
  } else {
    for (int64_t d = 0; d < D; ++d) out[d] = static_cast<acc_t>(src[d * stride]) * scale;
  }
}

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
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.x.scalar_type(), "convert_rows", [&] {
    const auto* p = x.x.const_data_ptr<scalar_t>();
    for (int64_t i = begin; i < end; ++i)
      convert_row<scalar_t, acc_t>(
          p + x.offset(g, i), x.x.stride(2), x.D, scale ? scale[i - begin] : acc_t(1), out + (i - begin) * ld);
  });
}

// 1/||x_i|| of rows [begin, end) of group g; 0 where the norm is at most eps, 1 where rows are not normalised.
template <typename acc_t>
void inverse_norms(const Groups& x, int64_t g, int64_t begin, int64_t end, bool normalize, double eps, acc_t* out) {
  if (!normalize) return void(std::fill_n(out, end - begin, acc_t(1)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.x.scalar_type(), "inverse_norms", [&] {
    const auto* p = x.x.const_data_ptr<scalar_t>();
    for (int64_t i = begin; i < end; ++i) {
      const acc_t norm = std::sqrt(square_sum<scalar_t, acc_t>(p + x.offset(g, i), x.x.stride(2), x.D));
      out[i - begin] = norm > static_cast<acc_t>(eps) ? 1 / norm : acc_t(0);
    }
  });
}

// Row i of E from its two products; p becomes that of W. Returns Σ_j E_ij².
template <typename acc_t, Rectify rectify>
FASTKD_MULTIVERSION acc_t difference_row(
    acc_t* p, const acc_t* pt, const acc_t* r, const acc_t* q, acc_t r_i, acc_t q_i, int64_t n) {
  acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const acc_t scale = r_i * r[j], map_s = p[j] * scale;
    acc_t map_t = pt[j] * (q_i * q[j]);
    if (rectify != Rectify::kNone) map_t = std::max(map_t, acc_t(0));
    acc_t e = map_s - map_t;
    if (rectify == Rectify::kBoth) e = std::max(map_s, acc_t(0)) - map_t;
    sum += e * e;
    p[j] = rectify == Rectify::kBoth && map_s < 0 ? acc_t(0) : e * scale;
  }
  return sum;
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

// dS_i = c (U_i - s_i r_i² <s_i, U_i>); c U_i where rows are not normalised.
template <typename scalar_t, typename acc_t, typename out_t>
FASTKD_MULTIVERSION void finish_row(
    const acc_t* u, const scalar_t* s, int64_t stride, int64_t D, acc_t r, acc_t c, bool normalize, out_t* out) {
  acc_t dot = 0;
  if (normalize) {
    if (stride == 1) {
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; ++d) dot += u[d] * static_cast<acc_t>(s[d]);
    } else {
      for (int64_t d = 0; d < D; ++d) dot += u[d] * static_cast<acc_t>(s[d * stride]);
    }
    dot *= r * r;
  }
  for (int64_t d = 0; d < D; ++d)
    out[d] = static_cast<out_t>(c * (u[d] - dot * static_cast<acc_t>(s[d * stride])));
}

struct Problem {
  Groups s, t;
  at::Tensor dstudent;  // (B, N, Ds) contiguous, or empty
  std::optional<Groups> ds;
  bool normalize;
  Rectify rectify;
  double eps;

  double elements() const {
    return static_cast<double>(s.G) * static_cast<double>(s.n) * static_cast<double>(s.n);
  }

  // u: rows [begin, end) of group g, leading dimension ld; may be the rows of dstudent themselves.
  template <typename acc_t>
  void finish(int64_t g, int64_t begin, int64_t end, const acc_t* u, int64_t ld, const acc_t* r) const {
    const auto c = static_cast<acc_t>(4 / elements());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, s.x.scalar_type(), "finish", [&] {
      using stored_t = std::conditional_t<std::is_same_v<scalar_t, at::Half>, float, scalar_t>;
      const auto* s_ptr = s.x.const_data_ptr<scalar_t>();
      auto* d_ptr = static_cast<stored_t*>(dstudent.data_ptr());
      for (int64_t i = begin; i < end; ++i)
        finish_row<scalar_t, acc_t, stored_t>(
            u + (i - begin) * ld,
            s_ptr + s.offset(g, i),
            s.x.stride(2),
            s.D,
            r[i],
            c,
            normalize,
            d_ptr + ds->offset(g, i));
    });
  }
};

template <typename acc_t>
acc_t difference(
    Rectify rectify, acc_t* p, const acc_t* pt, const acc_t* r, const acc_t* q, acc_t r_i, acc_t q_i, int64_t n) {
  switch (rectify) {
    case Rectify::kNone:
      return difference_row<acc_t, Rectify::kNone>(p, pt, r, q, r_i, q_i, n);
    case Rectify::kBoth:
      return difference_row<acc_t, Rectify::kBoth>(p, pt, r, q, r_i, q_i, n);
    default:
      return difference_row<acc_t, Rectify::kTeacher>(p, pt, r, q, r_i, q_i, n);
  }
}

// A group's rows ready for products, and their inverse norms.
template <typename acc_t>
struct Rows {
  std::vector<acc_t> copy, inverse;
  const acc_t* data = nullptr;
  int64_t ld = 0;

  void load(const Groups& x, int64_t g, bool normalize, double eps) {
    inverse.resize(x.n);
    inverse_norms(x, g, 0, x.n, normalize, eps, inverse.data());
    if (x.in_place(c10::CppTypeToScalarType<acc_t>::value)) {
      data = x.x.template const_data_ptr<acc_t>() + x.offset(g, 0);
      ld = x.ld();
      return;
    }
    copy.resize(x.n * x.D);
    convert_rows<acc_t>(x, g, 0, x.n, nullptr, copy.data(), x.D);
    data = copy.data();
    ld = x.D;
  }
};

// A thread's pieces of a strip.
template <typename acc_t>
struct Pieces {
  std::vector<acc_t> p = std::vector<acc_t>(kStrip * kColumns), pt = std::vector<acc_t>(kStrip * kColumns);
};

// Rows of a strip: as even as possible, for a tail of a few rows runs at a fraction of the product's rate.
int64_t strip_rows(int64_t n) {
  const int64_t strips = (n + kStrip - 1) / kStrip;
  return (n + strips - 1) / strips;
}

// Strip [i0, i1) of the maps of a group. `triangle`: columns from i0 on, each off-diagonal element counted twice; u is
// then the whole group's and takes both products. Otherwise all columns, and u is the strip's. Returns Σ E².
template <typename acc_t>
double strip(
    const Problem& problem, const Rows<acc_t>& s, const Rows<acc_t>& t, int64_t i0, int64_t i1, bool triangle,
    Pieces<acc_t>& pieces, acc_t* u, int64_t ldu) {
  const int64_t n = problem.s.n, Ds = problem.s.D, Dt = problem.t.D, rows = i1 - i0, step = std::min(n, kColumns);
  acc_t *p = pieces.p.data(), *pt = pieces.pt.data();
  double sum = 0;
  for (int64_t j0 = triangle ? i0 : 0, first = 1; j0 < n; j0 += step, first = 0) {
    const int64_t columns = std::min(step, n - j0), diagonal = triangle && first ? std::min(rows, columns) : 0;
    const acc_t *s_i = s.data + i0 * s.ld, *s_j = s.data + j0 * s.ld;
    gemm<acc_t>(Op::kAsIs, Op::kTransposed, rows, columns, Ds, 1, s_i, s.ld, s_j, s.ld, 0, p, columns);
    gemm<acc_t>(
        Op::kAsIs, Op::kTransposed, rows, columns, Dt, 1, t.data + i0 * t.ld, t.ld, t.data + j0 * t.ld, t.ld, 0, pt,
        columns);
    for (int64_t i = 0; i < rows; ++i) {
      const acc_t r_i = s.inverse[i0 + i], q_i = t.inverse[i0 + i];
      const auto part = [&](int64_t begin, int64_t end) {
        return static_cast<double>(difference<acc_t>(
            problem.rectify, p + i * columns + begin, pt + i * columns + begin, s.inverse.data() + j0 + begin,
            t.inverse.data() + j0 + begin, r_i, q_i, end - begin));
      };
      sum += part(0, diagonal) + (triangle ? 2 : 1) * part(diagonal, columns);
    }
    if (!u) continue;
    const bool add = triangle ? i0 > 0 || !first : !first;
    acc_t* u_i = triangle ? u + i0 * ldu : u;
    gemm<acc_t>(Op::kAsIs, Op::kAsIs, rows, Ds, columns, 1, p, columns, s_j, s.ld, add ? 1 : 0, u_i, ldu);
    if (triangle && columns > diagonal)
      gemm<acc_t>(
          Op::kTransposed, Op::kAsIs, columns - diagonal, Ds, rows, 1, p + diagonal, columns, s_i, s.ld, i0 > 0 ? 1 : 0,
          u + (j0 + diagonal) * ldu, ldu);
  }
  return sum;
}

double sum_of(const std::vector<double>& parts) {
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

template <typename acc_t>
double tile(const Problem& problem) {
  const int64_t G = problem.s.G, n = problem.s.n, Ds = problem.s.D, height = strip_rows(n), strips = (n + height - 1) / height;
  const bool with_grad = problem.ds.has_value();
  // Where the stored gradient is in acc_t, U is formed in it.
  const bool direct = with_grad && problem.dstudent.scalar_type() == c10::CppTypeToScalarType<acc_t>::value;
  const auto u_of = [&](std::vector<acc_t>& buffer, int64_t g, int64_t i, int64_t rows) -> std::pair<acc_t*, int64_t> {
    if (!with_grad) return {nullptr, 0};
    if (direct) return {problem.dstudent.template data_ptr<acc_t>() + problem.ds->offset(g, i), problem.ds->ld()};
    buffer.resize(rows * Ds);
    return {buffer.data(), Ds};
  };
  if (G >= at::get_num_threads()) {
    std::vector<double> sums(G);
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      Rows<acc_t> s, t;
      Pieces<acc_t> pieces;
      std::vector<acc_t> buffer;
      for (int64_t g = begin; g < end; ++g) {
        s.load(problem.s, g, problem.normalize, problem.eps);
        t.load(problem.t, g, problem.normalize, problem.eps);
        const auto [u, ldu] = u_of(buffer, g, 0, n);
        for (int64_t i0 = 0; i0 < n; i0 += height)
          sums[g] += strip<acc_t>(problem, s, t, i0, std::min(n, i0 + height), true, pieces, u, ldu);
        if (with_grad) problem.finish<acc_t>(g, 0, n, u, ldu, s.inverse.data());
      }
    });
    return sum_of(sums);
  }
  // Few groups: threads share a group's strips. A strip then takes all its columns, so that it alone writes its rows.
  std::vector<double> sums(G * strips);
  Rows<acc_t> s, t;
  for (int64_t g = 0; g < G; ++g) {
    s.load(problem.s, g, problem.normalize, problem.eps);
    t.load(problem.t, g, problem.normalize, problem.eps);
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      Pieces<acc_t> pieces;
      std::vector<acc_t> buffer;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i0 = k * height, i1 = std::min(n, i0 + height);
        const auto [u, ldu] = u_of(buffer, g, i0, height);
        sums[g * strips + k] = strip<acc_t>(problem, s, t, i0, i1, !with_grad, pieces, u, ldu);
        if (with_grad) problem.finish<acc_t>(g, i0, i1, u, ldu, s.inverse.data());
      }
    });
  }
  return sum_of(sums);
}

// The same for two bfloat16 networks where the CPU has a matrix unit for them: it is so much faster than float32
// that every strip takes all its columns.
struct PackedRows {
  std::vector<at::BFloat16> transposed, as_is;  // X^T, packed for X X^T; X, packed for W X
  std::vector<float> inverse;
  const at::BFloat16* data = nullptr;
  int64_t ld = 0, columns = 0;

  void load(const Groups& x, int64_t g, bool normalize, double eps, bool with_grad) {
    inverse.resize(x.n);
    inverse_norms<float>(x, g, 0, x.n, normalize, eps, inverse.data());
    data = x.x.const_data_ptr<at::BFloat16>() + x.offset(g, 0);
    ld = x.ld();
    columns = packed_columns(x.n);
    transposed.resize(x.D * columns);
    pack_bf16(data, ld, x.D, x.n, /*transposed=*/true, transposed.data());
    if (!with_grad) return;
    as_is.resize((x.n + 1) / 2 * 2 * packed_columns(x.D));
    pack_bf16(data, ld, x.n, x.D, /*transposed=*/false, as_is.data());
  }
};

struct PiecesBf16 {
  std::vector<float> p = std::vector<float>(kStrip * kColumns), pt = std::vector<float>(kStrip * kColumns), u;
  std::vector<at::BFloat16> high = std::vector<at::BFloat16>(kStrip * kColumns),
                            low = std::vector<at::BFloat16>(kStrip * kColumns);
};

double strip_bf16(
    const Problem& problem, const PackedRows& s, const PackedRows& t, int64_t i0, int64_t i1, bool with_grad,
    PiecesBf16& pieces) {
  const int64_t n = problem.s.n, Ds = problem.s.D, rows = i1 - i0, width = packed_columns(Ds);
  double sum = 0;
  for (int64_t j0 = 0; j0 < n; j0 += kColumns) {
    const int64_t columns = std::min(kColumns, n - j0), padded = packed_columns(columns);
    float *p = pieces.p.data(), *pt = pieces.pt.data();
    gemm_bf16(rows, padded, Ds, s.data + i0 * s.ld, s.ld, s.transposed.data() + 2 * j0, s.columns, false, p, padded);
    gemm_bf16(
        rows, padded, problem.t.D, t.data + i0 * t.ld, t.ld, t.transposed.data() + 2 * j0, t.columns, false, pt, padded);
    const int64_t even = (columns + 1) / 2 * 2;
    auto *high = pieces.high.data(), *low = pieces.low.data();
    for (int64_t i = 0; i < rows; ++i) {
      float* p_i = p + i * padded;
      sum += difference<float>(
          problem.rectify, p_i, pt + i * padded, s.inverse.data() + j0, t.inverse.data() + j0, s.inverse[i0 + i],
          t.inverse[i0 + i], columns);
      if (!with_grad) continue;
      if (even > columns) p_i[columns] = 0;
      split_row(p_i, even, reinterpret_cast<uint16_t*>(high + i * even), reinterpret_cast<uint16_t*>(low + i * even));
    }
    if (!with_grad) continue;
    const auto* packed = s.as_is.data() + j0 * width;
    gemm_bf16(rows, width, even, high, even, packed, width, j0 > 0, pieces.u.data(), width);
    gemm_bf16(rows, width, even, low, even, packed, width, true, pieces.u.data(), width);
  }
  return sum;
}

double tile_bf16(const Problem& problem) {
  const int64_t G = problem.s.G, n = problem.s.n, height = strip_rows(n), strips = (n + height - 1) / height;
  const bool with_grad = problem.ds.has_value();
  const int64_t width = packed_columns(problem.s.D);
  std::vector<double> sums(G * strips);
  const auto run = [&](const PackedRows& s, const PackedRows& t, int64_t g, int64_t k, PiecesBf16& pieces) {
    const int64_t i0 = k * height, i1 = std::min(n, i0 + height);
    pieces.u.resize(height * width);
    sums[g * strips + k] = strip_bf16(problem, s, t, i0, i1, with_grad, pieces);
    if (with_grad) problem.finish<float>(g, i0, i1, pieces.u.data(), width, s.inverse.data());
  };
  if (G >= at::get_num_threads()) {
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      PackedRows s, t;
      PiecesBf16 pieces;
      for (int64_t g = begin; g < end; ++g) {
        s.load(problem.s, g, problem.normalize, problem.eps, with_grad);
        t.load(problem.t, g, problem.normalize, problem.eps, false);
        for (int64_t k = 0; k < strips; ++k) run(s, t, g, k, pieces);
      }
      release_bf16();
    });
    return sum_of(sums);
  }
  PackedRows s, t;
  for (int64_t g = 0; g < G; ++g) {
    s.load(problem.s, g, problem.normalize, problem.eps, with_grad);
    t.load(problem.t, g, problem.normalize, problem.eps, false);
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      PiecesBf16 pieces;
      for (int64_t k = begin; k < end; ++k) run(s, t, g, k, pieces);
      release_bf16();
    });
  }
  return sum_of(sums);
}

// Gram algorithm. With X = [Ŝ | T̂], XᵀX holds the three Grams: float64, lower triangle, in blocks of columns.
void add_gram(const double* x, int64_t rows, int64_t D, double* gram) {
  for (int64_t c = 0; c < D; c += kGramColumns) {
    const int64_t columns = std::min(kGramColumns, D - c);
    gemm<double>(
        Op::kTransposed, Op::kAsIs, D - c, columns, rows, 1, x + c, D, x + c, D, 1, gram + c * D + c, D);
  }
}

// ||SᵀS||² - 2||SᵀT||² + ||TᵀT||² from the lower triangle.
double gram_difference(const double* gram, int64_t Ds, int64_t D) {
  double total = 0;
  for (int64_t i = 0; i < D; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const double square = gram[i * D + j] * gram[i * D + j];
      total += i == j ? square : i >= Ds && j < Ds ? -2 * square : 2 * square;
    }
  return total;
}

// [SᵀS; -TᵀS] (D, Ds): the gradient's right-hand side.
template <typename acc_t>
void gram_factor(const double* gram, int64_t Ds, int64_t D, acc_t* out) {
  for (int64_t i = 0; i < D; ++i)
    for (int64_t j = 0; j < Ds; ++j) {
      const double value = i >= j ? gram[i * D + j] : gram[j * D + i];
      out[i * Ds + j] = static_cast<acc_t>(i < Ds ? value : -value);
    }
}

// Rows [begin, end) of group g of [Ŝ | T̂], in acc_t and, where asked, in double.
template <typename acc_t>
struct UnitRows {
  std::vector<acc_t> x, r, q;
  std::vector<double> x64;

  void load(const Problem& problem, int64_t g, int64_t begin, int64_t end, bool in_double) {
    const int64_t D = problem.s.D + problem.t.D, rows = end - begin;
    x.resize(kGramRows * D);
    r.resize(kGramRows);
    q.resize(kGramRows);
    inverse_norms<acc_t>(problem.s, g, begin, end, problem.normalize, problem.eps, r.data());
    inverse_norms<acc_t>(problem.t, g, begin, end, problem.normalize, problem.eps, q.data());
    convert_rows<acc_t>(problem.s, g, begin, end, r.data(), x.data(), D);
    convert_rows<acc_t>(problem.t, g, begin, end, q.data(), x.data() + problem.s.D, D);
    if (!in_double) return;
    x64.resize(kGramRows * D);
    convert_row<acc_t, double>(x.data(), 1, rows * D, 1.0, x64.data());
  }
};

template <typename acc_t>
double gram(const Problem& problem) {
  const int64_t G = problem.s.G, n = problem.s.n, Ds = problem.s.D, D = Ds + problem.t.D;
  const int64_t blocks = (n + kGramRows - 1) / kGramRows;
  const bool with_grad = problem.ds.has_value();
  const auto accumulate = [&](int64_t g, int64_t begin, int64_t end, UnitRows<acc_t>& rows, double* out) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i0 = k * kGramRows, i1 = std::min(n, i0 + kGramRows);
      rows.load(problem, g, i0, i1, true);
      add_gram(rows.x64.data(), i1 - i0, D, out);
    }
  };
  const auto gradient = [&](int64_t g, int64_t begin, int64_t end, UnitRows<acc_t>& rows, const acc_t* factor) {
    const auto c = static_cast<acc_t>(4 / problem.elements());
    std::vector<acc_t> u(kGramRows * Ds), one(kGramRows, acc_t(1));
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i0 = k * kGramRows, i1 = std::min(n, i0 + kGramRows);
      rows.load(problem, g, i0, i1, false);
      gemm<acc_t>(Op::kAsIs, Op::kAsIs, i1 - i0, Ds, D, 1, rows.x.data(), D, factor, Ds, 0, u.data(), Ds);
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, problem.s.x.scalar_type(), "gram", [&] {
        using stored_t = std::conditional_t<std::is_same_v<scalar_t, at::Half>, float, scalar_t>;
        auto* d_ptr = static_cast<stored_t*>(problem.dstudent.data_ptr());
        for (int64_t i = i0; i < i1; ++i) {  // dS = r (dŜ - ŝ <ŝ, dŜ>): the unit rows are at hand
          const acc_t scale = rows.r[i - i0];
          finish_row<acc_t, acc_t, stored_t>(
              u.data() + (i - i0) * Ds,
              rows.x.data() + (i - i0) * D,
              1,
              Ds,
              acc_t(1),
              c * scale,
              problem.normalize,
              d_ptr + problem.ds->offset(g, i));
        }
      });
    }
  };
  std::vector<double> sums(G);
  if (G >= at::get_num_threads()) {
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      UnitRows<acc_t> rows;
      std::vector<double> total(D * D);
      std::vector<acc_t> factor(with_grad ? D * Ds : 0);
      for (int64_t g = begin; g < end; ++g) {
        std::fill(total.begin(), total.end(), 0.0);
        accumulate(g, 0, blocks, rows, total.data());
        sums[g] = gram_difference(total.data(), Ds, D);
        if (!with_grad) continue;
        gram_factor<acc_t>(total.data(), Ds, D, factor.data());
        gradient(g, 0, blocks, rows, factor.data());
      }
    });
    return std::max(sum_of(sums), 0.0);
  }
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), blocks);
  for (int64_t g = 0; g < G; ++g) {
    std::vector<std::vector<double>> partial(parts);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        UnitRows<acc_t> rows;
        partial[k].assign(D * D, 0.0);
        accumulate(g, k * blocks / parts, (k + 1) * blocks / parts, rows, partial[k].data());
      }
    });
    auto& total = partial[0];
    for (int64_t k = 1; k < parts; ++k)
      for (int64_t i = 0; i < D * D; ++i) total[i] += partial[k][i];
    sums[g] = gram_difference(total.data(), Ds, D);
    if (!with_grad) continue;
    std::vector<acc_t> factor(D * Ds);
    gram_factor<acc_t>(total.data(), Ds, D, factor.data());
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      UnitRows<acc_t> rows;
      gradient(g, begin, end, rows, factor.data());
    });
  }
  return std::max(sum_of(sums), 0.0);  // rounding alone can take a zero below 0
}

std::tuple<at::Tensor, at::Tensor> relation_fwd_cpu(
    const at::Tensor& student,  // (B, N, Ds)
    const at::Tensor& teacher,  // (B, N, Dt)
    std::string scope,
    bool normalize,
    std::string rectify,
    double eps,
    std::string algorithm,
    bool with_grad) {
  const auto acc = at::promote_types(accumulator(student), accumulator(teacher));
  const auto stored = student.scalar_type() == at::kHalf ? at::kFloat : student.scalar_type();
  auto dstudent = at::empty(with_grad ? student.sizes() : at::IntArrayRef{0}, student.options().dtype(stored));
  if (student.numel() == 0 || teacher.numel() == 0) return {at::zeros({}, student.options().dtype(acc)), dstudent.zero_()};
  const Problem problem{
      Groups(student, scope),
      Groups(teacher, scope),
      dstudent,
      with_grad ? std::make_optional(Groups(dstudent, scope)) : std::nullopt,
      normalize,
      rectify == "none"   ? Rectify::kNone
      : rectify == "both" ? Rectify::kBoth
                          : Rectify::kTeacher,
      eps};
  const bool bf16 = problem.s.in_place(at::kBFloat16) && problem.t.in_place(at::kBFloat16) && problem.s.D % 2 == 0 &&
      problem.t.D % 2 == 0 && has_bf16_products();
  double sum;
  if (algorithm == "gram") {
    sum = acc == at::kDouble ? gram<double>(problem) : gram<float>(problem);
  } else if (acc == at::kDouble) {
    sum = tile<double>(problem);
  } else {
    sum = bf16 ? tile_bf16(problem) : tile<float>(problem);
  }
  return {at::full({}, sum / problem.elements(), student.options().dtype(acc)), dstudent};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation_fwd", &relation_fwd_cpu);
}

}  // namespace fastkd
