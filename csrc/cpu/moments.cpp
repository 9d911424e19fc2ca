// Per-channel mean and biased variance of (B, C, ...), alone or of what an eval-mode batch norm normalises, their
// backward, and the distance of such moments to running statistics.
//
// Forward reads x once: a block that fits in L1 is summed, then its deviations from its own mean are, so a mean far
// above the spread costs no digits; blocks merge pairwise in double (Chan et al.) in a fixed order, so the
// result does not depend on the number of threads.
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
constexpr int64_t kRows = 32;          // rows of a block of columns
constexpr int64_t kColumns = 256;      // channels of a block of columns: 32 KB of float32 with kRows
constexpr int64_t kWide = 4 * kLanes;  // partial sums of a row: as many additions are under way at once
constexpr int64_t kSmall = 16;         // positions of a plane that make too short a row
constexpr int64_t kUnits = 4096;       // about as many units as a forward is cut into
constexpr int64_t kGrain = 1 << 15;    // elements per task below which threads cost more than they bring

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  FASTKD_INLINE void merge(double n, double mean_n, double m2_n) {
    const double total = count + n, share = n / total, delta = mean_n - mean;
    mean += delta * share;
    m2 += m2_n + delta * delta * (count * share);
    count = total;
  }
};

// Folds in a block from its rounded mean and the sums of deviations and squared deviations from it.
FASTKD_INLINE void merge_block(Moments* out, int64_t n, double mean, double deviation, double m2) {
  const double count = static_cast<double>(n);
  out->merge(count, mean + deviation / count, m2 - deviation * deviation / count);
}

// Asks for n elements from p on, so that they come from memory while others are computed with.
template <typename scalar_t>
FASTKD_INLINE void prefetch(const scalar_t* p, int64_t n) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i);
#endif
}

// The kWide partial sums of a row, in halves.
template <typename acc_t>
FASTKD_INLINE acc_t sum_of(const acc_t* part) {
  Lanes<acc_t> sums(0);
  for (int64_t l = 0; l < kLanes; ++l)
    sums[l] = (part[l] + part[l + kLanes]) + (part[l + 2 * kLanes] + part[l + 3 * kLanes]);
  return sums.sum();
}

// n adjacent elements; next is what will be read after them.
template <typename scalar_t, typename acc_t>
FASTKD_INLINE void merge_row(const acc_t* v, int64_t n, const scalar_t* next, Moments* out) {
  if (n < kWide) {  // folding the sums would cost more than they do
    acc_t sum = 0, deviation = 0, m2 = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += v[i];
    const acc_t mean = sum / static_cast<acc_t>(n);
#pragma omp simd reduction(+ : deviation, m2)
    for (int64_t i = 0; i < n; ++i) {
      const acc_t d = v[i] - mean;
      deviation += d;
      m2 += d * d;
    }
    merge_block(out, n, mean, deviation, m2);
    return;
  }
  const int64_t whole = n / kWide * kWide;
  acc_t part[kWide] = {}, squares[kWide] = {};
  for (int64_t i = 0; i < whole; i += kWide)
    for (int64_t l = 0; l < kWide; ++l) part[l] += v[i + l];
  for (int64_t i = whole; i < n; ++i) part[i - whole] += v[i];
  const acc_t sum = sum_of(part);
  const acc_t mean = sum / static_cast<acc_t>(n);
  for (int64_t l = 0; l < kWide; ++l) part[l] = 0;
  for (int64_t i = 0; i < whole; i += kWide) {
    prefetch(next + i, kWide);
    for (int64_t l = 0; l < kWide; ++l) {
      const acc_t d = v[i + l] - mean;
      part[l] += d;
      squares[l] += d * d;
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    const acc_t d = v[i] - mean;
    part[i - whole] += d;
    squares[i - whole] += d * d;
  }
  merge_block(out, n, mean, sum_of(part), sum_of(squares));
}

// Where y = alpha x + beta of a batch norm goes; none without it.
template <typename scalar_t, typename acc_t>
struct Output {
  scalar_t* y = nullptr;
  PlaneStrides s{};
  const acc_t *alpha = nullptr, *beta = nullptr;  // (C)
};

// One channel: B images of H rows of W elements. Short rows are gathered into blocks.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_moments(
    const scalar_t* x,
    const PlaneStrides s,
    int64_t B,
    int64_t H,
    int64_t W,
    const Output<scalar_t, acc_t> out,
    Moments* moments) {
  acc_t held[kBlock];
  int64_t n = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      const scalar_t* row = x + b * s.b + h * s.h;
      for (int64_t i = 0, m; i < W; i += m) {
        const scalar_t* p = row + i * s.w;
        const acc_t* v = held + n;
        bool is_direct = false;
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          is_direct = n == 0 && s.w == 1 && W - i >= kBlock / 2;
          if (is_direct) v = p;
        }
        m = std::min(kBlock - n, W - i);
        if (is_direct) {
          merge_row(v, m, p + m, moments);
        } else if (s.w == 1) {
          for (int64_t k = 0; k < m; ++k) held[n + k] = static_cast<acc_t>(p[k]);
        } else {
          for (int64_t k = 0; k < m; ++k) held[n + k] = static_cast<acc_t>(p[k * s.w]);
        }
        if (out.y != nullptr) {
          const acc_t alpha = *out.alpha, beta = *out.beta;
          scalar_t* y = out.y + b * out.s.b + h * out.s.h + i * out.s.w;
          if (out.s.w == 1) {
            for (int64_t k = 0; k < m; ++k) y[k] = static_cast<scalar_t>(alpha * v[k] + beta);
          } else {
            for (int64_t k = 0; k < m; ++k) y[k * out.s.w] = static_cast<scalar_t>(alpha * v[k] + beta);
          }
        }
        if (is_direct) continue;
        n += m;
        if (n < kBlock) continue;
        merge_row(held, n, p + m, moments);
        n = 0;
      }
    }
  if (n > 0) merge_row(held, n, x, moments);
}

