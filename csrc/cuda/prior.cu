// Total variation in four directions and the norms of images, and their gradient. One block per plane and band of rows.
//
// Forward sums the differences that end in a pixel, so that each is taken once; backward forms the eight around it. The
// neighbours of a warp's pixels come from L1. Partial sums add up in double in a fixed order: no atomics.
#include "thresholds.h"
#include "common.cuh"

#include <algorithm>
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

// Sums over the threads, left in column 0.
__device__ void reduce(double (*shared)[kThreads]) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
#pragma unroll
      for (int k = 0; k < kSums; ++k) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
  }
  __syncthreads();
}

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
  reduce(shared);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  if (threadIdx.x < kSums) partial[at * kSums + threadIdx.x] = shared[threadIdx.x][0];
}

// Sums of n rows; grid (groups of rows).
__global__ void __launch_bounds__(kThreads) prior_sum_kernel(
    int64_t n,
    const double* __restrict__ rows,  // (groups, n, 9)
    double* __restrict__ sums) {      // (groups, 9)
  __shared__ double shared[kSums][kThreads];
  double sum[kSums] = {};
  const double* first = rows + blockIdx.x * n * kSums;
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
#pragma unroll
    for (int k = 0; k < kSums; ++k) sum[k] += first[i * kSums + k];
#pragma unroll
  for (int k = 0; k < kSums; ++k) shared[k][threadIdx.x] = sum[k];
  reduce(shared);
  if (threadIdx.x < kSums) sums[blockIdx.x * kSums + threadIdx.x] = shared[threadIdx.x][0];
}

struct Counts {
  double of[kDirections];
};

template <typename acc_t>
__global__ void __launch_bounds__(kThreads) prior_results_kernel(
    int64_t B,
    Counts counts,
    const double* __restrict__ of_images,  // (B, 9)
    const double* __restrict__ total,      // (9)
    acc_t* __restrict__ tv_l1,             // (4)
    acc_t* __restrict__ tv_l2,             // (4)
    acc_t* __restrict__ norms) {           // (B)
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < B) norms[i] = static_cast<acc_t>(sqrt(of_images[i * kSums + kSums - 1]));
  if (i >= kDirections) return;
  tv_l1[i] = static_cast<acc_t>(total[i] / counts.of[i]);
  tv_l2[i] = static_cast<acc_t>(sqrt(total[kDirections + i]));
}

// gradient / norm, and 0 for a norm of 0. Subnormal norms count as 0; times a difference of 0, an infinite quotient
// would be NaN. A norm that is NaN stays so.
template <typename acc_t>
__device__ acc_t ratio(acc_t gradient, acc_t norm) {
  constexpr acc_t least = std::numeric_limits<acc_t>::min();
  const acc_t other = (gradient < 0 ? -gradient : gradient) * least;
  return norm < least ? acc_t(0) : gradient / (norm < other ? other : norm);
}

template <typename acc_t>
__global__ void __launch_bounds__(kThreads) prior_slopes_kernel(
    int64_t B,
    Counts counts,
    const acc_t* __restrict__ dtv_l1,  // (4)
    const acc_t* __restrict__ dtv_l2,  // (4)
    const acc_t* __restrict__ dnorms,  // (B)
    const acc_t* __restrict__ tv_l2,   // (4)
    const acc_t* __restrict__ norms,   // (B)
    acc_t* __restrict__ slopes,        // (2, 4): of sign(d_k), of d_k
    acc_t* __restrict__ of_image) {    // (B)
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < B) of_image[i] = ratio(dnorms[i], norms[i]);
  if (i >= kDirections) return;
  slopes[i] = static_cast<acc_t>(dtv_l1[i] / counts.of[i]);
  slopes[kDirections + i] = ratio(dtv_l2[i], tv_l2[i]);
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

// Blocks with a thread for each image, and for each direction.
unsigned blocks_of(int64_t B) {
  return static_cast<unsigned>((B + kThreads - 1) / kThreads);
}

