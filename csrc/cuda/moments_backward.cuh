// The kernel of the moments' gradients, alone or with those of a batch norm.
#pragma once
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
    const Norm& norm,
    Coefficients<acc_t>* __restrict__ shared) {  // (kThreads)
  using S = Shape<V, is_columns>;
  const Part part(l);
  const int tx = threadIdx.x % S::kX, ty = threadIdx.x / S::kX;
  const int64_t first = part.tile * S::kGroups, group = first + tx * S::kLanes;
  if (threadIdx.x < S::kGroups && first + threadIdx.x < l.groups)
    shared[threadIdx.x] = {l, l.items, first + threadIdx.x, dmean, dvar, mean, norm};
  __syncthreads();
  if (group >= l.groups) return;
  const auto* x = static_cast<const scalar_t*>(l.x) + group_offset(l, l.s, per_image, group);
  const auto* dy = static_cast<const scalar_t*>(l.dy);
  auto* dx = static_cast<scalar_t*>(l.out) + group_offset(l, l.d, per_image, group);
  const bool has_dy = dy != nullptr;
  if (has_dy) dy += group_offset(l, l.g, per_image, group);
  Coefficients<acc_t> of[S::kLanes];
#pragma unroll
  for (int j = 0; j < S::kLanes; ++j) of[j] = shared[tx * S::kLanes + j];
  Cursor at(l, part.begin + ty * S::kStep);
  for (int64_t i0 = part.begin + ty * S::kStep; i0 < part.end; i0 += S::kBatchBackward * S::kPass) {
    // All loads before the first store, past which the compiler moves none.
    Vector<scalar_t, V> v[S::kBatchBackward], g[S::kBatchBackward];
    Cursor from = at;
#pragma unroll
    for (int k = 0; k < S::kBatchBackward; ++k, at.advance(l)) {
      if (i0 + k * S::kPass >= part.end) continue;
      v[k] = load<scalar_t, V>(x + at.offset(l, l.s));
      if (has_dy) g[k] = load<scalar_t, V>(dy + at.offset(l, l.g));
    }
#pragma unroll
    for (int k = 0; k < S::kBatchBackward; ++k, from.advance(l)) {
      if (i0 + k * S::kPass >= part.end) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int j = is_columns ? e : 0;
        acc_t d = of[j].a + of[j].b * (static_cast<acc_t>(v[k].x[e]) - of[j].center);
        if (has_dy) d += of[j].alpha * static_cast<acc_t>(g[k].x[e]);
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
    const __grid_constant__ Norm norm) {
  constexpr int V = 16 / sizeof(scalar_t);
  __shared__ Coefficients<acc_t> shared[kThreads];
  const Layer& l = layer_of(layers, blockIdx.x);
  switch (l.mode) {
    case Mode::kPlanes:
      return backward<scalar_t, acc_t, 1, false>(l, per_image, dmean, dvar, mean, norm, shared);
    case Mode::kPlanesHalf:
      return backward<scalar_t, acc_t, V / 2, false>(l, per_image, dmean, dvar, mean, norm, shared);
    case Mode::kPlanesVector:
      return backward<scalar_t, acc_t, V, false>(l, per_image, dmean, dvar, mean, norm, shared);
    case Mode::kRuns:
      return backward_runs<scalar_t, acc_t>(l, per_image, dmean, dvar, mean, norm, shared);
    case Mode::kColumns:
      return backward<scalar_t, acc_t, 1, true>(l, per_image, dmean, dvar, mean, norm, shared);
    case Mode::kColumnsVector:
      return backward<scalar_t, acc_t, V, true>(l, per_image, dmean, dvar, mean, norm, shared);
  }
}

void launch_bwd(
    const Launch& launch,
    ScalarType dtype,
    bool per_image,
    const Tensor& dmean,
    const Tensor& dvar,
    const Tensor& mean,
    const Norm& norm = {}) {
  if (launch.layers.count == 0) return;
  const auto stream = stream_of(mean);
  FASTKD_DISPATCH(dtype, "moments_bwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    moments_bwd_kernel<scalar_t, acc_t><<<static_cast<unsigned>(launch.blocks), kThreads, 0, stream>>>(
        launch.layers,
        per_image,
        dmean.const_data_ptr<acc_t>(),
        dvar.const_data_ptr<acc_t>(),
        mean.const_data_ptr<acc_t>(),
        norm);
    check(cudaGetLastError());
  });
}

}  // namespace
}  // namespace fastkd
