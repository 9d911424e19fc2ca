// Moments of planes whose rows of memory start anywhere, as 7 x 7 ones do, and their gradients: adjacent planes of an
// image are one run of memory, which vectors cover whatever its first address.
#pragma once
#include "cuda/moments_layers.cuh"
#include "cuda/moments_scale.cuh"

namespace fastkd {
namespace {

constexpr int kRuns = 4;  // that a thread has in flight: one load of each

// Planes of a block, whose memory of an image is one run, or those of one plane's pieces.
struct RunTile {
  int64_t image, channel, group;  // the first
  int planes, size;               // size: elements of a plane, or of a piece

  __device__ RunTile(const Layer& l, bool per_image, int64_t tile) {
    const int64_t across = (l.C + l.planes - 1) / l.planes;
    image = per_image ? tile / across : 0, channel = tile % across * l.planes;
    group = image * l.C + channel;
    planes = static_cast<int>(min(static_cast<int64_t>(l.planes), l.C - channel));
    size = static_cast<int>(l.piece);
  }
};

// A run of memory as the threads of a block share it: thread i has the vector from element i V - lead on, and elements
// below 0 or from length on are none of the run's.
template <typename scalar_t>
struct Run {
  static constexpr int V = 16 / sizeof(scalar_t);
  using Vec = Vector<scalar_t, V>;
  int64_t n, position;  // of its first element, in the planes of the tile
  int length, lead;

  Run() = default;
  __device__ Run(const Layer& l, const RunTile& tile, const scalar_t* x, int64_t run) {
    const auto r = static_cast<uint32_t>(run), pieces = static_cast<uint32_t>(l.pieces);  // no memory holds 2^32 runs
    n = tile.image + r / pieces, position = r % pieces * l.piece;
    length = static_cast<int>(l.pieces > 1 ? min(l.piece, l.HW - position) : tile.planes * l.piece);
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(x + offset(tile, l.s)) % sizeof(Vec) / sizeof(scalar_t));
  }

  __device__ int64_t offset(const RunTile& tile, const PlaneStrides& s) const {
    return n * s.b + tile.channel * s.c + position;
  }

  __device__ int first() const { return static_cast<int>(threadIdx.x) * V - lead; }
  __device__ bool has(int i) const { return i >= 0 && i < length; }

  __device__ Vec read(const scalar_t* run) const {
    const int i = first();
    if (i >= 0 && i + V <= length) return load<scalar_t, V>(run + i);
    Vec v{};
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (has(i + e)) v.x[e] = load<scalar_t, 1>(run + i + e).x[0];
    return v;
  }

  __device__ void write(scalar_t* run, const Vec& v) const {
    const int i = first();
    if (i >= 0 && i + V <= length) return store(run + i, v);
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (has(i + e)) store(run + i + e, Vector<scalar_t, 1>{v.x[e]});
  }

  // Calls f(e, plane of the tile) for the elements of a thread's vector that are the run's.
  template <typename F>
  __device__ void each(const RunTile& tile, const F& f) const {
    const int i = first(), begin = max(i, 0);
    if (begin >= length) return;
    int plane = begin / tile.size, left = (plane + 1) * tile.size - begin;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (!has(i + e)) continue;
      if (left == 0) ++plane, left = tile.size;
      f(e, plane);
      --left;
    }
  }
};