// The same of C <= kColumns adjacent channels.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void column_moments(
    const scalar_t* x,
    const PlaneStrides s,
    int64_t B,
    int64_t H,
    int64_t W,
    int64_t C,
    const Output<scalar_t, acc_t> out,
    Moments* moments) {
  constexpr bool kConverts = !std::is_same_v<scalar_t, acc_t>;
  acc_t held[kConverts ? kRows * kColumns : 1], mean[kColumns], deviation[kColumns], m2[kColumns];
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i0 = 0; i0 < W; i0 += kRows) {
        const int64_t m = std::min(kRows, W - i0);
        const scalar_t* p = x + b * s.b + h * s.h + i0 * s.w;
        const acc_t* v = held;
        int64_t stride = C;
        if constexpr (kConverts) {
          for (int64_t i = 0; i < m; ++i)
            for (int64_t c = 0; c < C; ++c) held[i * C + c] = static_cast<acc_t>(p[i * s.w + c]);
        } else {
          v = p;
          stride = s.w;
        }
        for (int64_t c = 0; c < C; ++c) mean[c] = deviation[c] = m2[c] = 0;
        int64_t i = 0;
        for (; i + 4 <= m; i += 4) {  // four rows for each load and store of the sums
          const acc_t *v0 = v + i * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
          for (int64_t c = 0; c < C; ++c) mean[c] += (v0[c] + v1[c]) + (v2[c] + v3[c]);
        }
        for (; i < m; ++i)
          for (int64_t c = 0; c < C; ++c) mean[c] += v[i * stride + c];
        for (int64_t c = 0; c < C; ++c) mean[c] /= static_cast<acc_t>(m);
        for (i = 0; i + 4 <= m; i += 4) {
          const acc_t *v0 = v + i * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
          for (int64_t c = 0; c < C; ++c) {
            const acc_t d0 = v0[c] - mean[c], d1 = v1[c] - mean[c], d2 = v2[c] - mean[c], d3 = v3[c] - mean[c];
            deviation[c] += (d0 + d1) + (d2 + d3);
            m2[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
          }
        }
        for (; i < m; ++i)
          for (int64_t c = 0; c < C; ++c) {
            const acc_t d = v[i * stride + c] - mean[c];
            deviation[c] += d;
            m2[c] += d * d;
          }
        // As merge_block, whose divisions are the same for all channels here.
        const double count = moments[0].count, total = count + static_cast<double>(m);
        const double inverse = 1 / static_cast<double>(m), share = static_cast<double>(m) / total;
        for (int64_t c = 0; c < C; ++c) {
          const double e = deviation[c], delta = mean[c] + e * inverse - moments[c].mean;
          moments[c].mean += delta * share;
          moments[c].m2 += m2[c] - e * e * inverse + delta * delta * (count * share);
          moments[c].count = total;
        }
        if (out.y == nullptr) continue;
        scalar_t* y = out.y + b * out.s.b + h * out.s.h + i0 * out.s.w;
        for (i = 0; i < m; ++i)
          for (int64_t c = 0; c < C; ++c)
            y[i * out.s.w + c] = static_cast<scalar_t>(out.alpha[c] * v[i * stride + c] + out.beta[c]);
      }
}

