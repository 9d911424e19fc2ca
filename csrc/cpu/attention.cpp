// Attention losses: divergences of softmax(q kᵀ) maps and their gradients, in one sweep over strips of query rows.
//
// A strip of both maps stays in L2 from its scores to its gradient: Z = Q Kᵀ of both networks, row losses, dZ in the
// place of Z_s, then dQ = dZ K and dK += dZᵀ Q. Keys that the key mask hides are left out when an image's are gathered,
// and causality is a number of keys per row: only a bias can put -inf into a row.
#include "common.h"
#include "cpu/matmul.h"
#include "cpu/vector.h"
#include "isa.h"
#include "thresholds.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastkd {
namespace {

Threshold kStripBytes{"attention.strip_bytes", 1 << 20};       // what the rows of a strip may take, a share of L2,
Threshold kSpilledBytes{"attention.spilled_bytes", 8 << 20};   // or this, where those would be fewer rows
Threshold kFewRows{"attention.few_rows", 64};                  // than products need to run well;
Threshold kLeastRows{"attention.least_rows", 8};               // at least so many rows,
Threshold kMostRows{"attention.most_rows", 256};               // and at most
Threshold kFewestRows{"attention.fewest_rows", 32};            // of a range that a thread is given
Threshold kPrefetchedRows{"attention.prefetched_rows", 1024};  // of a head: beyond, they would not stay in L2
constexpr int64_t kMostBlock = 8;
Threshold kBlock{"attention.block_rows", kMostBlock};      // rows that are taken through a step together, at most,
Threshold kBlockBytes{"attention.block_bytes", 24 << 10};  // and what they may take of L1
Threshold kGramRows{"attention.gram_rows", 128};           // rows of a block of the Gram algorithm

enum class Divergence { kKL, kReverseKL, kJS, kCE, kMSE, kScoreMSE };

Divergence divergence_of(const std::string& name) {
  return name == "kl"           ? Divergence::kKL
         : name == "reverse_kl" ? Divergence::kReverseKL
         : name == "js"         ? Divergence::kJS
         : name == "ce"         ? Divergence::kCE
         : name == "mse"        ? Divergence::kMSE
                                : Divergence::kScoreMSE;
}

// Rows of scores: lengths n are whole vectors (kLanes), -inf beyond the last key.

template <typename T>
T scaled_max_row(T* z, int64_t n, T scale) {
  if (scale != 1) round_row<T, T>(z, n, scale, z);
  return max_row<T>(z, n);
}

template <typename T>
struct Sums {
  T l_s, l_t, cross;  // Σ e^y_s, Σ e^y_t, Σ e^y_t y_s
};

// y = z - m: e^y_s in place of z_s, e^y_t to e_t, y_t - y_s in place of z_t.
template <typename T, bool with_cross>
FASTKD_MULTIVERSION Sums<T> exp_rows(T* z_s, T* z_t, T* e_t, int64_t n, T m_s, T m_t) {
  n = n / kLanes * kLanes;
  Lanes<T> l_s(0), l_t(0), cross(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T y_s = z_s[j] - m_s, y_t = z_t[j] - m_t, s = exp_of(y_s), t = exp_of(y_t);
      z_s[j] = s;
      e_t[j] = t;
      z_t[j] = y_t - y_s;
      l_s[l] += s;
      l_t[l] += t;
      if constexpr (with_cross) cross[l] += t == 0 ? T(0) : t * y_s;
    }
  return {l_s.sum(), l_t.sum(), with_cross ? cross.sum() : T(0)};
}

// What turns e^y into probabilities: p_s = e_s / l_s, p_t = ratio e_t / l_s, log(p_t / p_s) = y_t - y_s + log ratio.
// p_s - p_t is formed as (e_s - ratio e_t) / l_s, so that equal maps differ by exactly 0.
template <typename T>
struct Norms {
  T inv_s, inv_t, ratio, log_ratio;
};

template <typename T>
struct Differences {
  T loss, excess;  // of a row; Σ (p_s - p_t) as computed, which is the rounding of the sums that p was divided by
};

// d - excess p_t, the differences less that rounding, which would be all there is where a row is all but one key.
template <typename T>
FASTKD_MULTIVERSION void correct_row(T* d, const T* e_t, int64_t n, T excess_over_l_t) {
  n = n / kLanes * kLanes;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) d[j] -= e_t[j] * excess_over_l_t;
}

// Σ p_t log(p_t / p_s) + p_s - p_t, each term >= 0 and of second order; (p_s - p_t) w in place of e_s.
template <typename T>
FASTKD_MULTIVERSION Differences<T> kl_row(T* e_s, const T* e_t, const T* dy, int64_t n, Norms<T> c, T w) {
  n = n / kLanes * kLanes;
  const T g = c.inv_s * w;
  Lanes<T> sum(0), excess(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T s = e_s[j], e = e_t[j], t = e * c.ratio, d = s - e * c.ratio;
      sum[l] += e == 0 ? d : t * (dy[j] + c.log_ratio) + d;
      excess[l] += d;
      e_s[j] = d * g;
    }
  return {sum.sum() * c.inv_s, excess.sum() * c.inv_s};
}

// (p_s - p_t) w to d; the excess.
template <typename T>
FASTKD_MULTIVERSION T difference_row(const T* e_s, const T* e_t, T* d, int64_t n, Norms<T> c, T w) {
  n = n / kLanes * kLanes;
  const T g = c.inv_s * w;
  Lanes<T> excess(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T x = e_s[j] - e_t[j] * c.ratio;
      excess[l] += x;
      d[j] = x * g;
    }
  return excess.sum() * c.inv_s;
}

// The likeliest key: where e^y is 1.
template <typename T>
FASTKD_MULTIVERSION int64_t top_of(const T* e, int64_t n) {
  for (int64_t first = 0; first + kLanes <= n; first += kLanes) {
    int found = 0;
    for (int64_t j = 0; j < kLanes; ++j) found |= e[first + j] == 1;
    if (found) return std::find(e + first, e + first + kLanes, T(1)) - e;
  }
  return 0;
}

// The others: the row's loss, p_s in place of e_s, and v in place of y_t - y_s, such that the gradient by log p_s is
// p_s v, up to multiples of p_s.
template <typename T>
FASTKD_MULTIVERSION T reverse_kl_row(T* e_s, const T* e_t, T* dy, int64_t n, Norms<T> c) {
  n = n / kLanes * kLanes;
  Lanes<T> sum(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T s = e_s[j], d = s - e_t[j] * c.ratio, x = s == 0 ? T(0) : -(dy[j] + c.log_ratio);
      sum[l] += (s * x - d) * c.inv_s;
      dy[j] = x;
      e_s[j] = s * c.inv_s;
    }
  return sum.sum();
}

template <typename T>
FASTKD_MULTIVERSION T mse_row(T* e_s, T* d, int64_t n, Norms<T> c, T N_k) {
  n = n / kLanes * kLanes;
  const T scale = 2 / N_k;
  Lanes<T> sum(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      sum[l] += d[j] * d[j];
      d[j] *= scale;
      e_s[j] *= c.inv_s;
    }
  return sum.sum() / N_k;
}

// With h = (p_s - p_t) / (p_s + p_t): log(p_s / m) = log(1 + h), log(p_t / m) = log(1 - h).
template <typename T>
FASTKD_MULTIVERSION T js_row(const T* p_s, const T* p_t, const T* d, T* v, int64_t n) {
  n = n / kLanes * kLanes;
  Lanes<T> sum(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T s = p_s[j], t = p_t[j], total = s + t, inv = 1 / (total == 0 ? T(1) : total), h = d[j] * inv;
      const T log_s = s == 0 ? T(0) : log_of(2 * s * inv, h), log_t = t == 0 ? T(0) : log_of(2 * t * inv, -h);
      sum[l] += s * log_s + t * log_t;
      v[j] = log_s / 2;
    }
  return sum.sum() / 2;
}

