// Relation losses by Gram matrices, linear in the number of tokens.
#pragma once
#include "cpu/relation_rows.h"
#include "cpu/relation_term.h"
#include "cpu/relation_strips.h"

namespace fastkd {
namespace {

// Gram algorithm. With X = [Ŝ | T̂], XᵀX holds the three Grams: float64, lower triangle, in blocks of columns.
void add_gram(const double* x, int64_t rows, int64_t D, double* gram) {
  const int64_t step = kGramColumns;
  for (int64_t c = 0; c < D; c += step) {
    const int64_t columns = std::min(step, D - c);
    gemm<double>(Op::kTransposed, D - c, columns, rows, 1, x + c, D, x + c, D, true, gram + c * D + c, D);
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
      gemm<acc_t>(Op::kAsIs, i1 - i0, Ds, D, 1, rows.x.data(), D, factor, Ds, false, u.data(), Ds);
      FASTKD_DISPATCH(term.s.x.scalar_type(), "gram", [&] {
        using stored_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;
        auto* d_ptr = static_cast<stored_t*>(term.dstudent.mutable_data_ptr());
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
  if (G >= get_num_threads()) {
    parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
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
    return not_negative(sum_of(sums));
  }
  const int64_t parts = std::min<int64_t>(get_num_threads(), blocks);
  for (int64_t g = 0; g < G; ++g) {
    std::vector<std::vector<double>> partial(parts);
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
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
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      UnitRows<acc_t> rows;
      gradient(g, begin, end, rows, factor.data());
    });
  }
  return not_negative(sum_of(sums));
}

}  // namespace
}  // namespace fastkd
