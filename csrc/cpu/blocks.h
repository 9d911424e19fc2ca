// Memory of gradients and activations that serves the next step again.
//
// glibc returns a large block to the kernel when it is freed, or splits it; the next one then has its pages handed out
// and cleared anew, as they are first touched: of 100 MB that takes several times as long as to compute them. Here a
// freed block is kept for the next tensor of about its size. What was freed last lies as it is, the rest as MADV_FREE:
// the kernel takes those pages when memory runs short. Blocks are made of huge pages where the system has them, because
// MADV_FREE and the next write are costly page by page.
//
// What is mapped in all never exceeds the most that was in use at once, or 64 MB: the layers of a network, one by one,
// want blocks of many sizes. FASTKD_KEEP_BLOCKS=0 in the environment leaves everything to PyTorch's allocator, as does
// any other system than Linux and any torch before 2.11. The storage of such a tensor does not grow: resize_ refuses,
// as it does memory of NumPy.
#pragma once

#include "tensor.h"
#include "thresholds.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>
#endif

#if defined(__linux__)
// Weak: torch_from_blob came with torch 2.11, and the profiler's reporter is no part of the stable interface.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data,
    int64_t ndim,
    const int64_t* sizes,
    const int64_t* strides,
    int64_t storage_offset,
    int32_t dtype,
    int32_t device_type,
    int32_t device_index,
    AtenTensorHandle* out,
    int32_t layout,
    const uint8_t* metadata,
    int64_t metadata_size,
    void (*deleter)(void* data, void* context),
    void* context);

namespace c10 {
class ProfiledCPUMemoryReporter {
 public:
  __attribute__((weak)) void New(void* data, size_t bytes);
  __attribute__((weak)) void Delete(void* data);
};
__attribute__((weak)) ProfiledCPUMemoryReporter& profiledCPUMemoryReporter();
}  // namespace c10
#endif

namespace fastkd {

#if defined(__linux__)
class Blocks {
 public:
  inline static Threshold kSmallest{"blocks.smallest", int64_t(256) << 10};  // bytes of a block; less is PyTorch's
  inline static Threshold kReady{"blocks.ready", int64_t(64) << 20};         // bytes that lie as they are
  inline static Threshold kKept{"blocks.kept", int64_t(1) << 30};            // bytes that lie free in all

  // This object is never destroyed, because tensors may outlive static objects.
  static Blocks& instance() {
    static auto* const blocks = new Blocks;
    return *blocks;
  }

  // A tensor in a block; nullopt where PyTorch's allocator serves, which also has the error for want of memory.
  std::optional<Tensor> empty(Sizes sizes, Sizes strides, ScalarType dtype, size_t bytes) {
    if (torch_from_blob == nullptr || !is_on_ || bytes < static_cast<size_t>(kSmallest)) return std::nullopt;
    const Block block = take((bytes + kPage - 1) / kPage * kPage);
    if (block.data == nullptr) return std::nullopt;
    if (c10::profiledCPUMemoryReporter != nullptr) c10::profiledCPUMemoryReporter().New(block.data, block.bytes);
    AtenTensorHandle out = nullptr;
    require(torch_from_blob(
        block.data,
        sizes.size(),
        sizes.data(),
        strides.data(),
        0,
        shim_dtype(dtype),
        aoti_torch_device_type_cpu(),
        -1,
        &out,
        aoti_torch_layout_strided(),
        nullptr,
        0,
        &give_back,
        new Block(block)));
    return Tensor(out);
  }

 private:
  static constexpr size_t kPage = size_t(64) << 10, kHuge = size_t(2) << 20;  // kPage: whole pages of any system

  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    bool is_offered = false;  // to the kernel
  };

  Blocks() {
    const char* setting = std::getenv("FASTKD_KEEP_BLOCKS");
    is_on_ = setting == nullptr || std::string_view(setting) != "0";
    // A child forked while another thread holds the lock would wait for it forever.
    pthread_atfork([] { instance().mutex_.lock(); }, unlock, unlock);
  }

  static void unlock() { instance().mutex_.unlock(); }

