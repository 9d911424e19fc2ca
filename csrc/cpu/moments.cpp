// Per-channel mean and biased variance of (B, C, ...), alone or of what an eval-mode batch norm normalises, their
// backward, and the distance of such moments to running statistics.
//
// Forward reads x once. A block is summed about a pivot, the mean of its first elements: for n elements and k of these,
// (pivot - mean)^2 <= n/k var, so a mean far above the spread costs 5 bits at the most. Blocks merge pairwise in double
// (Chan et al.) in a fixed order, so the result does not depend on the number of threads.
#include "cpu/moments_blocks.h"
#include "cpu/moments_rows.h"
#include "cpu/moments_columns.h"
#include "cpu/moments_planes.h"
#include "cpu/moments_backward.h"
#include "cpu/moments_distance.h"

namespace fastkd {
namespace {

// Merges the pieces of n groups, `stride` apart, in order into the first one.
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
  for (int64_t i = 0; i < n; ++i) var[i] = static_cast<acc_t>(not_negative(m2_of[i] / count));
}

// The moments of a layer; y too if out has one, whose layout is planes.strides[1].
template <typename scalar_t, typename acc_t>
void layer_moments(
    const Elements<scalar_t> in,
    bool per_image,
    const Output<scalar_t, acc_t> out,
    acc_t* mean,   // (C) or (B, C)
    acc_t* var) {  // as mean
  const int64_t B = in.B, C = in.C, H = in.H, W = in.W;
  const auto s = in.s;
  const bool columns = s.c == 1 && C > 1 && (out.y == nullptr || out.s.c == 1);
  if (!columns && !per_image && C > 1 && H == 1 && is_small(W) && is_dense(s, W) &&
      (out.y == nullptr || is_dense(out.s, W)))
    return small_plane_moments(in, out, mean, var);

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
  parallel_for(
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
          const Elements<scalar_t> block{in.x + b0 * s.b + c * s.c + w0 * s.w, b1 - b0, n, H, w1 - w0, s};
          const int64_t piece = unit / tiles, first = piece * C + c;
          const auto moments = columns ? column_moments<scalar_t, acc_t> : row_moments<scalar_t, acc_t>;
          moments(block, here, {&means[first], &m2s[first]});
          if (pieces == 1) finish(first, first + n);
        }
      });
  if (pieces > 1) parallel_for(0, groups, std::max<int64_t>(1, kGrain / pieces), finish);
}

// Corrects the means of inputs with an infinity, which differences turn into NaN; the sum does not.
template <typename scalar_t, typename acc_t>
void mend_means(
    const Elements<scalar_t> in,
    bool per_image,
    acc_t* mean) {  // (C) or (B, C)
  const auto [x, B, C, H, W, s] = in;
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

std::tuple<Tensor, Tensor> moments_fwd_cpu(
    const std::vector<Tensor>& inputs,  // per layer (B, C, ...), of one dtype
    bool per_image) {
  const auto moments = empty_moments(inputs, per_image);
  FASTKD_DISPATCH(inputs[0].scalar_type(), "moments_fwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    auto *mean_ptr = std::get<0>(moments).mutable_data_ptr<acc_t>(),
         *var_ptr = std::get<1>(moments).mutable_data_ptr<acc_t>();
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
        const Elements<scalar_t> layer{x.const_data_ptr<scalar_t>(), B, folded->C, folded->H, W, s};
        layer_moments<scalar_t, acc_t>(layer, per_image, {}, mean_ptr, var_ptr);
        mend_means<scalar_t, acc_t>(layer, per_image, mean_ptr);
      }
      mean_ptr += n;
      var_ptr += n;
    }
  });
  return moments;
}

