// Total variation in four directions and the norms of images, and their gradient. One block per plane and band of rows.
//
// Forward sums the differences that end in a pixel, so that each is taken once; backward forms the eight around it. The
// neighbours of a warp's pixels come from L1. Partial sums add up in double in a fixed order: no atomics.
#include "thresholds.h"
#include "common.cuh"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

namespace fastkd {
namespace {

constexpr int kThreads = 256;
constexpr int kSums = 9;  // Σ |d_k|, Σ d_k² of the directions, Σ x²
constexpr int kDirections = 4;
Threshold kWaves{"prior.cuda_waves", 16};     // blocks for each multiprocessor, where there are so many rows
Threshold kBands{"prior.cuda_bands", 65535};  // of a plane at the most: CUDA's limit of a grid's second dimension

// A difference of direction k that ends in (h, w) begins in (h - kUp[k], w - kLeft[k]).
__device__ constexpr int kUp[kDirections] = {0, 1, 1, 1}, kLeft[kDirections] = {1, 0, 1, -1};

// A (B, C, H, W) tensor by its strides.
struct Images {
  int64_t C, H, W;
  PlaneStrides s;

  __device__ int64_t plane(int64_t i) const { return i / C * s.b + i % C * s.c; }
  __device__ bool holds(int64_t h, int64_t w) const { return h >= 0 && h < H && w >= 0 && w < W; }
};

// grid (planes, bands)
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) prior_fwd_kernel(
    const scalar_t* __restrict__ images,
    Images layout,
    int64_t band,                    // rows
    double* __restrict__ partial) {  // (planes, bands, 9)
  const scalar_t* x = images + layout.plane(blockIdx.x);
  const int64_t begin = blockIdx.y * band, end = min(begin + band, layout.H);
  acc_t sums[kSums] = {};
  for (int64_t h = begin; h < end; ++h)
    for (int64_t w = threadIdx.x; w < layout.W; w += kThreads) {
      const auto here = static_cast<acc_t>(x[h * layout.s.h + w * layout.s.w]);
      sums[kSums - 1] += here * here;
#pragma unroll
      for (int k = 0; k < kDirections; ++k) {
        const int64_t i = h - kUp[k], j = w - kLeft[k];
        if (!layout.holds(i, j)) continue;
        const acc_t d = here - static_cast<acc_t>(x[i * layout.s.h + j * layout.s.w]);
        sums[k] += d < 0 ? -d : d;
        sums[kDirections + k] += d * d;
      }
    }
  __shared__ double shared[kSums][kThreads];
#pragma unroll
  for (int k = 0; k < kSums; ++k) shared[k][threadIdx.x] = sums[k];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
#pragma unroll
      for (int k = 0; k < kSums; ++k) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
  }
  __syncthreads();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  if (threadIdx.x < kSums) partial[at * kSums + threadIdx.x] = shared[threadIdx.x][0];
}

// grid (planes, bands)
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) prior_bwd_kernel(
    const scalar_t* __restrict__ images,
    Images layout,
    PlaneStrides d,
    int64_t band,                        // rows
    const acc_t* __restrict__ slopes,    // (2, 4): of sign(d_k), of d_k
    const acc_t* __restrict__ of_image,  // (B)
    scalar_t* __restrict__ dimages) {
  const scalar_t* x = images + layout.plane(blockIdx.x);
  const int64_t b = blockIdx.x / layout.C, c = blockIdx.x % layout.C;
  scalar_t* dx = dimages + b * d.b + c * d.c;
  const int64_t begin = blockIdx.y * band, end = min(begin + band, layout.H);
  const acc_t of_x = of_image[b];
  acc_t a[kDirections], e[kDirections];
#pragma unroll
  for (int k = 0; k < kDirections; ++k) a[k] = slopes[k], e[k] = slopes[kDirections + k];
  for (int64_t h = begin; h < end; ++h)
    for (int64_t w = threadIdx.x; w < layout.W; w += kThreads) {
      const auto here = static_cast<acc_t>(x[h * layout.s.h + w * layout.s.w]);
      acc_t sum = of_x * here;
#pragma unroll
      for (int k = 0; k < kDirections; ++k)
#pragma unroll
        for (int side = -1; side <= 1; side += 2) {  // the difference that begins here, then the one that ends here
          const int64_t i = h - side * kUp[k], j = w - side * kLeft[k];
          if (!layout.holds(i, j)) continue;
          // Both add the same function of here - other.
          const acc_t v = here - static_cast<acc_t>(x[i * layout.s.h + j * layout.s.w]);
          sum += (v > 0 ? a[k] : v < 0 ? -a[k] : acc_t(0)) + e[k] * v;
        }
      dx[h * d.h + w * d.w] = static_cast<scalar_t>(sum);
    }
}

