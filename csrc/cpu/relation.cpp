// Relation loss: 1/(G n²) Σ_g ||f(ŜŜᵀ) - f(T̂T̂ᵀ)||² and its gradient, in one sweep over strips of the maps.
//
// Rows stay as they lie in memory: with r, q the inverse norms, E_ij = r_i r_j <s_i, s_j> - q_i q_j <t_i, t_j>, and
// with W_ij = 4/(G n²) r_i E_ij r_j, U = W S, the gradient is dS_i = U_i - s_i r_i² <s_i, U_i>. W is symmetric: a strip
// of its upper triangle serves the rows it starts in (W S) and, transposed, the rows below (Wᵀ S). U adds up over
// terms. On AVX-512 the float32 maps are formed by kernels of our own: whole ones of few wide rows, others in blocks.
#include "common.h"
#include "cpu/blocks.h"
#include "cpu/matmul.h"
#include "cpu/panels.h"
#include "cpu/vector.h"
#include "isa.h"
#include "thresholds.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

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
  at::Tensor x;
  int64_t G, n, D, per_image, group_stride, row_stride, image_stride;
  bool across;  // a group is a token position across images

  Groups(const at::Tensor& x, const std::string& scope)
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
  bool in_place(at::ScalarType dtype) const {
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

template <typename acc_t>
FASTKD_MULTIVERSION void add_row(acc_t* to, const acc_t* from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

// x, rounded. Of bfloat16 the bits: an object of that class between would keep a loop from being vectorised.
template <typename acc_t, typename out_t>
FASTKD_INLINE void assign(out_t& to, acc_t x) {
  if constexpr (std::is_same_v<out_t, at::BFloat16>) {
    to.x = c10::detail::round_to_nearest_even(x);
  } else {
    to = static_cast<out_t>(x);
  }
}

template <typename scalar_t, typename acc_t, typename out_t>
FASTKD_INLINE void project_row(
    const acc_t* u,
    const scalar_t* s,
    int64_t stride,
    int64_t D,
    acc_t r,
    acc_t c,
    bool normalize,
    out_t* out) {
  acc_t dot = 0;
  if (normalize) {
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; ++d) dot += u[d] * static_cast<acc_t>(s[d * stride]);
    dot *= r * r;
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) assign(out[d], c * (u[d] - dot * static_cast<acc_t>(s[d * stride])));
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
  if (stride == 1) {
    project_row(u, s, 1, D, r, c, normalize, out);
  } else {
    project_row(u, s, stride, D, r, c, normalize, out);
  }
}

// One term: the maps of a scope, and what they add to U.
template <typename acc_t>
struct Term {
  Groups s, t;
  Rectify rectify = Rectify::kNone;
  acc_t c = 0;         // factor of the gradient
  acc_t* u = nullptr;  // (B, N, Ds), in ds's layout; null where a strip finishes by itself or no gradient is wanted
  bool add = false;    // u holds earlier terms
  at::Tensor dstudent = {};  // (B, N, Ds) contiguous: takes the finished gradient, where defined
  bool normalize = true;
  double eps = 0;

  bool with_grad() const { return u || dstudent.defined(); }

  // U of rows [begin, end) of group g, complete for this term, to where it belongs; inverse: their inverse norms, null
  // where this term's rows are projected already.
  void store(int64_t g, int64_t begin, int64_t end, acc_t* rows, int64_t ld, const acc_t* inverse) const {
    for (int64_t i = begin; u && i < end; ++i) {
      acc_t *sum = u + s.token(g, i) * s.D, *own = rows + (i - begin) * ld;
      if (own == sum) break;  // added up where it belongs
      if (add) add_row<acc_t>(own, sum, s.D);
      if (!dstudent.defined()) std::copy_n(own, s.D, sum);
    }
    if (dstudent.defined()) finish(g, begin, end, rows, ld, inverse);
  }

  // dstudent of rows [begin, end) of group g from their U (leading dimension ld).
  void finish(int64_t g, int64_t begin, int64_t end, const acc_t* rows, int64_t ld, const acc_t* inverse) const {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, s.x.scalar_type(), "finish", [&] {
      using stored_t = std::conditional_t<std::is_same_v<scalar_t, at::Half>, float, scalar_t>;
      const auto* s_ptr = s.x.const_data_ptr<scalar_t>();
      auto* d_ptr = static_cast<stored_t*>(dstudent.data_ptr());
      const bool project = normalize && inverse != nullptr;
      for (int64_t i = begin; i < end; ++i)
        finish_row<scalar_t, acc_t, stored_t>(
            rows + (i - begin) * ld,
            s_ptr + s.offset(g, i),
            s.x.stride(2),
            s.D,
            project ? inverse[i - begin] : acc_t(1),
            acc_t(1),
            project,
            d_ptr + s.token(g, i) * s.D);
    });
  }
};

// A group's rows ready for products, and their inverse norms.
template <typename acc_t>
struct Rows {
  std::vector<acc_t> copy, inverse;
  const acc_t* data = nullptr;
  int64_t ld = 0;