  // The smallest that lies free, is large enough and at most twice so, of several the one freed last; or a new one.
  Block take(size_t bytes) {
    std::vector<Block> surplus;
    size_t before = 0;
    {
      const std::lock_guard lock(mutex_);
      before = most_;
      auto found = free_.rend();
      for (auto b = free_.rbegin(); b != free_.rend(); ++b)
        if (b->bytes >= bytes && b->bytes / 2 <= bytes && (found == free_.rend() || b->bytes < found->bytes)) found = b;
      in_use_ += found == free_.rend() ? bytes : found->bytes;
      most_ = std::max(most_, in_use_);
      if (found != free_.rend()) {
        const Block block = *found;
        free_.erase(std::next(found).base());
        kept_ -= block.bytes;
        return block;
      }
      surplus = remove_beyond(std::max(most_, static_cast<size_t>(kReady)) - in_use_);
    }
    unmap(surplus);
    const Block block = map(bytes);
    if (block.data == nullptr) {
      const std::lock_guard lock(mutex_);
      in_use_ -= bytes;
      most_ = std::max(before, in_use_);
    }
    return block;
  }

  static void give_back(void*, void* context) {
    Block block = *static_cast<Block*>(context);
    delete static_cast<Block*>(context);
    if (c10::profiledCPUMemoryReporter != nullptr) c10::profiledCPUMemoryReporter().Delete(block.data);
    instance().keep(block);
  }

  void keep(Block block) {
    std::vector<Block> surplus;
    {
      const std::lock_guard lock(mutex_);
      block.is_offered = false;
      free_.push_back(block);
      in_use_ -= block.bytes;
      kept_ += block.bytes;
      surplus = remove_beyond(kKept);
      const size_t ready = kReady;
      size_t newer = 0;
      for (auto b = free_.rbegin(); b != free_.rend() && !b->is_offered; ++b) {
        newer += b->bytes;
        // Under the lock: whoever takes the block may write at once. Linux before 4.5 refuses, and keeps the pages.
        if (newer > ready) b->is_offered = madvise(b->data, b->bytes, MADV_FREE) == 0;
      }
    }
    unmap(surplus);
  }

  // Unmaps the blocks freed first until at most `most` bytes are free.
  std::vector<Block> remove_beyond(size_t most) {
    auto last = free_.begin();
    for (; kept_ > most; ++last) kept_ -= last->bytes;
    std::vector<Block> surplus(free_.begin(), last);
    free_.erase(free_.begin(), last);
    return surplus;
  }

  // Starts on a huge page.
  static Block map(size_t bytes) {
    void* const all = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return {};
    const size_t before = kHuge - reinterpret_cast<uintptr_t>(all) % kHuge;  // at most 2 MB
    char* const data = static_cast<char*>(all) + before;
    munmap(all, before);
    if (before < kHuge) munmap(data + bytes, kHuge - before);
    madvise(data, bytes, MADV_HUGEPAGE);
    return {data, bytes};
  }

  static void unmap(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) munmap(block.data, block.bytes);
  }

  bool is_on_;
  std::mutex mutex_;
  std::vector<Block> free_;                  // in the order in which they were freed
  size_t in_use_ = 0, most_ = 0, kept_ = 0;  // bytes: handed out, the most there were, lying free
};
#endif

// empty_like for what is written once and freed before the next step: a gradient, an activation.
inline Tensor empty_kept(const Tensor& x) {
#if defined(__linux__)
  if (x.is_dense())
    if (auto kept = Blocks::instance().empty(x.sizes(), x.strides(), x.scalar_type(), x.nbytes())) return *kept;
#endif
  return empty_like(x);
}

// empty for the same.
inline Tensor empty_kept(const Tensor& like, Sizes sizes, ScalarType dtype) {
#if defined(__linux__)
  const auto strides = contiguous_strides(sizes);
  const auto elements = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
  const size_t bytes = static_cast<size_t>(elements) * aoti_torch_dtype_element_size(shim_dtype(dtype));
  if (auto kept = Blocks::instance().empty(sizes, {strides.data(), sizes.size()}, dtype, bytes)) return *kept;
#endif
  return empty(like, sizes, dtype);
}

}  // namespace fastkd