// dz = p (v - Σ p v) w in place of p. v may be taken less its value at the likeliest key: what logarithms have in
// common is gone, and where a row is all but that key, what is left there is 1 - p of the terms.
template <typename T>
FASTKD_MULTIVERSION void through_softmax(T* p, const T* v, int64_t n, T v_top, T w) {
  n = n / kLanes * kLanes;
  Lanes<T> sum(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      sum[l] += p[j] == 0 ? T(0) : p[j] * (v[j] - v_top);
    }
  const T mean = sum.sum();
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) p[j] = p[j] == 0 ? T(0) : p[j] * ((v[j] - v_top) - mean) * w;
}

// 1/N_k Σ (z_s - z_t)²; 2/N_k (z_s - z_t) w in place of z_s. A key that both lack adds 0.
template <typename T>
FASTKD_MULTIVERSION T score_row(T* z_s, const T* z_t, int64_t n, T scale_s, T scale_t, T N_k, T w) {
  n = n / kLanes * kLanes;
  const T g = 2 / N_k * w;
  Lanes<T> sum(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T s = z_s[j] * scale_s, t = z_t[j] * scale_t, both = s > t ? s : t;
      const T d = both == kNever<T> ? T(0) : s - t;
      sum[l] += d * d;
      z_s[j] = d * g;
    }
  return sum.sum() / N_k;
}

// A row of a strip, on its way from scores to losses.
template <typename T>
struct Row {
  T *s, *t;         // scores of the student and the teacher; dz w comes in place of s
  T *e, *extra;     // room
  int64_t i, keys;  // its number; keys that it sees
  T w, m_s, m_t;
  Sums<T> sums;
};

template <typename T>
T finish_row(Divergence divergence, const Row<T>& row, T N_k) {
  const int64_t n = padded(row.keys);
  const T w = row.w;
  const auto& sums = row.sums;
  const bool has_s = sums.l_s != 0, has_t = sums.l_t != 0;
  if (!has_t) {
    std::fill_n(row.s, n, T(0));
    return 0;
  }
  const T l_s = has_s ? sums.l_s : T(1), ratio = l_s / sums.l_t;
  const Norms<T> c{1 / l_s, 1 / sums.l_t, ratio, std::log(ratio)};
  T loss = 0;
  if (divergence == Divergence::kKL) {
    const auto [value, excess] = kl_row<T>(row.s, row.e, row.t, n, c, w);
    correct_row<T>(row.s, row.e, n, excess * w * c.inv_t);
    loss = value;
  } else if (divergence == Divergence::kCE) {
    loss = std::log(l_s) - sums.cross * c.inv_t;
    const T excess = difference_row<T>(row.s, row.e, row.s, n, c, w);
    correct_row<T>(row.s, row.e, n, excess * w * c.inv_t);
  } else {
    const bool centred = divergence != Divergence::kMSE || c.inv_s > T(0.5);
    const int64_t top = centred ? top_of<T>(row.s, n) : -1;
    if (divergence == Divergence::kReverseKL) {
      loss = reverse_kl_row<T>(row.s, row.e, row.t, n, c) - (has_s ? 0 : 1);
    } else {
      T* d = divergence == Divergence::kMSE ? row.t : row.extra;
      const T excess = difference_row<T>(row.s, row.e, d, n, c, 1);
      if (has_s) correct_row<T>(d, row.e, n, excess * c.inv_t);  // without a key the whole of p_t is no rounding
      if (divergence == Divergence::kMSE) {
        loss = mse_row<T>(row.s, d, n, c, N_k);
      } else {
        round_row<T, T>(row.s, n, c.inv_s, row.s);
        round_row<T, T>(row.e, n, c.inv_t, row.e);
        loss = js_row<T>(row.s, row.e, d, row.t, n);
      }
    }
    through_softmax<T>(row.s, row.t, n, top < 0 ? T(0) : row.t[top], w);
  }
  if (!has_s) std::fill_n(row.s, n, T(0));
  return loss;
}

// Step by step for a few rows: what ends a row, the folding of its sums, overlaps with the next one's.
template <typename T>
void begin_rows(Divergence divergence, Row<T>* rows, int64_t count, T scale_s, T scale_t) {
  for (Row<T>* row = rows; row < rows + count; ++row) {
    row->m_s = scaled_max_row(row->s, padded(row->keys), scale_s);
    row->m_t = scaled_max_row(row->t, padded(row->keys), scale_t);
  }
  for (Row<T>* row = rows; row < rows + count; ++row) {
    const auto exp = divergence == Divergence::kCE ? exp_rows<T, true> : exp_rows<T, false>;
    row->sums = exp(row->s, row->t, row->e, padded(row->keys), row->m_s, row->m_t);
  }
}

// log p in place of z; all -inf, and false, where the row has no key.
template <typename T>
FASTKD_MULTIVERSION bool log_softmax_row(T* z, int64_t n) {
  n = n / kLanes * kLanes;
  const T m = max_row(z, n);
  Lanes<T> parts(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      z[j] -= m;
      parts[l] += exp_of(z[j]);
    }
  const T l = parts.sum();
  if (l == 0) return false;
  const T log_l = std::log(l);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) z[j] -= log_l;
  return true;
}

// The mean over heads of p to p, its logarithm to y, from rows of log p that lie `stride` apart.
template <typename T>
FASTKD_MULTIVERSION void mean_row(const T* log_p, int64_t stride, int64_t H, int64_t n, T* y, T* p) {
  n = n / kLanes * kLanes;
  const T log_H = std::log(static_cast<T>(H));
  std::fill_n(y, n, kNever<T>);
  std::fill_n(p, n, T(0));
  for (int64_t h = 0; h < H; ++h) {
    const T* x = log_p + h * stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] < x[j] ? x[j] : y[j];
  }
  for (int64_t h = 0; h < H; ++h) {
    const T* x = log_p + h * stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) p[j] += x[j] == kNever<T> ? T(0) : exp_of(x[j] - y[j]);
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T sum = p[j], m = y[j];
    y[j] = sum == 0 ? m : m + (log_of(sum, sum - 1) - log_H);
    p[j] = sum == 0 ? T(0) : exp_of(m) * sum / static_cast<T>(H);
  }
}

// The loss of two averaged rows, without what total probabilities other than 1 add; the gradient by the logarithm of
// the student's to v.
template <typename T, Divergence divergence>
FASTKD_MULTIVERSION T mean_loss_row(const T* y_s, const T* p_s, const T* y_t, const T* p_t, T* v, int64_t n, T N_k) {
  n = n / kLanes * kLanes;
  const T scale = 2 / N_k;
  Lanes<T> sum(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T s = p_s[j], t = p_t[j], d = s - t;
      if constexpr (divergence == Divergence::kKL) {
        sum[l] += (t == 0 ? T(0) : t * (y_t[j] - y_s[j])) + d;
        v[j] = d;
      } else if constexpr (divergence == Divergence::kReverseKL) {
        const T x = s == 0 ? T(0) : s * (y_s[j] - y_t[j]);
        sum[l] += x - d;
        v[j] = x;
      } else if constexpr (divergence == Divergence::kCE) {
        sum[l] -= t == 0 ? T(0) : t * y_s[j];
        v[j] = d;
      } else {
        sum[l] += d * d;
        v[j] = d * s * scale;
      }
    }
  const T total = sum.sum();
  return divergence == Divergence::kMSE ? total / N_k : total;
}