  void load(const Groups& x, int64_t g, bool normalize, double eps) {
    inverse.resize(x.n);
    inverse_norms<acc_t>(x, g, 0, x.n, normalize, eps, inverse.data());
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

// Columns of a piece of a strip: whole tiles of a matrix unit, and the first piece holds the strip's diagonal.
int64_t piece_columns() {
  return packed_columns(std::max<int64_t>(kColumns, kStrip));
}

// A thread's pieces of a strip.
template <typename acc_t>
struct Pieces {
  Buffer<acc_t> p{kStrip * piece_columns()}, pt{kStrip * piece_columns()}, u;
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
    const Term<acc_t>& term,
    const Rows<acc_t>& s,
    const Rows<acc_t>& t,
    int64_t i0,
    int64_t i1,
    bool triangle,
    Pieces<acc_t>& pieces,
    acc_t* u,
    int64_t ldu) {
  const int64_t n = term.s.n, Ds = term.s.D, Dt = term.t.D, rows = i1 - i0, step = std::min(n, piece_columns());
  acc_t *p = pieces.p.data(), *pt = pieces.pt.data();
  double sum = 0;
  for (int64_t j0 = triangle ? i0 : 0, first = 1; j0 < n; j0 += step, first = 0) {
    const int64_t columns = std::min(step, n - j0), diagonal = triangle && first ? std::min(rows, columns) : 0;
    const acc_t *s_i = s.data + i0 * s.ld, *s_j = s.data + j0 * s.ld;
    gemm<acc_t>(Op::kAsIs, Op::kTransposed, rows, columns, Ds, 1, s_i, s.ld, s_j, s.ld, 0, p, columns);
    gemm<acc_t>(
        Op::kAsIs,
        Op::kTransposed,
        rows,
        columns,
        Dt,
        1,
        t.data + i0 * t.ld,
        t.ld,
        t.data + j0 * t.ld,
        t.ld,
        0,
        pt,
        columns);
    for (int64_t i = 0; i < rows; ++i) {
      const acc_t r_i = s.inverse[i0 + i], q_i = t.inverse[i0 + i];
      const auto part = [&](int64_t begin, int64_t end) {
        acc_t* p_i = p + i * columns + begin;
        const acc_t *pt_i = pt + i * columns + begin, *r = s.inverse.data() + j0 + begin;
        const acc_t* q = t.inverse.data() + j0 + begin;
        return static_cast<double>(with_constant(term.rectify, [&](auto rectify) {
          return difference_row<acc_t, rectify()>(p_i, pt_i, r, q, r_i, q_i, term.c, end - begin);
        }));
      };
      sum += part(0, diagonal) + (triangle ? 2 : 1) * part(diagonal, columns);
    }
    if (!u) continue;
    const bool written = term.add || (triangle ? i0 > 0 || !first : !first);
    acc_t* u_i = triangle ? u + i0 * ldu : u;
    gemm<acc_t>(Op::kAsIs, Op::kAsIs, rows, Ds, columns, 1, p, columns, s_j, s.ld, written ? 1 : 0, u_i, ldu);
    if (triangle && columns > diagonal)
      gemm<acc_t>(
          Op::kTransposed,
          Op::kAsIs,
          columns - diagonal,
          Ds,
          rows,
          1,
          p + diagonal,
          columns,
          s_i,
          s.ld,
          term.add || i0 > 0 ? 1 : 0,
          u + (j0 + diagonal) * ldu,
          ldu);
  }
  return sum;
}

double sum_of(const std::vector<double>& parts) {
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

template <typename acc_t>
double tile(const Term<acc_t>& term) {
  const int64_t G = term.s.G, n = term.s.n, Ds = term.s.D, height = strip_rows(n), strips = (n + height - 1) / height;
  // U of rows from (g, i) on: in term.u, or in a buffer of the thread's.
  const auto u_of = [&](Buffer<acc_t>& buffer, int64_t g, int64_t i, int64_t rows) -> std::pair<acc_t*, int64_t> {
    if (term.u) return {term.u + term.s.token(g, i) * Ds, term.s.across ? term.s.per_image * Ds : Ds};
    if (!term.with_grad()) return {nullptr, 0};
    buffer.resize(rows * Ds);
    return {buffer.data(), Ds};
  };
  if (G >= at::get_num_threads()) {
    std::vector<double> sums(G);
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      Rows<acc_t> s, t;
      Pieces<acc_t> pieces;
      for (int64_t g = begin; g < end; ++g) {
        s.load(term.s, g, term.normalize, term.eps);
        t.load(term.t, g, term.normalize, term.eps);
        const auto [u, ldu] = u_of(pieces.u, g, 0, n);
        for (int64_t i0 = 0; i0 < n; i0 += height)
          sums[g] += strip<acc_t>(term, s, t, i0, std::min(n, i0 + height), true, pieces, u, ldu);
        if (term.dstudent.defined()) term.finish(g, 0, n, u, ldu, s.inverse.data());
      }
    });
    return sum_of(sums);
  }
  // Few groups: threads share a group's strips. A strip then takes all its columns, so that it alone writes its rows.
  std::vector<double> sums(G * strips);
  Rows<acc_t> s, t;
  for (int64_t g = 0; g < G; ++g) {
    s.load(term.s, g, term.normalize, term.eps);
    t.load(term.t, g, term.normalize, term.eps);
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      Pieces<acc_t> pieces;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i0 = k * height, i1 = std::min(n, i0 + height);
        const auto [u, ldu] = u_of(pieces.u, g, i0, height);
        sums[g * strips + k] = strip<acc_t>(term, s, t, i0, i1, !term.with_grad(), pieces, u, ldu);
        if (term.dstudent.defined()) term.finish(g, i0, i1, u, ldu, s.inverse.data() + i0);
      }
    });
  }
  return sum_of(sums);
}

// The length of W's rows for oneDNN, which takes three times as long for some that are no eights.
int64_t in_eights(int64_t n) {
  return (n + 7) / 8 * 8;
}

// The same for two bfloat16 networks where the CPU has a matrix unit for them: it is so much faster than float32
// that every strip takes all its columns.
struct PackedRows {
  std::vector<at::BFloat16> transposed, as_is;  // Xᵀ, packed for X Xᵀ; X, packed for W X
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
    const int64_t width = packed_columns(x.D), packed = (x.n + 1) / 2 * 2 * width;
    as_is.resize(in_eights(x.n) * width);
    pack_bf16(data, ld, x.n, x.D, /*transposed=*/false, as_is.data());
    std::fill(as_is.begin() + packed, as_is.end(), at::BFloat16(0));
  }
};

struct PiecesBf16 : Pieces<float> {
  Buffer<at::BFloat16> high{kStrip * piece_columns()}, low{kStrip * piece_columns()};
};

