// Per-channel mean and biased variance of (B, C, ...), alone or of what an eval-mode batch norm normalises, their
// backward, and the distance of such moments to running statistics.
//
// Forward reads x once. A block is summed about a pivot, the mean of its first elements: for n elements and k of these,
// (pivot - mean)^2 <= n/k var, so a mean far above the spread costs 5 bits at the most. Blocks merge pairwise in double
// (Chan et al.) in a fixed order, so the result does not depend on the number of threads.
#include "blocks.h"
#include "common.h"
#include "thresholds.h"
#include "vector.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kMostBlock = 4096, kMostColumns = 512, kMostGroup = 32;  // what arrays on the stack hold
constexpr int64_t kPivot = 128;        // elements of a block that its pivot is the mean of
constexpr int64_t kSpread = 32;        // times the pivot's elements that a block has at the most
constexpr int64_t kLead = 4;           // rows that are added up together, and those that the pivot is the mean of
constexpr int64_t kPair = 2 * kLanes;  // elements of a vector of 16 bits each

Threshold kBlock{"moments.block", kMostBlock};        // elements of a block along a row: 16 KB of float32
Threshold kPart{"moments.part", 8192};                // positions of a channel that repay a unit of their own
Threshold kRows{"moments.rows", 64};                  // rows of a block of columns
Threshold kImages{"moments.images", 32};              // images of a block of small planes
Threshold kColumns{"moments.columns", kMostColumns};  // channels of a block of columns
Threshold kSmall{"moments.small", 64};                // positions of a plane that make too short a row
Threshold kGroup{"moments.group", kMostGroup};        // channels of short rows that are taken together, at the most
Threshold kSpan{"moments.span", 1 << 14};             // about as many elements of them in an image
Threshold kFewUnits{"moments.few_units", 64};         // units that keep all cores busy to the end
Threshold kUnit{"moments.unit", 8192};                // elements of a unit that repay it
Threshold kUnits{"moments.units", 4096};              // about as many units as a forward is cut into
Threshold kHot{"moments.hot", 2 << 20};               // bytes that a core's cache holds
Threshold kGrain{"moments.grain", 1 << 13};           // elements per task below which threads cost more than they bring

int64_t block_columns() {
  return std::min<int64_t>(kColumns, kMostColumns);
}

// Channels of planes of W <= kSmall positions that make a block of columns.
int64_t block_planes(int64_t W) {
  return std::max<int64_t>(1, block_columns() / W);
}

bool is_small(int64_t W) {
  return W <= std::min<int64_t>(kSmall, kMostColumns);
}

struct Moments {
  double count, mean, m2;

  FASTKD_INLINE void merge(double n, double mean_n, double m2_n) {
    if (count == 0) {
      *this = {n, mean_n, m2_n};
      return;
    }
    const double total = count + n, share = n / total, delta = mean_n - mean;
    mean += delta * share;
    m2 += m2_n + delta * delta * (count * share);
    count = total;
  }
};

// The sums of equal elements that their pivot is an ulp off can leave less than nothing. NaN stays.
template <typename acc_t>
FASTKD_INLINE acc_t variance(double v) {
  return static_cast<acc_t>(v < 0 ? 0 : v);
}

// Asks for n elements from p on, so that they come from memory while others are computed with.
template <typename scalar_t>
FASTKD_INLINE void prefetch(const scalar_t* p, int64_t n) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i);
#endif
}

// Of n elements that are written, first those that make whole vectors; then what is left, together with enough of those
// before it to make one: written twice is faster than one by one.
FASTKD_INLINE std::pair<int64_t, int64_t> span_of(int64_t n, int part) {
  const int64_t whole = n / kPair * kPair;
  if (part == 0) return {0, whole};
  return {whole == n ? n : std::max<int64_t>(0, n - kPair), n};
}

// kSums deviations of adjacent elements from center, in any order.
constexpr int64_t kSums = 4 * kLanes;
template <typename scalar_t, typename acc_t>
FASTKD_INLINE void deviate(const scalar_t* v, acc_t center, acc_t* d) {
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {  // without taking vectors apart
    for (int64_t l = 0; l < kSums / 2; ++l) {
      uint32_t two;
      std::memcpy(&two, v + 2 * l, sizeof two);
      d[l] = bits_of<float>(two << 16) - center;
      d[kSums / 2 + l] = bits_of<float>(two & 0xffff0000u) - center;
    }
  } else {
    for (int64_t l = 0; l < kSums; ++l) d[l] = static_cast<acc_t>(v[l]) - center;
  }
}

// A block of rows under way: deviations from its pivot, and their squares, added up in lanes. Loops of fixed length
// over lanes become vectors of the widest instruction set, which stay in registers.
template <typename acc_t>
struct Block {
  alignas(64) acc_t deviation[kLanes];
  acc_t squares[kLanes];
  acc_t pivot;
  int64_t n, limit;  // elements; 0 before the first

  FASTKD_INLINE bool has_room(int64_t m) const { return n == 0 || n + m <= limit; }