// dz w of a head in place of its log p; dlog: the gradient by the logarithm of the mean, y.
template <typename T>
FASTKD_MULTIVERSION void head_gradient_row(T* log_p, const T* y, const T* dlog, T* dlog_h, int64_t n, T log_H, T w) {
  n = n / kLanes * kLanes;
  const int64_t top = std::max_element(log_p, log_p + n) - log_p;
  const auto share = [&](int64_t j) { return y[j] == kNever<T> ? T(0) : exp_of(log_p[j] - (y[j] + log_H)); };
  const T c = share(top) * dlog[top] / exp_of(log_p[top]);
  Lanes<T> sum(0);
  for (int64_t first = 0; first < n; first += kLanes)
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t j = first + l;
      const T p = exp_of(log_p[j]);
      const T part = y[j] == kNever<T> ? T(0) : exp_of(log_p[j] - (y[j] + log_H)) * dlog[j];
      const T x = j == top ? T(0) : part - c * p;
      dlog_h[j] = x;
      log_p[j] = p;
      sum[l] += x;
    }
  const T total = sum.sum();
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) log_p[j] = (dlog_h[j] - log_p[j] * total) * w;
}

// Rows of the heads of both networks, `stride` apart; room for 7 rows of n.
template <typename T>
T head_mean_loss(
    Divergence divergence,
    T* s,
    int64_t H_s,
    T* t,
    int64_t H_t,
    int64_t stride,
    int64_t keys,
    T N_k,
    T w,
    T* room) {
  const int64_t n = padded(keys);
  T *y_s = room, *p_s = y_s + n, *y_t = p_s + n, *p_t = y_t + n, *v = p_t + n, *extra = v + n, *d = extra + n;
  std::vector<char> has(H_s);
  T total_s = 0, total_t = 0;
  for (int64_t h = 0; h < H_s; ++h) total_s += has[h] = log_softmax_row<T>(s + h * stride, n);
  for (int64_t h = 0; h < H_t; ++h) total_t += log_softmax_row<T>(t + h * stride, n);
  mean_row<T>(s, stride, H_s, n, y_s, p_s);
  mean_row<T>(t, stride, H_t, n, y_t, p_t);
  const T excess = total_s / static_cast<T>(H_s) - total_t / static_cast<T>(H_t);
  T loss = 0;
  switch (divergence) {
    case Divergence::kKL:
      loss = mean_loss_row<T, Divergence::kKL>(y_s, p_s, y_t, p_t, v, n, N_k) - excess;
      break;
    case Divergence::kReverseKL:
      loss = mean_loss_row<T, Divergence::kReverseKL>(y_s, p_s, y_t, p_t, v, n, N_k) + excess;
      break;
    case Divergence::kCE:
      loss = mean_loss_row<T, Divergence::kCE>(y_s, p_s, y_t, p_t, v, n, N_k);
      break;
    case Divergence::kMSE:
      loss = mean_loss_row<T, Divergence::kMSE>(y_s, p_s, y_t, p_t, v, n, N_k);
      break;
    default:
      for (int64_t j = 0; j < n; ++j) d[j] = p_s[j] - p_t[j];
      loss = js_row<T>(p_s, p_t, d, v, n);
      for (int64_t j = 0; j < n; ++j) v[j] *= p_s[j];
  }
  const bool counts = total_s != 0 && total_t != 0;
  for (int64_t h = 0; h < H_s; ++h) {
    if (counts && has[h]) {
      head_gradient_row<T>(s + h * stride, y_s, v, extra, n, std::log(static_cast<T>(H_s)), w);
    } else {
      std::fill_n(s + h * stride, n, T(0));
    }
  }
  return total_t == 0 ? T(0) : loss;
}

struct Network {
  at::Tensor q, k;                 // (B, H, N_q, d), (B, H, N_k, d)
  std::optional<at::Tensor> bias;  // (B | 1, H | 1, N_q | 1, N_k | 1)
  double scale;

  int64_t H() const { return q.size(1); }
  int64_t d() const { return q.size(3); }
};

// x[b][h][i][j], where dimensions of size 1 broadcast.
int64_t offset(const at::Tensor& x, int64_t b, int64_t h, int64_t i, int64_t j) {
  const auto along = [&](int64_t dim, int64_t index) { return x.size(dim) == 1 ? 0 : index * x.stride(dim); };
  return along(0, b) + along(1, h) + along(2, i) + along(3, j);
}

struct Problem {
  Network s, t;
  Divergence divergence;
  bool mean_heads, causal, shared;
  int64_t row_start, row_step;
  double bias_scale;
  std::optional<at::Tensor> key_mask;  // (B, N_k), contiguous
  at::Tensor weight;                   // (B | 1, H_out | 1, N_q | 1, 1) in the accumulation dtype
  double factor;                       // of the weights
  at::Tensor rows;                     // (B, H_out, N_q) losses; undefined where only the gradient is wanted
  at::Tensor dq, dk, dbias;  // undefined where not wanted; dbias in the accumulation dtype, of its bias' shape

  int64_t B() const { return s.q.size(0); }
  int64_t H_out() const { return mean_heads ? 1 : s.H(); }
  int64_t N_q() const { return s.q.size(2); }
  int64_t N_k() const { return s.k.size(2); }
  bool has_softmax() const { return divergence != Divergence::kScoreMSE; }
  bool with_grad() const { return dq.defined() || dk.defined() || dbias.defined(); }
  bool with_dk() const { return dk.defined() || (shared && dq.defined()); }

  // Keys of image b that the mask leaves.
  std::vector<int64_t> keys(int64_t b) const {
    std::vector<int64_t> out;
    out.reserve(N_k());
    const bool* mask = key_mask ? key_mask->const_data_ptr<bool>() + b * N_k() : nullptr;
    for (int64_t j = 0; j < N_k(); ++j)
      if (!mask || mask[j]) out.push_back(j);
    return out;
  }

  // How many of an image's keys row i sees.
  int64_t visible(const std::vector<int64_t>& keys, int64_t i) const {
    if (!causal) return keys.size();
    return std::upper_bound(keys.begin(), keys.end(), row_start + i * row_step) - keys.begin();
  }
};

// Rows of a (B, H, N, d) tensor, times scale, to out with leading dimension ld.
template <typename T, typename Index>
void load_rows(const at::Tensor& x, int64_t b, int64_t h, int64_t n, const Index& index, T scale, T* out, int64_t ld) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "load_rows", [&] {
    const auto* p = x.const_data_ptr<scalar_t>() + b * x.stride(0) + h * x.stride(1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = index(i);
      if (row < 0) {
        std::fill_n(out + i * ld, x.size(3), T(0));
      } else {
        convert_row<scalar_t, T>(p + row * x.stride(2), x.stride(3), x.size(3), scale, out + i * ld);
      }
    }
  });
}

// x times scale, to row i of a contiguous (B, H, N, d) tensor.
template <typename T>
void store_row(const at::Tensor& out, int64_t b, int64_t h, int64_t i, const T* x, T scale) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "store_row", [&] {
    auto* p = out.mutable_data_ptr<scalar_t>() + ((b * out.size(1) + h) * out.size(2) + i) * out.size(3);
    round_row<T, scalar_t>(x, out.size(3), scale, p);
  });
}

// Less its mean: a softmax cannot tell, and a common offset of the scores is gone before it costs digits.
template <typename T>
FASTKD_MULTIVERSION void centre_rows(T* x, int64_t n, int64_t d, T* mean) {
  std::fill_n(mean, d, T(0));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < d; ++c) mean[c] += x[i * d + c];
  for (int64_t c = 0; c < d; ++c) mean[c] /= static_cast<T>(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < d; ++c) x[i * d + c] -= mean[c];
}

// A head of an image, or all of them (h = 0) where they are averaged.
struct Task {
  int64_t b, h;
};

// Operands of a task and the products of its strips, for any dtypes, in float32 or float64.
template <typename T>
struct Products {
  using acc_t = T;
  const Problem& problem;
  Buffer<T> q_s, q_t, k_s, k_t, dq, mean;
  int64_t b = 0, h0 = 0, n = 0, most_rows = 0;

  Products(const Problem& problem, int64_t most_rows) : problem(problem), most_rows(most_rows) {}

  static int64_t bytes_per_score() { return 2 * sizeof(T); }
  int64_t heads(const Network& x) const { return problem.mean_heads ? x.H() : 1; }
  // Size of a head's dK.
  int64_t dk_size() const { return problem.N_k() * problem.s.d(); }

