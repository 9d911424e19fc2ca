// Layers of a launch: how their groups and items are dealt to blocks and threads.
#pragma once
#include "moments.h"
#include "thresholds.h"
#include "common.cuh"

#include <algorithm>
#include <vector>

namespace fastkd {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks that share a multiprocessor at least: 32 KB of loads in flight cover its latency
constexpr int kWarp = 32;
Threshold kWaves{"moments.cuda_waves", 16};         // blocks of a layer for each multiprocessor, where it has so many
Threshold kLoads{"moments.cuda_loads", 4};          // of a thread at least, if the layer has so many
constexpr int kLayers = kLargeArguments ? 96 : 12;  // of a launch, of which they are an argument
Threshold kFull{"moments.cuda_layers", kLayers};    // layers of a launch at the most

enum class Mode : int { kPlanes, kPlanesHalf, kPlanesVector, kRuns, kColumns, kColumnsVector };

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
  // With Mode::kRuns, an item is a run of `planes` planes, or of one of the `pieces` of a plane; `piece` is what it has
  // of a plane.
  int64_t pieces, piece;
  int planes, splits;
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

// What a block has of a layer: a tile of its groups, and of their items those of a split.
struct Part {
  int64_t split, tile, begin, end;

  explicit __device__ Part(const Layer& l) {
    const int64_t block = blockIdx.x - l.block;
    split = block / l.tiles, tile = block % l.tiles;
    begin = split * l.split, end = min(begin + l.split, l.items);
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

// Returns whether tensors of one shape and these strides and addresses can be read by the same vectors, the odd
// elements before the first alike.
bool is_alike(const void* p, const PlaneStrides& s, const void* q, const PlaneStrides& t, int64_t V, int64_t size) {
  const auto apart = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(q);
  return s.w == 1 && t.w == 1 && (s.b - t.b) % V == 0 && (s.c - t.c) % V == 0 && apart % (V * size) == 0;
}

// Layers gathered for one launch: enough blocks to fill the card, a few loads of a thread each.
struct Launch {
  Layers layers{};
  int64_t blocks = 0, partials = 0, groups = 0;

  bool is_full() const { return layers.count >= std::min<int64_t>(kFull, kLayers); }

  // x, and of the same shape out (y or dx) and dy if defined; false if their positions do not fold.
  bool add(const Tensor& x, const Tensor& out, const Tensor& dy, int64_t first_group, bool per_image) {
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
    l.mode = is_columns                           ? (is_vector ? Mode::kColumnsVector : Mode::kColumns)
             : is_vector                          ? Mode::kPlanesVector
             : is_half                            ? Mode::kPlanesHalf
             : cut_runs(l, per_image, most, size) ? Mode::kRuns
                                                  : Mode::kPlanes;
    // As Shape has them: kX, kGroups, kStep, kPass.
    const int64_t across = !is_columns ? 1
                           : is_vector ? 8
                                       : 32,
                  wide = is_columns && is_vector ? across * most : across;
    const int64_t step = is_columns ? 1 : is_vector ? most : is_half ? most / 2 : 1;
    const int64_t pass = l.mode == Mode::kRuns ? 1 : kThreads / across * step;
    l.pass_n = pass / l.HW, l.pass_p = pass % l.HW;
    l.tiles = (l.groups + wide - 1) / wide;
    if (l.mode == Mode::kRuns) l.tiles = (l.C + l.planes - 1) / l.planes * (per_image ? l.groups / l.C : 1);
    const int64_t least = kLoads * pass, most_splits = (l.items + least - 1) / least;
    const int64_t wanted = std::clamp<int64_t>(kWaves * multiprocessors() / l.tiles, 1, most_splits);
    l.split = ((l.items + wanted - 1) / wanted + step - 1) / step * step;
    l.splits = static_cast<int>((l.items + l.split - 1) / l.split);
    l.first = first_group, l.before = groups, l.block = blocks, l.partial = partials;
    blocks += l.tiles * l.splits, partials += l.splits * l.groups, groups += l.groups;
    layers.layer[layers.count++] = l;
    return true;
  }

 private:
  // Makes runs, of vectors of V elements, the items; false if such a run would be shorter than what the threads of a
  // block read one element each.
  static bool cut_runs(Layer& l, bool per_image, int64_t V, int64_t size) {
    const auto alike = [&](const void* p, const PlaneStrides& s) {
      return p == nullptr || is_alike(l.x, l.s, p, s, V, size);
    };
    if (l.W != l.HW || !alike(l.x, l.s) || !alike(l.out, l.d) || !alike(l.dy, l.g)) return false;
    const int64_t most = (kThreads - 1) * V;  // one vector more holds what lies before the first whole one
    const auto is_dense = [&](int64_t channels, auto stride, int64_t expected) {
      return channels == 1 || (stride(l.s) == expected && stride(l.d) == expected && stride(l.g) == expected);
    };
    const bool is_row = is_dense(l.C, [](const PlaneStrides& s) { return s.c; }, l.HW);
    // The planes of all images are one row of memory too, if each image has moments of its own.
    const auto of_image = [](const PlaneStrides& s) { return s.b; };
    if (per_image && is_row && is_dense(l.groups / l.C, of_image, l.C * l.HW))
      l.C = l.groups, l.s.c = l.d.c = l.g.c = l.HW;
    l.planes = 1;
    while (is_row && 2 * l.planes * l.HW <= most && l.planes < std::min<int64_t>(l.C, kThreads)) l.planes *= 2;
    l.pieces = (l.HW + most - 1) / most;
    l.piece = l.HW;
    if (l.pieces > 1) {  // of whole vectors, as even as possible
      l.piece = ((l.HW + l.pieces - 1) / l.pieces + V - 1) / V * V;
      l.pieces = (l.HW + l.piece - 1) / l.piece;
    }
    if (std::min<int64_t>(l.planes, l.C) * l.piece < kThreads) return false;
    l.items = l.items / l.HW * l.pieces;
    return true;
  }
};

}  // namespace
}  // namespace fastkd