  // m adjacent elements; next is what will be read after them.
  template <typename scalar_t>
  FASTKD_INLINE void add(const scalar_t* v, int64_t m, const scalar_t* next) {
    if (n == 0) start(v, m);
    n += m;
    const acc_t center = pivot;
    int64_t i = 0;
    if (m < kLanes) {
      for (; i < m; ++i) {
        const acc_t d = static_cast<acc_t>(v[i]) - center;
        deviation[i] += d;
        squares[i] += d * d;
      }
      return;
    }
    acc_t d[kSums], sums[kSums], sums2[kSums];
    if (m >= kSums) {  // as many additions are under way at once
      prefetch(next, kSums);
      deviate(v, center, d);
      for (int64_t l = 0; l < kSums; ++l) {
        sums[l] = d[l];
        sums2[l] = d[l] * d[l];
      }
      for (i = kSums; i + kSums <= m; i += kSums) {
        prefetch(next + i, kSums);
        deviate(v + i, center, d);
        for (int64_t l = 0; l < kSums; ++l) {
          sums[l] += d[l];
          sums2[l] += d[l] * d[l];
        }
      }
      for (int64_t l = 0; l < kLanes; ++l) {
        sums[l] = deviation[l] + (sums[l] + sums[kLanes + l] + (sums[2 * kLanes + l] + sums[3 * kLanes + l]));
        sums2[l] = squares[l] + (sums2[l] + sums2[kLanes + l] + (sums2[2 * kLanes + l] + sums2[3 * kLanes + l]));
      }
    } else {
      prefetch(next, m);
      std::memcpy(sums, deviation, sizeof deviation);
      std::memcpy(sums2, squares, sizeof squares);
    }
    for (; i + kLanes <= m; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) {
        const acc_t e = static_cast<acc_t>(v[i + l]) - center;
        sums[l] += e;
        sums2[l] += e * e;
      }
    if (i < m) {  // the last vector, without what has been added
      const scalar_t* p = v + m - kLanes;
      const acc_t* keep = kLast<acc_t> + (m - i);
      for (int64_t l = 0; l < kLanes; ++l) {
        const acc_t e = (static_cast<acc_t>(p[l]) - center) * keep[l];
        sums[l] += e;
        sums2[l] += e * e;
      }
    }
    std::memcpy(deviation, sums, sizeof deviation);
    std::memcpy(squares, sums2, sizeof squares);
  }

  FASTKD_INLINE void merge_into(Moments* out) {
    const double count = static_cast<double>(n), inverse = 1 / count, e = Lanes<acc_t>::load(deviation).sum();
    out->merge(count, pivot + e * inverse, Lanes<acc_t>::load(squares).sum() - e * e * inverse);
    n = 0;
  }

 private:
  template <typename scalar_t>
  FASTKD_INLINE void start(const scalar_t* v, int64_t m) {
    for (int64_t l = 0; l < kLanes; ++l) deviation[l] = 0;
    int64_t lead = std::min(m, kPivot);
    acc_t total = 0;
    if (m < kLanes) {
      for (int64_t i = 0; i < lead; ++i) total += static_cast<acc_t>(v[i]);
    } else {
      lead = lead / kLanes * kLanes;
      for (int64_t i = 0; i < lead; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) deviation[l] += static_cast<acc_t>(v[i + l]);
      total = Lanes<acc_t>::load(deviation).sum();
    }
    pivot = total / static_cast<acc_t>(lead);
    limit = kSpread * lead;
    for (int64_t l = 0; l < kLanes; ++l) deviation[l] = squares[l] = 0;
  }
};

// Where y = alpha x + beta of a batch norm goes; none without it.
template <typename scalar_t, typename acc_t>
struct Output {
  scalar_t* y = nullptr;
  PlaneStrides s{};
  const acc_t *alpha = nullptr, *beta = nullptr;  // (C)
};

// Whether planes of W positions follow each other.
FASTKD_INLINE bool is_dense(const PlaneStrides& s, int64_t W) {
  return s.w == 1 && s.c == W;
}

