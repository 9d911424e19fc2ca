// Rows of probabilities averaged over heads: their divergences and gradients.
#pragma once
#include "cpu/attention_rows.h"

namespace fastkd {
namespace {

// log p in place of z; all -inf, and false, where the row has no key.
template <typename T>
FASTKD_MULTIVERSION bool log_softmax_row(T* z, int64_t n) {
  n = n / kLanes * kLanes;
  const T m = max_row(z, n);
  Lanes<T> parts(0);
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    z[j] -= m;
    parts[l] += exp_of(z[j]);
  });
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
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
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
  });
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
  for_lanes(n, [&](int64_t j, int64_t l) FASTKD_INLINE_LAMBDA {
    const T p = exp_of(log_p[j]);
    const T part = y[j] == kNever<T> ? T(0) : exp_of(log_p[j] - (y[j] + log_H)) * dlog[j];
    const T x = j == top ? T(0) : part - c * p;
    dlog_h[j] = x;
    log_p[j] = p;
    sum[l] += x;
  });
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

}  // namespace
}  // namespace fastkd