std::vector<Tensor> moments_bwd_cpu(
    const Tensor& dmean_in,             // all layers' channels end to end
    const Tensor& dvar_in,              // as dmean
    const std::vector<Tensor>& inputs,  // per layer (B, C, ...), of one dtype
    const Tensor& mean,                 // as dmean
    bool per_image) {
  const auto dtype = accumulator(inputs[0]);
  const auto dmean = dmean_in.to(dtype).contiguous(), dvar = dvar_in.to(dtype).contiguous();
  const auto means = mean.contiguous();
  std::vector<Tensor> dinputs;
  int64_t first = 0;
  for (const auto& x : inputs) {
    dinputs.push_back(layer_backward(dmean, dvar, x, means, first, per_image));
    first += groups_of(x, per_image);
  }
  return dinputs;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd_cpu(
    const Tensor& x_in,          // (B, C, ...)
    const Tensor& running_mean,  // (C)
    const Tensor& running_var,   // (C)
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    double eps) {
  auto x = x_in;
  const auto dtype = accumulator(x);
  // PyTorch's allocator reuses the block that a convolution freed last, and that block is still in cache.
  const auto y = static_cast<int64_t>(x.nbytes()) < kHot ? empty_like(x) : empty_kept(x);
  const auto moments = empty_moments({x}, false);
  const auto &mean = std::get<0>(moments), &var = std::get<1>(moments);
  if (x.numel() == 0) return {y, mean, var};
  auto out = y;
  auto folded = fold_planes<2>({x, y});
  if (!folded) {
    x = x.contiguous();
    out = empty_like(x);
    folded = fold_planes<2>({x, out});
  }
  const auto shift = bias ? bias->to(dtype).contiguous() : Tensor();
  const auto center = running_mean.to(dtype).contiguous();
  FASTKD_DISPATCH(x.scalar_type(), "batch_norm_fwd_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto alpha = scale_of<acc_t>(weight, running_var, eps);
    std::vector<acc_t> beta(alpha.size());
    const auto* running = center.const_data_ptr<acc_t>();
    const auto* added = shift.defined() ? shift.const_data_ptr<acc_t>() : nullptr;
    for (size_t c = 0; c < beta.size(); ++c) beta[c] = -running[c] * alpha[c];
    for (size_t c = 0; c < beta.size() && added != nullptr; ++c) beta[c] += added[c];
    const Output<scalar_t, acc_t> output{
        out.mutable_data_ptr<scalar_t>(), folded->strides[1], alpha.data(), beta.data()};
    const auto [B, C, H, W, strides] = *folded;
    const Elements<scalar_t> layer{x.const_data_ptr<scalar_t>(), B, C, H, W, strides[0]};
    layer_moments<scalar_t, acc_t>(layer, false, output, mean.mutable_data_ptr<acc_t>(), var.mutable_data_ptr<acc_t>());
    mend_means<scalar_t, acc_t>(layer, false, mean.mutable_data_ptr<acc_t>());
  });
  if (!out.is_same(y)) y.copy_(out);
  return {y, mean, var};
}

Tensor batch_norm_bwd_cpu(
    const Tensor& dy,           // (B, C, ...)
    const Tensor& dmean,        // (C)
    const Tensor& dvar,         // (C)
    const Tensor& x,            // (B, C, ...)
    const Tensor& mean,         // (C)
    const Tensor& running_var,  // (C)
    const std::optional<Tensor>& weight,
    double eps) {
  const auto dtype = accumulator(x);
  const auto dm = dmean.to(dtype).contiguous(), dv = dvar.to(dtype).contiguous();
  return layer_backward(dm, dv, x, mean.contiguous(), 0, false, {dy, running_var, weight, eps});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  implement<moments_fwd_cpu>(m, "moments_fwd");
  implement<moments_bwd_cpu>(m, "moments_bwd");
  implement<batch_norm_fwd_cpu>(m, "batch_norm_fwd");
  implement<batch_norm_bwd_cpu>(m, "batch_norm_bwd");
  implement<bn_distance_cpu>(m, "bn_distance");
}

}  // namespace fastkd