// Mean and Σ (x - mean)² of each of C <= kMostGroup channels: B images of H rows of W elements each.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_moments(
    const scalar_t* x,
    const PlaneStrides s,
    int64_t B,
    int64_t H,
    int64_t W,
    int64_t C,
    const Output<scalar_t, acc_t> out,
    double* mean,  // (C)
    double* m2) {  // (C)
  scalar_t held[kMostBlock];
  Moments moments[kMostGroup];
  Block<acc_t> blocks[kMostGroup];
  const int64_t most = std::min<int64_t>(kBlock, kMostBlock);
  for (int64_t c = 0; c < C; ++c) {
    moments[c] = {0, 0, 0};
    blocks[c].n = 0;
  }
  // Of rows that follow each other, how many elements, and how far ahead of them memory is asked for the next.
  const int64_t span = H == 1 && is_dense(s, W) ? C * W : 0, ahead = std::min<int64_t>(span, 2048);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < W; i += most) {
          const int64_t m = std::min(most, W - i);
          const scalar_t* p = x + b * s.b + h * s.h + c * s.c + i * s.w;
          const scalar_t* v = p;
          if (s.w != 1) {
            for (int64_t k = 0; k < m; ++k) held[k] = p[k * s.w];
            v = held;
          }
          Block<acc_t>& block = blocks[c];
          if (!block.has_room(m)) block.merge_into(moments + c);
          const int64_t to_end = span - c * W - i;
          block.add(v, m, p + (to_end > ahead ? ahead : span == 0 ? m : ahead + s.b - span));
          if (out.y != nullptr) {
            const acc_t alpha = out.alpha[c], beta = out.beta[c];
            scalar_t* y = out.y + b * out.s.b + h * out.s.h + c * out.s.c + i * out.s.w;
            for (int part = 0; part < 2; ++part) {
              const auto [from, to] = span_of(m, part);
              if (out.s.w == 1) {
                for (int64_t k = from; k < to; ++k)
                  y[k] = static_cast<scalar_t>(alpha * static_cast<acc_t>(v[k]) + beta);
              } else {
                for (int64_t k = from; k < to; ++k)
                  y[k * out.s.w] = static_cast<scalar_t>(alpha * static_cast<acc_t>(v[k]) + beta);
              }
            }
          }
        }
  for (int64_t c = 0; c < C; ++c) {
    if (blocks[c].n > 0) blocks[c].merge_into(moments + c);
    mean[c] = moments[c].mean;
    m2[c] = moments[c].m2;
  }
}

// Of C <= kMostColumns adjacent columns of `rows` rows, deviations from their pivots and squares of these, and y =
// alpha x
// + beta if it is given. Of `left` rows in all those that come next are asked for.
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
    // Rows that are read side by side are no stream to the processor.
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
FASTKD_MULTIVERSION void column_moments(
    const scalar_t* x,
    const PlaneStrides s,
    int64_t B,
    int64_t H,
    int64_t W,
    int64_t C,
    const Output<scalar_t, acc_t> out,
    double* mean,  // (C)
    double* m2) {  // (C)
  acc_t pivot[kMostColumns], deviation[kMostColumns], squares[kMostColumns];
  const int64_t most = kRows;
  double count = 0;
  for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0;
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
        merge_columns(pivot, deviation, squares, static_cast<double>(m), C, count, mean, m2);
        count += static_cast<double>(m);
      }
}

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

template <typename acc_t>
FASTKD_INLINE void sum_planes(const acc_t* x, int64_t C, int64_t W, acc_t* sums) {
  if (W == 4) return sum_planes_of(x, C, Width<4>(), sums);
  if (W == 16) return sum_planes_of(x, C, Width<16>(), sums);
  if (W == 49) return sum_planes_of(x, C, Width<49>(), sums);
  sum_planes_of(x, C, W, sums);
}

template <typename acc_t>
FASTKD_INLINE void fill_planes(const acc_t* values, int64_t C, int64_t W, acc_t* out) {
  if (W == 4) return fill_planes_of(values, C, Width<4>(), out);
  if (W == 16) return fill_planes_of(values, C, Width<16>(), out);
  if (W == 49) return fill_planes_of(values, C, Width<49>(), out);
  fill_planes_of(values, C, W, out);
}

// C channels of B images in planes of W positions that follow each other, C W <= kMostColumns: too short to be rows.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void plane_moments(
    const scalar_t* x,
    int64_t stride,
    int64_t B,
    int64_t C,
    int64_t W,
    const Output<scalar_t, acc_t> out,
    acc_t* mean,   // (C)
    acc_t* var) {  // (C)
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
    const scalar_t* p = x + b * stride;
    for (int64_t i = 0; i < n; ++i) deviation[i] = static_cast<acc_t>(p[i]);
    sum_planes(deviation, C, W, pivots);
    const acc_t part = 1 / static_cast<acc_t>(W);
    for (int64_t c = 0; c < C; ++c) pivots[c] *= part;
    fill_planes(pivots, C, W, pivot);
    const int64_t rows = std::min(most, B - b);
    scalar_t* y = out.y == nullptr ? nullptr : out.y + b * out.s.b;
    column_sums(p, stride, rows, B - b, n, pivot, deviation, squares, alpha, beta, y, out.s.b);
    sum_planes(deviation, C, W, deviations);
    sum_planes(squares, C, W, of_squares);
    merge_columns(pivots, deviations, of_squares, static_cast<double>(rows * W), C, count, mean_of, m2_of);
    count += static_cast<double>(rows * W);
  }
  for (int64_t c = 0; c < C; ++c) mean[c] = static_cast<acc_t>(mean_of[c]);
  for (int64_t c = 0; c < C; ++c) var[c] = variance<acc_t>(m2_of[c] / count);
}