  void load_keys(const Network& x, const std::vector<int64_t>& keys, Buffer<T>& k) {
    const int64_t d = x.d();
    k.resize(heads(x) * n * d);
    mean.resize(d);
    for (int64_t h = 0; h < heads(x); ++h) {
      T* out = k.data() + h * n * d;
      load_rows<T>(x.k, b, h0 + h, n, [&](int64_t j) { return keys[j]; }, 1, out, d);
      if (problem.has_softmax() && n > 0) centre_rows<T>(out, n, d, mean.data());
    }
  }

  void load(const Task& task, const std::vector<int64_t>& keys) {
    b = task.b, h0 = task.h, n = keys.size();
    load_keys(problem.s, keys, k_s);
    load_keys(problem.t, keys, k_t);
    q_s.resize(heads(problem.s) * most_rows * problem.s.d());
    q_t.resize(most_rows * problem.t.d());
    dq.resize(most_rows * problem.s.d());
  }

  // Scores of rows [i0, i0 + rows), of which those with weight 0 count as 0, with the first `columns` keys.
  void scores(bool student, int64_t h, int64_t i0, int64_t rows, int64_t columns, const T* w, T* z, int64_t ld) {
    const Network& x = student ? problem.s : problem.t;
    const int64_t d = x.d();
    T* q = student ? q_s.data() + h * most_rows * d : q_t.data();
    load_rows<T>(
        x.q, b, h0 + h, rows, [&](int64_t i) { return w[i] == 0 ? -1 : i0 + i; }, static_cast<T>(x.scale), q, d);
    const T* k = (student ? k_s : k_t).data() + h * n * d;
    gemm<T>(Op::kAsIs, Op::kTransposed, rows, columns, d, 1, q, d, k, d, 0, z, ld);
  }
  T scale_of_scores(bool) const { return 1; }

  // dQ of the strip. Returns where it is and its leading dimension: in `out` (rows, d) if that is given.
  std::pair<const T*, int64_t> queries_gradient(
      int64_t h,
      int64_t rows,
      int64_t columns,
      const T* dz,
      int64_t ld,
      bool add,
      T* out) {
    const int64_t d = problem.s.d();
    const T *k = k_s.data() + h * n * d, scale = static_cast<T>(problem.s.scale);
    out = out ? out : dq.data();
    gemm<T>(Op::kAsIs, Op::kAsIs, rows, d, columns, scale, dz, ld, k, d, add ? 1 : 0, out, d);
    return {out, d};
  }
  // dK, or what the strip adds to it.
  void keys_gradient(int64_t h, int64_t rows, int64_t columns, const T* dz, int64_t ld, bool add, T* dk) {
    const int64_t d = problem.s.d();
    const T* q = q_s.data() + h * most_rows * d;
    gemm<T>(Op::kTransposed, Op::kAsIs, columns, d, rows, 1, dz, ld, q, d, add ? 1 : 0, dk, d);
  }
  void prepare_gradient(int64_t, int64_t, T*, int64_t) {}
  // dK as rows of d.
  const T* finish_keys_gradient(T* dk) { return dk; }
  // Where keys are the queries: whether dQ is added to dK as it comes.
  static bool merges(const Problem& problem) { return problem.shared && !problem.key_mask; }
  // Whether sums of dK may lie in the output itself.
  static bool sums_in_place(const Problem& problem) {
    const at::Tensor& out = problem.shared ? problem.dq : problem.dk;
    return out.defined() && out.scalar_type() == c10::CppTypeToScalarType<T>::value && !problem.key_mask;
  }
  static void release() {}
};

// w of rows r and r + 1 as sums of two bfloat16: one alone would show in the gradient. Truncated, which the second
// makes good. As rows, and as the pairs that the tile unit reads; the second row may be absent.
FASTKD_MULTIVERSION void split_rows(
    const float* first,
    const float* second,
    int64_t n,
    uint16_t* high,
    uint16_t* low,
    int64_t ld,
    uint32_t* high_pairs,
    uint32_t* low_pairs) {
  n = n / kLanes * kLanes;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t a = bits_of<uint32_t>(first[j]), b = second ? bits_of<uint32_t>(second[j]) : 0u;
    const float a_top = bits_of<float>(a & 0xffff0000u), b_top = bits_of<float>(b & 0xffff0000u);
    const uint32_t a_rest = bits_of<uint32_t>(first[j] - a_top);
    const uint32_t b_rest = second ? bits_of<uint32_t>(second[j] - b_top) : 0u;
    high[j] = static_cast<uint16_t>(a >> 16);
    low[j] = static_cast<uint16_t>(a_rest >> 16);
    if (second) {
      high[ld + j] = static_cast<uint16_t>(b >> 16);
      low[ld + j] = static_cast<uint16_t>(b_rest >> 16);
    }
    high_pairs[j] = a >> 16 | (b & 0xffff0000u);
    low_pairs[j] = a_rest >> 16 | (b_rest & 0xffff0000u);
  }
}

// Xᵀ (n, m) of X (m, n), in squares that stay in L1.
template <typename scalar_t>
FASTKD_MULTIVERSION void transpose(const scalar_t* x, int64_t m, int64_t n, int64_t ld, scalar_t* out) {
  for (int64_t i0 = 0; i0 < m; i0 += kLanes)
    for (int64_t j0 = 0; j0 < n; j0 += kLanes)
      for (int64_t j = j0; j < std::min(j0 + kLanes, n); ++j)
        for (int64_t i = i0; i < std::min(i0 + kLanes, m); ++i) out[j * m + i] = x[i * ld + j];
}

// The same for bfloat16 networks where the CPU has a matrix unit for them. Scales come after the products.
struct ProductsBf16 {
  using acc_t = float;
  const Problem& problem;
  Buffer<at::BFloat16> rows_buffer, q_s, q_t, q_columns;  // (n, d), (rows, d), (d, rows); d, rows made even
  Buffer<at::BFloat16> k_s_columns, k_t_columns, k_rows;  // packed Kᵀ (d, n), K (n, d)
  Buffer<uint16_t> high, low;                             // (rows, ld)
  Buffer<uint32_t> high_pairs, low_pairs;                 // (rows / 2, ld)
  Buffer<float> dq, dk_rows;
  int64_t b = 0, h0 = 0, n = 0, most_rows = 0;

  ProductsBf16(const Problem& problem, int64_t most_rows) : problem(problem), most_rows(most_rows) {}

  static int64_t bytes_per_score() { return 2 * sizeof(float) + 4 * sizeof(at::BFloat16); }
  static int64_t even(int64_t d) { return (d + 1) / 2 * 2; }
  int64_t heads(const Network&) const { return 1; }
  int64_t dk_size() const { return problem.s.d() * padded(problem.N_k()); }

  template <typename Index>
  static void load_rows(const at::Tensor& x, int64_t b, int64_t h, int64_t n, const Index& index, at::BFloat16* out) {
    const int64_t d = x.size(3), ld = even(d), stride = x.stride(3);
    const auto* p = x.const_data_ptr<at::BFloat16>() + b * x.stride(0) + h * x.stride(1);
    for (int64_t i = 0; i < n; ++i, out += ld) {
      const int64_t row = index(i);
      const auto* src = p + row * x.stride(2);
      if (ld > d) out[d] = 0;
      if (row < 0) {
        std::fill_n(out, d, at::BFloat16(0));
      } else if (stride == 1) {
        std::memcpy(static_cast<void*>(out), src, d * sizeof *src);
      } else {
        for (int64_t c = 0; c < d; ++c) out[c] = src[c * stride];
      }
    }
  }

