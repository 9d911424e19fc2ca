// Per-channel mean and biased variance of (B, C, ...), alone or of what an eval-mode batch norm normalises, their
// backward, and the distance of such moments to running statistics. All layers of a call share one launch.
//
// A group is a channel (or a channel of an image); its items are the elements averaged. A block of kX x kY threads
// takes kX threads' groups, kY threads' items at a time, so that neighbouring threads read neighbouring addresses:
// along channels for channels-last, along positions for planes, 16 bytes a thread (8 of short planes) where alignment
// allows. Partial moments merge pairwise in a fixed order: no atomics.
#include "../thresholds.h"
#include "common.cuh"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace fastkd {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks that share a multiprocessor at least: 32 KB of loads in flight cover its latency
constexpr int kWarp = 32;
Threshold kWaves{"moments.cuda_waves", 16};  // blocks of a layer for each multiprocessor, where it has so many
Threshold kLoads{"moments.cuda_loads", 4};   // of a thread at least, if the layer has so many
// Layers of a launch: they are a kernel argument, of at most 4 KB before CUDA 12.1 and 32 KB since.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kLayers = 96;
#else
constexpr int kLayers = 12;
#endif
Threshold kFull{"moments.cuda_layers", kLayers};  // layers of a launch at the most

enum class Mode : int { kPlanes, kPlanesHalf, kPlanesVector, kColumns, kColumnsVector };

template <typename acc_t>
struct Moments {
  acc_t count, mean, m2;

  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) return void(*this = other);
    const acc_t total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean = isfinite(delta) ? mean + delta * share : mean + other.mean;  // infinities add up, and do not cancel
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

// One layer of a launch. The moments of its groups start at `first` in those of all layers.
struct Layer {
  const void *x, *dy;  // dy null without a batch norm
  void* out;           // y (null without a batch norm) or dx
  PlaneStrides s, g, d;
  int64_t C, HW, W, groups, items, split, first, partial;
  int64_t pass_n, pass_p;  // images and positions from one load of a thread to its next
  int64_t block;           // of the launch, its first
  int64_t tiles;
  int splits;
  Mode mode;
};

struct Layers {
  int count;
  Layer layer[kLayers];
};
static_assert(sizeof(Layers) < (kLayers > 12 ? 32000 : 3900), "a launch has no more room for arguments");