// Planes of a few positions.
template <typename scalar_t, typename acc_t>
void small_plane_moments(
    const scalar_t* x,
    int64_t B,
    int64_t C,
    int64_t W,
    int64_t stride_b,
    const Output<scalar_t, acc_t> out,
    acc_t* mean,   // (C)
    acc_t* var) {  // (C)
  const int64_t each = block_planes(W), units = (C + each - 1) / each;
  at::parallel_for(0, units, std::max<int64_t>(1, kGrain / (each * W * B)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * each; c < std::min(end * each, C); c += each) {
      auto here = out;
      if (out.y != nullptr) here = {out.y + c * W, out.s, out.alpha + c, out.beta + c};
      const int64_t n = std::min(each, C - c);
      plane_moments<scalar_t, acc_t>(x + c * W, stride_b, B, n, W, here, mean + c, var + c);
    }
  });
}

// Joins the pieces of n groups, `stride` apart, in order into the first of them.
template <typename acc_t>
FASTKD_MULTIVERSION void join_pieces(
    double* mean_of,
    double* m2_of,
    int64_t stride,
    int64_t pieces,
    const double* counts,  // (pieces)
    int64_t n,
    acc_t* mean,   // (n)
    acc_t* var) {  // (n)
  double count = counts[0];
  for (int64_t k = 1; k < pieces; ++k) {
    const double *other = mean_of + k * stride, *m2_other = m2_of + k * stride;
    const double total = count + counts[k], share = counts[k] / total, weight = count * share;
    for (int64_t i = 0; i < n; ++i) {
      const double delta = other[i] - mean_of[i];
      mean_of[i] += delta * share;
      m2_of[i] += m2_other[i] + delta * delta * weight;
    }
    count = total;
  }
  for (int64_t i = 0; i < n; ++i) mean[i] = static_cast<acc_t>(mean_of[i]);
  for (int64_t i = 0; i < n; ++i) var[i] = variance<acc_t>(m2_of[i] / count);
}

// The moments of a layer whose positions fold; y too if out has one, whose layout is planes.strides[1].
template <typename scalar_t, typename acc_t>
void layer_moments(
    const scalar_t* x,
    int64_t B,
    int64_t C,
    int64_t H,
    int64_t W,
    const PlaneStrides s,
    bool per_image,
    const Output<scalar_t, acc_t> out,
    acc_t* mean,   // (C) or (B, C)
    acc_t* var) {  // as mean
  const bool columns = s.c == 1 && C > 1 && (out.y == nullptr || out.s.c == 1);
  if (!columns && !per_image && C > 1 && H == 1 && is_small(W) && is_dense(s, W) &&
      (out.y == nullptr || is_dense(out.s, W)))
    return small_plane_moments(x, B, C, W, s.b, out, mean, var);

  // A unit is one channel (or block of channels) of some images or of a part of a row. Their number depends on the
  // shape alone, and is small: each costs a merge.
  const int64_t wanted = std::clamp(
      columns ? (B * H * W + kRows - 1) / kRows : B * H * W / kPart, int64_t(1), std::max(kUnits / C, int64_t(16)));
  const int64_t sets = per_image ? B : std::min(wanted, B);
  const int64_t parts = per_image ? 1 : std::clamp(wanted / sets, int64_t(1), (W + kRows - 1) / kRows);
  const int64_t channel = std::max<int64_t>(1, B * H * W / (sets * parts));
  const int64_t together = std::min(kSpan * parts / W, std::max(sets * parts * C / kFewUnits, kUnit / channel));
  const int64_t each =
      columns ? block_columns() : std::clamp(together, int64_t(1), std::min<int64_t>(kGroup, kMostGroup));
  const int64_t tiles = (C + each - 1) / each;
  const int64_t groups = per_image ? B * C : C, pieces = per_image ? 1 : sets * parts;
  std::vector<double> means(sets * parts * C), m2s(means.size()), counts(sets * parts);  // (sets, parts, C)
  for (int64_t i = 0; i < sets * parts; ++i) {
    const int64_t set = i / parts, part = i % parts;
    const int64_t images = (set + 1) * B / sets - set * B / sets, width = (part + 1) * W / parts - part * W / parts;
    counts[i] = static_cast<double>(images * H * width);
  }
  const auto finish = [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    join_pieces<acc_t>(&means[begin], &m2s[begin], groups, pieces, &counts[begin / C], n, mean + begin, var + begin);
  };
  at::parallel_for(
      0, sets * parts * tiles, std::max<int64_t>(1, kGrain / (channel * each)), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t set = unit / tiles / parts, part = unit / tiles % parts;
          const int64_t c = unit % tiles * each, n = std::min(each, C - c);
          const int64_t w0 = part * W / parts, w1 = (part + 1) * W / parts;
          const int64_t b0 = set * B / sets, b1 = (set + 1) * B / sets;
          auto here = out;
          if (out.y != nullptr) {
            here.y += b0 * out.s.b + c * out.s.c + w0 * out.s.w;
            here.alpha += c;
            here.beta += c;
          }
          const scalar_t* p = x + b0 * s.b + c * s.c + w0 * s.w;
          const int64_t piece = unit / tiles, first = piece * C + c;
          if (columns)
            column_moments<scalar_t, acc_t>(p, s, b1 - b0, H, w1 - w0, n, here, &means[first], &m2s[first]);
          else
            row_moments<scalar_t, acc_t>(p, s, b1 - b0, H, w1 - w0, n, here, &means[first], &m2s[first]);
          if (pieces == 1) finish(first, first + n);
        }
      });
  if (pieces > 1) at::parallel_for(0, groups, std::max<int64_t>(1, kGrain / pieces), finish);
}

