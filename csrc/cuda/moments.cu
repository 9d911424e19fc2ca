// Per-channel mean and biased variance of (B, C, ...), and their backward. One read; one read and one write.
//
// A group is a channel (or a channel of an image); its items are the elements averaged. A block of kX x kY threads
// takes kX groups, kY items at a time, so that neighbouring threads read neighbouring addresses: kX = 32 for
// channels-last, kX = 1 for planes. Partial moments merge pairwise in a fixed order: no atomics.
#include "common.cuh"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>

namespace fastkd {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;  // items a thread has in flight: their mean first, then their deviations from it

template <typename acc_t>
struct Moments {
  acc_t count, mean, m2;

  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) return void(*this = other);
    const acc_t total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

struct Layout {
  int64_t C, HW, W;
  PlaneStrides s;
  bool per_image;

  __device__ int64_t offset(int64_t group, int64_t item) const {
    const int64_t n = per_image ? group / C : item / HW, c = per_image ? group % C : group;
    const int64_t position = per_image ? item : item % HW;
    return n * s.b + c * s.c + position / W * s.h + position % W * s.w;
  }
};

// grid (group tiles, splits): each block reduces one split of the items of kX groups.
template <typename scalar_t, typename acc_t, int kX>
__global__ void __launch_bounds__(kThreads) moments_partial_kernel(
    const scalar_t* __restrict__ x,
    Layout layout,
    int64_t groups,
    int64_t items,
    int64_t split,
    Moments<acc_t>* __restrict__ partial) {  // (splits, groups)
  constexpr int kY = kThreads / kX;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kX + threadIdx.x;
  const int64_t begin = blockIdx.y * split, end = min(begin + split, items);
  Moments<acc_t> sum{0, 0, 0};
  if (group < groups) {
    for (int64_t i0 = begin + threadIdx.y; i0 < end; i0 += kBatch * kY) {
      acc_t value[kBatch], count = 0, total = 0, m2 = 0;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t i = i0 + k * kY;
        value[k] = i < end ? static_cast<acc_t>(x[layout.offset(group, i)]) : acc_t(0);
        total += value[k];
        count += i < end;
      }
      const acc_t mean = total / count;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const acc_t d = i0 + k * kY < end ? value[k] - mean : acc_t(0);
        m2 += d * d;
      }
      sum.merge({count, mean, m2});
    }
  }
  __shared__ Moments<acc_t> shared[kY][kX];
  shared[threadIdx.y][threadIdx.x] = sum;
  for (int half = kY / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) shared[threadIdx.y][threadIdx.x].merge(shared[threadIdx.y + half][threadIdx.x]);
  }
  // Row 0 was last written by the threads that read it here.
  if (threadIdx.y == 0 && group < groups) partial[blockIdx.y * groups + group] = shared[0][threadIdx.x];
}

// One thread per group.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) moments_merge_kernel(
    const Moments<acc_t>* __restrict__ partial,  // (splits, groups)
    int64_t groups,
    int splits,
    acc_t* __restrict__ mean,   // (groups)
    acc_t* __restrict__ var) {  // (groups)
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  Moments<acc_t> sum = partial[group];
  for (int k = 1; k < splits; ++k) sum.merge(partial[k * groups + group]);
  mean[group] = sum.mean;
  var[group] = sum.m2 / sum.count;
}

// dx = a + b (x - mean); grid as in the forward.
template <typename scalar_t, typename acc_t, int kX>
__global__ void __launch_bounds__(kThreads) moments_bwd_kernel(
    const acc_t* __restrict__ dmean,  // (groups)
    const acc_t* __restrict__ dvar,   // (groups)
    const scalar_t* __restrict__ x,
    const acc_t* __restrict__ mean,  // (groups)
    Layout layout_x,
    Layout layout_d,
    int64_t groups,
    int64_t items,
    int64_t split,
    scalar_t* __restrict__ dx) {
  constexpr int kY = kThreads / kX;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kX + threadIdx.x;
  if (group >= groups) return;
  const int64_t begin = blockIdx.y * split, end = min(begin + split, items);
  const acc_t a = dmean[group] / items, b = dvar[group] * (acc_t(2) / items), center = mean[group];
  for (int64_t i = begin + threadIdx.y; i < end; i += kY)
    dx[layout_d.offset(group, i)] =
        static_cast<scalar_t>(a + b * (static_cast<acc_t>(x[layout_x.offset(group, i)]) - center));
}