__device__ const Layer& layer_of(const Layers& layers, int64_t block) {
  int low = 0, high = layers.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (layers.layer[middle].block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return layers.layer[low];
}

__device__ int64_t group_offset(const Layer& l, const PlaneStrides& s, bool per_image, int64_t group) {
  return per_image ? group / l.C * s.b + group % l.C * s.c : group * s.c;
}

// Where a thread's items lie: a division for the first of them, none on the way.
struct Cursor {
  int64_t n, position;

  __device__ Cursor(const Layer& l, int64_t item) {
    if (l.items <= 0x7fffffff) {  // 32-bit divisions are several times cheaper
      const auto i = static_cast<uint32_t>(item), hw = static_cast<uint32_t>(l.HW);
      n = i / hw, position = i % hw;
    } else {
      n = item / l.HW, position = item % l.HW;
    }
  }

  __device__ void advance(const Layer& l) {
    n += l.pass_n, position += l.pass_p;
    if (position >= l.HW) position -= l.HW, ++n;
  }

  __device__ int64_t offset(const Layer& l, const PlaneStrides& s) const {
    if (l.HW == l.W) return n * s.b + position * s.w;
    return n * s.b + position / l.W * s.h + position % l.W * s.w;
  }
};

template <typename scalar_t, int V>
struct alignas(sizeof(scalar_t) * V) Vector {
  scalar_t x[V];
};

template <typename scalar_t, int V>
__device__ Vector<scalar_t, V> load(const scalar_t* p) {
  return *reinterpret_cast<const Vector<scalar_t, V>*>(p);
}

template <typename scalar_t, int V>
__device__ void store(scalar_t* p, const Vector<scalar_t, V>& v) {
  *reinterpret_cast<Vector<scalar_t, V>*>(p) = v;
}

// How the threads of a block lie over groups and items.
template <int V, bool is_columns>
struct Shape {
  static constexpr int kX = !is_columns ? 1 : V > 1 ? 8 : 32;  // threads along groups: 128 bytes of them
  static constexpr int kY = kThreads / kX;
  static constexpr int kLanes = is_columns ? V : 1;  // groups of a thread
  static constexpr int kGroups = kX * kLanes;        // groups of a block
  static constexpr int kStep = is_columns ? 1 : V;   // items of a thread
  static constexpr int kPass = kY * kStep;           // items of a block in one load each
  // Loads that a thread has in flight, fewer where the sums of eight groups take its registers. Forward takes the mean
  // of a batch first, then its deviations from it.
  static constexpr int kBatch = kLanes > 4 ? 3 : 4;
  static constexpr int kBatchBackward = kLanes > 4 ? 2 : 4;
};

// Moments of one split of the items of a block's groups; y as well where there is one.
template <typename scalar_t, typename acc_t, int V, bool is_columns>
__device__ void partial_moments(
    const Layer& l,
    bool per_image,
    const acc_t* __restrict__ scale,  // (C), with y
    const acc_t* __restrict__ shift,  // (C), with y
    Moments<acc_t>* __restrict__ shared,
    Moments<acc_t>* __restrict__ partial) {  // (splits, groups) of the layer
  using S = Shape<V, is_columns>;
  const int64_t block = blockIdx.x - l.block, split = block / l.tiles;
  const int tx = threadIdx.x % S::kX, ty = threadIdx.x / S::kX;
  const int64_t group = block % l.tiles * S::kGroups + tx * S::kLanes;
  const int64_t begin = split * l.split, end = min(begin + l.split, l.items);
  const auto* x = static_cast<const scalar_t*>(l.x) + group_offset(l, l.s, per_image, group);
  auto* y = static_cast<scalar_t*>(l.out);
  Cursor at(l, begin + ty * S::kStep);
  Moments<acc_t> sum[S::kLanes];
#pragma unroll
  for (int j = 0; j < S::kLanes; ++j) sum[j] = {0, 0, 0};
  if (group < l.groups) {
    for (int64_t i0 = begin + ty * S::kStep; i0 < end; i0 += S::kBatch * S::kPass) {
      Vector<scalar_t, V> v[S::kBatch];
      Cursor from = at;
      int loaded = 0;
#pragma unroll
      for (int b = 0; b < S::kBatch; ++b, at.advance(l)) {
        if (i0 + b * S::kPass >= end) continue;
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
          const int64_t c = is_columns ? group + e : group;
          v[b].x[e] = static_cast<scalar_t>(scale[c] * static_cast<acc_t>(v[b].x[e]) + shift[c]);
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
    for (int j = 0; j < S::kLanes; ++j) partial[split * l.groups + group + j] = shared[tx * S::kLanes + j];
}

// Each block reduces one split of the items of some groups of one layer.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, kResident) moments_partial_kernel(
    const __grid_constant__ Layers layers,
    bool per_image,
    const acc_t* __restrict__ scale,
    const acc_t* __restrict__ shift,
    Moments<acc_t>* __restrict__ partial) {
  constexpr int V = 16 / sizeof(scalar_t);
  __shared__ Moments<acc_t> shared[kThreads * V];
  const Layer& l = layer_of(layers, blockIdx.x);
  auto* own = partial + l.partial;
  switch (l.mode) {
    case Mode::kPlanes:
      return partial_moments<scalar_t, acc_t, 1, false>(l, per_image, scale, shift, shared, own);
    case Mode::kPlanesHalf:
      return partial_moments<scalar_t, acc_t, V / 2, false>(l, per_image, scale, shift, shared, own);
    case Mode::kPlanesVector:
      return partial_moments<scalar_t, acc_t, V, false>(l, per_image, scale, shift, shared, own);
    case Mode::kColumns:
      return partial_moments<scalar_t, acc_t, 1, true>(l, per_image, scale, shift, shared, own);
    case Mode::kColumnsVector:
      return partial_moments<scalar_t, acc_t, V, true>(l, per_image, scale, shift, shared, own);
  }
}

// One warp per group.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) moments_merge_kernel(
    const __grid_constant__ Layers layers,
    int64_t first,   // group of the first layer here
    int64_t groups,  // of all layers here
    const Moments<acc_t>* __restrict__ partial,
    acc_t* __restrict__ mean,   // (all groups)
    acc_t* __restrict__ var) {  // (all groups)
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (at >= groups) return;  // a whole warp
  int which = layers.count - 1;
  while (layers.layer[which].first > first + at) --which;
  const Layer& l = layers.layer[which];
  const int64_t group = first + at - l.first;
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
  mean[first + at] = sum.mean;
  var[first + at] = sum.m2 / sum.count;
}

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

int64_t groups_of(const at::Tensor& x, bool per_image) {
  return per_image ? x.size(0) * x.size(1) : x.size(1);
}

// Whether V elements of p may be read at once, at each step of V along the dimension whose stride is 1.
bool is_aligned(const void* p, const PlaneStrides& s, int64_t V, int64_t size, bool is_columns) {
  const bool rest = s.b % V == 0 && s.h % V == 0 && (is_columns ? s.w % V == 0 : s.c % V == 0);
  return rest && (is_columns ? s.c : s.w) == 1 && reinterpret_cast<uintptr_t>(p) % (V * size) == 0;
}

// Layers gathered for one launch: enough blocks to fill the card, a few loads of a thread each.
struct Launch {
  Layers layers{};
  int64_t blocks = 0, partials = 0, first = 0, groups = 0;

  bool is_full() const { return layers.count >= std::min<int64_t>(kFull, kLayers); }

  // x, and of the same shape out (y or dx) and dy if defined; false if their positions do not fold.
  bool add(const at::Tensor& x, const at::Tensor& out, const at::Tensor& dy, int64_t first_group, bool per_image) {
    const bool has_out = out.defined(), has_dy = dy.defined();
    const auto folded = fold_planes<3>({x, has_out ? out : x, has_dy ? dy : x});
    if (!folded) return false;
    Layer l{};
    l.x = x.const_data_ptr(), l.dy = has_dy ? dy.const_data_ptr() : nullptr;
    l.out = has_out ? out.mutable_data_ptr() : nullptr;
    l.s = folded->strides[0], l.d = folded->strides[1], l.g = folded->strides[2];
    l.C = folded->C, l.W = folded->W, l.HW = folded->H * folded->W;
    l.groups = per_image ? folded->B * l.C : l.C, l.items = per_image ? l.HW : folded->B * l.HW;
    const int64_t size = x.element_size(), most = 16 / size;
    const bool is_columns = l.s.c == 1 && l.C > 1;
    const auto fits = [&](int64_t V) {
      return (is_columns ? l.C : l.W) % V == 0 && is_aligned(l.x, l.s, V, size, is_columns) &&
             (!has_out || is_aligned(l.out, l.d, V, size, is_columns)) &&
             (!has_dy || is_aligned(l.dy, l.g, V, size, is_columns));
    };
    const bool is_vector = fits(most), is_half = !is_vector && !is_columns && most > 2 && fits(most / 2);
    l.mode = is_columns  ? (is_vector ? Mode::kColumnsVector : Mode::kColumns)
             : is_vector ? Mode::kPlanesVector
             : is_half   ? Mode::kPlanesHalf
                         : Mode::kPlanes;
    // As Shape has them: kX, kGroups, kStep, kPass.
    const int64_t across = !is_columns ? 1
                           : is_vector ? 8
                                       : 32,
                  wide = is_columns && is_vector ? across * most : across;
    const int64_t step = is_columns ? 1 : is_vector ? most : is_half ? most / 2 : 1, pass = kThreads / across * step;
    l.pass_n = pass / l.HW, l.pass_p = pass % l.HW;
    l.tiles = (l.groups + wide - 1) / wide;
    const int64_t least = kLoads * pass, most_splits = (l.items + least - 1) / least;
    const int64_t wanted = std::clamp<int64_t>(kWaves * multiprocessors() / l.tiles, 1, most_splits);
    l.split = ((l.items + wanted - 1) / wanted + step - 1) / step * step;
    l.splits = static_cast<int>((l.items + l.split - 1) / l.split);
    l.first = first_group, l.block = blocks, l.partial = partials;
    if (layers.count == 0) first = first_group;
    blocks += l.tiles * l.splits, partials += l.splits * l.groups, groups += l.groups;
    layers.layer[layers.count++] = l;
    return true;
  }
};

// Moments of the layers of one launch; scale and shift with a batch norm.
void launch_fwd(
    const Launch& launch,
    at::ScalarType dtype,
    bool per_image,
    const at::Tensor& mean,
    const at::Tensor& var,
    const at::Tensor& scale = {},
    const at::Tensor& shift = {}) {
  if (launch.layers.count == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  auto partial = at::empty({launch.partials, 3}, mean.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "moments_fwd_cuda", [&] {
    using acc_t = acc_type<scalar_t>;
    auto* partial_ptr = reinterpret_cast<Moments<acc_t>*>(partial.mutable_data_ptr<acc_t>());
    moments_partial_kernel<scalar_t, acc_t><<<static_cast<unsigned>(launch.blocks), kThreads, 0, stream>>>(
        launch.layers,
        per_image,
        scale.defined() ? scale.const_data_ptr<acc_t>() : nullptr,
        shift.defined() ? shift.const_data_ptr<acc_t>() : nullptr,
        partial_ptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const int64_t warps = kThreads / kWarp;
    moments_merge_kernel<acc_t><<<static_cast<unsigned>((launch.groups + warps - 1) / warps), kThreads, 0, stream>>>(
        launch.layers,
        launch.first,
        launch.groups,
        partial_ptr,
        mean.mutable_data_ptr<acc_t>(),
        var.mutable_data_ptr<acc_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::tuple<at::Tensor, at::Tensor> moments_fwd_cuda(
    const at::TensorList inputs,  // per layer (B, C, ...), of one dtype
    bool per_image) {
  const c10::cuda::CUDAGuard guard(inputs[0].device());
  int64_t groups = 0;
  for (const auto& x : inputs) groups += groups_of(x, per_image);
  auto mean = at::empty({groups}, inputs[0].options().dtype(accumulator(inputs[0]))), var = at::empty_like(mean);
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

std::vector<at::Tensor> moments_bwd_cuda(
    const at::Tensor& dmean_in,   // all layers' channels end to end
    const at::Tensor& dvar_in,    // as dmean
    const at::TensorList inputs,  // per layer (B, C, ...), of one dtype
    const at::Tensor& mean,       // as dmean
    bool per_image) {
  const c10::cuda::CUDAGuard guard(inputs[0].device());
  const auto acc = accumulator(inputs[0]), dtype = inputs[0].scalar_type();
  const auto dmean = dmean_in.to(acc).contiguous(), dvar = dvar_in.to(acc).contiguous();
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
  auto mean = at::empty({x.size(1)}, x.options().dtype(acc)), var = at::empty_like(mean);
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
    const at::Tensor& mean,         // (C)
    const at::Tensor& running_var,  // (C)
    const std::optional<at::Tensor>& weight,
    double eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto acc = accumulator(x);
  auto dx = at::empty_like(x);
  if (x.numel() == 0) return dx;
  const auto dmean = dmean_in.to(acc).contiguous(), dvar = dvar_in.to(acc).contiguous();
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

enum class Distance : int { kNorm, kMean, kImage };

struct Target {
  int64_t first, running, C, n;  // n moments from first on; C statistics from running on
  double weight, unbias;
};

#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kTargets = 256;
#else
constexpr int kTargets = 64;
#endif

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

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_distance_cuda(
    const at::Tensor& mean_in,       // (Σ rows_l C_l)
    const at::Tensor& var_in,        // as mean
    const at::Tensor& running_mean,  // (Σ C_l)
    const at::Tensor& running_var,   // as running_mean
    at::IntArrayRef channels,        // C_l
    at::IntArrayRef rows,            // 1, or images of "image"
    at::IntArrayRef counts,          // elements of a moment
    at::ArrayRef<double> weights,
    c10::string_view name) {
  const c10::cuda::CUDAGuard guard(mean_in.device());
  const auto mean = mean_in.contiguous(), var = var_in.contiguous();
  const auto dtype = mean.scalar_type();
  const auto M = running_mean.to(dtype).contiguous(), V = running_var.to(dtype).contiguous();
  const auto layers = static_cast<int64_t>(channels.size());
  auto losses = at::empty({layers}, mean.options().dtype(at::kDouble));
  auto dmean = at::empty_like(mean), dvar = at::empty_like(mean);
  const auto distance = name == "l2" ? Distance::kNorm : name == "mse" ? Distance::kMean : Distance::kImage;
  const auto stream = c10::cuda::getCurrentCUDAStream();
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
    AT_DISPATCH_FLOATING_TYPES(dtype, "bn_distance_cuda", [&] {
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
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {losses.sum().to(dtype), dmean, dvar};
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
