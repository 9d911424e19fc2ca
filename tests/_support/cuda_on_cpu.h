// Enough of CUDA to run fastkd's kernels on a CPU: blocks one after another, the threads of a block as coroutines that
// change places at each barrier. What holds for any order of blocks and threads is found here, as both are drawn by
// EMULATED_SEED; time and memory models are not. Shared memory is NaN when a block starts. What CUDA refuses or leaves
// undefined ends the process: launches beyond its limits, barriers and shuffles that some threads have left out.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // of the block that runs; emulation::share follows
#define CUDART_VERSION 13000

// What has been launched, and loads through emulation::read by their bytes.
extern "C" {
inline uint64_t emulated_launches = 0, emulated_loads[17] = {};
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;
constexpr unsigned kGrid = 65535;           // of blocks along y and z; 2^31 - 1 along x
constexpr unsigned kThreads = 1024;         // of a block
constexpr size_t kShared = 48 << 10;        // bytes of a block
constexpr size_t kParameters = 32764;       // bytes of a launch, since CUDA 12.1 on compute capability 7.0
constexpr unsigned char kUnwritten = 0xff;  // bytes of a NaN

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

inline unsigned setting(const char* name, unsigned otherwise) {
  const char* value = std::getenv(name);
  return value ? static_cast<unsigned>(std::atoi(value)) : otherwise;
}

inline std::mt19937 random{setting("EMULATED_SEED", 0)};

inline void shuffle(std::vector<unsigned>& order, size_t size) {
  order.resize(size);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
}

// A coroutine that runs one thread of each block in turn. Its first start takes a context, which costs system calls;
// from then on it is left and entered by jumps.
struct Thread {
  ucontext_t context;
  jmp_buf place;  // where it goes on
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  bool has_started = false, has_ended = false;
  char value[16];  // that others of the warp may ask for
};

// Threads that wait for each other: those of a block or of a warp. One that has ended is not waited for.
struct Group {
  unsigned left = 0, waiting = 0, barriers = 0;

  void open_if_complete() {
    if (waiting == left) waiting = 0, ++barriers;
  }
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned size = 0, now = 0;  // the thread that runs
  Group all;
  std::vector<Group> warps;
  std::vector<unsigned> order;
  std::vector<const void*> shared;  // arrays that the block has met
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
};

inline Block block;
inline dim3 thread_idx, block_idx, grid_dim, block_dim;

[[gnu::noinline]] inline void yield() {
  if (_setjmp(block.threads[block.now]->place) == 0) _longjmp(block.scheduler, 1);
}

[[gnu::noinline]] inline void resume(Thread& thread) {
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.has_started) _longjmp(thread.place, 1);
  thread.has_started = true;
  setcontext(&thread.context);
}

inline void wait(Group& group) {
  const unsigned barriers = group.barriers;
  ++group.waiting;
  group.open_if_complete();
  while (group.barriers == barriers) yield();
}

inline void enter() {
  for (;;) {
    (*block.body)();
    block.threads[block.now]->has_ended = true;
    require(block.all.waiting == 0, "a thread ended while others wait for it in __syncthreads");
    for (Group* group : {&block.all, &block.warps[block.now / kWarp]}) {
      --group->left;
      group->open_if_complete();
    }
    yield();
  }
}