  void load_keys(const Network& x, const std::vector<int64_t>& keys, Buffer<at::BFloat16>& columns, bool as_rows) {
    const int64_t d = even(x.d()), width = padded(n);
    rows_buffer.resize(n * d);
    load_rows(x.k, b, h0, n, [&](int64_t j) { return keys[j]; }, rows_buffer.data());
    columns.resize(d * width);
    pack_bf16(rows_buffer.data(), d, d, n, /*transposed=*/true, columns.data());
    if (!as_rows) return;
    const int64_t row = packed_columns(d) * 2, pairs = (n + 1) / 2;
    k_rows.resize(width / 2 * row);
    pack_bf16(rows_buffer.data(), d, n, d, /*transposed=*/false, k_rows.data());
    std::fill_n(k_rows.data() + pairs * row, (width / 2 - pairs) * row, at::BFloat16(0));
  }

  void load(const Task& task, const std::vector<int64_t>& keys) {
    b = task.b, h0 = task.h, n = keys.size();
    load_keys(problem.s, keys, k_s_columns, problem.with_grad());
    load_keys(problem.t, keys, k_t_columns, false);
    const int64_t d = even(problem.s.d()), ld = padded(n), rows = even(most_rows);
    q_s.resize(rows * d);
    q_columns.resize(rows * d);
    q_t.resize(rows * even(problem.t.d()));
    high.resize(rows * ld);
    low.resize(rows * ld);
    high_pairs.resize(rows / 2 * ld);
    low_pairs.resize(rows / 2 * ld);
    dq.resize(rows * packed_columns(d));
  }

  void scores(bool student, int64_t, int64_t i0, int64_t rows, int64_t columns, const float* w, float* z, int64_t ld) {
    const Network& x = student ? problem.s : problem.t;
    const int64_t d = even(x.d());
    auto* q = (student ? q_s : q_t).data();
    load_rows(x.q, b, h0, rows, [&](int64_t i) { return w[i] == 0 ? -1 : i0 + i; }, q);
    const auto* k = (student ? k_s_columns : k_t_columns).data();
    gemm_bf16(rows, padded(columns), d, q, d, k, padded(n), false, z, ld);
  }
  float scale_of_scores(bool student) const { return static_cast<float>((student ? problem.s : problem.t).scale); }

  void prepare_gradient(int64_t rows, int64_t columns, float* dz, int64_t ld) {
    for (int64_t i = 0; i < rows; i += 2)
      split_rows(
          dz + i * ld,
          i + 1 < rows ? dz + (i + 1) * ld : nullptr,
          padded(columns),
          high.data() + i * ld,
          low.data() + i * ld,
          ld,
          high_pairs.data() + i / 2 * ld,
          low_pairs.data() + i / 2 * ld);
  }

  std::pair<const float*, int64_t> queries_gradient(
      int64_t,
      int64_t rows,
      int64_t columns,
      const float*,
      int64_t ld,
      bool,
      float*) {
    const int64_t width = packed_columns(even(problem.s.d()));
    const auto product = [&](const Buffer<uint16_t>& dz, bool add) {
      const auto* a = reinterpret_cast<const at::BFloat16*>(dz.data());
      gemm_bf16(rows, width, padded(columns), a, ld, k_rows.data(), width, add, dq.data(), width);
    };
    product(high, false);
    product(low, true);
    round_row<float, float>(dq.data(), rows * width, static_cast<float>(problem.s.scale), dq.data());
    return {dq.data(), width};
  }

  // dKᵀ += Qᵀ dZ.
  void keys_gradient(int64_t, int64_t rows, int64_t columns, const float*, int64_t ld, bool add, float* dk) {
    const int64_t d = problem.s.d(), ld_q = even(d), pairs = even(rows);
    if (pairs > rows) std::fill_n(q_s.data() + rows * ld_q, ld_q, at::BFloat16(0));
    transpose(q_s.data(), pairs, d, ld_q, q_columns.data());
    const auto product = [&](const Buffer<uint32_t>& dz, bool add) {
      const auto* packed = reinterpret_cast<const at::BFloat16*>(dz.data());
      gemm_bf16(d, padded(columns), pairs, q_columns.data(), pairs, packed, ld, add, dk, padded(n));
    };
    product(high_pairs, add);
    product(low_pairs, true);
  }
  const float* finish_keys_gradient(float* dk) {
    const int64_t d = problem.s.d(), width = padded(n);
    dk_rows.resize(n * d);
    transpose(dk, d, n, width, dk_rows.data());
    round_row<float, float>(dk_rows.data(), n * d, static_cast<float>(problem.s.scale), dk_rows.data());
    return dk_rows.data();
  }
  static bool merges(const Problem&) { return false; }
  static bool sums_in_place(const Problem&) { return false; }
  static void release() { release_bf16(); }
};

template <typename T>
FASTKD_MULTIVERSION void add_row(T* x, const T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

// Row i of a bias times bias_scale: its first n keys to out, -inf up to whole vectors.
template <typename T>
void load_bias(
    const at::Tensor& bias,
    int64_t b,
    int64_t h,
    int64_t i,
    const std::vector<int64_t>& keys,
    int64_t n,
    T bias_scale,
    T* out) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, bias.scalar_type(), "load_bias", [&] {
    const auto* p = bias.const_data_ptr<scalar_t>() + offset(bias, b, h, i, 0);
    const int64_t stride = bias.size(3) == 1 ? 0 : bias.stride(3);
    if (keys[n - 1] == n - 1) {  // the first n keys of all
      convert_row<scalar_t, T>(p, stride, n, bias_scale, out);
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(p[keys[j] * stride]) * bias_scale;
    }
  });
  std::fill(out + n, out + padded(n), kNever<T>);
}

template <typename T>
FASTKD_MULTIVERSION void add_bias(T* z, const T* bias, T m, int64_t n, T scale) {
  for (int64_t j = 0; j < n; ++j) z[j] = z[j] * scale + (bias[j] - m);
}

template <typename T>
FASTKD_MULTIVERSION void add_scaled_row(T* x, const T* y, T scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] += y[j] * scale;
}

template <typename T>
void add_bias_gradient(
    const Problem& problem,
    int64_t b,
    int64_t h,
    int64_t i,
    const std::vector<int64_t>& keys,
    int64_t n,
    const T* dz) {
  T* out = problem.dbias.mutable_data_ptr<T>() + offset(problem.dbias, b, h, i, 0);
  const T scale = static_cast<T>(problem.bias_scale);
  if (problem.dbias.size(3) == 1) {
    *out += std::accumulate(dz, dz + n, T(0)) * scale;
  } else if (n > 0 && keys[n - 1] == n - 1) {
    add_scaled_row<T>(out, dz, scale, n);
  } else {
    for (int64_t j = 0; j < n; ++j) out[keys[j]] += dz[j] * scale;
  }
}

// A thread's work: the strips of its tasks.
template <typename Products>
struct Sweep {
  using T = typename Products::acc_t;
  const Problem& problem;
  int64_t most_rows;
  Products products;
  Buffer<T> z_s, z_t, room, bias, w;
  std::vector<int64_t> keys;
  std::vector<T> zeros;
  Task task{};

  struct Stream {
    const char* data;
    int64_t rows, stride, bytes;
  };
  std::vector<Stream> streams;  // rows of the next task, fetched while this one's are computed

  static int64_t heads_together(const Problem& problem) {
    return problem.mean_heads ? problem.s.H() + problem.t.H() : 2;
  }

  static int64_t rows_of_strip(const Problem& problem) {
    const int64_t row = padded(problem.N_k()) * heads_together(problem) * Products::bytes_per_score() / 2;
    const auto fit = [&](int64_t bytes) { return bytes / std::max<int64_t>(row, 1); };
    const int64_t rows =
        std::max({fit(kStripBytes), std::min<int64_t>(fit(kSpilledBytes), kFewRows), int64_t(kLeastRows)});
    return std::min({rows, int64_t(kMostRows), problem.N_q()});
  }

  explicit Sweep(const Problem& problem)
      : problem(problem), most_rows(rows_of_strip(problem)), products(problem, most_rows), zeros(problem.s.d()) {}
  ~Sweep() { Products::release(); }