// The means that an infinity among the inputs spoilt: differences turn it into NaN, their sum does not.
template <typename scalar_t, typename acc_t>
void mend_means(
    const scalar_t* x,
    int64_t B,
    int64_t C,
    int64_t H,
    int64_t W,
    const PlaneStrides s,
    bool per_image,
    acc_t* mean) {  // (C) or (B, C)
  const int64_t groups = per_image ? B * C : C, images = per_image ? 1 : B;
  for (int64_t i = 0; i < groups; ++i) {
    if (std::isfinite(mean[i])) continue;
    const scalar_t* p = x + (per_image ? i / C * s.b : 0) + i % C * s.c;
    double sum = 0;
    for (int64_t b = 0; b < images; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W && !std::isnan(sum); ++w) sum += static_cast<double>(p[b * s.b + h * s.h + w * s.w]);
    mean[i] = static_cast<acc_t>(sum / static_cast<double>(images * H * W));
  }
}

int64_t groups_of(const at::Tensor& x, bool per_image) {
  return per_image ? x.size(0) * x.size(1) : x.size(1);
}

std::tuple<at::Tensor, at::Tensor> moments_fwd_cpu(
    const at::TensorList inputs,  // per layer (B, C, ...), of one dtype
    bool per_image) {
  int64_t groups = 0;
  for (const auto& x : inputs) groups += groups_of(x, per_image);
  auto mean = at::empty({groups}, inputs[0].options().dtype(accumulator(inputs[0]))), var = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs[0].scalar_type(), "moments_fwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    auto* mean_ptr = mean.mutable_data_ptr<acc_t>();
    auto* var_ptr = var.mutable_data_ptr<acc_t>();
    for (auto x : inputs) {
      const int64_t n = groups_of(x, per_image);
      if (x.numel() > 0) {
        auto folded = fold_planes<1>({x});
        if (!folded) {
          x = x.contiguous();
          folded = fold_planes<1>({x});
        }
        int64_t B = folded->B, W = folded->W;
        auto s = folded->strides[0];
        if (!per_image && folded->H == 1 && (W == 1 || s.b == W * s.w)) {  // images follow each other: one long row
          s.w = W == 1 ? s.b : s.w;
          W *= std::exchange(B, 1);
        }
        const auto* p = x.const_data_ptr<scalar_t>();
        layer_moments<scalar_t, acc_t>(p, B, folded->C, folded->H, W, s, per_image, {}, mean_ptr, var_ptr);
        mend_means<scalar_t, acc_t>(p, B, folded->C, folded->H, W, s, per_image, mean_ptr);
      }
      mean_ptr += n;
      var_ptr += n;
    }
  });
  return {mean, var};
}

// dx = a + b (x - mean) + alpha dy, and what it is made of; dy may be null.
template <typename scalar_t, typename acc_t>
struct Backward {
  int64_t C, H, W;
  bool per_image;
  scalar_t* dx;
  PlaneStrides d;
  const scalar_t* x;
  PlaneStrides s;
  const scalar_t* dy;
  PlaneStrides g;
  const acc_t *a, *b, *mean;  // (C), or (B, C) per image
  const acc_t* alpha;         // (C)
};

// Channels [begin, end) of image n.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_backward(const Backward<scalar_t, acc_t> k, int64_t n, int64_t begin, int64_t end) {
  const bool has_dy = k.dy != nullptr;
  const bool is_adjacent = k.d.w == 1 && k.s.w == 1 && (!has_dy || k.g.w == 1);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t stat = k.per_image ? n * k.C + c : c;
    const acc_t a = k.a[stat], b = k.b[stat], mean = k.mean[stat], alpha = has_dy ? k.alpha[c] : acc_t(0);
    for (int64_t h = 0; h < k.H; ++h) {
      scalar_t* dx = k.dx + n * k.d.b + c * k.d.c + h * k.d.h;
      const scalar_t* x = k.x + n * k.s.b + c * k.s.c + h * k.s.h;
      const scalar_t* dy = has_dy ? k.dy + n * k.g.b + c * k.g.c + h * k.g.h : nullptr;
      for (int part = 0; part < 2; ++part) {
        const auto [from, to] = span_of(k.W, part);
        if (is_adjacent && has_dy) {
          for (int64_t w = from; w < to; ++w)
            dx[w] =
                static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean) + alpha * static_cast<acc_t>(dy[w]));
        } else if (is_adjacent) {
          for (int64_t w = from; w < to; ++w) dx[w] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean));
        } else {
          for (int64_t w = from; w < to; ++w) {
            acc_t d = a + b * (static_cast<acc_t>(x[w * k.s.w]) - mean);
            if (has_dy) d += alpha * static_cast<acc_t>(dy[w * k.g.w]);
            dx[w * k.d.w] = static_cast<scalar_t>(d);
          }
        }
      }
    }
  }
}

