// Distances of all layers' moments to running statistics, with their gradients.
#pragma once
#include "cuda/moments_layers.cuh"
#include "cuda/moments_forward.cuh"
#include "cuda/moments_backward.cuh"

namespace fastkd {
namespace {

struct Target {
  int64_t first, running, C, n;  // n moments from first on; C statistics from running on
  double weight, unbias;
};

constexpr int kTargets = kLargeArguments ? 256 : 64;
Threshold kManyTargets{"moments.cuda_targets", kTargets};  // layers of a launch at the most

struct Targets {
  Target layer[kTargets];
};

__device__ double block_sum(double x, double* shared) {
  shared[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

// One block per layer.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) bn_distance_kernel(
    const __grid_constant__ Targets targets,
    Distance distance,
    const acc_t* __restrict__ mean,          // (all moments)
    const acc_t* __restrict__ var,           // (all moments)
    const acc_t* __restrict__ running_mean,  // (all channels)
    const acc_t* __restrict__ running_var,   // (all channels)
    double* __restrict__ losses,             // (layers)
    acc_t* __restrict__ dmean,               // (all moments)
    acc_t* __restrict__ dvar) {              // (all moments)
  __shared__ double shared[kThreads];
  const Target& t = targets.layer[blockIdx.x];
  const double w = t.weight;
  double of_mean = 0, of_var = 0;
  for (int64_t i = threadIdx.x; i < t.n; i += kThreads) {
    const double d = static_cast<double>(mean[t.first + i]) - running_mean[t.running + i % t.C];
    double e = static_cast<double>(var[t.first + i]) - running_var[t.running + i % t.C];
    if (distance == Distance::kImage) {
      const double sigma = sqrt(var[t.first + i] * t.unbias + 1e-6);
      e = sigma - sqrt(running_var[t.running + i % t.C] + 1e-6);
      dvar[t.first + i] = static_cast<acc_t>(w * t.unbias * e / sigma);
    } else if (distance == Distance::kMean) {
      dvar[t.first + i] = static_cast<acc_t>(2 * w * e);
    }
    if (distance != Distance::kNorm) dmean[t.first + i] = static_cast<acc_t>(2 * w * d);
    of_mean += d * d;
    of_var += e * e;
  }
  of_mean = block_sum(of_mean, shared), of_var = block_sum(of_var, shared);
  if (distance != Distance::kNorm) {
    if (threadIdx.x == 0) losses[blockIdx.x] = w * (of_mean + of_var);
    return;
  }
  const double norm_mean = sqrt(of_mean), norm_var = sqrt(of_var);
  if (threadIdx.x == 0) losses[blockIdx.x] = w * (norm_mean + norm_var);
  const double w_mean = norm_mean == 0 ? 0 : w / norm_mean, w_var = norm_var == 0 ? 0 : w / norm_var;
  for (int64_t i = threadIdx.x; i < t.n; i += kThreads) {
    const int64_t at = t.first + i;
    dmean[at] = static_cast<acc_t>(w_mean * (static_cast<double>(mean[at]) - running_mean[t.running + i]));
    dvar[at] = static_cast<acc_t>(w_var * (static_cast<double>(var[at]) - running_var[t.running + i]));
  }
}

std::tuple<Tensor, Tensor, Tensor> bn_distance_cuda(
    const Tensor& mean_in,                 // (Σ rows_l C_l)
    const Tensor& var_in,                  // as mean
    const Tensor& running_mean,            // (Σ C_l)
    const Tensor& running_var,             // as running_mean
    const std::vector<int64_t>& channels,  // C_l
    const std::vector<int64_t>& rows,      // 1, or images of "image"
    const std::vector<int64_t>& counts,    // elements of a moment
    const std::vector<double>& weights,
    const std::string& name) {
  const OnDevice guard(mean_in);
  const auto mean = mean_in.contiguous(), var = var_in.contiguous();
  const auto dtype = mean.scalar_type();
  const auto M = running_mean.to(dtype).contiguous(), V = running_var.to(dtype).contiguous();
  const auto layers = static_cast<int64_t>(channels.size());
  auto losses = empty(mean, {layers}, ScalarType::Double);
  auto dmean = empty_like(mean), dvar = empty_like(mean);
  const auto distance = distance_of(name);
  const auto stream = stream_of(mean);
  int64_t first = 0, running = 0;
  const int64_t most = std::min<int64_t>(kManyTargets, kTargets);
  for (int64_t begin = 0; begin < layers; begin += most) {
    const int64_t n = std::min(most, layers - begin);
    Targets targets{};
    for (int64_t i = 0; i < n; ++i) {
      const int64_t l = begin + i, C = channels[l], B = rows[l];
      const auto count = static_cast<double>(counts[l]);
      const double share = distance == Distance::kImage ? static_cast<double>(B) : static_cast<double>(layers * C);
      const double weight = distance == Distance::kNorm ? weights[l] : weights[l] / share;
      targets.layer[i] = {first, running, C, B * C, weight, count / std::max(count - 1, 1.0)};
      first += B * C, running += C;
    }
    FASTKD_DISPATCH_ACC(dtype, "bn_distance_cuda", [&] {
      bn_distance_kernel<scalar_t><<<static_cast<unsigned>(n), kThreads, 0, stream>>>(
          targets,
          distance,
          mean.const_data_ptr<scalar_t>(),
          var.const_data_ptr<scalar_t>(),
          M.const_data_ptr<scalar_t>(),
          V.const_data_ptr<scalar_t>(),
          losses.mutable_data_ptr<double>() + begin,
          dmean.mutable_data_ptr<scalar_t>(),
          dvar.mutable_data_ptr<scalar_t>());
      check(cudaGetLastError());
    });
  }
  return {Tensor(torch::stable::sum(losses.handle())).to(dtype), dmean, dvar};
}

}  // namespace
}  // namespace fastkd
