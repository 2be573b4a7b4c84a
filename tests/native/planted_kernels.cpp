// Small kernels, right as they are and wrong in one known way: what the emulator must pass and what it must catch.
#include "../../csrc/cuda/common.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

namespace {

constexpr int kWarps = kThreads / kWarp;

struct Args {
  const float* x;
  float* y;
  int n;
  bool planted;
};

// y[block] = sum of the block's share of x; planted: the barrier between writing and reading scratch is left out.
__global__ void sum_kernel(const __grid_constant__ Args args) {
  __shared__ float scratch[kWarps];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < args.n ? args.x[i] : 0.0f;
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, step);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = sum;
  if (!args.planted) __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch[warp];
  args.y[blockIdx.x] = sum;
}

// Twice through the same scratch; planted: the second round overwrites what slow warps of the first have yet to read.
__global__ void twice_kernel(const __grid_constant__ Args args) {
  __shared__ float scratch[kThreads];
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    scratch[threadIdx.x] = args.x[threadIdx.x] * (round + 1);
    __syncthreads();
    sum += scratch[(threadIdx.x + 37) % kThreads];
    if (!args.planted) __syncthreads();
  }
  args.y[threadIdx.x] = sum;
}

// y = 2 x; planted: the last block writes one entry too many.
__global__ void double_kernel(const __grid_constant__ Args args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n + args.planted) args.y[i] = 2.0f * (i < args.n ? args.x[i] : 0.0f);
}

// y = reversed x; planted: reads one entry before the first.
__global__ void reverse_kernel(const __grid_constant__ Args args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) args.y[i] = args.x[args.n - 1 - i - args.planted];
}

// Neighbouring arrays; planted: the write leaves the first of them.
__global__ void array_kernel(const __grid_constant__ Args args) {
  __shared__ float first[kThreads];
  __shared__ float second[kThreads];
  second[threadIdx.x] = 1.0f;
  first[threadIdx.x + args.planted] = args.x[threadIdx.x];
  __syncthreads();
  args.y[threadIdx.x] = first[kThreads - 1 - threadIdx.x] + second[threadIdx.x];
}

// kThreads floats of dynamic shared memory; planted: reads one more.
__global__ void dynamic_kernel(const __grid_constant__ Args args) {
  DYNAMIC_SHARED(float, all);
  all[threadIdx.x] = args.x[threadIdx.x];
  __syncthreads();
  const int i = threadIdx.x + 1;
  args.y[threadIdx.x] = all[args.planted ? i : i % kThreads];
}

// planted: the upper half of the block waits at another barrier.
__global__ void barriers_kernel(const __grid_constant__ Args args) {
  if (args.planted && threadIdx.x >= kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  args.y[threadIdx.x] = 1.0f;
}

// planted: threads without an entry return before the barrier.
__global__ void return_kernel(const __grid_constant__ Args args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (args.planted && i >= args.n) return;
  __syncthreads();
  if (i < args.n) args.y[i] = args.x[i];
}

// Lane i of each half gets what the half's first lane has; planted: the mask names lanes that do not come.
__global__ void half_warp_kernel(const __grid_constant__ Args args) {
  const int lane = threadIdx.x % kWarp;
  float x = args.x[threadIdx.x];
  if (lane < 16) x = __shfl_sync(args.planted ? 0xFFFFFFFFu : 0xFFFFu, x, 0);
  args.y[threadIdx.x] = x;
}

// Lanes exchange through shared memory; planted: without __syncwarp.
__global__ void exchange_kernel(const __grid_constant__ Args args) {
  __shared__ float scratch[kThreads];
  scratch[threadIdx.x] = args.x[threadIdx.x];
  if (!args.planted) __syncwarp();
  args.y[threadIdx.x] = scratch[threadIdx.x ^ 1];
}

// planted: nobody writes what is read.
__global__ void poison_kernel(const __grid_constant__ Args args) {
  __shared__ float scratch[kThreads];
  if (!args.planted) scratch[threadIdx.x] = args.x[threadIdx.x];
  args.y[threadIdx.x] = scratch[threadIdx.x];
}

// planted: a vector load between vectors.
__global__ void vector_kernel(const __grid_constant__ Args args) {
  const uint4 x = *reinterpret_cast<const uint4*>(args.x + 4 * threadIdx.x + args.planted);
  args.y[threadIdx.x] = __uint_as_float(x.y);
}

// A histogram with atomics; planted: plain additions.
__global__ void count_kernel(const __grid_constant__ Args args) {
  __shared__ float bins[4];
  if (threadIdx.x < 4) bins[threadIdx.x] = 0.0f;
  __syncthreads();
  float* bin = bins + threadIdx.x % 4;
  if (args.planted) {
    *bin += 1.0f;
  } else {
    atomicAdd(bin, 1.0f);
  }
  __syncthreads();
  args.y[threadIdx.x] = bins[threadIdx.x % 4];
}

// One call of each collective with three dimensions of threads and a last warp of 8 lanes.
__global__ void collectives_kernel(float* y) {
  const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z), lane = i % kWarp;
  const unsigned mask = i < 32 ? 0xFFFFFFFFu : 0xFFu;
  float sum = static_cast<float>(__shfl_xor_sync(mask, lane, 5) == (lane ^ 5));
  sum += static_cast<float>(__shfl_sync(mask, lane, 2, 4) == lane / 4 * 4 + 2);
  sum += static_cast<float>(__ballot_sync(mask, lane % 2) == (mask & 0xAAAAAAAAu));
  sum += static_cast<float>(__any_sync(mask, lane == 3) && !__all_sync(mask, lane == 3));
  sum += static_cast<float>(__reduce_add_sync(mask, 1u) == static_cast<unsigned>(__popc(mask)));
  sum += static_cast<float>(__reduce_max_sync(mask, i) == (i < 32 ? 31 : 39));
  sum += static_cast<float>(__syncthreads_count(i < 7) == 7);
  sum += static_cast<float>(__syncthreads_or(i == 39) && !__syncthreads_and(i == 39));
  y[i] = sum;
}

using Kernel = void (*)(Args);

constexpr Kernel kKernels[] = {sum_kernel,     twice_kernel,    double_kernel, reverse_kernel,   array_kernel,
                               dynamic_kernel, barriers_kernel, return_kernel, half_warp_kernel, exchange_kernel,
                               poison_kernel,  vector_kernel,   count_kernel};

}  // namespace

extern "C" {

void emulate_planted(int which, int planted, const float* x, float* y, int n) {
  const Kernel kernel = kKernels[which];
  const unsigned blocks = static_cast<unsigned>((n + kThreads - 1) / kThreads);
  LAUNCH(kernel, blocks, kThreads, kernel == dynamic_kernel ? kThreads * sizeof(float) : 0, nullptr,
         Args{x, y, n, planted != 0});
}

void emulate_collectives(float* y) { LAUNCH(collectives_kernel, 1, dim3(5, 4, 2), 0, nullptr, y); }

void emulate_large_block(float* y) { LAUNCH(collectives_kernel, 1, dim3(1025), 0, nullptr, y); }
}
