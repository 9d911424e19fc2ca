// Blocks of the moments: where work is split, how a block is summed about its pivot, how blocks merge.
#pragma once
#include "blocks.h"
#include "common.h"
#include "moments.h"
#include "thresholds.h"
#include "vector.h"

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
Threshold kRun{"moments.run", 2048};                  // elements of an image's planes whose gradient is formed together
Threshold kSmall{"moments.small", 64};                // positions of a plane that make too short a row
Threshold kGroup{"moments.group", kMostGroup};        // channels of short rows that are taken together, at the most
Threshold kSpan{"moments.span", 1 << 14};             // about as many elements of them in an image
Threshold kFewUnits{"moments.few_units", 64};         // units that keep all cores busy to the end
Threshold kUnit{"moments.unit", 8192};                // elements of a unit that repay it
Threshold kUnits{"moments.units", 4096};              // about as many units as a forward is cut into
Threshold kHot{"moments.hot", 2 << 20};               // bytes that a core's cache holds
Threshold kGrain{"moments.grain", 1 << 13};           // elements per task below which threads cost more than they bring

// Mean and Σ (x - mean)² of C channels.
struct Sums {
  double *mean, *m2;
};

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

// Prefetches n elements from p on, so that they arrive while other elements are processed.
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
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {  // without taking vectors apart
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

// Elements of a layer whose positions fold, or of a part of one.
template <typename scalar_t>
struct Elements {
  const scalar_t* x;
  int64_t B, C, H, W;
  PlaneStrides s;
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

}  // namespace
}  // namespace fastkd