  int64_t heads() const { return problem.mean_heads ? problem.s.H() : 1; }

  void load(const Task& task) {
    this->task = task;
    keys = problem.keys(task.b);
    products.load(task, keys);
    const int64_t ld = padded(keys.size()), heads_s = heads(), heads_t = problem.mean_heads ? problem.t.H() : 1;
    z_s.resize(heads_s * most_rows * ld);
    z_t.resize(heads_t * most_rows * ld);
    room.resize((kMostBlock + 1) * ld);
    bias.resize(ld);
    w.resize(most_rows);
  }

  // Scores of a row made ready: the bias added, -inf up to whole vectors. Returns what is left to scale them by.
  T prepare_row(bool student, int64_t h, int64_t i, int64_t visible, T* z) {
    const Network& x = student ? problem.s : problem.t;
    T scale = products.scale_of_scores(student);
    if (x.bias) {
      const T bias_scale = static_cast<T>(problem.bias_scale);
      load_bias<T>(*x.bias, task.b, task.h + h, i, keys, visible, bias_scale, bias.data());
      // Less its maximum, like keys less their mean: a common offset would cost digits.
      const T m = problem.has_softmax() ? max_row<T>(bias.data(), padded(visible)) : T(0);
      add_bias<T>(z, bias.data(), m, visible, scale);
      scale = 1;
    }
    std::fill(z + visible, z + padded(visible), kNever<T>);
    return scale;
  }

  void announce(const Task* next) {
    streams.clear();
    if (!next) return;
    for (const Network* x : {&problem.s, &problem.t})
      for (const at::Tensor* y : {&x->q, &x->k}) {
        if (y->size(2) > kPrefetchedRows || (y == &x->k && y->is_same(x->q))) continue;
        const int64_t size = y->element_size(), first = next->b * y->stride(0) + next->h * y->stride(1);
        const char* data = static_cast<const char*>(y->const_data_ptr()) + first * size;
        streams.push_back({data, y->size(2), y->stride(2) * size, y->size(3) * size});
      }
  }

  // Row i of the next task's operands, on its way to L2.
  void prefetch(int64_t i) const {
    for (const Stream& x : streams)
      if (i < x.rows)
        for (int64_t c = 0; c < x.bytes; c += 64) __builtin_prefetch(x.data + i * x.stride + c, 0, 2);
  }

  // Of the task, among the losses.
  int64_t first_row() const { return (task.b * problem.H_out() + task.h) * problem.N_q(); }

  // Rows [i0, i0 + rows): their losses, and dz in the place of the student's scores. Returns the sum of the losses.
  double rows_of(int64_t i0, int64_t rows, int64_t ld) {
    const int64_t heads_t = problem.mean_heads ? problem.t.H() : 1, stride = most_rows * ld;
    const T N_k = static_cast<T>(problem.N_k());
    T* losses = problem.rows.defined() ? problem.rows.mutable_data_ptr<T>() + first_row() : nullptr;
    double sum = 0;
    const auto take = [&](int64_t i, T loss) {
      sum += static_cast<double>(loss);
      if (losses) losses[i0 + i] = loss;
    };
    Row<T> block[kMostBlock];
    int64_t count = 0;
    const int64_t fit = kBlockBytes / (3 * std::max(ld, kLanes) * sizeof(T));
    const int64_t block_rows = std::clamp<int64_t>(fit, 1, std::min<int64_t>(kBlock, kMostBlock));
    T scale_s = 1, scale_t = 1;
    for (int64_t i = 0; i < rows; ++i) {
      prefetch(i0 + i);
      const int64_t visible = problem.visible(keys, i0 + i);
      const T weight = w.data()[i];
      T *s = z_s.data() + i * ld, *t = z_t.data() + i * ld;
      if (weight == 0 || visible == 0) {
        for (int64_t h = 0; h < heads(); ++h) std::fill_n(s + h * stride, ld, T(0));
        take(i, 0);
      } else {
        for (int64_t h = 0; h < heads(); ++h) scale_s = prepare_row(true, h, i0 + i, visible, s + h * stride);
        for (int64_t h = 0; h < heads_t; ++h) scale_t = prepare_row(false, h, i0 + i, visible, t + h * stride);
        if (problem.mean_heads) {
          take(
              i,
              weight * head_mean_loss<T>(
                           problem.divergence, s, heads(), t, heads_t, stride, visible, N_k, weight, room.data()));
          for (int64_t h = 0; h < heads(); ++h) std::fill(s + h * stride + visible, s + h * stride + ld, T(0));
        } else if (problem.has_softmax()) {
          block[count] = {s, t, room.data() + count * ld, room.data() + kMostBlock * ld, i, visible, weight, 0, 0, {}};
          ++count;
        } else {
          take(i, weight * score_row<T>(s, t, padded(visible), scale_s, scale_t, N_k, weight));
          std::fill(s + visible, s + ld, T(0));
        }
      }
      if (count == block_rows || (count > 0 && i + 1 == rows)) {
        begin_rows<T>(problem.divergence, block, count, scale_s, scale_t);
        for (const Row<T>* row = block; row < block + count; ++row) {
          take(row->i, row->w * finish_row<T>(problem.divergence, *row, N_k));
          std::fill(row->s + row->keys, row->s + ld, T(0));
        }
        count = 0;
      }
    }
    return sum;
  }

  // The gradients of a strip; dk: sums of each head's, or null; dq: (heads, N_q, d) where they are to be added to dk.
  void gradients(int64_t i0, int64_t rows, int64_t columns, int64_t ld, bool add, T* dk, T* dq) {
    const int64_t d = problem.s.d(), N_q = problem.N_q();
    const bool merges = dk && Products::merges(problem);
    T* out = nullptr;  // of dQ, where it needs no rounding
    if (merges) {
      out = dk + i0 * d;
    } else if (dq) {
      out = dq + i0 * d;
    } else if (problem.dq.defined() && problem.dq.scalar_type() == c10::CppTypeToScalarType<T>::value) {
      out = problem.dq.mutable_data_ptr<T>() + ((task.b * problem.s.H() + task.h) * N_q + i0) * d;
    }
    for (int64_t h = 0; h < heads(); ++h) {
      T* dz = z_s.data() + h * most_rows * ld;
      if (problem.dbias.defined())
        for (int64_t i = 0; i < rows; ++i)
          add_bias_gradient<T>(problem, task.b, task.h + h, i0 + i, keys, columns, dz + i * ld);
      if (columns > 0) products.prepare_gradient(rows, columns, dz, ld);
      if (dk && columns > 0) products.keys_gradient(h, rows, columns, dz, ld, add, dk + h * products.dk_size());
      if (!problem.dq.defined() || (merges && columns == 0)) continue;
      T* out_h = out ? out + h * N_q * d : nullptr;
      std::pair<const T*, int64_t> product(zeros.data(), 0);
      if (columns > 0) product = products.queries_gradient(h, rows, columns, dz, ld, merges, out_h);
      const auto [u, ldu] = product;
      for (int64_t i = 0; i < rows && u != out_h; ++i) {
        if (out_h) {
          std::copy_n(u + i * ldu, d, out_h + i * d);
        } else {
          store_row<T>(problem.dq, task.b, task.h + h, i0 + i, u + i * ldu, 1);
        }
      }
    }
  }