// As strip, all columns; the strip's U is left in pieces.u, packed_columns(Ds) wide.
double strip_bf16(
    const Term<float>& term,
    const PackedRows& s,
    const PackedRows& t,
    int64_t i0,
    int64_t i1,
    PiecesBf16& pieces) {
  const int64_t n = term.s.n, Ds = term.s.D, rows = i1 - i0, width = packed_columns(Ds);
  const int64_t step = piece_columns();
  double sum = 0;
  for (int64_t j0 = 0; j0 < n; j0 += step) {
    const int64_t columns = std::min(step, n - j0), padded = packed_columns(columns);
    float *p = pieces.p.data(), *pt = pieces.pt.data();
    gemm_bf16(rows, padded, Ds, s.data + i0 * s.ld, s.ld, s.transposed.data() + 2 * j0, s.columns, false, p, padded);
    gemm_bf16(
        rows, padded, term.t.D, t.data + i0 * t.ld, t.ld, t.transposed.data() + 2 * j0, t.columns, false, pt, padded);
    const int64_t depth = in_eights(columns);
    for (int64_t i = 0; i < rows; ++i) {
      float* p_i = p + i * padded;
      const float *r = s.inverse.data() + j0, *q = t.inverse.data() + j0;
      sum += with_constant(term.rectify, [&](auto rectify) {
        return difference_row<float, rectify()>(
            p_i, pt + i * padded, r, q, s.inverse[i0 + i], t.inverse[i0 + i], term.c, columns);
      });
      if (!term.with_grad()) continue;
      auto *high = pieces.high.data() + i * depth, *low = pieces.low.data() + i * depth;
      split_row(p_i, columns, reinterpret_cast<uint16_t*>(high), reinterpret_cast<uint16_t*>(low));
      for (auto* half : {high, low}) std::fill(half + columns, half + depth, at::BFloat16(0));
    }
    if (!term.with_grad()) continue;
    const auto* packed = s.as_is.data() + j0 * width;
    float* u = pieces.u.data();
    gemm_bf16(rows, width, depth, pieces.high.data(), depth, packed, width, j0 > 0, u, width);
    gemm_bf16(rows, width, depth, pieces.low.data(), depth, packed, width, true, u, width);
  }
  return sum;
}

double tile_bf16(const Term<float>& term) {
  const int64_t G = term.s.G, n = term.s.n, Ds = term.s.D, height = strip_rows(n), strips = (n + height - 1) / height;
  const int64_t width = packed_columns(Ds);
  std::vector<double> sums(G * strips);
  const auto run = [&](const PackedRows& s, const PackedRows& t, int64_t g, int64_t k, PiecesBf16& pieces) {
    const int64_t i0 = k * height, i1 = std::min(n, i0 + height);
    pieces.u.resize(height * width);
    sums[g * strips + k] = strip_bf16(term, s, t, i0, i1, pieces);
    if (term.with_grad()) term.store(g, i0, i1, pieces.u.data(), width, s.inverse.data() + i0);
  };
  if (G >= at::get_num_threads()) {
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      PackedRows s, t;
      PiecesBf16 pieces;
      for (int64_t g = begin; g < end; ++g) {
        s.load(term.s, g, term.normalize, term.eps, term.with_grad());
        t.load(term.t, g, term.normalize, term.eps, false);
        for (int64_t k = 0; k < strips; ++k) run(s, t, g, k, pieces);
      }
      release_bf16();
    });
    return sum_of(sums);
  }
  PackedRows s, t;
  for (int64_t g = 0; g < G; ++g) {
    s.load(term.s, g, term.normalize, term.eps, term.with_grad());
    t.load(term.t, g, term.normalize, term.eps, false);
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      PiecesBf16 pieces;
      for (int64_t k = begin; k < end; ++k) run(s, t, g, k, pieces);
      release_bf16();
    });
  }
  return sum_of(sums);
}

// The maps of a group in square blocks: whole panels of rows, as even as possible.
struct RowBlocks {
  int64_t n, count;

  int64_t begin(int64_t k) const { return std::min(n, padded(n) / kPanel * k / count * kPanel); }
  int64_t rows(int64_t k) const { return begin(k + 1) - begin(k); }
  int64_t height() const { return (padded(n) / kPanel + count - 1) / count * kPanel; }
};

// Whether rows are whole vectors of float32 where they lie.
bool in_vectors(const Groups& x) {
  return x.in_place(at::kFloat) && x.D % kPanel == 0;
}

// Rows [begin, end) of group g as whole vectors.
void copy_rows(const Groups& x, int64_t g, int64_t begin, int64_t end, float* out) {
  const int64_t width = padded(x.D);
  convert_rows<float>(x, g, begin, end, nullptr, out, width);
  for (int64_t i = begin; i < end && x.D < width; ++i) std::fill_n(out + (i - begin) * width + x.D, width - x.D, 0.f);
}

// Inverse norms of `count` rows from the squares of theirs, up to a whole panel.
FASTKD_MULTIVERSION void invert_norms(float* squares, int64_t count, bool normalize, float eps) {
  for (int64_t i = 0; i < count; ++i) {
    const float norm = std::sqrt(squares[i]), inverse = norm > eps ? 1 / norm : 0.f;
    squares[i] = normalize ? inverse : 1.f;
  }
  std::fill(squares + count, squares + padded(count), 0.f);
}

// Rows of a group, packed, and their inverse norms; as rows too where asked for.
struct PanelRows {
  Buffer<float> panels, inverse, copy, zeros;
  const float* data = nullptr;  // as rows
  int64_t ld = 0, rows = 0, width = 0;
  bool is_packed = false;

  // Where they lie, for left operands alone, given their inverse norms; false where they cannot be read there.
  bool refer(const Groups& x, int64_t g, int64_t begin, int64_t end, const float* norms) {
    if (!in_vectors(x) || x.across) return false;
    rows = end - begin;
    width = x.D;
    inverse.resize(padded(rows));
    std::copy_n(norms, rows, inverse.data());
    data = x.x.const_data_ptr<float>() + x.offset(g, begin);
    ld = x.ld();
    is_packed = false;
    return true;
  }

