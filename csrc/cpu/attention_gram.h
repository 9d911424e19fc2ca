// The score loss by Gram matrices, linear in the numbers of queries and keys.
#pragma once
#include "cpu/attention_rows.h"
#include "cpu/attention_products.h"

namespace fastkd {
namespace {

// Scores by Grams: Σ w ||Q_s K_sᵀ - Q_t K_tᵀ||² = <A_ss, C_ss> - 2 <A_ts, C_ts> + <A_tt, C_tt>, A_xy = Q_xᵀ W Q_y,
// C_xy = K_xᵀ K_y; dQ_s = 2 W (Q_s C_ss - Q_t C_ts), dK_s = 2 (K_s A_ss - K_t A_ts). In float64, for near a match the
// three terms cancel.
struct Grams {
  Buffer<double> ss, ts, tt;
  int64_t d_s, d_t;

  Grams(int64_t d_s, int64_t d_t) : ss(d_s * d_s), ts(d_t * d_s), tt(d_t * d_t), d_s(d_s), d_t(d_t) {}

  void clear() {
    std::fill_n(ss.data(), d_s * d_s, 0.0);
    std::fill_n(ts.data(), d_t * d_s, 0.0);
    std::fill_n(tt.data(), d_t * d_t, 0.0);
  }

  // xw: x with its rows weighted.
  void add(const double* s, const double* t, const double* sw, const double* tw, int64_t rows) {
    gemm<double>(Op::kTransposed, d_s, d_s, rows, 1, sw, d_s, s, d_s, true, ss.data(), d_s);
    gemm<double>(Op::kTransposed, d_t, d_s, rows, 1, tw, d_t, s, d_s, true, ts.data(), d_s);
    gemm<double>(Op::kTransposed, d_t, d_t, rows, 1, tw, d_t, t, d_t, true, tt.data(), d_t);
  }
};

double dot(const Buffer<double>& a, const Buffer<double>& b, int64_t n) {
  return std::inner_product(a.data(), a.data() + n, b.data(), 0.0);
}

double gram(const Problem& problem) {
  const int64_t B = problem.B(), H = problem.s.H(), N_q = problem.N_q(), N_k = problem.N_k();
  const int64_t d_s = problem.s.d(), d_t = problem.t.d(), height = kGramRows;
  const double f_ss = problem.s.scale * problem.s.scale / static_cast<double>(N_k),
               f_ts = problem.t.scale * problem.s.scale / static_cast<double>(N_k),
               f_tt = problem.t.scale * problem.t.scale / static_cast<double>(N_k);
  const auto weight = problem.weight.to(ScalarType::Double);
  std::vector<double> sums(B * H);
  parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    Grams a(d_s, d_t), c(d_s, d_t);
    Buffer<double> s(height * d_s), t(height * d_t), sw(height * d_s), tw(height * d_t), u(height * d_s);
    std::vector<double> w(height);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = k / H, h = k % H;
      const bool* mask = problem.key_mask ? problem.key_mask->const_data_ptr<bool>() + b * N_k : nullptr;
      // Rows [i0, i1) of both networks; what does not count is 0.
      const auto load = [&](bool queries, int64_t i0, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i)
          w[i] = !queries ? !mask || mask[i0 + i]
                          : weight.const_data_ptr<double>()[offset(weight, b, h, i0 + i, 0)] * problem.factor;
        const auto index = [&](int64_t i) { return w[i] == 0 ? -1 : i0 + i; };
        load_rows<double>(queries ? problem.s.q : problem.s.k, b, h, rows, index, 1.0, s.data(), d_s);
        load_rows<double>(queries ? problem.t.q : problem.t.k, b, h, rows, index, 1.0, t.data(), d_t);
      };
      a.clear();
      c.clear();
      for (int64_t i0 = 0; i0 < N_q; i0 += height) {
        const int64_t rows = std::min(height, N_q - i0);
        load(true, i0, rows);
        for (int64_t i = 0; i < rows; ++i) {
          round_row<double, double>(s.data() + i * d_s, d_s, w[i], sw.data() + i * d_s);
          round_row<double, double>(t.data() + i * d_t, d_t, w[i], tw.data() + i * d_t);
        }
        a.add(s.data(), t.data(), sw.data(), tw.data(), rows);
      }
      for (int64_t i0 = 0; i0 < N_k; i0 += height) {
        const int64_t rows = std::min(height, N_k - i0);
        load(false, i0, rows);
        c.add(s.data(), t.data(), s.data(), t.data(), rows);
      }
      sums[k] =
          f_ss * dot(a.ss, c.ss, d_s * d_s) - 2 * f_ts * dot(a.ts, c.ts, d_t * d_s) + f_tt * dot(a.tt, c.tt, d_t * d_t);
      const auto gradient = [&](bool queries, const Tensor& out, const Grams& grams, int64_t n) {
        if (!out.defined()) return;
        for (int64_t i0 = 0; i0 < n; i0 += height) {
          const int64_t rows = std::min(height, n - i0);
          load(queries, i0, rows);
          double *u_s = sw.data(), *u_t = u.data();
          gemm<double>(Op::kAsIs, rows, d_s, d_s, 2 * f_ss, s.data(), d_s, grams.ss.data(), d_s, false, u_s, d_s);
          gemm<double>(Op::kAsIs, rows, d_s, d_t, 2 * f_ts, t.data(), d_t, grams.ts.data(), d_s, false, u_t, d_s);
          for (int64_t i = 0; i < rows * d_s; ++i) u_s[i] -= u_t[i];
          for (int64_t i = 0; i < rows; ++i) store_row<double>(out, b, h, i0 + i, u_s + i * d_s, queries ? w[i] : 1);
        }
      };
      gradient(true, problem.dq, c, N_q);
      gradient(false, problem.dk, a, N_k);
    }
  });
  return not_negative(std::accumulate(sums.begin(), sums.end(), 0.0));
}

}  // namespace
}  // namespace fastkd