Images layout_of(const Tensor& x) {
  return {x.size(1), x.size(2), x.size(3), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

// Rows of a band: enough blocks to fill the card.
int64_t band_of(const Tensor& images) {
  const int64_t planes = images.size(0) * images.size(1), H = images.size(2);
  const int64_t bands = std::clamp<int64_t>(kWaves * multiprocessors() / planes, 1, std::min<int64_t>(H, kBands));
  return (H + bands - 1) / bands;
}

// Differences per direction; at least 1, so that a direction without any is 0. On the host: no copy to the device.
Counts counts_of(const Tensor& images) {
  const int64_t H = images.size(2), W = images.size(3), planes = images.size(0) * images.size(1);
  const int64_t each[] = {H * (W - 1), (H - 1) * W, (H - 1) * (W - 1), (H - 1) * (W - 1)};
  Counts counts;
  for (int k = 0; k < kDirections; ++k) counts.of[k] = static_cast<double>(std::max<int64_t>(1, planes * each[k]));
  return counts;
}

std::tuple<Tensor, Tensor, Tensor> prior_fwd_cuda(const Tensor& images) {  // (B, C, H, W)
  const OnDevice guard(images);
  const int64_t B = images.size(0), H = images.size(2), planes = B * images.size(1), band = band_of(images);
  const dim3 grid(static_cast<unsigned>(planes), static_cast<unsigned>((H + band - 1) / band));
  const auto acc = accumulator(images);
  const auto partial = empty(images, {planes, grid.y, kSums}, ScalarType::Double);
  const auto of_images = empty(partial, {B, kSums}), total = empty(partial, {kSums});
  const auto tv_l1 = empty(images, {kDirections}, acc), tv_l2 = empty_like(tv_l1), norms = empty(images, {B}, acc);
  const auto stream = stream_of(images);
  FASTKD_DISPATCH(images.scalar_type(), "prior_fwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    prior_fwd_kernel<scalar_t, acc_t><<<grid, kThreads, 0, stream>>>(
        images.const_data_ptr<scalar_t>(), layout_of(images), band, partial.mutable_data_ptr<double>());
    check(cudaGetLastError());
    prior_sum_kernel<<<static_cast<unsigned>(B), kThreads, 0, stream>>>(
        planes / B * grid.y, partial.const_data_ptr<double>(), of_images.mutable_data_ptr<double>());
    check(cudaGetLastError());
    prior_sum_kernel<<<1, kThreads, 0, stream>>>(
        B, of_images.const_data_ptr<double>(), total.mutable_data_ptr<double>());
    check(cudaGetLastError());
    prior_results_kernel<acc_t><<<blocks_of(B), kThreads, 0, stream>>>(
        B,
        counts_of(images),
        of_images.const_data_ptr<double>(),
        total.const_data_ptr<double>(),
        tv_l1.mutable_data_ptr<acc_t>(),
        tv_l2.mutable_data_ptr<acc_t>(),
        norms.mutable_data_ptr<acc_t>());
    check(cudaGetLastError());
  });
  return {tv_l1, tv_l2, norms};
}

Tensor prior_bwd_cuda(
    const Tensor& dtv_l1,   // (4)
    const Tensor& dtv_l2,   // (4)
    const Tensor& dnorms,   // (B)
    const Tensor& images,   // (B, C, H, W)
    const Tensor& tv_l2,    // (4)
    const Tensor& norms) {  // (B)
  const OnDevice guard(images);
  const int64_t H = images.size(2), planes = images.size(0) * images.size(1), band = band_of(images);
  const dim3 grid(static_cast<unsigned>(planes), static_cast<unsigned>((H + band - 1) / band));
  const auto acc = accumulator(images);
  auto dimages = empty_like(images);
  const int64_t B = images.size(0);
  const auto dense = [&](const Tensor& x) { return x.to(acc).contiguous(); };
  const auto dl1 = dense(dtv_l1), dl2 = dense(dtv_l2), dn = dense(dnorms), l2 = dense(tv_l2), n = dense(norms);
  const auto slopes = empty(images, {2, kDirections}, acc), of_image = empty(images, {B}, acc);
  const auto stream = stream_of(images);
  FASTKD_DISPATCH(images.scalar_type(), "prior_bwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto in = [](const Tensor& x) { return x.const_data_ptr<acc_t>(); };
    const auto out = [](const Tensor& x) { return x.mutable_data_ptr<acc_t>(); };
    prior_slopes_kernel<acc_t><<<blocks_of(B), kThreads, 0, stream>>>(
        B, counts_of(images), in(dl1), in(dl2), in(dn), in(l2), in(n), out(slopes), out(of_image));
    check(cudaGetLastError());
    prior_bwd_kernel<scalar_t, acc_t><<<grid, kThreads, 0, stream>>>(
        images.const_data_ptr<scalar_t>(),
        layout_of(images),
        layout_of(dimages).s,
        band,
        in(slopes),
        in(of_image),
        dimages.mutable_data_ptr<scalar_t>());
    check(cudaGetLastError());
  });
  return dimages;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  implement<prior_fwd_cuda>(m, "prior_fwd");
  implement<prior_bwd_cuda>(m, "prior_bwd");
}

}  // namespace fastkd
