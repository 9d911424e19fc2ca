// Kernels of the moments: partial ones of a block's items, and their merge.
#pragma once
#include "cuda/moments_runs.cuh"

namespace fastkd {
namespace {

// Moments of one split of the items of a block's groups; y as well where there is one.
template <typename scalar_t, typename acc_t, int V, bool is_columns>
__device__ void partial_moments(
    const Layer& l,
    bool per_image,
    const Norm& norm,                    // with y
    Affine<acc_t>* __restrict__ affine,  // (kThreads)
    Moments<acc_t>* __restrict__ shared,
    Moments<acc_t>* __restrict__ partial) {  // (splits, groups) of the layer
  using S = Shape<V, is_columns>;
  const Part part(l);
  const int tx = threadIdx.x % S::kX, ty = threadIdx.x / S::kX;
  const int64_t first = part.tile * S::kGroups, group = first + tx * S::kLanes;
  const auto* x = static_cast<const scalar_t*>(l.x) + group_offset(l, l.s, per_image, group);
  auto* y = static_cast<scalar_t*>(l.out);
  if (y != nullptr) {
    if (threadIdx.x < S::kGroups && first + threadIdx.x < l.groups) affine[threadIdx.x] = {norm, first + threadIdx.x};
    __syncthreads();
  }
  Cursor at(l, part.begin + ty * S::kStep);
  Moments<acc_t> sum[S::kLanes];
#pragma unroll
  for (int j = 0; j < S::kLanes; ++j) sum[j] = {0, 0, 0};
  if (group < l.groups) {
    for (int64_t i0 = part.begin + ty * S::kStep; i0 < part.end; i0 += S::kBatch * S::kPass) {
      Vector<scalar_t, V> v[S::kBatch];
      Cursor from = at;
      int loaded = 0;
#pragma unroll
      for (int b = 0; b < S::kBatch; ++b, at.advance(l)) {
        if (i0 + b * S::kPass >= part.end) continue;
        v[b] = load<scalar_t, V>(x + at.offset(l, l.s));
        ++loaded;
      }
#pragma unroll
      for (int j = 0; j < S::kLanes; ++j) {
        acc_t total = 0, m2 = 0;
        const auto count = static_cast<acc_t>(loaded * S::kStep);
#pragma unroll
        for (int b = 0; b < S::kBatch; ++b)
#pragma unroll
          for (int e = 0; e < S::kStep; ++e)
            if (b < loaded) total += static_cast<acc_t>(v[b].x[is_columns ? j : e]);
        const acc_t mean = total / count;
#pragma unroll
        for (int b = 0; b < S::kBatch; ++b)
#pragma unroll
          for (int e = 0; e < S::kStep; ++e)
            if (b < loaded) {
              const acc_t d = static_cast<acc_t>(v[b].x[is_columns ? j : e]) - mean;
              m2 += d * d;
            }
        sum[j].merge({count, mean, m2});
      }
      if (y == nullptr) continue;
      const int64_t group_y = group_offset(l, l.d, per_image, group);
#pragma unroll
      for (int b = 0; b < S::kBatch; ++b, from.advance(l)) {
        if (b >= loaded) continue;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const auto& of = affine[tx * S::kLanes + (is_columns ? e : 0)];
          v[b].x[e] = static_cast<scalar_t>(of.scale * static_cast<acc_t>(v[b].x[e]) + of.shift);
        }
        store(y + group_y + from.offset(l, l.d), v[b]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < S::kLanes; ++j) shared[ty * S::kGroups + tx * S::kLanes + j] = sum[j];
  for (int half = S::kY / 2; half > 0; half /= 2) {
    __syncthreads();
    if (ty < half)
#pragma unroll
      for (int j = 0; j < S::kLanes; ++j) {
        const int at = ty * S::kGroups + tx * S::kLanes + j;
        shared[at].merge(shared[at + half * S::kGroups]);
      }
  }
  // Row 0 was last written by the threads that read it here.
  if (ty == 0 && group < l.groups)
#pragma unroll
    for (int j = 0; j < S::kLanes; ++j) partial[part.split * l.groups + group + j] = shared[tx * S::kLanes + j];
}

// Each block reduces one split of the items of some groups of one layer.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kResident) moments_partial_kernel(
    const __grid_constant__ Layers layers,
    bool per_image,
    const __grid_constant__ Norm norm,
    Moments<acc_t>* __restrict__ partial) {
  constexpr int V = 16 / sizeof(scalar_t);
  __shared__ Moments<acc_t> shared[kThreads * V];
  __shared__ Vector<scalar_t, V> staged[kRuns * kThreads];
  __shared__ Affine<acc_t> affine[kThreads];
  const Layer& l = layer_of(layers, blockIdx.x);
  auto* own = partial + l.partial;
  switch (l.mode) {
    case Mode::kPlanes:
      return partial_moments<scalar_t, acc_t, 1, false>(l, per_image, norm, affine, shared, own);
    case Mode::kPlanesHalf:
      return partial_moments<scalar_t, acc_t, V / 2, false>(l, per_image, norm, affine, shared, own);
    case Mode::kPlanesVector:
      return partial_moments<scalar_t, acc_t, V, false>(l, per_image, norm, affine, shared, own);
    case Mode::kRuns:
      return partial_runs<scalar_t, acc_t>(l, per_image, norm, affine, staged, shared, own);
    case Mode::kColumns:
      return partial_moments<scalar_t, acc_t, 1, true>(l, per_image, norm, affine, shared, own);
    case Mode::kColumnsVector:
      return partial_moments<scalar_t, acc_t, V, true>(l, per_image, norm, affine, shared, own);
  }
}

// One warp per group.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) moments_merge_kernel(
    const __grid_constant__ Layers layers,
    int64_t groups,  // of all layers here
    const Moments<acc_t>* __restrict__ partial,
    acc_t* __restrict__ mean,   // (all groups)
    acc_t* __restrict__ var) {  // (all groups)
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (at >= groups) return;  // a whole warp
  int which = layers.count - 1;
  while (layers.layer[which].before > at) --which;
  const Layer& l = layers.layer[which];
  const int64_t group = at - l.before;
  Moments<acc_t> sum{0, 0, 0};
  for (int k = lane; k < l.splits; k += kWarp) sum.merge(partial[l.partial + k * l.groups + group]);
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const Moments<acc_t> other{
        __shfl_down_sync(0xffffffff, sum.count, half),
        __shfl_down_sync(0xffffffff, sum.mean, half),
        __shfl_down_sync(0xffffffff, sum.m2, half)};
    if (lane < half) sum.merge(other);
  }
  if (lane > 0) return;
  mean[l.first + group] = sum.mean;
  var[l.first + group] = sum.m2 / sum.count;
}

// Moments of the layers of one launch, with a batch norm of the only one.
void launch_fwd(
    const Launch& launch,
    ScalarType dtype,
    bool per_image,
    const Tensor& mean,
    const Tensor& var,
    const Norm& norm = {}) {
  if (launch.layers.count == 0) return;
  const auto stream = stream_of(mean);
  auto partial = empty(mean, {launch.partials, 3});
  FASTKD_DISPATCH(dtype, "moments_fwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    auto* partial_ptr = reinterpret_cast<Moments<acc_t>*>(partial.mutable_data_ptr<acc_t>());
    moments_partial_kernel<scalar_t, acc_t>
        <<<static_cast<unsigned>(launch.blocks), kThreads, 0, stream>>>(launch.layers, per_image, norm, partial_ptr);
    check(cudaGetLastError());
    const int64_t warps = kThreads / kWarp;
    moments_merge_kernel<acc_t><<<static_cast<unsigned>((launch.groups + warps - 1) / warps), kThreads, 0, stream>>>(
        launch.layers, launch.groups, partial_ptr, mean.mutable_data_ptr<acc_t>(), var.mutable_data_ptr<acc_t>());
    check(cudaGetLastError());
  });
}

}  // namespace
}  // namespace fastkd
