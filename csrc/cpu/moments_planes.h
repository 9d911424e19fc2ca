// Moments of planes too small to be rows.
#pragma once
#include "cpu/moments_blocks.h"
#include "cpu/moments_columns.h"

namespace fastkd {
namespace {

// The sum of each of C planes of W elements.
template <typename acc_t, typename width_t>
FASTKD_INLINE void sum_planes_of(const acc_t* x, int64_t C, width_t W, acc_t* sums) {
  for (int64_t c = 0; c < C; ++c) {
    acc_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t w = 0; w < W; ++w) sum += x[c * W + w];
    sums[c] = sum;
  }
}

// Each of C values W times.
template <typename acc_t, typename width_t>
FASTKD_INLINE void fill_planes_of(const acc_t* values, int64_t C, width_t W, acc_t* out) {
  for (int64_t c = 0; c < C; ++c)
    for (int64_t w = 0; w < W; ++w) out[c * W + w] = values[c];
}

template <int64_t W>
using Width = std::integral_constant<int64_t, W>;  // known to the compiler, of the maps that end most networks

template <typename Body>
FASTKD_INLINE void with_width(int64_t W, Body body) {
  if (W == 4) return body(Width<4>());
  if (W == 16) return body(Width<16>());
  if (W == 49) return body(Width<49>());
  body(W);
}

template <typename acc_t>
FASTKD_INLINE void sum_planes(const acc_t* x, int64_t C, int64_t W, acc_t* sums) {
  with_width(W, [&](auto width) FASTKD_INLINE_LAMBDA { sum_planes_of(x, C, width, sums); });
}

template <typename acc_t>
FASTKD_INLINE void fill_planes(const acc_t* values, int64_t C, int64_t W, acc_t* out) {
  with_width(W, [&](auto width) FASTKD_INLINE_LAMBDA { fill_planes_of(values, C, width, out); });
}

// C channels of B images in planes of W positions that follow each other, C W <= kMostColumns: too short to be rows.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void plane_moments(
    const Elements<scalar_t> in,
    const Output<scalar_t, acc_t> out,
    acc_t* mean,   // (C)
    acc_t* var) {  // (C)
  const auto [x, B, C, H, W, s] = in;
  // Of planes, then of their elements.
  acc_t pivots[kMostColumns], deviations[kMostColumns], of_squares[kMostColumns];
  acc_t pivot[kMostColumns], deviation[kMostColumns], squares[kMostColumns], alpha[kMostColumns], beta[kMostColumns];
  double mean_of[kMostColumns], m2_of[kMostColumns];
  const int64_t n = C * W, most = kImages;
  if (out.y != nullptr) {
    fill_planes(out.alpha, C, W, alpha);
    fill_planes(out.beta, C, W, beta);
  }
  for (int64_t c = 0; c < C; ++c) mean_of[c] = m2_of[c] = 0;
  double count = 0;
  for (int64_t b = 0; b < B; b += most) {
    const scalar_t* p = x + b * s.b;
    for (int64_t i = 0; i < n; ++i) deviation[i] = static_cast<acc_t>(p[i]);
    sum_planes(deviation, C, W, pivots);
    const acc_t part = 1 / static_cast<acc_t>(W);
    for (int64_t c = 0; c < C; ++c) pivots[c] *= part;
    fill_planes(pivots, C, W, pivot);
    const int64_t rows = std::min(most, B - b);
    scalar_t* y = out.y == nullptr ? nullptr : out.y + b * out.s.b;
    column_sums(p, s.b, rows, B - b, n, pivot, deviation, squares, alpha, beta, y, out.s.b);
    sum_planes(deviation, C, W, deviations);
    sum_planes(squares, C, W, of_squares);
    merge_columns(pivots, deviations, of_squares, static_cast<double>(rows * W), C, count, mean_of, m2_of);
    count += static_cast<double>(rows * W);
  }
  for (int64_t c = 0; c < C; ++c) mean[c] = static_cast<acc_t>(mean_of[c]);
  for (int64_t c = 0; c < C; ++c) var[c] = static_cast<acc_t>(not_negative(m2_of[c] / count));
}

// Planes of a few positions.
template <typename scalar_t, typename acc_t>
void small_plane_moments(
    const Elements<scalar_t> in,
    const Output<scalar_t, acc_t> out,
    acc_t* mean,   // (C)
    acc_t* var) {  // (C)
  const int64_t B = in.B, C = in.C, W = in.W, each = block_planes(W), units = (C + each - 1) / each;
  parallel_for(0, units, std::max<int64_t>(1, kGrain / (each * W * B)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * each; c < std::min(end * each, C); c += each) {
      auto here = out;
      if (out.y != nullptr) here = {out.y + c * W, out.s, out.alpha + c, out.beta + c};
      auto planes = in;
      planes.x += c * W;
      planes.C = std::min(each, C - c);
      plane_moments<scalar_t, acc_t>(planes, here, mean + c, var + c);
    }
  });
}

}  // namespace
}  // namespace fastkd
