// Per-channel mean and biased variance of (B, C, ...), alone or of what an eval-mode batch norm normalises, their
// backward, and the distance of such moments to running statistics.
//
// Forward reads x once. A block is summed about a pivot, the mean of its first elements: for n elements and k of these,
// (pivot - mean)^2 <= n/k var, so a mean far above the spread costs 5 bits at the most. Blocks merge pairwise in double
// (Chan et al.) in a fixed order, so the result does not depend on the number of threads.
#include "blocks.h"
#include "common.h"
#include "vector.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastkd {
namespace {

constexpr int64_t kBlock = 2048;       // elements of a block along a row: 8 KB of float32
constexpr int64_t kPart = 4 * kBlock;  // positions of a channel that repay a unit of their own
constexpr int64_t kPivot = 64;         // elements of a block that its pivot is the mean of
constexpr int64_t kRows = 32;          // rows of a block of columns
constexpr int64_t kLead = 4;           // rows that are added up together, and those that the pivot is the mean of
constexpr int64_t kColumns = 512;      // channels of a block of columns
constexpr int64_t kSmall = 16;         // positions of a plane that make too short a row
constexpr int64_t kUnits = 4096;       // about as many units as a forward is cut into
constexpr int64_t kGrain = 1 << 15;    // elements per task below which threads cost more than they bring

struct Moments {
  double count = 0, mean = 0, m2 = 0;

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

// A block of rows under way: deviations from its pivot, and their squares.
template <typename acc_t>
struct Block {
  int64_t n = 0, limit = 0;  // elements
  acc_t pivot = 0;
  Wide<acc_t> deviation, deviation2, squares, squares2;  // two of each: as many additions are under way at once

  FASTKD_INLINE bool has_room(int64_t m) const { return n == 0 || n + m <= limit; }

  // m adjacent elements; next is what will be read after them.
  template <typename scalar_t>
  FASTKD_INLINE void add(const acc_t* v, int64_t m, const scalar_t* next) {
    if (n == 0) start(v, m);
    n += m;
    if (m < kLanes) {
      add_few(v, m);
      return;
    }
    const Wide<acc_t> center(pivot);
    int64_t i = 0;
    for (; i + 2 * kLanes <= m; i += 2 * kLanes) {
      prefetch(next + i, 2 * kLanes);
      const auto d = Wide<acc_t>::load(v + i) - center, d2 = Wide<acc_t>::load(v + i + kLanes) - center;
      deviation = deviation + d;
      deviation2 = deviation2 + d2;
      squares = squares + d * d;
      squares2 = squares2 + d2 * d2;
    }
    for (int64_t left = m - i; left > 0; left -= kLanes) {  // the last vector again, without what has been added
      const int64_t fresh = std::min(left, kLanes);
      const auto d = (Wide<acc_t>::load(v + m - left - (kLanes - fresh)) - center) * Wide<acc_t>::last(fresh);
      deviation = deviation + d;
      squares = squares + d * d;
    }
  }

  FASTKD_INLINE void merge_into(Moments* out) {
    const double count = static_cast<double>(n), inverse = 1 / count, e = (deviation + deviation2).sum();
    out->merge(count, pivot + e * inverse, (squares + squares2).sum() - e * e * inverse);
    n = 0;
  }

 private:
  FASTKD_INLINE void start(const acc_t* v, int64_t m) {
    const int64_t lead = std::min(m, kPivot);
    acc_t sum = 0;
    if (lead == kPivot) {
      Wide<acc_t> sums;
      for (int64_t i = 0; i < kPivot; i += kLanes) sums = sums + Wide<acc_t>::load(v + i);
      sum = sums.sum();
    } else {
      for (int64_t i = 0; i < lead; ++i) sum += v[i];
    }
    pivot = sum / static_cast<acc_t>(lead);
    limit = kBlock / kPivot * lead;
    deviation = deviation2 = squares = squares2 = Wide<acc_t>();
  }