  void load(const Groups& x, int64_t g, int64_t begin, int64_t end, bool normalize, double eps, bool as_rows) {
    rows = end - begin;
    width = padded(x.D);
    is_packed = true;
    panels.resize(padded(rows) * width);
    inverse.resize(padded(rows));
    // Rows far apart would cost a page each at every step of a product.
    const bool copies = !in_vectors(x) || (as_rows && x.across);
    if (copies) copy.resize((as_rows ? padded(rows) : kPanel) * width);
    zeros.resize(width);
    std::fill_n(zeros.data(), width, 0.f);
    for (int64_t i0 = 0; i0 < rows; i0 += kPanel) {
      const int64_t count = std::min(kPanel, rows - i0);
      const float* block[kPanel];
      std::fill_n(block, kPanel, zeros.data());
      float* copied = copy.data() + (as_rows ? i0 * width : 0);
      if (copies) copy_rows(x, g, begin + i0, begin + i0 + count, copied);
      for (int64_t i = 0; i < count; ++i)
        block[i] = copies ? copied + i * width : x.x.const_data_ptr<float>() + x.offset(g, begin + i0 + i);
      pack_panel(block, width, panels.data() + i0 * width, inverse.data() + i0);
    }
    invert_norms(inverse.data(), rows, normalize, static_cast<float>(eps));
    if (!as_rows) return;
    data = copies ? copy.data() : x.x.const_data_ptr<float>() + x.offset(g, begin);
    ld = copies ? width : x.ld();
  }

  // Rows from i on, of one panel, as the left operand of the products of rows.
  Left left(int64_t i) const {
    if (!is_packed) return {data + i * ld, ld, 1, width};
    return {panels.data() + i / kPanel * kPanel * width + i % kPanel, 1, kPanel, width};
  }
  Right right() const { return {panels.data(), kPanel, kPanel * width}; }
  Right right_rows() const { return {data, ld, kPanel}; }
};

// Whether tiles of U add up in the gradient itself.
bool sums_in_place(const Term<float>& term) {
  return term.u && term.s.D % kPanel == 0 && !term.s.across;
}

// Fetch `count` rows from `begin` on of group g: what they read,
void fetch_rows(Ahead& ahead, const Term<float>& term, int64_t g, int64_t begin, int64_t count) {
  if (g == term.s.G) return;
  for (const Groups* x : {&term.s, &term.t}) {
    const int64_t size = x->x.element_size();
    if (x->row_stride < x->D || x->x.stride(2) != 1) continue;
    const auto* first = static_cast<const char*>(x->x.const_data_ptr()) + x->offset(g, begin) * size;
    if (x->row_stride == x->D) {
      ahead.add(first, count * x->D * size);
    } else {
      ahead.add(first, x->D * size, count, x->row_stride * size);
    }
  }
}

// and what they write where sums add up in the gradient itself.
void fetch_sums(Ahead& ahead, const Term<float>& term, int64_t g, int64_t begin, int64_t count) {
  const int64_t bytes = term.s.D * sizeof(float);
  const float* first = term.u + term.s.token(g, begin) * term.s.D;
  if (term.s.across) {
    ahead.add(first, bytes, count, term.s.per_image * bytes);
  } else {
    ahead.add(first, count * bytes);
  }
}

// Multiply-adds of an element of the maps that serves two rows.
int64_t element_products(const Term<float>& term) {
  return term.s.D + term.t.D + (term.with_grad() ? 2 * term.s.D : 0);
}

// What the blocks of a group share: its inverse norms, and where U adds up: the gradient itself where tiles fit it.
struct GroupSums {
  Buffer<float> r, q, own;
  float* u = nullptr;
  int64_t g = -1, ld = 0;

  void start(const Term<float>& term, int64_t group) {
    g = group;
    r.resize(padded(term.s.n));
    q.resize(padded(term.s.n));
    if (!term.with_grad()) return;
    ld = padded(term.s.D);
    if (sums_in_place(term)) {
      u = term.u + term.s.token(g, 0) * ld;
    } else {
      own.resize(term.s.n * ld);
      u = own.data();
    }
  }
};

// A thread's work in float32, on kernels of our own: blocks of the maps, each of which serves the rows of both sides.
struct PanelSweep {
  const Term<float>& term;
  RowBlocks blocks;
  PanelRows s_i, t_i, s_j, t_j;
  int64_t held_g = -1, held_j = -1;  // whose rows s_j and t_j are
  Buffer<float> w, pt;
  Ahead ahead;
  double sum = 0;   // Σ E²
  GroupSums whole;  // of a group that is this thread's alone

  PanelSweep(const Term<float>& term, RowBlocks blocks)
      : term(term),
        blocks(blocks),
        w(blocks.height() * pitch(blocks.height())),
        pt(kTileRows * pitch(blocks.height())) {}

  // Elements between rows of W: an odd number of cache lines, or a column of it would share a few sets of the cache.
  static int64_t pitch(int64_t columns) { return padded(columns) | kPanel; }

  struct Block {
    int64_t g, k;
  };

  // While `elements` of the maps are formed, each of them known by symmetry to two rows, fetch the rows of the blocks
  // that come next and the gradient that `own` writes first.
  void look_ahead(double elements, const Block* own, at::ArrayRef<Block> next) {
    ahead.clear();
    if (own && sums_in_place(term)) fetch_sums(ahead, term, own->g, blocks.begin(own->k), blocks.rows(own->k));
    for (const Block& block : next) fetch_rows(ahead, term, block.g, blocks.begin(block.k), blocks.rows(block.k));
    ahead.spread(elements * element_products(term) / (kTileRows * kTileVectors * kPanel));
  }

  void load(Block block, PanelRows& s, PanelRows& t) {
    const int64_t begin = blocks.begin(block.k), end = blocks.begin(block.k + 1);
    s.load(term.s, block.g, begin, end, term.normalize, term.eps, term.with_grad());
    t.load(term.t, block.g, begin, end, term.normalize, term.eps, false);
  }

  // Block j to the right of the products.
  void hold(Block j) {
    if (held_g != j.g || held_j != j.k) load(j, s_j, t_j);
    held_g = j.g;
    held_j = j.k;
  }