Images layout_of(const at::Tensor& x) {
  return {x.size(1), x.size(2), x.size(3), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

// Rows of a band: enough blocks to fill the card.
int64_t band_of(const at::Tensor& images) {
  const int64_t planes = images.size(0) * images.size(1), H = images.size(2);
  const int64_t bands = std::clamp<int64_t>(kWaves * multiprocessors() / planes, 1, std::min<int64_t>(H, kBands));
  return (H + bands - 1) / bands;
}

// Differences per direction; at least 1, so that a direction without any is 0. On the host: no copy to the device.
std::array<double, kDirections> counts_of(const at::Tensor& images) {
  const int64_t H = images.size(2), W = images.size(3), planes = images.size(0) * images.size(1);
  const int64_t each[] = {H * (W - 1), (H - 1) * W, (H - 1) * (W - 1), (H - 1) * (W - 1)};
  std::array<double, kDirections> counts;
  for (int k = 0; k < kDirections; ++k) counts[k] = static_cast<double>(std::max<int64_t>(1, planes * each[k]));
  return counts;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> prior_fwd_cuda(const at::Tensor& images) {  // (B, C, H, W)
  const c10::cuda::CUDAGuard guard(images.device());
  const int64_t B = images.size(0), H = images.size(2), planes = B * images.size(1), band = band_of(images);
  const dim3 grid(static_cast<unsigned>(planes), static_cast<unsigned>((H + band - 1) / band));
  const auto acc = accumulator(images);
  auto partial = at::empty({planes, grid.y, kSums}, images.options().dtype(at::kDouble));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "prior_fwd_cuda", [&] {
    prior_fwd_kernel<scalar_t, acc_type<scalar_t>><<<grid, kThreads, 0, stream>>>(
        images.const_data_ptr<scalar_t>(), layout_of(images), band, partial.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const auto sums = partial.view({B, -1, kSums}).sum(1), total = sums.sum(0);  // few numbers
  const auto counts = counts_of(images);
  std::vector<at::Tensor> tv_l1;
  for (int k = 0; k < kDirections; ++k) tv_l1.push_back(total[k] / counts[k]);
  return {
      at::stack(tv_l1).to(acc),
      total.narrow(0, kDirections, kDirections).sqrt().to(acc),
      sums.select(1, kSums - 1).sqrt().to(acc)};
}

at::Tensor prior_bwd_cuda(
    const at::Tensor& dtv_l1,   // (4)
    const at::Tensor& dtv_l2,   // (4)
    const at::Tensor& dnorms,   // (B)
    const at::Tensor& images,   // (B, C, H, W)
    const at::Tensor& tv_l2,    // (4)
    const at::Tensor& norms) {  // (B)
  const c10::cuda::CUDAGuard guard(images.device());
  const int64_t H = images.size(2), planes = images.size(0) * images.size(1), band = band_of(images);
  const dim3 grid(static_cast<unsigned>(planes), static_cast<unsigned>((H + band - 1) / band));
  const auto acc = accumulator(images);
  auto dimages = at::empty_like(images);
  const auto counts = counts_of(images);
  std::vector<at::Tensor> of_sign;
  for (int k = 0; k < kDirections; ++k) of_sign.push_back(dtv_l1[k].to(acc) / counts[k]);
  // Subnormal norms count as 0; times a difference of 0, an infinite quotient would be NaN.
  const double least = acc == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const auto ratio = [&](const at::Tensor& gradient, const at::Tensor& norm) {
    return (gradient / at::maximum(norm, gradient.abs() * least)).masked_fill_(norm < least, 0);
  };
  const auto of_difference = ratio(dtv_l2.to(acc), tv_l2);
  const auto slopes = at::cat({at::stack(of_sign), of_difference});
  const auto of_image = ratio(dnorms.to(acc), norms);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "prior_bwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    prior_bwd_kernel<scalar_t, acc_t><<<grid, kThreads, 0, stream>>>(
        images.const_data_ptr<scalar_t>(),
        layout_of(images),
        layout_of(dimages).s,
        band,
        slopes.const_data_ptr<acc_t>(),
        of_image.const_data_ptr<acc_t>(),
        dimages.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return dimages;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("prior_fwd", &prior_fwd_cuda);
  m.impl("prior_bwd", &prior_bwd_cuda);
}

}  // namespace fastkd