  FASTKD_INLINE void add_few(const acc_t* v, int64_t m) {
    acc_t few[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) few[l] = pivot;
    for (int64_t i = 0; i < m; ++i) few[i] = v[i];
    const auto d = Wide<acc_t>::load(few) - Wide<acc_t>(pivot);
    deviation = deviation + d;
    squares = squares + d * d;
  }
};

// Where y = alpha x + beta of a batch norm goes; none without it.
template <typename scalar_t, typename acc_t>
struct Output {
  scalar_t* y = nullptr;
  PlaneStrides s{};
  const acc_t *alpha = nullptr, *beta = nullptr;  // (C)
};

// One channel: B images of H rows of W elements.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_moments(
    const scalar_t* x,
    const PlaneStrides s,
    int64_t B,
    int64_t H,
    int64_t W,
    const Output<scalar_t, acc_t> out,
    Moments* moments) {
  constexpr bool kConverts = !std::is_same_v<scalar_t, acc_t>;
  constexpr int64_t kPiece = kConverts ? 256 : kBlock;  // elements converted while those before are added up
  const bool is_direct = !kConverts && s.w == 1;
  acc_t held[kPiece];
  Block<acc_t> block;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < W; i += kPiece) {
        const int64_t m = std::min(kPiece, W - i);
        const scalar_t* p = x + b * s.b + h * s.h + i * s.w;
        const acc_t* v = held;
        if (is_direct) {
          if constexpr (!kConverts) v = p;
        } else if (s.w == 1) {
          for (int64_t k = 0; k < m; ++k) held[k] = static_cast<acc_t>(p[k]);
        } else {
          for (int64_t k = 0; k < m; ++k) held[k] = static_cast<acc_t>(p[k * s.w]);
        }
        if (!block.has_room(m)) block.merge_into(moments);
        block.add(v, m, p + m);
        if (out.y != nullptr) {
          const acc_t alpha = *out.alpha, beta = *out.beta;
          scalar_t* y = out.y + b * out.s.b + h * out.s.h + i * out.s.w;
          if (out.s.w == 1) {
            for (int64_t k = 0; k < m; ++k) y[k] = static_cast<scalar_t>(alpha * v[k] + beta);
          } else {
            for (int64_t k = 0; k < m; ++k) y[k * out.s.w] = static_cast<scalar_t>(alpha * v[k] + beta);
          }
        }
      }
  if (block.n > 0) block.merge_into(moments);
}

// Mean and Σ (x - mean)² of each of C <= kColumns adjacent columns.
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
  constexpr bool kConverts = !std::is_same_v<scalar_t, acc_t>;
  acc_t held[kConverts ? kLead * kColumns : 1], pivot[kColumns], deviation[kColumns], squares[kColumns];
  double count = 0;
  for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i0 = 0; i0 < W; i0 += kRows) {
        const int64_t m = std::min(kRows, W - i0);
        const scalar_t* p = x + b * s.b + h * s.h + i0 * s.w;
        for (int64_t i = 0; i < m; i += kLead) {
          const int64_t rows = std::min(kLead, m - i);
          const acc_t* v = held;
          int64_t stride = C;
          if constexpr (kConverts) {
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c < C; ++c) held[r * C + c] = static_cast<acc_t>(p[(i + r) * s.w + c]);
          } else {
            v = p + i * s.w;
            stride = s.w;
          }
          // Rows that are read side by side are no stream to the processor.
          for (int64_t r = kLead; r < 2 * kLead && i0 + i + r < W; ++r) prefetch(p + (i + r) * s.w, C);
          if (i == 0) {
            for (int64_t c = 0; c < C; ++c) pivot[c] = v[c];
            for (int64_t r = 1; r < rows; ++r)
              for (int64_t c = 0; c < C; ++c) pivot[c] += v[r * stride + c];
            const acc_t share = 1 / static_cast<acc_t>(rows);
            for (int64_t c = 0; c < C; ++c) pivot[c] *= share;
            for (int64_t c = 0; c < C; ++c) deviation[c] = squares[c] = 0;
          }
          if (rows == kLead) {  // one load and store of the sums for all of them
            const acc_t *v0 = v, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
            for (int64_t c = 0; c < C; ++c) {
              const acc_t d0 = v0[c] - pivot[c], d1 = v1[c] - pivot[c], d2 = v2[c] - pivot[c], d3 = v3[c] - pivot[c];
              deviation[c] += (d0 + d1) + (d2 + d3);
              squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
            }
          } else {
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c < C; ++c) {
                const acc_t d = v[r * stride + c] - pivot[c];
                deviation[c] += d;
                squares[c] += d * d;
              }
          }
          if (out.y == nullptr) continue;
          scalar_t* y = out.y + b * out.s.b + h * out.s.h + (i0 + i) * out.s.w;
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < C; ++c)
              y[r * out.s.w + c] = static_cast<scalar_t>(out.alpha[c] * v[r * stride + c] + out.beta[c]);
        }
        // As merge_block, whose divisions are the same for all channels here.
        const double total = count + static_cast<double>(m);
        const double inverse = 1 / static_cast<double>(m), share = static_cast<double>(m) / total;
        for (int64_t c = 0; c < C; ++c) {
          const double e = deviation[c], delta = pivot[c] + e * inverse - mean[c];
          mean[c] += delta * share;
          m2[c] += squares[c] - e * e * inverse + delta * delta * (count * share);
        }
        count = total;
      }
}