// n adjacent elements, each with its own coefficients.
template <typename scalar_t, typename acc_t>
FASTKD_INLINE void element_backward(
    scalar_t* dx,
    const scalar_t* x,
    const scalar_t* dy,
    const acc_t* a,
    const acc_t* b,
    const acc_t* mean,
    const acc_t* alpha,
    int64_t n) {
  for (int part = 0; part < 2; ++part) {
    const auto [from, to] = span_of(n, part);
    if (dy != nullptr) {
      for (int64_t i = from; i < to; ++i)
        dx[i] = static_cast<scalar_t>(
            a[i] + b[i] * (static_cast<acc_t>(x[i]) - mean[i]) + alpha[i] * static_cast<acc_t>(dy[i]));
    } else {
      for (int64_t i = from; i < to; ++i)
        dx[i] = static_cast<scalar_t>(a[i] + b[i] * (static_cast<acc_t>(x[i]) - mean[i]));
    }
  }
}

// Positions [begin, end) of all images, whose channels are adjacent.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void column_backward(const Backward<scalar_t, acc_t> k, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / (k.H * k.W), h = i / k.W % k.H, w = i % k.W, stat = k.per_image ? n * k.C : 0;
    element_backward<scalar_t, acc_t>(
        k.dx + n * k.d.b + h * k.d.h + w * k.d.w,
        k.x + n * k.s.b + h * k.s.h + w * k.s.w,
        k.dy == nullptr ? nullptr : k.dy + n * k.g.b + h * k.g.h + w * k.g.w,
        k.a + stat,
        k.b + stat,
        k.mean + stat,
        k.alpha,
        k.C);
  }
}

// Channels [begin, end) of B images, in planes of a few positions that follow each other.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void small_plane_backward(
    const Backward<scalar_t, acc_t> k,
    int64_t B,
    int64_t begin,
    int64_t end) {
  acc_t a[kMostColumns], b[kMostColumns], mean[kMostColumns], alpha[kMostColumns];
  const int64_t each = block_planes(k.W);
  for (int64_t c = begin; c < end; c += each) {
    const int64_t n = std::min(each, end - c);
    for (int64_t i = 0, to = 0; i < n; ++i)
      for (int64_t w = 0; w < k.W; ++w, ++to) {
        a[to] = k.a[c + i];
        b[to] = k.b[c + i];
        mean[to] = k.mean[c + i];
        alpha[to] = k.dy == nullptr ? acc_t(0) : k.alpha[c + i];
      }
    for (int64_t image = 0; image < B; ++image)
      element_backward<scalar_t, acc_t>(
          k.dx + image * k.d.b + c * k.W,
          k.x + image * k.s.b + c * k.W,
          k.dy == nullptr ? nullptr : k.dy + image * k.g.b + c * k.W,
          a,
          b,
          mean,
          alpha,
          n * k.W);
  }
}

template <typename acc_t>
FASTKD_MULTIVERSION void scale_row(const acc_t* var, const acc_t* weight, acc_t eps, int64_t C, acc_t* out) {
  for (int64_t c = 0; c < C; ++c) out[c] = 1 / std::sqrt(var[c] + eps);
  for (int64_t c = 0; c < C && weight != nullptr; ++c) out[c] *= weight[c];
}

// weight / sqrt(running_var + eps), for all channels.
template <typename acc_t>
std::vector<acc_t> scale_of(const std::optional<at::Tensor>& weight, const at::Tensor& running_var, double eps) {
  constexpr auto dtype = c10::CppTypeToScalarType<acc_t>::value;
  const at::Tensor var = running_var.to(dtype).contiguous();
  const at::Tensor w = weight ? weight->to(dtype).contiguous() : at::Tensor();
  std::vector<acc_t> scale(var.numel());
  scale_row<acc_t>(
      var.const_data_ptr<acc_t>(),
      w.defined() ? w.const_data_ptr<acc_t>() : nullptr,
      static_cast<acc_t>(eps),
      var.numel(),
      scale.data());
  return scale;
}

// What a batch norm adds to the gradient: dy, times a scale made of the others.
struct Normalised {
  at::Tensor dy;           // as x
  at::Tensor running_var;  // (C)
  std::optional<at::Tensor> weight;
  double eps;
};

