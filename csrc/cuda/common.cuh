// Helpers shared by all CUDA operators. The CUDA runtime is linked statically and may differ from torch's.
#pragma once

#include "../common.h"

#include <cuda_runtime_api.h>

// Weak: a part of torch's CUDA half, without which this library loads too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastkd {

// A kernel has at most 4 KB of arguments before CUDA 12.1, and 32 KB since.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr bool kLargeArguments = true;
#else
constexpr bool kLargeArguments = false;
#endif

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// Makes the device of x the current one, of torch until the end of the scope, and of this library's runtime.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.device_index()) { check(cudaSetDevice(x.device_index())); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream on which torch works now.
inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream(x.device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace fastkd