  // Rows [begin, end) of the task. Fills dk with their sums, and their part of dq; returns the sum of the losses.
  double run(int64_t begin, int64_t end, T* dk, T* dq) {
    const int64_t strips = (end - begin + most_rows - 1) / most_rows, ld = padded(keys.size());
    const T factor = static_cast<T>(problem.factor);
    const T* weights = problem.weight.const_data_ptr<T>();
    double sum = 0;
    const bool adds = problem.causal || keys.empty();  // no strip writes every key's sums first
    if (dk && adds) std::fill_n(dk, heads() * products.dk_size(), T(0));
    for (int64_t k = 0; k < strips; ++k) {
      const int64_t i0 = begin + (end - begin) * k / strips, rows = begin + (end - begin) * (k + 1) / strips - i0;
      const int64_t columns = problem.visible(keys, i0 + rows - 1);
      for (int64_t i = 0; i < rows; ++i)
        w.data()[i] = weights[offset(problem.weight, task.b, task.h, i0 + i, 0)] * factor;
      if (columns > 0) {
        for (int64_t h = 0; h < heads(); ++h)
          products.scores(true, h, i0, rows, columns, w.data(), z_s.data() + h * most_rows * ld, ld);
        for (int64_t h = 0; h < (problem.mean_heads ? problem.t.H() : 1); ++h)
          products.scores(false, h, i0, rows, columns, w.data(), z_t.data() + h * most_rows * ld, ld);
      }
      sum += rows_of(i0, rows, ld);
      if (problem.with_grad()) gradients(i0, rows, columns, ld, adds || k > 0, dk, dq);
    }
    return sum;
  }

  // The task's dK from its sums, and where keys are the queries the whole gradient.
  void finish(T* dk, T* dq) {
    const int64_t d = problem.s.d();
    const at::Tensor& out = problem.shared ? problem.dq : problem.dk;
    for (int64_t h = 0; h < heads(); ++h) {
      const T* rows = products.finish_keys_gradient(dk + h * products.dk_size());
      if (dq) {
        T* all = dq + h * problem.N_q() * d;
        for (size_t j = 0; j < keys.size(); ++j) add_row<T>(all + keys[j] * d, rows + j * d, d);
        for (int64_t i = 0; i < problem.N_q(); ++i) store_row<T>(problem.dq, task.b, task.h + h, i, all + i * d, 1);
      } else {
        size_t j = 0;
        for (int64_t i = 0; i < problem.N_k(); ++i) {
          const bool is_seen = j < keys.size() && keys[j] == i;
          store_row<T>(out, task.b, task.h + h, i, is_seen ? rows + j * d : zeros.data(), 1);
          j += is_seen;
        }
      }
    }
  }
};

// Chains of tasks that may run side by side, in waves that follow each other. Tasks that add to the same elements of
// the bias' gradient are in one chain, or, where those would be too few for the threads, in different waves.
std::vector<std::vector<std::vector<Task>>> waves(const Problem& problem) {
  const int64_t B = problem.B(), H = problem.H_out();
  const bool b_meet = problem.dbias.defined() && problem.dbias.size(0) == 1;
  const bool h_meet = problem.dbias.defined() && problem.dbias.size(1) == 1;
  const int64_t apart = (b_meet ? 1 : B) * (h_meet ? 1 : H);
  const bool chained = apart >= at::get_num_threads();
  std::vector<std::vector<std::vector<Task>>> out(chained ? 1 : B * H / apart);
  for (auto& wave : out) wave.resize(apart);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t wave = (b_meet ? b : 0) * (h_meet ? H : 1) + (h_meet ? h : 0);
      out[chained ? 0 : wave][(b_meet ? 0 : b) * (h_meet ? 1 : H) + (h_meet ? 0 : h)].push_back({b, h});
    }
  return out;
}

// Into how many ranges of rows each of `tasks` is cut, so that all threads have work.
int64_t parts_of(const Problem& problem, int64_t tasks) {
  const int64_t threads = at::get_num_threads();
  if (tasks % threads == 0 || tasks >= 4 * threads) return 1;
  if (problem.dbias.defined() && problem.dbias.size(2) == 1) return 1;  // ranges of rows would meet
  return std::min((4 * threads + tasks - 1) / tasks, (problem.N_q() + kFewestRows - 1) / kFewestRows);
}

// Returns the sum of the losses.
template <typename Products>
double sweep(const Problem& problem) {
  using T = typename Products::acc_t;
  const int64_t N_q = problem.N_q(), heads = problem.mean_heads ? problem.s.H() : 1;
  const int64_t dk_size = heads * Products(problem, 0).dk_size();
  const int64_t dq_size = problem.shared && !Products::merges(problem) ? heads * N_q * problem.s.d() : 0;
  double total = 0;
  for (const auto& chains : waves(problem)) {
    const int64_t n = chains.size(), parts = chains[0].size() == 1 ? parts_of(problem, n) : 1;
    std::vector<double> sums(n * parts);
    if (parts == 1) {
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        Sweep<Products> sweep(problem);
        const bool in_place = Products::sums_in_place(problem);
        const at::Tensor& out = problem.shared ? problem.dq : problem.dk;
        Buffer<T> dk(problem.with_dk() && !in_place ? dk_size : 0), dq(problem.with_dk() ? dq_size : 0);
        for (int64_t k = begin; k < end; ++k)
          for (size_t i = 0; i < chains[k].size(); ++i) {
            const Task& task = chains[k][i];
            sweep.load(task);
            sweep.announce(i + 1 < chains[k].size() ? &chains[k][i + 1] : k + 1 < end ? &chains[k + 1][0] : nullptr);
            if (in_place) {
              const int64_t first = task.b * problem.s.H() + task.h;
              sums[k] += sweep.run(0, N_q, out.mutable_data_ptr<T>() + first * (dk_size / heads), nullptr);
              continue;
            }
            sums[k] += sweep.run(0, N_q, dk.data(), dq.data());
            if (dk.data()) sweep.finish(dk.data(), dq.data());
          }
      });
    } else {
      Buffer<T> dk(problem.with_dk() ? n * parts * dk_size : 0), dq(problem.with_dk() ? n * dq_size : 0);
      at::parallel_for(0, n * parts, 1, [&](int64_t begin, int64_t end) {
        Sweep<Products> sweep(problem);
        for (int64_t k = begin; k < end; ++k) {
          const int64_t task = k / parts, part = k % parts;
          if (part == 0 || k == begin) sweep.load(chains[task][0]);
          T* dk_k = dk.data() ? dk.data() + k * dk_size : nullptr;
          T* dq_k = dq.data() ? dq.data() + task * dq_size : nullptr;
          sums[k] = sweep.run(part * N_q / parts, (part + 1) * N_q / parts, dk_k, dq_k);
        }
      });
      if (dk.data()) {
        at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
          Sweep<Products> sweep(problem);
          for (int64_t k = begin; k < end; ++k) {
            T* first = dk.data() + k * parts * dk_size;
            for (int64_t part = 1; part < parts; ++part) add_row<T>(first, first + part * dk_size, dk_size);
            sweep.task = chains[k][0];
            sweep.keys = problem.keys(sweep.task.b);
            sweep.products.n = sweep.keys.size();
            sweep.finish(first, dq.data() ? dq.data() + k * dq_size : nullptr);
          }
        });
      }
    }
    total += std::accumulate(sums.begin(), sums.end(), 0.0);
  }
  return total;
}

bool fits_bf16(const Problem& problem) {
  for (const Network* x : {&problem.s, &problem.t})
    if (x->q.scalar_type() != at::kBFloat16 || x->k.scalar_type() != at::kBFloat16) return false;
  return !problem.mean_heads && has_bf16_products();
}

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
    gemm<double>(Op::kTransposed, Op::kAsIs, d_s, d_s, rows, 1, sw, d_s, s, d_s, 1, ss.data(), d_s);
    gemm<double>(Op::kTransposed, Op::kAsIs, d_t, d_s, rows, 1, tw, d_t, s, d_s, 1, ts.data(), d_s);
    gemm<double>(Op::kTransposed, Op::kAsIs, d_t, d_t, rows, 1, tw, d_t, t, d_t, 1, tt.data(), d_t);
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
  const auto weight = problem.weight.to(at::kDouble);
  std::vector<double> sums(B * H);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
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
      const auto gradient = [&](bool queries, const at::Tensor& out, const Grams& grams, int64_t n) {
        if (!out.defined()) return;
        for (int64_t i0 = 0; i0 < n; i0 += height) {
          const int64_t rows = std::min(height, n - i0);
          load(queries, i0, rows);
          double *u_s = sw.data(), *u_t = u.data();
          gemm<double>(
              Op::kAsIs, Op::kAsIs, rows, d_s, d_s, 2 * f_ss, s.data(), d_s, grams.ss.data(), d_s, 0, u_s, d_s);
          gemm<double>(
              Op::kAsIs, Op::kAsIs, rows, d_s, d_t, 2 * f_ts, t.data(), d_t, grams.ts.data(), d_s, 0, u_t, d_s);
          for (int64_t i = 0; i < rows * d_s; ++i) u_s[i] -= u_t[i];
          for (int64_t i = 0; i < rows; ++i) store_row<double>(out, b, h, i0 + i, u_s + i * d_s, queries ? w[i] : 1);
        }
      };
      gradient(true, problem.dq, c, N_q);
      gradient(false, problem.dk, a, N_k);
    }
  });
  return std::max(std::accumulate(sums.begin(), sums.end(), 0.0), 0.0);  // rounding alone can take a zero below 0
}

