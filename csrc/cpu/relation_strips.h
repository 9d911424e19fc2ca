// Maps in strips of rows, by general matrix products.
#pragma once
#include "cpu/relation_rows.h"
#include "cpu/relation_term.h"

namespace fastkd {
namespace {

// A group's rows ready for products, and their inverse norms.
template <typename acc_t>
struct Rows {
  std::vector<acc_t> copy, inverse;
  RightRows<acc_t> right;
  const acc_t* data = nullptr;
  int64_t ld = 0;

  void load(const Groups& x, int64_t g, bool normalize, double eps) {
    inverse.resize(x.n);
    inverse_norms<acc_t>(x, g, 0, x.n, normalize, eps, inverse.data());
    if (x.in_place(CppTypeToScalarType<acc_t>::value)) {
      data = x.x.template const_data_ptr<acc_t>() + x.offset(g, 0);
      ld = x.ld();
    } else {
      copy.resize(x.n * x.D);
      convert_rows<acc_t>(x, g, 0, x.n, nullptr, copy.data(), x.D);
      data = copy.data();
      ld = x.D;
    }
    right.assign(data, ld, x.n, x.D);
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
  const int64_t n = term.s.n, Ds = term.s.D, rows = i1 - i0, step = std::min(n, piece_columns());
  acc_t *p = pieces.p.data(), *pt = pieces.pt.data();
  double sum = 0;
  for (int64_t j0 = triangle ? i0 : 0, first = 1; j0 < n; j0 += step, first = 0) {
    const int64_t columns = std::min(step, n - j0), diagonal = triangle && first ? std::min(rows, columns) : 0;
    const acc_t *s_i = s.data + i0 * s.ld, *s_j = s.data + j0 * s.ld;
    s.right.multiply(rows, s_i, s.ld, j0, columns, p, columns);
    t.right.multiply(rows, t.data + i0 * t.ld, t.ld, j0, columns, pt, columns);
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
    gemm<acc_t>(Op::kAsIs, rows, Ds, columns, 1, p, columns, s_j, s.ld, written, u_i, ldu);
    if (!triangle || columns == diagonal) continue;
    const bool add = term.add || i0 > 0;
    acc_t* u_j = u + (j0 + diagonal) * ldu;
    gemm<acc_t>(Op::kTransposed, columns - diagonal, Ds, rows, 1, p + diagonal, columns, s_i, s.ld, add, u_j, ldu);
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
  if (G >= get_num_threads()) {
    std::vector<double> sums(G);
    parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
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
    parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
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
  std::vector<BFloat16> transposed, as_is;  // Xᵀ, packed for X Xᵀ; X, packed for W X
  std::vector<float> inverse;
  const BFloat16* data = nullptr;
  int64_t ld = 0, columns = 0;

  void load(const Groups& x, int64_t g, bool normalize, double eps, bool with_grad) {
    inverse.resize(x.n);
    inverse_norms<float>(x, g, 0, x.n, normalize, eps, inverse.data());
    data = x.x.const_data_ptr<BFloat16>() + x.offset(g, 0);
    ld = x.ld();
    columns = packed_columns(x.n);
    transposed.resize(x.D * columns);
    pack_bf16(data, ld, x.D, x.n, /*transposed=*/true, transposed.data());
    if (!with_grad) return;
    const int64_t width = packed_columns(x.D), packed = (x.n + 1) / 2 * 2 * width;
    as_is.resize(in_eights(x.n) * width);
    pack_bf16(data, ld, x.n, x.D, /*transposed=*/false, as_is.data());
    std::fill(as_is.begin() + packed, as_is.end(), BFloat16(0));
  }
};

struct PiecesBf16 : Pieces<float> {
  Buffer<BFloat16> high{kStrip * piece_columns()}, low{kStrip * piece_columns()};
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
      for (auto* half : {high, low}) std::fill(half + columns, half + depth, BFloat16(0));
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
  if (G >= get_num_threads()) {
    parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
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
    parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      PiecesBf16 pieces;
      for (int64_t k = begin; k < end; ++k) run(s, t, g, k, pieces);
      release_bf16();
    });
  }
  return sum_of(sums);
}

}  // namespace
}  // namespace fastkd