  // W of a block, s and t its rows, s_j and t_j its columns. A diagonal block is formed up to the panel that each row
  // is in, which its symmetry leaves to know; what lies off the map's diagonal counts twice.
  void maps(const PanelRows& s, const PanelRows& t, bool diagonal) {
    const int64_t ld = pitch(s_j.rows);
    for (int64_t i = 0; i < s.rows; i += kTileRows) {
      const int64_t rows = std::min(kTileRows, s.rows - i), own = i / kPanel * kPanel;
      const int64_t columns = diagonal ? own + kPanel : padded(s_j.rows), twice = diagonal ? own : columns;
      float* p = w.data() + i * ld;
      tile_row(rows, columns / kPanel, t.left(i), {}, t_j.right(), pt.data(), ld, false, ahead);
      tile_row(rows, columns / kPanel, s.left(i), {}, s_j.right(), p, ld, false, ahead);
      const float *r_i = s.inverse.data() + i, *q_i = t.inverse.data() + i;
      const Scales scales{s_j.inverse.data(), t_j.inverse.data(), term.c};
      sum += static_cast<double>(with_constant(term.rectify, [&](auto rectify) {
        return difference_rows<rectify()>(p, pt.data(), ld, rows, columns, twice, r_i, q_i, scales);
      }));
    }
  }

  // Block j of the diagonal, before others of its row or column: writes its rows of U.
  void diagonal(GroupSums& sums, int64_t j, at::ArrayRef<Block> next) {
    const Block own{sums.g, j};
    hold(own);
    const int64_t n = s_j.rows, begin = blocks.begin(j), ld = pitch(n), width = padded(term.s.D);
    std::copy_n(s_j.inverse.data(), n, sums.r.data() + begin);
    std::copy_n(t_j.inverse.data(), n, sums.q.data() + begin);
    look_ahead(n * n / 2.0, &own, next);
    maps(s_j, t_j, true);
    if (!term.with_grad()) return;
    const bool add = term.add && sums_in_place(term);
    for (int64_t i = 0; i < n; i += kTileRows) {
      const int64_t rows = std::min(kTileRows, n - i), known = std::min(n, i / kPanel * kPanel + kPanel);
      const Left row{w.data() + i * ld, ld, 1, known}, column{w.data() + known * ld + i, 1, ld, n - known};
      float* u = sums.u + (begin + i) * sums.ld;
      tile_row(rows, width / kPanel, row, column, s_j.right_rows(), u, sums.ld, add, ahead);
    }
  }

  // Blocks (i, j) and, by symmetry, (j, i).
  void pair(GroupSums& sums, int64_t i, int64_t j, at::ArrayRef<Block> next) {
    hold({sums.g, j});
    const int64_t begin = blocks.begin(i), end = blocks.begin(i + 1);
    if (!s_i.refer(term.s, sums.g, begin, end, sums.r.data() + begin) ||
        !t_i.refer(term.t, sums.g, begin, end, sums.q.data() + begin))
      load({sums.g, i}, s_i, t_i);
    look_ahead(s_i.rows * s_j.rows, nullptr, next);
    maps(s_i, t_i, false);
    if (!term.with_grad()) return;
    const int64_t ld = pitch(s_j.rows);
    const int64_t vectors = padded(term.s.D) / kPanel;
    const auto add = [&](const Left& weights, const PanelRows& to, const PanelRows& from, int64_t first) {
      multiply(to.rows, vectors, weights, from.right_rows(), sums.u + first * sums.ld, sums.ld, true, ahead);
    };
    add({w.data(), ld, 1, s_j.rows}, s_i, s_j, begin);
    add({w.data(), 1, ld, s_i.rows}, s_j, s_i, blocks.begin(j));
  }

  // Rows of U that are complete.
  void store(const GroupSums& sums, int64_t begin, int64_t end) const {
    if (term.with_grad()) term.store(sums.g, begin, end, sums.u + begin * sums.ld, sums.ld, sums.r.data() + begin);
  }

  // A whole group; `after` comes next, if there is such a one. Returns Σ E².
  double group(int64_t g, int64_t after) {
    sum = 0;
    whole.start(term, g);
    const auto block = [&](int64_t k) { return k < blocks.count ? Block{g, k} : Block{after, 0}; };
    for (int64_t j = 0; j < blocks.count; ++j) {
      diagonal(whole, j, block(j == 0 ? 1 : 0));
      for (int64_t i = 0; i < j; ++i) pair(whole, i, j, block(i + 1 < j ? i + 1 : j + 1));
    }
    store(whole, 0, blocks.n);
    return sum;
  }
};

// How many blocks keep their panels in L2.
int64_t panel_blocks(int64_t n, int64_t width) {
  const int64_t fit = std::max<int64_t>(kPanelBytes / (width * sizeof(float)), 4 * kPanel);
  const int64_t most = std::max<int64_t>(std::min<int64_t>(fit, kPanelRows), kPanel);
  return (n + most - 1) / most;
}

// The whole maps of a group of few rows, from products of its rows as they lie. With all of W at hand the projection of
// the gradient is a part of it: dS = (W - diag(r_i² Σ_j W_ij <s_i, s_j>)) S.
struct WholeMaps {
  const Term<float>& term;
  int64_t n, pitch;
  bool in_place;  // the gradient is formed where it belongs
  Buffer<float> s_copy, t_copy, w, pt, r, q, u;
  RowMap s, t;
  Ahead ahead;
  int64_t g = -1;

  explicit WholeMaps(const Term<float>& term)
      : term(term),
        n(term.s.n),
        pitch(PanelSweep::pitch(n)),
        in_place(term.u && term.s.D % kPanel == 0),
        w(padded(n) * pitch),
        pt(padded(n) * pitch),
        r(padded(n)),
        q(padded(n)) {
    for (float* map : {w.data(), pt.data()}) std::fill_n(map, padded(n) * pitch, 0.f);
    if (term.with_grad() && !in_place) u.resize(n * padded(term.s.D));
  }

  // Whether rows are so wide that to pack them would take longer than to add up the lanes of every product.
  static bool pay(const Term<float>& term) {
    const int64_t n = term.s.n, bytes = n * std::max(term.s.D, term.t.D) * sizeof(float);
    return n <= kPanelRows && bytes <= kPanelBytes && 2 * n <= term.s.D + term.t.D;
  }

