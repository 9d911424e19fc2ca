// Per-channel mean and biased variance of (B, C, ...), alone or of what an eval-mode batch norm normalises, their
// backward, and the distance of such moments to running statistics. All layers of a call share one launch.
//
// A group is a channel (or a channel of an image); its items are the elements averaged. A block of kX x kY threads
// takes kX threads' groups, kY threads' items at a time, so that neighbouring threads read neighbouring addresses:
// along channels for channels-last, along positions for planes, 16 bytes a thread (8 of short planes) where alignment
// allows. Partial moments merge pairwise in a fixed order: no atomics.
#include "cuda/moments_layers.cuh"
#include "cuda/moments_forward.cuh"
#include "cuda/moments_backward.cuh"
#include "cuda/moments_distance.cuh"

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace fastkd {
namespace {

std::tuple<at::Tensor, at::Tensor> moments_fwd_cuda(
    const at::TensorList inputs,  // per layer (B, C, ...), of one dtype
    bool per_image) {
  const c10::cuda::CUDAGuard guard(inputs[0].device());
  auto [mean, var] = empty_moments(inputs, per_image);
  const auto dtype = inputs[0].scalar_type();
  std::vector<at::Tensor> held;  // copies of layers that do not fold
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

std::vector<at::Tensor> moments_bwd_cuda(
    const at::Tensor& dmean_in,   // all layers' channels end to end
    const at::Tensor& dvar_in,    // as dmean
    const at::TensorList inputs,  // per layer (B, C, ...), of one dtype
    const at::Tensor& mean_in,    // as dmean
    bool per_image) {
  const c10::cuda::CUDAGuard guard(inputs[0].device());
  const auto acc = accumulator(inputs[0]), dtype = inputs[0].scalar_type();
  const auto dmean = dmean_in.to(acc).contiguous(), dvar = dvar_in.to(acc).contiguous(), mean = mean_in.contiguous();
  std::vector<at::Tensor> dinputs, held;
  std::vector<std::pair<size_t, at::Tensor>> copies;  // gradients of layers that do not fold
  Launch launch;
  int64_t first = 0;
  for (const auto& x : inputs) {
    if (launch.is_full()) {
      launch_bwd(launch, dtype, per_image, dmean, dvar, mean);
      launch = {};
    }
    dinputs.push_back(at::empty_like(x));
    if (x.numel() > 0 && !launch.add(x, dinputs.back(), {}, first, per_image)) {
      held.push_back(x.contiguous());
      copies.emplace_back(dinputs.size() - 1, at::empty_like(held.back()));
      launch.add(held.back(), copies.back().second, {}, first, per_image);
    }
    first += groups_of(x, per_image);
  }
  launch_bwd(launch, dtype, per_image, dmean, dvar, mean);
  for (const auto& [i, dx] : copies) dinputs[i].copy_(dx);
  return dinputs;
}

// weight / sqrt(running_var + eps), in the type of sums.
at::Tensor scale_of(
    const std::optional<at::Tensor>& weight,
    const at::Tensor& running_var,
    double eps,
    at::ScalarType acc) {
  auto scale = running_var.to(acc).add(eps).rsqrt_();
  return weight ? scale.mul_(weight->to(acc)) : scale;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_fwd_cuda(
    const at::Tensor& x,             // (B, C, ...)
    const at::Tensor& running_mean,  // (C)
    const at::Tensor& running_var,   // (C)
    const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias,
    double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto acc = accumulator(x);
  auto y = at::empty_like(x);
  const auto moments = empty_moments(x, false);
  const auto &mean = std::get<0>(moments), &var = std::get<1>(moments);
  if (x.numel() == 0) return {y, mean, var};
  const auto scale = scale_of(weight, running_var, eps, acc);
  const auto shift = (bias ? bias->to(acc) : at::zeros_like(scale)).addcmul(running_mean.to(acc), scale, -1);
  Launch launch;
  if (launch.add(x, y, {}, 0, false)) {
    launch_fwd(launch, x.scalar_type(), false, mean, var, scale, shift);
  } else {
    const auto dense = x.contiguous(), out = at::empty_like(dense);
    launch.add(dense, out, {}, 0, false);
    launch_fwd(launch, x.scalar_type(), false, mean, var, scale, shift);
    y.copy_(out);
  }
  return {y, mean, var};
}

at::Tensor batch_norm_bwd_cuda(
    const at::Tensor& dy,           // (B, C, ...)
    const at::Tensor& dmean_in,     // (C)
    const at::Tensor& dvar_in,      // (C)
    const at::Tensor& x,            // (B, C, ...)
    const at::Tensor& mean_in,      // (C)
    const at::Tensor& running_var,  // (C)
    const std::optional<at::Tensor>& weight,
    double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto acc = accumulator(x);
  auto dx = at::empty_like(x);
  if (x.numel() == 0) return dx;
  const auto dmean = dmean_in.to(acc).contiguous(), dvar = dvar_in.to(acc).contiguous(), mean = mean_in.contiguous();
  const auto scale = scale_of(weight, running_var, eps, acc);
  Launch launch;
  if (launch.add(x, dx, dy, 0, false)) {
    launch_bwd(launch, x.scalar_type(), false, dmean, dvar, mean, scale);
  } else {
    const auto dense = x.contiguous(), gradient = dy.contiguous(), out = at::empty_like(dense);
    launch.add(dense, out, gradient, 0, false);
    launch_bwd(launch, x.scalar_type(), false, dmean, dvar, mean, scale);
    dx.copy_(out);
  }
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("moments_fwd", &moments_fwd_cuda);
  m.impl("moments_bwd", &moments_bwd_cuda);
  m.impl("batch_norm_fwd", &batch_norm_fwd_cuda);
  m.impl("batch_norm_bwd", &batch_norm_bwd_cuda);
  m.impl("bn_distance", &bn_distance_cuda);
}

}  // namespace fastkd