// dx of one layer.
at::Tensor layer_backward(
    const at::Tensor& dmean,  // (Σ C) or (Σ B C), this layer's from `first` on
    const at::Tensor& dvar,   // as dmean
    const at::Tensor& x,      // (B, C, ...)
    const at::Tensor& mean,   // as dmean
    int64_t first,
    bool per_image,
    const Normalised& norm = {}) {
  auto dx = empty_kept(x);
  if (x.numel() == 0) return dx;
  const auto& dy = norm.dy;
  const bool has_dy = dy.defined();
  auto folded = fold_planes<3>({x, dx, has_dy ? dy : x});
  if (!folded) {
    auto dense = norm;
    if (has_dy) dense.dy = dy.contiguous();
    return dx.copy_(layer_backward(dmean, dvar, x.contiguous(), mean, first, per_image, dense));
  }
  const int64_t B = folded->B, C = folded->C, H = folded->H, W = folded->W, groups = groups_of(x, per_image);
  const auto s = folded->strides[0], d = folded->strides[1], g = folded->strides[2];
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "moments_bwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto M = static_cast<acc_t>(per_image ? H * W : B * H * W);
    std::vector<acc_t> a(groups), b(groups);
    const auto *dm = dmean.const_data_ptr<acc_t>() + first, *dv = dvar.const_data_ptr<acc_t>() + first;
    for (int64_t i = 0; i < groups; ++i) {
      a[i] = dm[i] / M;
      b[i] = dv[i] * (2 / M);
    }
    const auto scale = has_dy ? scale_of<acc_t>(norm.weight, norm.running_var, norm.eps) : std::vector<acc_t>();
    const Backward<scalar_t, acc_t> k{
        C,
        H,
        W,
        per_image,
        dx.mutable_data_ptr<scalar_t>(),
        d,
        x.const_data_ptr<scalar_t>(),
        s,
        has_dy ? dy.const_data_ptr<scalar_t>() : nullptr,
        g,
        a.data(),
        b.data(),
        mean.const_data_ptr<acc_t>() + first,
        scale.data()};
    if (s.c == 1 && d.c == 1 && (!has_dy || g.c == 1) && C > 1)
      at::parallel_for(0, B * H * W, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
        column_backward(k, begin, end);
      });
    else if (!per_image && H == 1 && is_small(W) && is_dense(s, W) && is_dense(d, W) && (!has_dy || is_dense(g, W)))
      at::parallel_for(0, C, std::max<int64_t>(1, kGrain / (B * W)), [&](int64_t begin, int64_t end) {
        small_plane_backward(k, B, begin, end);
      });
    else if (!per_image && B * H * W < 2 * kPart)  // as forward cuts it: what a core reads it still has in its cache
      at::parallel_for(0, C, std::max<int64_t>(1, kGrain / (B * H * W)), [&](int64_t begin, int64_t end) {
        for (int64_t n = 0; n < B; ++n) row_backward(k, n, begin, end);
      });
    else
      at::parallel_for(0, B * C, std::max<int64_t>(1, kGrain / (H * W)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin, m; i < end; i += m) {
          m = std::min(end, (i / C + 1) * C) - i;
          row_backward(k, i / C, i % C, i % C + m);
        }
      });
  });
  return dx;
}

std::vector<at::Tensor> moments_bwd_cpu(
    const at::Tensor& dmean_in,   // all layers' channels end to end
    const at::Tensor& dvar_in,    // as dmean
    const at::TensorList inputs,  // per layer (B, C, ...), of one dtype
    const at::Tensor& mean,       // as dmean
    bool per_image) {
  const auto dtype = accumulator(inputs[0]);
  const auto dmean = dmean_in.to(dtype).contiguous(), dvar = dvar_in.to(dtype).contiguous();
  std::vector<at::Tensor> dinputs;
  int64_t first = 0;
  for (const auto& x : inputs) {
    dinputs.push_back(layer_backward(dmean, dvar, x, mean, first, per_image));
    first += groups_of(x, per_image);
  }
  return dinputs;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_fwd_cpu(
    const at::Tensor& x_in,          // (B, C, ...)
    const at::Tensor& running_mean,  // (C)
    const at::Tensor& running_var,   // (C)
    const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias,
    double eps) {
  auto x = x_in;
  const auto dtype = accumulator(x);
  // What a convolution freed last, PyTorch's allocator gives out first, and it is still in the cache.
  const auto y = static_cast<int64_t>(x.nbytes()) < kHot ? at::empty_like(x) : empty_kept(x);
  auto mean = at::empty({x.size(1)}, x.options().dtype(dtype)), var = at::empty_like(mean);
  if (x.numel() == 0) return {y, mean, var};
  auto out = y;
  auto folded = fold_planes<2>({x, y});
  if (!folded) {
    x = x.contiguous();
    out = at::empty_like(x);
    folded = fold_planes<2>({x, out});
  }
  const auto shift = bias ? bias->to(dtype).contiguous() : at::Tensor();
  const auto center = running_mean.to(dtype).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batch_norm_fwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto alpha = scale_of<acc_t>(weight, running_var, eps);
    std::vector<acc_t> beta(alpha.size());
    const auto* running = center.const_data_ptr<acc_t>();
    const auto* added = shift.defined() ? shift.const_data_ptr<acc_t>() : nullptr;
    for (size_t c = 0; c < beta.size(); ++c) beta[c] = -running[c] * alpha[c];
    for (size_t c = 0; c < beta.size() && added != nullptr; ++c) beta[c] += added[c];
    const Output<scalar_t, acc_t> output{
        out.mutable_data_ptr<scalar_t>(), folded->strides[1], alpha.data(), beta.data()};
    const auto* p = x.const_data_ptr<scalar_t>();
    auto *mean_ptr = mean.mutable_data_ptr<acc_t>(), *var_ptr = var.mutable_data_ptr<acc_t>();
    const auto [B, C, H, W, strides] = *folded;
    layer_moments<scalar_t, acc_t>(p, B, C, H, W, strides[0], false, output, mean_ptr, var_ptr);
    mend_means<scalar_t, acc_t>(p, B, C, H, W, strides[0], false, mean_ptr);
  });
  if (!out.is_same(y)) y.copy_(out);
  return {y, mean, var};
}