  void load(int64_t group) {
    g = group;
    const auto rows = [&](const Groups& x, Buffer<float>& copy, float* out) -> RowMap {
      const int64_t width = padded(x.D);
      if (in_vectors(x) && !x.across)
        return {x.x.const_data_ptr<float>() + x.offset(g, 0), x.ld(), n, width, out, pitch};
      copy.resize(n * width);
      copy_rows(x, g, 0, n, copy.data());
      return {copy.data(), width, n, width, out, pitch};
    };
    s = rows(term.s, s_copy, w.data());
    t = rows(term.t, t_copy, pt.data());
  }

  // Rows [begin, end) of both maps, as map_rows has them.
  void products(int64_t begin, int64_t end, Ahead& ahead) const {
    map_rows(s, begin, end, ahead);
    map_rows(t, begin, end, ahead);
  }

  // Once all products are there.
  void norms() {
    for (int64_t i = 0; i < n; ++i) {
      r.data()[i] = w.data()[i * (pitch + 1)];
      q.data()[i] = pt.data()[i * (pitch + 1)];
    }
    for (float* squares : {r.data(), q.data()}) invert_norms(squares, n, term.normalize, static_cast<float>(term.eps));
  }

  // Rows [begin, end) of E, W and the gradient. Returns Σ E².
  double rows(int64_t begin, int64_t end, Ahead& ahead) const {
    const float *r_i = r.data() + begin, *q_i = q.data() + begin;
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      float *p = w.data() + i * pitch, *p_t = pt.data() + i * pitch;
      const auto row = with_constant(term.rectify, [&](auto rectify) {
        return whole_row<rectify()>(p, p_t, padded(n), r_i[i - begin], q_i[i - begin], {r.data(), q.data(), term.c});
      });
      sum += static_cast<double>(row.square);
      if (term.normalize) p[i] -= r_i[i - begin] * r_i[i - begin] * row.dot;
    }
    if (!term.with_grad()) return sum;
    const int64_t ld = in_place && term.s.across ? term.s.per_image * s.D : s.D;
    float* out = in_place ? term.u + term.s.token(g, begin) * s.D : u.data() + begin * s.D;
    const Left weights{w.data() + begin * pitch, pitch, 1, n};
    multiply(end - begin, s.D / kPanel, weights, {s.x, s.ld, kPanel}, out, ld, in_place && term.add, ahead);
    if (!in_place || term.add) term.store(g, begin, end, out, ld, term.add ? r_i : nullptr);
    return sum;
  }

  // A whole group; `after` comes next, if there is such a one. Returns Σ E².
  double group(int64_t group, int64_t after) {
    load(group);
    ahead.clear();
    if (in_place) fetch_sums(ahead, term, g, 0, n);
    fetch_rows(ahead, term, after, 0, n);
    const int64_t weighted = term.with_grad() ? s.D : 0;
    const double of_products = (s.D + t.D) / 2. / (kPanel * kPanel);
    ahead.spread(n * n * (of_products + weighted / static_cast<double>(kTileRows * kTileVectors * kPanel)));
    products(0, n, ahead);
    norms();
    return rows(0, n, ahead);
  }
};

// Groups [0, G), each by one thread with a worker of its own. A thread goes through its share, whose next group it
// knows and fetches, and then helps others with theirs.
template <typename Make>
double whole_groups(const Term<float>& term, int64_t G, int64_t threads, const Make& make_worker) {
  std::vector<double> sums(G);
  std::vector<std::atomic<int64_t>> next(threads);
  for (int64_t k = 0; k < threads; ++k) next[k] = k * G / threads;
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    auto worker = make_worker();
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t share = (own + k) % threads, end = (share + 1) * G / threads;
      for (int64_t g = next[share]++; g < end; g = next[share]++)
        sums[g] = worker.group(g, g + 1 < end ? g + 1 : term.s.G);
    }
  });
  return sum_of(sums);
}

// Groups [first, G) of few rows by all threads: first the maps, then the gradient.
double shared_maps(const Term<float>& term, int64_t first, int64_t threads) {
  constexpr int64_t kRows = 16;  // of a task: whole cache lines also of the columns that mirror them
  const int64_t n = term.s.n, groups = term.s.G - first, strips = (n + kRows - 1) / kRows, tasks = groups * strips;
  std::vector<WholeMaps> maps;
  for (int64_t g = 0; g < groups; ++g) maps.emplace_back(term).load(first + g);
  std::vector<double> sums(tasks);
  const auto each = [&](const auto& f) {
    std::atomic<int64_t> next = tasks;
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Ahead ahead;
      for (int64_t task = --next; task >= 0; task = --next) {  // a map's longest rows first
        const int64_t begin = task / groups * kRows;
        f(task, maps[task % groups], begin, std::min(n, begin + kRows), ahead);
      }
    });
  };
  each([](int64_t, WholeMaps& x, int64_t begin, int64_t end, Ahead& ahead) { x.products(begin, end, ahead); });
  for (auto& x : maps) x.norms();
  each([&](int64_t task, WholeMaps& x, int64_t begin, int64_t end, Ahead& ahead) {
    sums[task] = x.rows(begin, end, ahead);
  });
  return sum_of(sums);
}

