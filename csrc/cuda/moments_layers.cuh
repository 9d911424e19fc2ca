// Layers of a launch: how their groups and items are dealt to blocks and threads.
#pragma once
#include "moments.h"
#include "thresholds.h"
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
    mean = isfinite(delta) ? mean + delta * share : mean + other.mean;  // keeps infinities; differences give NaN
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

// One layer of a launch. The moments of its groups start at `first` in those of all layers, its groups at `before` in
// those of the launch: layers without elements have moments but take part in no launch.
struct Layer {
  const void *x, *dy;  // dy null without a batch norm
  void* out;           // y (null without a batch norm) or dx
  PlaneStrides s, g, d;
  int64_t C, HW, W, groups, items, split, first, before, partial;
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

// Position of a thread's items: only the first one takes a division.
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

// Returns whether V elements of p can be read at once, at each step of V along the dimension with stride 1.
bool is_aligned(const void* p, const PlaneStrides& s, int64_t V, int64_t size, bool is_columns) {
  const bool rest = s.b % V == 0 && s.h % V == 0 && (is_columns ? s.w % V == 0 : s.c % V == 0);
  return rest && (is_columns ? s.c : s.w) == 1 && reinterpret_cast<uintptr_t>(p) % (V * size) == 0;
}

// Layers gathered for one launch: enough blocks to fill the card, a few loads of a thread each.
struct Launch {
  Layers layers{};
  int64_t blocks = 0, partials = 0, groups = 0;

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
    l.first = first_group, l.before = groups, l.block = blocks, l.partial = partials;
    blocks += l.tiles * l.splits, partials += l.splits * l.groups, groups += l.groups;
    layers.layer[layers.count++] = l;
    return true;
  }
};

}  // namespace
}  // namespace fastkd
