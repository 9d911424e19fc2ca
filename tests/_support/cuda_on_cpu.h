// Enough of CUDA to run fastkd's kernels on a CPU: blocks one after another, the threads of a block as coroutines that
// change places at each barrier. What holds for any order of threads is found here; time and memory models are not.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // of the block that runs

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

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
  for (unsigned i = 0; i < size; ++i) block.threads[i]->has_ended = false;
  // In an order that changes: a result that depends on it is a race.
  static unsigned turn = 0;
  while (block.all.left > 0) {
    ++turn;
    for (unsigned i = 0; i < size; ++i) {
      block.now = turn % 2 ? i : size - 1 - i;
      if (block.threads[block.now]->has_ended) continue;
      thread_idx = dim3(block.now, 0, 0);
      resume(*block.threads[block.now]);
    }
  }
}

// What kernel<<<grid, block, shared, stream>>> becomes: called with the arguments.
template <typename... Parameters, typename Stream>
auto launch(dim3 grid, dim3 threads, size_t, Stream, void (*kernel)(Parameters...)) {
  return [=](auto&&... arguments) {
    grid_dim = grid, block_dim = threads;
    const std::function<void()> body = [&] { kernel(arguments...); };
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_idx = dim3(x, y, 0);
        run_block(threads.x, body);
      }
  };
}

template <typename T>
T shuffle_down(T value, unsigned by) {
  const unsigned here = block.now, last = std::min(here / kWarp * kWarp + kWarp, block.size);
  Group& warp = block.warps[here / kWarp];
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
  emulation::wait(emulation::block.all);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  return emulation::shuffle_down(value, by);
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
  *value = 3;
  return 0;
}
#define C10_CUDA_CHECK(call) (void)(call)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() (void)0

namespace c10::cuda {
struct CUDAGuard {
  template <typename Device>
  explicit CUDAGuard(const Device&) {}
};
inline int getCurrentCUDAStream() {
  return 0;
}
}  // namespace c10::cuda
