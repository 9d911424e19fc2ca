// The kernel of the moments' gradients, alone or with those of a batch norm.
#pragma once
#include "cuda/moments_layers.cuh"
#include "cuda/moments_forward.cuh"

namespace fastkd {
namespace {

// dx = a + b (x - mean) + scale dy of one split of the items of a block's groups.
template <typename scalar_t, typename acc_t, int V, bool is_columns>
__device__ void backward(
    const Layer& l,
    bool per_image,
    const acc_t* __restrict__ dmean,
    const acc_t* __restrict__ dvar,
    const acc_t* __restrict__ mean,
    const acc_t* __restrict__ scale) {
  using S = Shape<V, is_columns>;
  const int64_t block = blockIdx.x - l.block, split = block / l.tiles;
  const int tx = threadIdx.x % S::kX, ty = threadIdx.x / S::kX;
  const int64_t group = block % l.tiles * S::kGroups + tx * S::kLanes;
  if (group >= l.groups) return;
  const int64_t begin = split * l.split, end = min(begin + l.split, l.items);
  const auto* x = static_cast<const scalar_t*>(l.x) + group_offset(l, l.s, per_image, group);
  const auto* dy = static_cast<const scalar_t*>(l.dy);
  auto* dx = static_cast<scalar_t*>(l.out) + group_offset(l, l.d, per_image, group);
  const bool has_dy = dy != nullptr;
  if (has_dy) dy += group_offset(l, l.g, per_image, group);
  const auto M = static_cast<acc_t>(l.items);
  acc_t a[S::kLanes], b[S::kLanes], center[S::kLanes], alpha[S::kLanes];
#pragma unroll
  for (int j = 0; j < S::kLanes; ++j) {
    const int64_t at = l.first + group + j;
    a[j] = dmean[at] / M, b[j] = dvar[at] * (2 / M), center[j] = mean[at];
    alpha[j] = has_dy ? scale[group + j] : acc_t(0);
  }
  Cursor at(l, begin + ty * S::kStep);
  for (int64_t i0 = begin + ty * S::kStep; i0 < end; i0 += S::kBatchBackward * S::kPass) {
    // All loads before the first store, past which the compiler moves none.
    Vector<scalar_t, V> v[S::kBatchBackward], g[S::kBatchBackward];
    Cursor from = at;
#pragma unroll
    for (int k = 0; k < S::kBatchBackward; ++k, at.advance(l)) {
      if (i0 + k * S::kPass >= end) continue;
      v[k] = load<scalar_t, V>(x + at.offset(l, l.s));
      if (has_dy) g[k] = load<scalar_t, V>(dy + at.offset(l, l.g));
    }
#pragma unroll
    for (int k = 0; k < S::kBatchBackward; ++k, from.advance(l)) {
      if (i0 + k * S::kPass >= end) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int j = is_columns ? e : 0;
        acc_t d = a[j] + b[j] * (static_cast<acc_t>(v[k].x[e]) - center[j]);
        if (has_dy) d += alpha[j] * static_cast<acc_t>(g[k].x[e]);
        v[k].x[e] = static_cast<scalar_t>(d);
      }
      store(dx + from.offset(l, l.d), v[k]);
    }
  }
}

template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kResident) moments_bwd_kernel(
    const __grid_constant__ Layers layers,
    bool per_image,
    const acc_t* __restrict__ dmean,
    const acc_t* __restrict__ dvar,
    const acc_t* __restrict__ mean,
    const acc_t* __restrict__ scale) {
  constexpr int V = 16 / sizeof(scalar_t);
  const Layer& l = layer_of(layers, blockIdx.x);
  switch (l.mode) {
    case Mode::kPlanes:
      return backward<scalar_t, acc_t, 1, false>(l, per_image, dmean, dvar, mean, scale);
    case Mode::kPlanesHalf:
      return backward<scalar_t, acc_t, V / 2, false>(l, per_image, dmean, dvar, mean, scale);
    case Mode::kPlanesVector:
      return backward<scalar_t, acc_t, V, false>(l, per_image, dmean, dvar, mean, scale);
    case Mode::kColumns:
      return backward<scalar_t, acc_t, 1, true>(l, per_image, dmean, dvar, mean, scale);
    case Mode::kColumnsVector:
      return backward<scalar_t, acc_t, V, true>(l, per_image, dmean, dvar, mean, scale);
  }
}

void launch_bwd(
    const Launch& launch,
    at::ScalarType dtype,
    bool per_image,
    const at::Tensor& dmean,
    const at::Tensor& dvar,
    const at::Tensor& mean,
    const at::Tensor& scale = {}) {
  if (launch.layers.count == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "moments_bwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    moments_bwd_kernel<scalar_t, acc_t><<<static_cast<unsigned>(launch.blocks), kThreads, 0, stream>>>(
        launch.layers,
        per_image,
        dmean.const_data_ptr<acc_t>(),
        dvar.const_data_ptr<acc_t>(),
        mean.const_data_ptr<acc_t>(),
        scale.defined() ? scale.const_data_ptr<acc_t>() : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace fastkd