// Groups [first, G) by all threads: in a round every block is in one pair, so that nobody else writes its rows.
double shared_groups(const Term<float>& term, int64_t first, int64_t threads) {
  using Block = PanelSweep::Block;
  const int64_t groups = term.s.G - first, panels = padded(term.s.n) / kPanel;
  const int64_t even = 2 * threads / std::gcd(groups, threads);  // blocks that give every thread as many pairs
  const int64_t least = panel_blocks(term.s.n, term.s.D + term.t.D);
  const int64_t count = std::min((least + even - 1) / even * even, panels / 2 * 2);
  const int64_t pairs = count / 2, tasks = groups * pairs;
  std::vector<GroupSums> sums(groups);
  for (int64_t g = 0; g < groups; ++g) sums[g].start(term, first + g);
  std::vector<PanelSweep> sweeps;
  for (int64_t k = 0; k < threads; ++k) sweeps.emplace_back(term, RowBlocks{term.s.n, count});
  // One block stays, the others go round it, such that the pairs of round 0 lie side by side.
  const auto pair = [&](int64_t round, int64_t task) -> std::array<Block, 2> {
    const int64_t g = first + task / pairs, k = task % pairs, others = count - 1;
    const auto block = [&](int64_t place) { return Block{g, place < pairs ? 2 * place : 2 * (others - place) + 1}; };
    return {block((round + k) % others), block(k == 0 ? others : (round + others - k) % others)};
  };
  for (int64_t round = 0; round < count - 1; ++round)
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        const int64_t from = thread * tasks / threads, to = (thread + 1) * tasks / threads;
        for (int64_t task = from; task < to; ++task) {
          auto& sweep = sweeps[thread];
          auto& own = sums[task / pairs];
          const auto [i, j] = pair(round, task);
          if (round == 0) {
            sweep.diagonal(own, i.k, j);
            sweep.diagonal(own, j.k, i);
          }
          sweep.pair(own, i.k, j.k, task + 1 < to ? pair(round, task + 1) : pair(round + 1, from));
          if (round < count - 2) continue;
          for (const auto& x : {i, j}) sweep.store(own, sweep.blocks.begin(x.k), sweep.blocks.begin(x.k + 1));
        }
      }
    });
  return std::accumulate(sweeps.begin(), sweeps.end(), 0.0, [](double x, const PanelSweep& y) { return x + y.sum; });
}

double tile_panels(const Term<float>& term) {
  const int64_t G = term.s.G, n = term.s.n, threads = at::get_num_threads();
  const int64_t work = n * n * (3 * term.s.D + term.t.D);
  const bool few_rows = WholeMaps::pay(term);
  // Groups beyond as many for every thread are shared, where that outweighs the waiting.
  const bool worth =
      few_rows ? work > kSharedMaps : work > kSharedBlocks && n >= std::max<int64_t>(kSharedRows, kPanel + 1);
  const int64_t whole = worth && G < kFewGroups * threads ? G / threads * threads : G;
  double sum = 0;
  if (whole < G) sum = few_rows ? shared_maps(term, whole, threads) : shared_groups(term, whole, threads);
  if (whole == 0) return sum;
  if (few_rows) return sum + whole_groups(term, whole, threads, [&] { return WholeMaps(term); });
  const RowBlocks blocks{n, panel_blocks(n, term.s.D + term.t.D)};
  return sum + whole_groups(term, whole, threads, [&] { return PanelSweep(term, blocks); });
}

bool both_bf16(const at::Tensor& student, const at::Tensor& teacher) {
  return student.scalar_type() == at::kBFloat16 && teacher.scalar_type() == at::kBFloat16 && has_bf16_products();
}

template <typename acc_t>
double visit(const Term<acc_t>& term) {
  if constexpr (std::is_same_v<acc_t, float>) {
    const bool rows_in_place = term.s.in_place(at::kBFloat16) && term.t.in_place(at::kBFloat16);
    const bool fits = rows_in_place && term.s.D % 2 == 0 && term.t.D % 2 == 0;
    const bool fills = term.s.n >= kMatrixRows || !has_avx512();
    if (both_bf16(term.s.x, term.t.x) && fits && fills) return tile_bf16(term);
    if (has_avx512()) return tile_panels(term);
  }
  return tile(term);
}