inline void run_block(unsigned size, const std::function<void()>& body) {
  while (block.threads.size() < size) {
    auto& thread = *block.threads.emplace_back(std::make_unique<Thread>());
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  block.size = size;
  block.body = &body;
  block.all = {size};
  block.warps.clear();
  for (unsigned first = 0; first < size; first += kWarp) block.warps.push_back({std::min(kWarp, size - first)});
  block.shared.clear();
  block.shared_bytes = 0;
  for (unsigned i = 0; i < size; ++i) block.threads[i]->has_ended = false;
  // In an order that changes from barrier to barrier: a result that depends on it is a race.
  while (block.all.left > 0) {
    shuffle(block.order, size);
    for (const unsigned thread : block.order) {
      block.now = thread;
      if (block.threads[block.now]->has_ended) continue;
      thread_idx = dim3(block.now, 0, 0);
      resume(*block.threads[block.now]);
    }
  }
}

// What follows the declaration of a __shared__ array: the first thread to get there finds nothing of an earlier block.
template <typename T>
void share(T& array) {
  if (std::find(block.shared.begin(), block.shared.end(), &array) != block.shared.end()) return;
  block.shared.push_back(&array);
  block.shared_bytes += sizeof array;
  require(block.shared_bytes <= kShared, "more than 48 KB of shared memory");
  std::memset(static_cast<void*>(&array), kUnwritten, sizeof array);
}

// What the reinterpret_cast of a load becomes.
template <typename T>
const T* read(const void* p) {
  ++emulated_loads[sizeof(T)];
  return static_cast<const T*>(p);
}

// What kernel<<<grid, block, shared, stream>>> becomes: called with the arguments.
template <typename... Parameters, typename Stream>
auto launch(dim3 grid, dim3 threads, size_t, Stream, void (*kernel)(Parameters...)) {
  require((sizeof(Parameters) + ... + 0) <= kParameters, "more than 32764 bytes of parameters");
  require(grid.x > 0 && grid.y > 0 && grid.z > 0, "an empty grid");
  require(grid.x < 1u << 31 && grid.y <= kGrid && grid.z <= kGrid, "a grid beyond CUDA's limits");
  require(threads.x <= kThreads && threads.x % kWarp == 0, "a block of more than 1024 threads or of part of a warp");
  require(grid.z == 1 && threads.y == 1 && threads.z == 1, "more dimensions than are emulated");
  return [=](auto&&... arguments) {
    ++emulated_launches;
    grid_dim = grid, block_dim = threads;
    const std::function<void()> body = [&] { kernel(arguments...); };
    std::vector<unsigned> order;
    shuffle(order, static_cast<size_t>(grid.x) * grid.y);
    for (const unsigned i : order) {
      block_idx = dim3(i % grid.x, i / grid.x, 0);
      run_block(threads.x, body);
    }
  };
}

template <typename T>
T shuffle_down(unsigned mask, T value, unsigned by) {
  const unsigned here = block.now, last = std::min(here / kWarp * kWarp + kWarp, block.size);
  Group& warp = block.warps[here / kWarp];
  require(mask == 0xffffffff && warp.left == last - here / kWarp * kWarp, "a shuffle without some threads of its mask");
  std::memcpy(block.threads[here]->value, &value, sizeof value);
  wait(warp);
  if (here + by < last) std::memcpy(&value, block.threads[here + by]->value, sizeof value);
  wait(warp);  // before the next one overwrites it
  return value;
}

}  // namespace emulation

#define threadIdx emulation::thread_idx
#define blockIdx emulation::block_idx
#define gridDim emulation::grid_dim
#define blockDim emulation::block_dim

inline void __syncthreads() {
  emulation::require(emulation::block.all.left == emulation::block.size, "__syncthreads after a thread has ended");
  emulation::wait(emulation::block.all);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return emulation::shuffle_down(mask, value, by);
}

using std::isfinite;
using std::max;
using std::min;
using std::sqrt;

enum { cudaDevAttrMultiProcessorCount };
inline int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
inline int cudaDeviceGetAttribute(int* value, int, int) {
  *value = static_cast<int>(emulation::setting("EMULATED_MULTIPROCESSORS", 3));
  return 0;
}
inline int cudaSetDevice(int) {
  return 0;
}
inline int cudaGetLastError() {
  return 0;
}
inline const char* cudaGetErrorString(int) {
  return "";
}
using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;

namespace emulation {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace emulation

extern "C" inline int32_t emulated_current_stream(int32_t, void**) {
  return 0;
}
