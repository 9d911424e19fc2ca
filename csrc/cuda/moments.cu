// Per-channel mean and biased variance of (B, C, ...), alone or of what an eval-mode batch norm normalises, their
// backward, and the distance of such moments to running statistics. All layers of a call share one launch.
//
// A group is a channel (or a channel of an image); its items are the elements averaged. A block of kX x kY threads
// takes kX threads' groups, kY threads' items at a time, so that neighbouring threads read neighbouring addresses:
// along channels for channels-last, along positions for planes, 16 bytes a thread (8 of short planes) where alignment
// allows. Odd planes are read in runs of several (moments_runs.cuh). Partial moments merge pairwise in a fixed order:
// no atomics.
#include "cuda/moments_layers.cuh"
#include "cuda/moments_runs.cuh"
#include "cuda/moments_forward.cuh"
#include "cuda/moments_backward.cuh"
#include "cuda/moments_distance.cuh"
#include "cuda/moments_scale.cuh"

namespace fastkd {
namespace {

std::tuple<Tensor, Tensor> moments_fwd_cuda(
    const std::vector<Tensor>& inputs,  // per layer (B, C, ...), of one dtype
    bool per_image) {
  const OnDevice guard(inputs[0]);
  auto [mean, var] = empty_moments(inputs, per_image);
  const auto dtype = inputs[0].scalar_type();
  std::vector<Tensor> held;  // copies of layers that do not fold
  Launch launch;
  int64_t first = 0;
  for (const auto& x : inputs) {
    if (launch.is_full()) {
      launch_fwd(launch, dtype, per_image, mean, var);
      launch = {};
    }
    if (x.numel() > 0 && !launch.add(x, {}, {}, first, per_image)) {
      held.push_back(x.contiguous());
      launch.add(held.back(), {}, {}, first, per_image);
    }
    first += groups_of(x, per_image);
  }
  launch_fwd(launch, dtype, per_image, mean, var);
  return {mean, var};
}

std::vector<Tensor> moments_bwd_cuda(
    const Tensor& dmean_in,             // all layers' channels end to end
    const Tensor& dvar_in,              // as dmean
    const std::vector<Tensor>& inputs,  // per layer (B, C, ...), of one dtype
    const Tensor& mean_in,              // as dmean
    bool per_image) {
  const OnDevice guard(inputs[0]);
  const auto acc = accumulator(inputs[0]), dtype = inputs[0].scalar_type();
  const auto dmean = dmean_in.to(acc).contiguous(), dvar = dvar_in.to(acc).contiguous(), mean = mean_in.contiguous();
  std::vector<Tensor> dinputs, held;
  std::vector<std::pair<size_t, Tensor>> copies;  // gradients of layers that do not fold
  Launch launch;
  int64_t first = 0;
  for (const auto& x : inputs) {
    if (launch.is_full()) {
      launch_bwd(launch, dtype, per_image, dmean, dvar, mean);
      launch = {};
    }
    dinputs.push_back(empty_like(x));
    if (x.numel() > 0 && !launch.add(x, dinputs.back(), {}, first, per_image)) {
      held.push_back(x.contiguous());
      copies.emplace_back(dinputs.size() - 1, empty_like(held.back()));
      launch.add(held.back(), copies.back().second, {}, first, per_image);
    }
    first += groups_of(x, per_image);
  }
  launch_bwd(launch, dtype, per_image, dmean, dvar, mean);
  for (const auto& [i, dx] : copies) dinputs[i].copy_(dx);
  return dinputs;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd_cuda(
    const Tensor& x,             // (B, C, ...)
    const Tensor& running_mean,  // (C)
    const Tensor& running_var,   // (C)
    const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias,
    double eps) {
  const OnDevice guard(x);
  auto y = empty_like(x);
  const auto moments = empty_moments({x}, false);
  const auto &mean = std::get<0>(moments), &var = std::get<1>(moments);
  if (x.numel() == 0) return {y, mean, var};
  const Norm norm = norm_of(running_mean, running_var, weight, bias, eps);
  Launch launch;
  if (launch.add(x, y, {}, 0, false)) {
    launch_fwd(launch, x.scalar_type(), false, mean, var, norm);
  } else {
    const auto dense = x.contiguous(), out = empty_like(dense);
    launch.add(dense, out, {}, 0, false);
    launch_fwd(launch, x.scalar_type(), false, mean, var, norm);
    y.copy_(out);
  }
  return {y, mean, var};
}

Tensor batch_norm_bwd_cuda(
    const Tensor& dy,           // (B, C, ...)
    const Tensor& dmean_in,     // (C)
    const Tensor& dvar_in,      // (C)
    const Tensor& x,            // (B, C, ...)
    const Tensor& mean_in,      // (C)
    const Tensor& running_var,  // (C)
    const std::optional<Tensor>& weight,
    double eps) {
  const OnDevice guard(x);
  const auto acc = accumulator(x);
  auto dx = empty_like(x);
  if (x.numel() == 0) return dx;
  const auto dmean = dmean_in.to(acc).contiguous(), dvar = dvar_in.to(acc).contiguous(), mean = mean_in.contiguous();
  const Norm norm = norm_of({}, running_var, weight, std::nullopt, eps);
  Launch launch;
  if (launch.add(x, dx, dy, 0, false)) {
    launch_bwd(launch, x.scalar_type(), false, dmean, dvar, mean, norm);
  } else {
    const auto dense = x.contiguous(), gradient = dy.contiguous(), out = empty_like(dense);
    launch.add(dense, out, gradient, 0, false);
    launch_bwd(launch, x.scalar_type(), false, dmean, dvar, mean, norm);
    dx.copy_(out);
  }
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  implement<moments_fwd_cuda>(m, "moments_fwd");
  implement<moments_bwd_cuda>(m, "moments_bwd");
  implement<batch_norm_fwd_cuda>(m, "batch_norm_fwd");
  implement<batch_norm_bwd_cuda>(m, "batch_norm_bwd");
  implement<bn_distance_cuda>(m, "bn_distance");
}

}  // namespace fastkd