double run(const Problem& problem, const std::string& algorithm, at::ScalarType acc) {
  if (algorithm == "gram") return gram(problem);
  if (acc == at::kDouble) return sweep<Products<double>>(problem);
  return fits_bf16(problem) ? sweep<ProductsBf16>(problem) : sweep<Products<float>>(problem);
}

at::ScalarType stored(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

// An uninitialised gradient of x, or nothing.
at::Tensor gradient_of(const at::Tensor& x, bool wanted, at::ScalarType dtype) {
  return at::empty(wanted ? x.sizes() : at::IntArrayRef{0}, x.options().dtype(dtype));
}

using OptionalTensor = std::optional<at::Tensor>;

Problem problem_of(
    const at::Tensor& q_student,
    const OptionalTensor& k_student,
    const at::Tensor& q_teacher,
    const at::Tensor& k_teacher,
    const OptionalTensor& bias_student,
    const OptionalTensor& bias_teacher,
    const OptionalTensor& key_mask,
    const std::string& divergence,
    const std::string& heads,
    double scale_student,
    double scale_teacher,
    double bias_scale,
    bool is_causal,
    int64_t row_start,
    int64_t row_step) {
  Problem p{};
  p.s = {q_student, k_student ? *k_student : q_student, bias_student, scale_student};
  p.t = {q_teacher, k_teacher, bias_teacher, scale_teacher};
  p.divergence = divergence_of(divergence);
  p.mean_heads = heads == "mean";
  p.causal = is_causal;
  p.shared = !k_student;
  p.row_start = row_start;
  p.row_step = row_step;
  p.bias_scale = bias_scale;
  if (key_mask) p.key_mask = key_mask->contiguous();
  return p;
}

at::ScalarType accumulator_of(const Problem& p) {
  auto acc = at::kFloat;
  for (const Network* x : {&p.s, &p.t}) {
    acc = at::promote_types(at::promote_types(acc, x->q.scalar_type()), x->k.scalar_type());
    if (x->bias) acc = at::promote_types(acc, x->bias->scalar_type());
  }
  return acc;
}

// What is wanted of the gradients, to be filled in.
void set_gradients(Problem& p, const at::Tensor& dq, const at::Tensor& dk, bool with_dbias, at::ScalarType acc) {
  if (dq.dim() == 4) p.dq = dq;
  if (dk.dim() == 4) p.dk = dk;
  if (with_dbias && p.s.bias) p.dbias = at::zeros(p.s.bias->sizes(), p.s.bias->options().dtype(acc));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_fwd_cpu(
    const at::Tensor& q_student,         // (B, H, N_q, d)
    const OptionalTensor& k_student,     // (B, H, N_k, d)
    const at::Tensor& q_teacher,         // (B, H', N_q, d')
    const at::Tensor& k_teacher,         // (B, H', N_k, d')
    const OptionalTensor& bias_student,  // (B | 1, H | 1, N_q | 1, N_k | 1)
    const OptionalTensor& bias_teacher,  // (B | 1, H' | 1, N_q | 1, N_k | 1)
    const OptionalTensor& key_mask,      // (B, N_k)
    const OptionalTensor& row_weight,    // (B, N_q)
    std::string reduction,
    std::string algorithm,
    std::string divergence,
    std::string heads,
    double scale_student,
    double scale_teacher,
    double bias_scale,
    bool is_causal,
    int64_t row_start,
    int64_t row_step,
    bool with_dq,
    bool with_dk,
    bool with_dbias) {
  auto p = problem_of(
      q_student,
      k_student,
      q_teacher,
      k_teacher,
      bias_student,
      bias_teacher,
      key_mask,
      divergence,
      heads,
      scale_student,
      scale_teacher,
      bias_scale,
      is_causal,
      row_start,
      row_step);
  const auto acc = accumulator_of(p);
  const auto options = q_student.options().dtype(acc);
  auto dq = gradient_of(p.s.q, with_dq, stored(p.s.q)), dk = gradient_of(p.s.k, with_dk, stored(p.s.k));
  set_gradients(p, dq, dk, with_dbias, acc);
  const bool is_mean = reduction == "mean";
  p.factor = is_mean ? 1.0 / static_cast<double>(p.B() * p.H_out()) : 1.0;
  if (row_weight) {
    p.weight = row_weight->to(acc).contiguous().view({p.B(), 1, p.N_q(), 1});
  } else {
    p.weight = at::full({1, 1, 1, 1}, is_mean ? 1.0 / static_cast<double>(p.N_q()) : 1.0, options);
  }
  if (reduction == "none") p.rows = at::empty({p.B(), p.H_out(), p.N_q()}, options);
  const double sum = run(p, algorithm, acc);
  auto dbias = p.dbias.defined() ? p.dbias.to(stored(*bias_student))
                                 : at::empty({0}, options.dtype(bias_student ? stored(*bias_student) : acc));
  return {p.rows.defined() ? p.rows : at::full({}, sum, options), dq, dk, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_bwd_cpu(
    const at::Tensor& drows,             // (B, H | 1, N_q)
    const at::Tensor& q_student,         // (B, H, N_q, d)
    const OptionalTensor& k_student,     // (B, H, N_k, d)
    const at::Tensor& q_teacher,         // (B, H', N_q, d')
    const at::Tensor& k_teacher,         // (B, H', N_k, d')
    const OptionalTensor& bias_student,  // (B | 1, H | 1, N_q | 1, N_k | 1)
    const OptionalTensor& bias_teacher,  // (B | 1, H' | 1, N_q | 1, N_k | 1)
    const OptionalTensor& key_mask,      // (B, N_k)
    std::string divergence,
    std::string heads,
    double scale_student,
    double scale_teacher,
    double bias_scale,
    bool is_causal,
    int64_t row_start,
    int64_t row_step,
    bool with_dq,
    bool with_dk,
    bool with_dbias) {
  auto p = problem_of(
      q_student,
      k_student,
      q_teacher,
      k_teacher,
      bias_student,
      bias_teacher,
      key_mask,
      divergence,
      heads,
      scale_student,
      scale_teacher,
      bias_scale,
      is_causal,
      row_start,
      row_step);
  const auto acc = accumulator_of(p);
  auto dq = gradient_of(p.s.q, with_dq, p.s.q.scalar_type()), dk = gradient_of(p.s.k, with_dk, p.s.k.scalar_type());
  set_gradients(p, dq, dk, with_dbias, acc);
  p.factor = 1;
  p.weight = drows.to(acc).contiguous().unsqueeze(-1);
  run(p, "tile", acc);
  const auto dtype = bias_student ? bias_student->scalar_type() : acc;
  auto dbias = p.dbias.defined() ? p.dbias.to(dtype) : at::empty({0}, q_student.options().dtype(dtype));
  return {dq, dk, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_fwd", &attention_fwd_cpu);
  m.impl("attention_bwd", &attention_bwd_cpu);
}

}  // namespace fastkd