// Planes of a few positions: each position of a channel is a column over the images. Equal counts need no division.
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
  const int64_t columns = C * W;
  std::vector<acc_t> alpha(out.y == nullptr ? 0 : columns), beta(alpha.size());
  for (int64_t c = 0; c < C && out.y != nullptr; ++c) {
    std::fill_n(alpha.begin() + c * W, W, out.alpha[c]);
    std::fill_n(beta.begin() + c * W, W, out.beta[c]);
  }
  std::vector<Moments> moments(columns);
  const int64_t tiles = (columns + kColumns - 1) / kColumns;
  at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (kColumns * B)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kColumns; i < std::min(end * kColumns, columns); i += kColumns) {
      auto here = out;
      if (out.y != nullptr) here = {out.y + i, {0, 1, 0, out.s.b}, alpha.data() + i, beta.data() + i};
      const int64_t n = std::min(kColumns, columns - i);
      column_moments<scalar_t, acc_t>(x + i, {0, 1, 0, stride_b}, 1, 1, B, n, here, &moments[i]);
    }
  });
  const auto n = static_cast<double>(B), inverse = 1 / static_cast<double>(W);
  for (int64_t c = 0; c < C; ++c) {
    const Moments* of = &moments[c * W];
    double sum = 0, m2 = 0;
    for (int64_t w = 0; w < W; ++w) sum += of[w].mean - of[0].mean;
    const double center = of[0].mean + sum * inverse;
    for (int64_t w = 0; w < W; ++w) m2 += of[w].m2 + n * (of[w].mean - center) * (of[w].mean - center);
    mean[c] = static_cast<acc_t>(center);
    var[c] = static_cast<acc_t>(m2 * inverse / n);
  }
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
  const auto is_dense = [W](const PlaneStrides& t) { return t.w == 1 && t.c == W; };
  if (!columns && !per_image && C > 1 && H == 1 && W <= kSmall && is_dense(s) && (out.y == nullptr || is_dense(out.s)))
    return small_plane_moments(x, B, C, W, s.b, out, mean, var);

  // A unit is one channel (or block of channels) of some images or of a part of a row. Their number depends on the
  // shape alone, and is small: each costs a merge.
  const int64_t least = columns ? kRows : 4 * kBlock;  // positions that repay a unit
  const int64_t wanted = std::clamp(B * H * W / least, int64_t(1), std::max(kUnits / C, int64_t(16)));
  const int64_t sets = per_image ? B : std::min(wanted, B);
  const int64_t parts = per_image ? 1 : std::clamp(wanted / sets, int64_t(1), (W + kRows - 1) / kRows);
  const int64_t tiles = columns ? (C + kColumns - 1) / kColumns : C;
  const int64_t elements = std::max<int64_t>(1, B * C * H * W / (sets * parts * tiles));
  std::vector<Moments> partial(sets * parts * C);  // (sets, parts, C)
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
      Moments* moments = &partial[unit / tiles * C + c];
      if (columns)
        column_moments<scalar_t, acc_t>(p, s, b1 - b0, H, w1 - w0, std::min(kColumns, C - c), here, moments);
      else
        row_moments<scalar_t, acc_t>(p, s, b1 - b0, H, w1 - w0, here, moments);
    }
  });
  const int64_t groups = per_image ? B * C : C, rest = per_image ? 1 : sets * parts;
  at::parallel_for(0, groups, std::max<int64_t>(1, 4096 / rest), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Moments& total = partial[i];
      for (int64_t k = 1; k < rest; ++k) {  // in order into the first
        const Moments& other = partial[k * groups + i];
        total.merge(other.count, other.mean, other.m2);
      }
      mean[i] = static_cast<acc_t>(total.mean);
      var[i] = static_cast<acc_t>(total.m2 / total.count);
    }
  });
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
        layer_moments<scalar_t, acc_t>(
            x.const_data_ptr<scalar_t>(), B, folded->C, folded->H, W, s, per_image, {}, mean_ptr, var_ptr);
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