// Joins the W columns of each of n channels, all of `count` elements: equal counts need no division.
template <typename acc_t>
FASTKD_MULTIVERSION void join_columns(
    const double* mean_in,  // (n, W)
    const double* m2_in,    // (n, W)
    int64_t n,
    int64_t W,
    double count,
    acc_t* mean,   // (n)
    acc_t* var) {  // (n)
  const double inverse = 1 / static_cast<double>(W);
  for (int64_t c = 0; c < n; ++c) {
    const double *of = mean_in + c * W, *m2_of = m2_in + c * W;
    double sum = 0, spread = 0, m2 = 0;
#pragma omp simd reduction(+ : sum, m2)
    for (int64_t w = 0; w < W; ++w) {
      sum += of[w] - of[0];
      m2 += m2_of[w];
    }
    const double center = of[0] + sum * inverse;
#pragma omp simd reduction(+ : spread)
    for (int64_t w = 0; w < W; ++w) spread += (of[w] - center) * (of[w] - center);
    mean[c] = static_cast<acc_t>(center);
    var[c] = variance<acc_t>((m2 / count + spread) * inverse);
  }
}

// Planes of a few positions: each position of a channel is a column over the images.
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
  const int64_t each = kColumns / W, units = (C + each - 1) / each;
  at::parallel_for(0, units, std::max<int64_t>(1, kGrain / (kColumns * B)), [&](int64_t begin, int64_t end) {
    double mean_of[kColumns], m2_of[kColumns];
    acc_t alpha[kColumns], beta[kColumns];
    for (int64_t c = begin * each; c < std::min(end * each, C); c += each) {
      const int64_t n = std::min(each, C - c);
      auto here = out;
      if (out.y != nullptr) {
        for (int64_t k = 0; k < n; ++k) {
          std::fill_n(alpha + k * W, W, out.alpha[c + k]);
          std::fill_n(beta + k * W, W, out.beta[c + k]);
        }
        here = {out.y + c * W, {0, 1, 0, out.s.b}, alpha, beta};
      }
      column_moments<scalar_t, acc_t>(x + c * W, {0, 1, 0, stride_b}, 1, 1, B, n * W, here, mean_of, m2_of);
      join_columns<acc_t>(mean_of, m2_of, n, W, static_cast<double>(B), mean + c, var + c);
    }
  });
}