// As partial_moments: runs go to shared memory by vectors, where kThreads / planes threads sum each plane.
template <typename scalar_t, typename acc_t>
__device__ void partial_runs(
    const Layer& l,
    bool per_image,
    const Norm& norm,
    Affine<acc_t>* __restrict__ affine,                // (kThreads)
    typename Run<scalar_t>::Vec* __restrict__ staged,  // (kRuns, kThreads)
    Moments<acc_t>* __restrict__ shared,               // (kThreads)
    Moments<acc_t>* __restrict__ partial) {
  const Part part(l);
  const RunTile tile(l, per_image, part.tile);
  const int team = kThreads / l.planes, plane = threadIdx.x / team, member = threadIdx.x % team;
  const auto* x = static_cast<const scalar_t*>(l.x);
  auto* y = static_cast<scalar_t*>(l.out);
  // Read after the barrier in the loop.
  if (y != nullptr && threadIdx.x < tile.planes) affine[threadIdx.x] = {norm, tile.channel + threadIdx.x};
  Moments<acc_t> sum{0, 0, 0};
  for (int64_t r0 = part.begin; r0 < part.end; r0 += kRuns) {
    Run<scalar_t> runs[kRuns];
    typename Run<scalar_t>::Vec v[kRuns];
#pragma unroll
    for (int b = 0; b < kRuns; ++b) {
      if (r0 + b >= part.end) continue;
      const auto& run = runs[b] = Run<scalar_t>(l, tile, x, r0 + b);
      v[b] = run.read(x + run.offset(tile, l.s));
    }
    __syncthreads();  // the runs before are summed
#pragma unroll
    for (int b = 0; b < kRuns; ++b) {
      if (r0 + b >= part.end) continue;
      staged[b * kThreads + threadIdx.x] = v[b];
      if (y == nullptr) continue;
      const auto& run = runs[b];
      run.each(tile, [&](int e, int at) {
        const auto& of = affine[at];
        v[b].x[e] = static_cast<scalar_t>(of.scale * static_cast<acc_t>(v[b].x[e]) + of.shift);
      });
      run.write(y + run.offset(tile, l.d), v[b]);
    }
    __syncthreads();
    if (plane >= tile.planes) continue;
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int b = 0; b < kRuns; ++b) {
        if (r0 + b >= part.end) continue;
        const auto& run = runs[b];
        const auto* elements = reinterpret_cast<const scalar_t*>(staged + b * kThreads) + run.lead;
        const int last = min((plane + 1) * tile.size, run.length);
        for (int i = plane * tile.size + member; i < last; i += team) f(static_cast<acc_t>(elements[i]));
      }
    };
    acc_t count = 0, total = 0, m2 = 0;
    each([&](acc_t value) { total += value, ++count; });
    if (count == 0) continue;
    const acc_t mean = total / count;
    each([&](acc_t value) { m2 += (value - mean) * (value - mean); });
    sum.merge({count, mean, m2});
  }
  shared[threadIdx.x] = sum;
  for (int half = team / 2; half > 0; half /= 2) {
    __syncthreads();
    if (member < half) shared[threadIdx.x].merge(shared[threadIdx.x + half]);
  }
  if (member == 0 && plane < tile.planes) partial[part.split * l.groups + tile.group + plane] = shared[threadIdx.x];
}

template <typename scalar_t, typename acc_t>
__device__ void backward_runs(
    const Layer& l,
    bool per_image,
    const acc_t* __restrict__ dmean,
    const acc_t* __restrict__ dvar,
    const acc_t* __restrict__ mean,
    const Norm& norm,
    Coefficients<acc_t>* __restrict__ shared) {  // (kThreads)
  const Part part(l);
  const RunTile tile(l, per_image, part.tile);
  const auto* x = static_cast<const scalar_t*>(l.x);
  const auto* dy = static_cast<const scalar_t*>(l.dy);
  auto* dx = static_cast<scalar_t*>(l.out);
  const bool has_dy = dy != nullptr;
  if (threadIdx.x < tile.planes) {
    const int64_t items = l.items / l.pieces * l.HW, group = tile.group + threadIdx.x;
    shared[threadIdx.x] = {l, items, group, dmean, dvar, mean, norm};
  }
  __syncthreads();
  for (int64_t r0 = part.begin; r0 < part.end; r0 += kRuns) {
    // All loads before the first store, past which the compiler moves none.
    Run<scalar_t> runs[kRuns];
    typename Run<scalar_t>::Vec v[kRuns], g[kRuns];
#pragma unroll
    for (int b = 0; b < kRuns; ++b) {
      if (r0 + b >= part.end) continue;
      const auto& run = runs[b] = Run<scalar_t>(l, tile, x, r0 + b);
      v[b] = run.read(x + run.offset(tile, l.s));
      if (has_dy) g[b] = run.read(dy + run.offset(tile, l.g));
    }
#pragma unroll
    for (int b = 0; b < kRuns; ++b) {
      if (r0 + b >= part.end) continue;
      const auto& run = runs[b];
      run.each(tile, [&](int e, int at) {
        const auto& of = shared[at];
        acc_t d = of.a + of.b * (static_cast<acc_t>(v[b].x[e]) - of.center);
        if (has_dy) d += of.alpha * static_cast<acc_t>(g[b].x[e]);
        v[b].x[e] = static_cast<scalar_t>(d);
      });
      run.write(dx + run.offset(tile, l.d), v[b]);
    }
  }
}

}  // namespace
}  // namespace fastkd