// Channels [begin, end) of all images, one after the other.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void row_backward(const Backward<scalar_t, acc_t> k, int64_t begin, int64_t end) {
  const bool adjacent = k.d.w == 1 && k.s.w == 1 && (k.dy == nullptr || k.g.w == 1);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / k.C, c = i % k.C, stat = k.per_image ? i : c;
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

// Positions [begin, end) of all images, whose channels are adjacent.
template <typename scalar_t, typename acc_t>
FASTKD_MULTIVERSION void column_backward(const Backward<scalar_t, acc_t> k, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / (k.H * k.W), h = i / k.W % k.H, w = i % k.W, stat = k.per_image ? n * k.C : 0;
    scalar_t* dx = k.dx + n * k.d.b + h * k.d.h + w * k.d.w;
    const scalar_t* x = k.x + n * k.s.b + h * k.s.h + w * k.s.w;
    const acc_t *a = k.a + stat, *b = k.b + stat, *mean = k.mean + stat;
    if (k.dy != nullptr) {
      const scalar_t* dy = k.dy + n * k.g.b + h * k.g.h + w * k.g.w;
      for (int64_t c = 0; c < k.C; ++c)
        dx[c] = static_cast<scalar_t>(
            a[c] + b[c] * (static_cast<acc_t>(x[c]) - mean[c]) + k.alpha[c] * static_cast<acc_t>(dy[c]));
    } else {
      for (int64_t c = 0; c < k.C; ++c)
        dx[c] = static_cast<scalar_t>(a[c] + b[c] * (static_cast<acc_t>(x[c]) - mean[c]));
    }
  }
}

// weight / sqrt(running_var + eps), for all channels.
template <typename acc_t>
std::vector<acc_t> scale_of(const std::optional<at::Tensor>& weight, const at::Tensor& running_var, double eps) {
  constexpr auto dtype = c10::CppTypeToScalarType<acc_t>::value;
  const at::Tensor var = running_var.to(dtype).contiguous();
  const at::Tensor w = weight ? weight->to(dtype).contiguous() : at::Tensor();
  std::vector<acc_t> scale(var.numel());
  for (size_t c = 0; c < scale.size(); ++c) {
    scale[c] = 1 / std::sqrt(var.const_data_ptr<acc_t>()[c] + static_cast<acc_t>(eps));
    if (w.defined()) scale[c] *= w.const_data_ptr<acc_t>()[c];
  }
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
  auto dx = at::empty_like(x);
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
    for (int64_t i = 0; i < groups; ++i) {
      a[i] = dmean.const_data_ptr<acc_t>()[first + i] / M;
      b[i] = dvar.const_data_ptr<acc_t>()[first + i] * (2 / M);
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
    else
      at::parallel_for(0, B * C, std::max<int64_t>(1, kGrain / (H * W)), [&](int64_t begin, int64_t end) {
        row_backward(k, begin, end);
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
    for (size_t c = 0; c < beta.size(); ++c) {
      beta[c] = -center.const_data_ptr<acc_t>()[c] * alpha[c];
      if (shift.defined()) beta[c] += shift.const_data_ptr<acc_t>()[c];
    }
    const Output<scalar_t, acc_t> output{
        out.mutable_data_ptr<scalar_t>(), folded->strides[1], alpha.data(), beta.data()};
    layer_moments<scalar_t, acc_t>(
        x.const_data_ptr<scalar_t>(),
        folded->B,
        folded->C,
        folded->H,
        folded->W,
        folded->strides[0],
        false,
        output,
        mean.mutable_data_ptr<acc_t>(),
        var.mutable_data_ptr<acc_t>());
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