// Whether planes of W positions follow each other.
bool is_dense(const PlaneStrides& s, int64_t W) {
  return s.w == 1 && s.c == W;
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
  const bool is_small = W <= kSmall || (W <= kPivot && B >= kRows / 4);
  if (!columns && !per_image && C > 1 && H == 1 && is_small && is_dense(s, W) &&
      (out.y == nullptr || is_dense(out.s, W)))
    return small_plane_moments(x, B, C, W, s.b, out, mean, var);

  // A unit is one channel (or block of channels) of some images or of a part of a row. Their number depends on the
  // shape alone, and is small: each costs a merge.
  const int64_t wanted =
      std::clamp(B * H * W / (columns ? kRows : kPart), int64_t(1), std::max(kUnits / C, int64_t(16)));
  const int64_t sets = per_image ? B : std::min(wanted, B);
  const int64_t parts = per_image ? 1 : std::clamp(wanted / sets, int64_t(1), (W + kRows - 1) / kRows);
  const int64_t tiles = columns ? (C + kColumns - 1) / kColumns : C;
  const int64_t elements = std::max<int64_t>(1, B * C * H * W / (sets * parts * tiles));
  const int64_t groups = per_image ? B * C : C, rest = per_image ? 1 : sets * parts;
  std::vector<Moments> partial(sets * parts * C);  // (sets, parts, C)
  const auto finish = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Moments& total = partial[i];
      for (int64_t k = 1; k < rest; ++k) {  // in order into the first
        const Moments& other = partial[k * groups + i];
        total.merge(other.count, other.mean, other.m2);
      }
      mean[i] = static_cast<acc_t>(total.mean);
      var[i] = variance<acc_t>(total.m2 / total.count);
    }
  };
  at::parallel_for(0, sets * parts * tiles, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t set = unit / tiles / parts, part = unit / tiles % parts;
      const int64_t c = unit % tiles * (columns ? kColumns : 1);
      const int64_t w0 = part * W / parts, w1 = (part + 1) * W / parts;
      const int64_t b0 = set * B / sets, b1 = (set + 1) * B / sets;
      auto here = out;
      if (out.y != nullptr) {
        here.y += b0 * out.s.b + c * out.s.c + w0 * out.s.w;
        here.alpha += c;
        here.beta += c;
      }
      const scalar_t* p = x + b0 * s.b + c * s.c + w0 * s.w;
      const int64_t first = unit / tiles * C + c, n = columns ? std::min(kColumns, C - c) : 1;
      Moments* moments = &partial[first];
      if (columns) {
        double mean_of[kColumns], m2_of[kColumns];
        column_moments<scalar_t, acc_t>(p, s, b1 - b0, H, w1 - w0, n, here, mean_of, m2_of);
        const auto count = static_cast<double>((b1 - b0) * H * (w1 - w0));
        for (int64_t k = 0; k < n; ++k) moments[k] = {count, mean_of[k], m2_of[k]};
      } else {
        row_moments<scalar_t, acc_t>(p, s, b1 - b0, H, w1 - w0, here, moments);
      }
      if (rest == 1) finish(first, first + n);
    }
  });
  if (rest > 1) at::parallel_for(0, groups, std::max<int64_t>(1, 4096 / rest), finish);
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
  const bool adjacent = k.d.w == 1 && k.s.w == 1 && (k.dy == nullptr || k.g.w == 1);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t stat = k.per_image ? n * k.C + c : c;
    const acc_t a = k.a[stat], b = k.b[stat], mean = k.mean[stat], alpha = k.dy == nullptr ? 0 : k.alpha[c];
    for (int64_t h = 0; h < k.H; ++h) {
      scalar_t* dx = k.dx + n * k.d.b + c * k.d.c + h * k.d.h;
      const scalar_t* x = k.x + n * k.s.b + c * k.s.c + h * k.s.h;
      if (k.dy != nullptr) {
        const scalar_t* dy = k.dy + n * k.g.b + c * k.g.c + h * k.g.h;
        if (adjacent) {
          for (int64_t w = 0; w < k.W; ++w)
            dx[w] =
                static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean) + alpha * static_cast<acc_t>(dy[w]));
        } else {
          for (int64_t w = 0; w < k.W; ++w)
            dx[w * k.d.w] = static_cast<scalar_t>(
                a + b * (static_cast<acc_t>(x[w * k.s.w]) - mean) + alpha * static_cast<acc_t>(dy[w * k.g.w]));
        }
      } else if (adjacent) {
        for (int64_t w = 0; w < k.W; ++w) dx[w] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w]) - mean));
      } else {
        for (int64_t w = 0; w < k.W; ++w)
          dx[w * k.d.w] = static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[w * k.s.w]) - mean));
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
  if (dy != nullptr) {
    for (int64_t i = 0; i < n; ++i)
      dx[i] = static_cast<scalar_t>(
          a[i] + b[i] * (static_cast<acc_t>(x[i]) - mean[i]) + alpha[i] * static_cast<acc_t>(dy[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) dx[i] = static_cast<scalar_t>(a[i] + b[i] * (static_cast<acc_t>(x[i]) - mean[i]));
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
  acc_t a[kColumns], b[kColumns], mean[kColumns], alpha[kColumns];
  const int64_t each = kColumns / k.W;
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
  auto dx = empty_gradient(x);
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
    else if (!per_image && H == 1 && W <= kSmall && is_dense(s, W) && is_dense(d, W) && (!has_dy || is_dense(g, W)))
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
  const auto y = at::empty_like(x);
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