// Gram algorithm. With X = [Ŝ | T̂], XᵀX holds the three Grams: float64, lower triangle, in blocks of columns.
void add_gram(const double* x, int64_t rows, int64_t D, double* gram) {
  const int64_t step = kGramColumns;
  for (int64_t c = 0; c < D; c += step) {
    const int64_t columns = std::min(step, D - c);
    gemm<double>(Op::kTransposed, Op::kAsIs, D - c, columns, rows, 1, x + c, D, x + c, D, 1, gram + c * D + c, D);
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

  void load(const Term<acc_t>& term, int64_t g, int64_t begin, int64_t end, bool in_double) {
    const int64_t D = term.s.D + term.t.D, rows = end - begin;
    x.resize(rows * D);
    r.resize(rows);
    q.resize(rows);
    inverse_norms<acc_t>(term.s, g, begin, end, term.normalize, term.eps, r.data());
    inverse_norms<acc_t>(term.t, g, begin, end, term.normalize, term.eps, q.data());
    convert_rows<acc_t>(term.s, g, begin, end, r.data(), x.data(), D);
    convert_rows<acc_t>(term.t, g, begin, end, q.data(), x.data() + term.s.D, D);
    if (!in_double) return;
    x64.resize(rows * D);
    convert_row<acc_t, double>(x.data(), 1, rows * D, 1.0, x64.data());
  }
};

template <typename acc_t>
double gram(const Term<acc_t>& term) {
  const int64_t G = term.s.G, n = term.s.n, Ds = term.s.D, D = Ds + term.t.D;
  const int64_t height = kGramRows, blocks = (n + height - 1) / height;
  const bool with_grad = term.with_grad();
  const auto accumulate = [&](int64_t g, int64_t begin, int64_t end, UnitRows<acc_t>& rows, double* out) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i0 = k * height, i1 = std::min(n, i0 + height);
      rows.load(term, g, i0, i1, true);
      add_gram(rows.x64.data(), i1 - i0, D, out);
    }
  };
  const auto gradient = [&](int64_t g, int64_t begin, int64_t end, UnitRows<acc_t>& rows, const acc_t* factor) {
    std::vector<acc_t> u(height * Ds);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i0 = k * height, i1 = std::min(n, i0 + height);
      rows.load(term, g, i0, i1, false);
      gemm<acc_t>(Op::kAsIs, Op::kAsIs, i1 - i0, Ds, D, 1, rows.x.data(), D, factor, Ds, 0, u.data(), Ds);
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, term.s.x.scalar_type(), "gram", [&] {
        using stored_t = std::conditional_t<std::is_same_v<scalar_t, at::Half>, float, scalar_t>;
        auto* d_ptr = static_cast<stored_t*>(term.dstudent.data_ptr());
        for (int64_t i = i0; i < i1; ++i)  // dS = r (dŜ - ŝ <ŝ, dŜ>): the unit rows are at hand
          finish_row<acc_t, acc_t, stored_t>(
              u.data() + (i - i0) * Ds,
              rows.x.data() + (i - i0) * D,
              1,
              Ds,
              acc_t(1),
              term.c * rows.r[i - i0],
              term.normalize,
              d_ptr + term.s.token(g, i) * Ds);
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

// Contiguous, and empty where no gradient is wanted.
at::Tensor gradient_of(const at::Tensor& student, bool with_grad) {
  const auto stored = student.scalar_type() == at::kHalf ? at::kFloat : student.scalar_type();
  return empty_kept(with_grad ? student.sizes() : at::IntArrayRef{0}, student.options().dtype(stored));
}

// dstudent itself where it is stored in acc_t, else null.
template <typename acc_t>
acc_t* sums_in(const at::Tensor& dstudent) {
  return dstudent.scalar_type() == c10::CppTypeToScalarType<acc_t>::value ? dstudent.data_ptr<acc_t>() : nullptr;
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
  auto dstudent = gradient_of(student, with_grad);
  if (student.numel() == 0 || teacher.numel() == 0)
    return {at::zeros({}, student.options().dtype(acc)), dstudent.zero_()};
  double loss = 0;
  AT_DISPATCH_FLOATING_TYPES(acc, "relation_fwd_cpu", [&] {
    using acc_t = scalar_t;
    Term<acc_t> term{Groups(student, scope), Groups(teacher, scope)};
    term.eps = eps;
    term.rectify = rectify == "none" ? Rectify::kNone : rectify == "both" ? Rectify::kBoth : Rectify::kTeacher;
    term.normalize = normalize;
    const double elements = static_cast<double>(term.s.G) * term.s.n * term.s.n;
    term.c = static_cast<acc_t>(4 / elements);
    if (with_grad) {
      term.dstudent = dstudent;
      term.u = sums_in<acc_t>(dstudent);
    }
    loss = (algorithm == "gram" ? gram(term) : visit(term)) / elements;
  });
  return {at::full({}, loss, student.options().dtype(acc)), dstudent};
}

// Rows `index` of the flattened batch, as one group.
at::Tensor take_rows(const at::Tensor& x, const at::Tensor& index) {
  const auto N = x.size(1);
  return x.index({at::floor_divide(index, N), at::remainder(index, N)}).unsqueeze(0);
}

// One layer's three terms, into losses[0..2]; they share U where a gradient is wanted.
template <typename acc_t>
void manifold_layer(
    const at::Tensor& student,
    const at::Tensor& teacher,
    const at::Tensor& index,
    const std::array<double, 3>& weights,
    const at::Tensor& dstudent,
    acc_t* losses) {
  constexpr double kEps = 1e-12;
  const bool with_grad = dstudent.numel() > 0;
  const int64_t Ds = student.size(2);
  acc_t* u = with_grad ? sums_in<acc_t>(dstudent) : nullptr;
  std::vector<acc_t> buffer;
  if (with_grad && !u) {
    buffer.resize(student.numel());
    u = buffer.data();
  }
  const auto term_of = [&](const at::Tensor& s, const at::Tensor& t, const char* scope, double weight) {
    Term<acc_t> term{Groups(s, scope), Groups(t, scope)};
    term.eps = kEps;
    term.c = static_cast<acc_t>(4 * weight / (static_cast<double>(term.s.G) * term.s.n * term.s.n));
    return term;
  };
  const auto mean = [](double sum, const Term<acc_t>& term) {
    return static_cast<acc_t>(sum / (static_cast<double>(term.s.G) * term.s.n * term.s.n));
  };
  auto inter = term_of(student, teacher, "inter", weights[1]);
  inter.u = u;
  losses[1] = mean(visit(inter), inter);

  const auto rows_s = take_rows(student, index), rows_t = take_rows(teacher, index);
  const int64_t K = index.numel();
  const auto ids = index.contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  std::vector<acc_t> u_k(with_grad ? K * Ds : 0);
  for (int64_t k = 0; k < K; ++k)
    TORCH_CHECK(id[k] >= 0 && id[k] < student.size(0) * student.size(1), "index must lie in [0, B*N), got ", id[k]);
  auto random = term_of(rows_s, rows_t, "intra", weights[2]);
  random.u = with_grad ? u_k.data() : nullptr;
  losses[2] = mean(visit(random), random);
  for (int64_t k = 0; with_grad && k < K; ++k)
    for (int64_t d = 0; d < Ds; ++d) u[id[k] * Ds + d] += u_k[k * Ds + d];

  auto intra = term_of(student, teacher, "intra", weights[0]);
  intra.u = u;
  intra.add = true;
  if (with_grad) intra.dstudent = dstudent;
  losses[0] = mean(visit(intra), intra);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> manifold_fwd_cpu(
    at::TensorList students,  // (B, N, Ds) each
    at::TensorList teachers,  // (B, N, Dt) each
    at::TensorList indices,   // (K) each
    double intra,
    double inter,
    double random,
    bool with_grad) {
  auto acc = at::kFloat;
  for (size_t l = 0; l < students.size(); ++l)
    acc = at::promote_types(acc, at::promote_types(accumulator(students[l]), accumulator(teachers[l])));
  auto terms = at::empty({static_cast<int64_t>(students.size()), 3}, students[0].options().dtype(acc));
  std::vector<at::Tensor> dstudents;
  for (size_t l = 0; l < students.size(); ++l) {
    dstudents.push_back(gradient_of(students[l], with_grad));
    AT_DISPATCH_FLOATING_TYPES(acc, "manifold_fwd_cpu", [&] {
      manifold_layer<scalar_t>(
          students[l],
          teachers[l],
          indices[l],
          {intra, inter, random},
          dstudents[l],
          terms.mutable_data_ptr<scalar_t>() + 3 * l);
    });
  }
  return {terms, dstudents};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation_fwd", &relation_fwd_cpu);
  m.impl("manifold_fwd", &manifold_fwd_cpu);
}

}  // namespace fastkd