at::Tensor batch_norm_bwd_cpu(
    const at::Tensor& dy,           // (B, C, ...)
    const at::Tensor& dmean,        // (C)
    const at::Tensor& dvar,         // (C)
    const at::Tensor& x,            // (B, C, ...)
    const at::Tensor& mean,         // (C)
    const at::Tensor& running_var,  // (C)
    const std::optional<at::Tensor>& weight,
    double eps) {
  const auto dtype = accumulator(x);
  const auto dm = dmean.to(dtype).contiguous(), dv = dvar.to(dtype).contiguous();
  return layer_backward(dm, dv, x, mean, 0, false, {dy, running_var, weight, eps});
}

// Σ weight (‖V - var‖ + ‖M - mean‖) and its like, with gradients; moments of all layers end to end.
std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_distance_cpu(
    const at::Tensor& mean_in,       // (Σ rows_l C_l)
    const at::Tensor& var_in,        // as mean
    const at::Tensor& running_mean,  // (Σ C_l)
    const at::Tensor& running_var,   // as running_mean
    at::IntArrayRef channels,        // C_l
    at::IntArrayRef rows,            // 1, or images of "image"
    at::IntArrayRef counts,          // elements of a moment
    at::ArrayRef<double> weights,
    c10::string_view distance) {
  const auto mean = mean_in.contiguous(), var = var_in.contiguous();
  const auto dtype = mean.scalar_type();
  const auto target_mean = running_mean.to(dtype).contiguous(), target_var = running_var.to(dtype).contiguous();
  auto loss = at::empty({}, mean.options()), dmean = at::empty_like(mean), dvar = at::empty_like(mean);
  const bool is_norm = distance == "l2", is_image = distance == "image";
  AT_DISPATCH_FLOATING_TYPES(dtype, "bn_distance_cpu", [&] {
    const auto *m = mean.const_data_ptr<scalar_t>(), *v = var.const_data_ptr<scalar_t>();
    const auto *M = target_mean.const_data_ptr<scalar_t>(), *V = target_var.const_data_ptr<scalar_t>();
    auto *dm = dmean.mutable_data_ptr<scalar_t>(), *dv = dvar.mutable_data_ptr<scalar_t>();
    double total = 0;
    for (size_t l = 0; l < channels.size(); ++l) {
      const int64_t C = channels[l], n = rows[l] * C;
      double of_mean = 0, of_var = 0;
      if (is_image) {
        const double count = static_cast<double>(counts[l]), unbias = count / (count - 1);
        for (int64_t i = 0; i < n; ++i) {
          const double sigma = std::sqrt(v[i] * unbias + 1e-6), e = sigma - std::sqrt(V[i % C] + 1e-6);
          const double d = static_cast<double>(m[i]) - M[i % C], w = weights[l] / static_cast<double>(rows[l]);
          of_mean += d * d;
          of_var += e * e;
          dm[i] = static_cast<scalar_t>(2 * w * d);
          dv[i] = static_cast<scalar_t>(w * unbias * e / sigma);
        }
        total += weights[l] / static_cast<double>(rows[l]) * (of_mean + of_var);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const double d = static_cast<double>(m[i]) - M[i], e = static_cast<double>(v[i]) - V[i];
          of_mean += d * d;
          of_var += e * e;
        }
        double w_mean = 2 * weights[l] / static_cast<double>(channels.size() * C), w_var = w_mean;
        if (is_norm) {
          const double norm_mean = std::sqrt(of_mean), norm_var = std::sqrt(of_var);
          total += weights[l] * (norm_mean + norm_var);
          w_mean = norm_mean == 0 ? 0 : weights[l] / norm_mean;
          w_var = norm_var == 0 ? 0 : weights[l] / norm_var;
        } else {
          total += w_mean / 2 * (of_mean + of_var);
        }
        for (int64_t i = 0; i < n; ++i) {
          dm[i] = static_cast<scalar_t>(w_mean * (static_cast<double>(m[i]) - M[i]));
          dv[i] = static_cast<scalar_t>(w_var * (static_cast<double>(v[i]) - V[i]));
        }
      }
      m += n, v += n, dm += n, dv += n, M += C, V += C;
    }
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(total);
  });
  return {loss, dmean, dvar};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("moments_fwd", &moments_fwd_cpu);
  m.impl("moments_bwd", &moments_bwd_cpu);
  m.impl("batch_norm_fwd", &batch_norm_fwd_cpu);
  m.impl("batch_norm_bwd", &batch_norm_bwd_cpu);
  m.impl("bn_distance", &bn_distance_cpu);
}

}  // namespace fastkd
