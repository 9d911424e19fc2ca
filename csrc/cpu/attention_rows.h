// Rows of scores: their softmaxes, divergences and gradients.
#pragma once
#include "common.h"
#include "cpu/matmul.h"
#include "cpu/vector.h"
#include "isa.h"
#include "thresholds.h"

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
Threshold kPairKeys{"attention.pair_keys", 128};           // from which on products of bfloat16 pairs gain
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
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T y_s = z_s[j] - m_s, y_t = z_t[j] - m_t, s = exp_of(y_s), t = exp_of(y_t);
    z_s[j] = s;
    e_t[j] = t;
    z_t[j] = y_t - y_s;
    l_s[l] += s;
    l_t[l] += t;
    if constexpr (with_cross) cross[l] += t == 0 ? T(0) : t * y_s;
  });
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
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T s = e_s[j], e = e_t[j], t = e * c.ratio, d = s - e * c.ratio;
    sum[l] += e == 0 ? d : t * (dy[j] + c.log_ratio) + d;
    excess[l] += d;
    e_s[j] = d * g;
  });
  return {sum.sum() * c.inv_s, excess.sum() * c.inv_s};
}

// (p_s - p_t) w to d; the excess.
template <typename T>
FASTKD_MULTIVERSION T difference_row(const T* e_s, const T* e_t, T* d, int64_t n, Norms<T> c, T w) {
  n = n / kLanes * kLanes;
  const T g = c.inv_s * w;
  Lanes<T> excess(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T x = e_s[j] - e_t[j] * c.ratio;
    excess[l] += x;
    d[j] = x * g;
  });
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
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T s = e_s[j], d = s - e_t[j] * c.ratio, x = s == 0 ? T(0) : -(dy[j] + c.log_ratio);
    sum[l] += (s * x - d) * c.inv_s;
    dy[j] = x;
    e_s[j] = s * c.inv_s;
  });
  return sum.sum();
}

template <typename T>
FASTKD_MULTIVERSION T mse_row(T* e_s, T* d, int64_t n, Norms<T> c, T N_k) {
  n = n / kLanes * kLanes;
  const T scale = 2 / N_k;
  Lanes<T> sum(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    sum[l] += d[j] * d[j];
    d[j] *= scale;
    e_s[j] *= c.inv_s;
  });
  return sum.sum() / N_k;
}

// With h = (p_s - p_t) / (p_s + p_t): log(p_s / m) = log(1 + h), log(p_t / m) = log(1 - h).
template <typename T>
FASTKD_MULTIVERSION T js_row(const T* p_s, const T* p_t, const T* d, T* v, int64_t n) {
  n = n / kLanes * kLanes;
  constexpr T kLeast = 8 * std::numeric_limits<T>::min();  // of smaller totals the inverse overflows; they add nothing
  Lanes<T> sum(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T s = p_s[j], t = p_t[j], total = s + t, inv = 1 / (total < kLeast ? T(1) : total), h = d[j] * inv;
    const T log_s = s == 0 ? T(0) : log_of(2 * s * inv, h), log_t = t == 0 ? T(0) : log_of(2 * t * inv, -h);
    sum[l] += s * log_s + t * log_t;
    v[j] = log_s / 2;
  });
  return sum.sum() / 2;
}

// dz = p (v - Σ p v) w in place of p. v may be taken less its value at the likeliest key: what logarithms have in
// common is gone, and where a row is all but that key, what is left there is 1 - p of the terms.
template <typename T>
FASTKD_MULTIVERSION void through_softmax(T* p, const T* v, int64_t n, T v_top, T w) {
  n = n / kLanes * kLanes;
  Lanes<T> sum(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA { sum[l] += p[j] == 0 ? T(0) : p[j] * (v[j] - v_top); });
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
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T s = z_s[j] * scale_s, t = z_t[j] * scale_t, both = s > t ? s : t;
    const T d = both == kNever<T> ? T(0) : s - t;
    sum[l] += d * d;
    z_s[j] = d * g;
  });
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

}  // namespace
}  // namespace fastkd