// How groups and items spread over a grid: enough blocks to fill the card, at least one full pass of items each.
struct Launch {
  dim3 grid, block;
  int64_t split;

  Launch(int64_t groups, int64_t items, int kX) : block(kX, kThreads / kX) {
    const int64_t tiles = (groups + kX - 1) / kX, pass = static_cast<int64_t>(kBatch) * block.y;
    const int64_t most = std::min<int64_t>((items + pass - 1) / pass, 65535);
    const int64_t wanted = std::clamp<int64_t>(8 * multiprocessors() / tiles, 1, most);
    split = (items + wanted - 1) / wanted;
    grid = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>((items + split - 1) / split));
  }
};

template <size_t n>
Layout layout_of(const Planes<n>& planes, size_t i, bool per_image) {
  return {planes.C, planes.H * planes.W, planes.W, planes.strides[i], per_image};
}

std::tuple<at::Tensor, at::Tensor> moments_fwd_cuda(
    const at::Tensor& x_in,  // (B, C, ...)
    bool per_image) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  auto x = x_in;
  auto folded = fold_planes<1>({x});
  if (!folded) {
    x = x.contiguous();
    folded = fold_planes<1>({x});
  }
  const auto layout = layout_of(*folded, 0, per_image);
  const int64_t B = folded->B, C = folded->C;
  const int64_t groups = per_image ? B * C : C, items = per_image ? layout.HW : B * layout.HW;
  const auto options = x.options().dtype(accumulator(x));
  auto mean = per_image ? at::empty({B, C}, options) : at::empty({C}, options);
  auto var = at::empty_like(mean);
  if (x.numel() == 0) return {mean, var};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "moments_fwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    const bool columns = layout.s.c == 1 && C > 1;
    const Launch launch(groups, items, columns ? 32 : 1);
    const int splits = static_cast<int>(launch.grid.y);
    auto partial = at::empty({splits, groups, 3}, options);
    auto* partial_ptr = reinterpret_cast<Moments<acc_t>*>(partial.mutable_data_ptr<acc_t>());
    const auto kernel =
        columns ? moments_partial_kernel<scalar_t, acc_t, 32> : moments_partial_kernel<scalar_t, acc_t, 1>;
    kernel<<<launch.grid, launch.block, 0, stream>>>(
        x.const_data_ptr<scalar_t>(), layout, groups, items, launch.split, partial_ptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    moments_merge_kernel<acc_t><<<static_cast<unsigned>((groups + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        partial_ptr, groups, splits, mean.mutable_data_ptr<acc_t>(), var.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {mean, var};
}

at::Tensor moments_bwd_cuda(
    const at::Tensor& dmean,  // (C) or (B, C)
    const at::Tensor& dvar,   // as dmean
    const at::Tensor& x_in,   // (B, C, ...)
    const at::Tensor& mean,   // as dmean
    bool per_image) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const auto& x = x_in;
  auto dx = at::empty_like(x);
  if (x.numel() == 0) return dx;
  auto folded = fold_planes<2>({x, dx});
  if (!folded) return dx.copy_(moments_bwd_cuda(dmean, dvar, x.contiguous(), mean, per_image));
  const auto layout_x = layout_of(*folded, 0, per_image), layout_d = layout_of(*folded, 1, per_image);
  const int64_t groups = per_image ? folded->B * folded->C : folded->C;
  const int64_t items = per_image ? layout_x.HW : folded->B * layout_x.HW;
  const auto dtype = accumulator(x);
  const auto a = dmean.to(dtype).contiguous(), b = dvar.to(dtype).contiguous(), center = mean.contiguous();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "moments_bwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    const bool columns = layout_x.s.c == 1 && folded->C > 1;
    const Launch launch(groups, items, columns ? 32 : 1);
    const auto kernel = columns ? moments_bwd_kernel<scalar_t, acc_t, 32> : moments_bwd_kernel<scalar_t, acc_t, 1>;
    kernel<<<launch.grid, launch.block, 0, stream>>>(
        a.const_data_ptr<acc_t>(),
        b.const_data_ptr<acc_t>(),
        x.const_data_ptr<scalar_t>(),
        center.const_data_ptr<acc_t>(),
        layout_x,
        layout_d,
        groups,
        items,
        launch.split,
        dx.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("moments_fwd", &moments_fwd_cuda);
  m.impl("moments_bwd", &moments_bwd_cuda);
}

}  // namespace fastkd
