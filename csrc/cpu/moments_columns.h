// Moments of channels that are adjacent in memory.
#pragma once
#include "cpu/moments_blocks.h"

namespace fastkd {
namespace {

// Sum the deviations of C <= kMostColumns adjacent columns of `rows` rows from their pivots, and the squares of these;
// write y = alpha x + beta if y is given. The rows that come next, of `left` in all, are prefetched.
template <typename scalar_t, typename acc_t>
FASTKD_INLINE void column_sums(
    const scalar_t* x,
    int64_t stride,
    int64_t rows,
    int64_t left,
    int64_t C,
    const acc_t* pivot,  // (C)
    acc_t* deviation,    // (C)
    acc_t* squares,      // (C)
    const acc_t* alpha,  // (C)
    const acc_t* beta,   // (C)
    scalar_t* y,
    int64_t y_stride) {
  for (int64_t c = 0; c < C; ++c) deviation[c] = squares[c] = 0;
  for (int64_t i = 0, n; i < rows; i += n) {
    n = std::min(kLead, rows - i);
    const scalar_t* p = x + i * stride;
    // The processor does not prefetch rows that are read side by side.
    for (int64_t r = 2 * kLead; r < 3 * kLead && i + r < left; ++r) prefetch(p + r * stride, C);
    if (n == kLead) {  // one load and store of the sums for all of them
      const scalar_t *x0 = p, *x1 = x0 + stride, *x2 = x1 + stride, *x3 = x2 + stride;
      for (int64_t c = 0; c < C; ++c) {
        const acc_t center = pivot[c];
        const acc_t d0 = static_cast<acc_t>(x0[c]) - center, d1 = static_cast<acc_t>(x1[c]) - center;
        const acc_t d2 = static_cast<acc_t>(x2[c]) - center, d3 = static_cast<acc_t>(x3[c]) - center;
        deviation[c] += (d0 + d1) + (d2 + d3);
        squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
      }
    } else {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t c = 0; c < C; ++c) {
          const acc_t d = static_cast<acc_t>(p[r * stride + c]) - pivot[c];
          deviation[c] += d;
          squares[c] += d * d;
        }
    }
    for (int64_t r = 0; r < n && y != nullptr; ++r)
      for (int64_t c = 0; c < C; ++c)
        y[(i + r) * y_stride + c] = static_cast<scalar_t>(alpha[c] * static_cast<acc_t>(p[r * stride + c]) + beta[c]);
  }
}

// As Moments::merge for C blocks of n elements each, whose divisions are the same; the others had `count` so far.
template <typename acc_t>
FASTKD_INLINE void merge_columns(
    const acc_t* pivot,      // (C)
    const acc_t* deviation,  // (C)
    const acc_t* squares,    // (C)
    double n,
    int64_t C,
    double count,
    double* mean,  // (C)
    double* m2) {  // (C)
  const double inverse = 1 / n, share = n / (count + n), weight = count * share;
  for (int64_t c = 0; c < C; ++c) {
    const double e = deviation[c], delta = pivot[c] + e * inverse - mean[c];
    mean[c] += delta * share;
    m2[c] += squares[c] - e * e * inverse + delta * weight * delta;  // of the first block 0, where a square overflows
  }
}

// Mean and Σ (x - mean)² of each of C <= kMostColumns adjacent columns.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void column_moments(const Elements<scalar_t> in, const Output<scalar_t, acc_t> out, const Sums to) {
  const auto [x, B, C, H, W, s] = in;
  acc_t pivot[kMostColumns], deviation[kMostColumns], squares[kMostColumns];
  const int64_t most = kRows;
  double count = 0;
  for (int64_t c = 0; c < C; ++c) to.mean[c] = to.m2[c] = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0, m; i < W; i += m) {
        m = (W - i) / ((W - i + most - 1) / most);  // blocks as equal as can be
        const int64_t lead = std::min(kLead, m);
        const scalar_t* p = x + b * s.b + h * s.h + i * s.w;
        for (int64_t c = 0; c < C; ++c) pivot[c] = static_cast<acc_t>(p[c]);
        for (int64_t r = 1; r < lead; ++r)
          for (int64_t c = 0; c < C; ++c) pivot[c] += static_cast<acc_t>(p[r * s.w + c]);
        const acc_t part = 1 / static_cast<acc_t>(lead);
        for (int64_t c = 0; c < C; ++c) pivot[c] *= part;
        scalar_t* y = out.y == nullptr ? nullptr : out.y + b * out.s.b + h * out.s.h + i * out.s.w;
        column_sums(p, s.w, m, W - i, C, pivot, deviation, squares, out.alpha, out.beta, y, out.s.w);
        merge_columns(pivot, deviation, squares, static_cast<double>(m), C, count, to.mean, to.m2);
        count += static_cast<double>(m);
      }
}

}  // namespace
}  // namespace fastkd
