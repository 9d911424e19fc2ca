// Enough of CUDA to run fastkd's kernels on a CPU: blocks one after another, the threads of a block as coroutines that
// change places at each barrier. What holds for any order of threads is found here; time and memory models are not.
#pragma once

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

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  bool has_ended = false;
  unsigned barriers = 0;   // passed, of the block
  unsigned exchanges = 0;  // and of the warp
  char value[16];          // that others of the warp may ask for
};

struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  unsigned now = 0;  // the thread that runs
  std::function<void()> body;
};

inline Block* block = nullptr;
inline dim3 thread_idx, block_idx, grid_dim, block_dim;

inline void yield() {
  Thread& own = block->threads[block->now];
  swapcontext(&own.context, &block->scheduler);
}

inline void enter() {
  block->body();
  block->threads[block->now].has_ended = true;
  yield();
}

// Waits until every thread of [first, last) that has not ended has come as far.
inline void wait_for(unsigned first, unsigned last, unsigned Thread::* counter) {
  const unsigned here = ++(block->threads[block->now].*counter);
  for (;;) {
    bool all = true;
    for (unsigned i = first; i < last; ++i) {
      const Thread& other = block->threads[i];
      all = all && (other.has_ended || other.*counter >= here);
    }
    if (all) return;
    yield();
  }
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
  static Block memory;
  block = &memory;
  block->body = body;
  block->threads.resize(threads);
  for (Thread& thread : block->threads) {
    thread.has_ended = false;
    thread.barriers = thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  // Warps in an order that changes: a result that depends on it is a race.
  static unsigned turn = 0;
  for (unsigned left = threads; left > 0;) {
    ++turn;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned warps = (threads + kWarp - 1) / kWarp, warp = turn % 2 ? i / kWarp : warps - 1 - i / kWarp;
      block->now = warp * kWarp + i % kWarp;
      if (block->now >= threads || block->threads[block->now].has_ended) continue;
      thread_idx = dim3(block->now, 0, 0);
      swapcontext(&block->scheduler, &block->threads[block->now].context);
      left -= block->threads[block->now].has_ended;
    }
  }
}

// What kernel<<<grid, block, shared, stream>>> becomes: called with the arguments.
template <typename... Parameters, typename Stream>
auto launch(dim3 grid, dim3 threads, size_t, Stream, void (*kernel)(Parameters...)) {
  return [=](auto&&... arguments) {
    grid_dim = grid, block_dim = threads;
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_idx = dim3(x, y, 0);
        run_block(threads.x, [&] { kernel(arguments...); });
      }
  };
}

template <typename T>
T shuffle_down(T value, unsigned by) {
  const unsigned first = block->now / kWarp * kWarp;
  const unsigned last = std::min<unsigned>(first + kWarp, static_cast<unsigned>(block->threads.size()));
  std::memcpy(block->threads[block->now].value, &value, sizeof value);
  wait_for(first, last, &Thread::exchanges);
  if (block->now + by < last) std::memcpy(&value, block->threads[block->now + by].value, sizeof value);
  wait_for(first, last, &Thread::exchanges);  // before the next one overwrites it
  return value;
}

}  // namespace emulation

#define threadIdx emulation::thread_idx
#define blockIdx emulation::block_idx
#define gridDim emulation::grid_dim
#define blockDim emulation::block_dim

inline void __syncthreads() {
  emulation::wait_for(0, static_cast<unsigned>(emulation::block->threads.size()), &emulation::Thread::barriers);
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
