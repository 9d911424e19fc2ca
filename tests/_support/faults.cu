// Kernels with one fault each, for what emulates CUDA to find: `faults NAME` runs one and prints what it computes.
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kCount = 64;

struct Large {
  char bytes[32768];
};

__global__ void nothing(int*) {}
__global__ void parameters(const Large) {}

__global__ void shared_bytes(double* out) {
  __shared__ double held[6145];
  held[threadIdx.x] = 0;
  out[threadIdx.x] = held[threadIdx.x];
}

__global__ void unwritten(double* out) {
  __shared__ double held[kCount];
  if (blockIdx.x == 0) held[threadIdx.x] = 1;
  out[threadIdx.x] = held[threadIdx.x];
}

__global__ void without_barrier(double* out) {
  __shared__ double held[kCount];
  held[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = held[kCount - 1 - threadIdx.x];
}

__global__ void order_of_blocks(double* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}

__global__ void barrier_of_some(double* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void barrier_after_an_end(double* out) {
  if (threadIdx.x == 0) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void shuffle_of_some(double* out) {
  if (threadIdx.x < 16) return;
  out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1.0, 1);
}

__global__ void right(double* out) {
  __shared__ double held[kCount];
  held[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = __shfl_down_sync(0xffffffff, held[kCount - 1 - threadIdx.x], 1);
}

}  // namespace

int main(int, char** arguments) {
  std::vector<double> out(kCount);
  int none = 0;
  const auto is = [&](const char* name) { return std::strcmp(arguments[1], name) == 0; };
  if (is("grid y")) nothing<<<dim3(1, 65536), kCount, 0, 0>>>(&none);
  if (is("grid x")) nothing<<<dim3(0), kCount, 0, 0>>>(&none);
  if (is("threads")) nothing<<<1, 1056, 0, 0>>>(&none);
  if (is("warp")) nothing<<<1, 48, 0, 0>>>(&none);
  if (is("parameters")) parameters<<<1, kCount, 0, 0>>>(Large());
  if (is("shared bytes")) shared_bytes<<<1, kCount, 0, 0>>>(out.data());
  if (is("unwritten")) unwritten<<<64, kCount, 0, 0>>>(out.data());
  if (is("without barrier")) without_barrier<<<1, kCount, 0, 0>>>(out.data());
  if (is("order of blocks")) order_of_blocks<<<64, kCount, 0, 0>>>(out.data());
  if (is("barrier of some")) barrier_of_some<<<1, kCount, 0, 0>>>(out.data());
  if (is("barrier after an end")) barrier_after_an_end<<<1, kCount, 0, 0>>>(out.data());
  if (is("shuffle of some")) shuffle_of_some<<<1, kCount, 0, 0>>>(out.data());
  if (is("right")) right<<<1, kCount, 0, 0>>>(out.data());
  for (const double x : out) std::printf("%g ", x);
}
