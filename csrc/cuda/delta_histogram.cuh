// Histograms of magnitudes: level 0 counts bits(|d|) >> 15, level 1 the lower 15 bits of entries with one prefix.
// Grid (blocks, T). A block walks chunks of one task and counts in shared memory: 32768 bins of 16 bits, which a chunk
// cannot overflow; what lies above (level 0, |d| >= 2) goes straight to device memory, zeros are counted in registers.
// Reads base and the tensor once per task.
#pragma once

#include "delta_source.cuh"

namespace pymerge::cuda {

constexpr int kFineBits = 15;
constexpr int kCoarseBins = 1 << 16, kFineBins = 1 << kFineBits;
constexpr int kHistogramThreads = 512;
constexpr int64_t kChunkVectors = 7680;                                         // 61440 entries < 2^16
constexpr int kHistogramBytes = kFineBins * 2 + kHistogramThreads / kWarp * 8;  // counters, then a Count per warp

struct HistogramArgs {
  DeltaArgs delta;
  int level;
  const uint32_t* prefix;  // [T] on the device, or null: each task's own
  Count* hist;             // [T, 65536] or [T, 32768]
};

__device__ __forceinline__ void count_magnitude(const HistogramArgs& args, uint32_t bits, uint32_t prefix,
                                                uint32_t* counters, Count* bins, Count& zeros) {
  if (args.level == 1 && bits >> kFineBits != prefix) return;
  if (bits == 0) {
    ++zeros;
    return;
  }
  const uint32_t bin = args.level == 0 ? bits >> kFineBits : bits & (kFineBins - 1);
  if (bin < kFineBins) {
    atomicAdd(counters + (bin >> 1), 1u << (16 * (bin & 1)));
  } else {
    atomicAdd(bins + bin, Count{1});
  }
}

// Adds the shared counters to the bins and clears them.
__device__ __forceinline__ void flush_counters(uint32_t* counters, Count* bins) {
  for (int word = threadIdx.x; word < kFineBins / 2; word += blockDim.x) {
    const uint32_t both = counters[word];
    if (both == 0) continue;
    counters[word] = 0;
    if (both & 0xFFFFu) atomicAdd(bins + 2 * word, Count{both & 0xFFFFu});
    if (both >> 16) atomicAdd(bins + 2 * word + 1, Count{both >> 16});
  }
}

// Shared memory: kHistogramBytes.
static __global__ void __launch_bounds__(kHistogramThreads)
    histogram_kernel(const __grid_constant__ HistogramArgs args) {
  DYNAMIC_SHARED(uint32_t, counters);
  Count* scratch = reinterpret_cast<Count*>(counters + kFineBins / 2);
  const Task task = task_at(args.delta, blockIdx.y);
  const uint32_t prefix = args.prefix != nullptr ? args.prefix[blockIdx.y] : task.prefix;
  Count* bins = args.hist + static_cast<int64_t>(blockIdx.y) * (args.level == 0 ? kCoarseBins : kFineBins);
  const int64_t count = args.delta.count, all = vectors(count);
  Count zeros = 0;
  for (int word = threadIdx.x; word < kFineBins / 2; word += blockDim.x) counters[word] = 0;
  __syncthreads();
  for (int64_t chunk = blockIdx.x * kChunkVectors; chunk < all; chunk += gridDim.x * kChunkVectors) {
    const int64_t end = chunk + kChunkVectors < all ? chunk + kChunkVectors : all;
    for (int64_t v = chunk + threadIdx.x; v < end; v += blockDim.x) {
      const int n = width_at(count, v);
      Vec d = delta8(args.delta, task, v, n);
      mask8(args.delta, task, v, d);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (j < n) count_magnitude(args, magnitude_bits(d.at[j]), prefix, counters, bins, zeros);
      }
    }
    __syncthreads();
    flush_counters(counters, bins);
    __syncthreads();
  }
  zeros = block_sum(zeros, scratch);
  if (threadIdx.x == 0 && zeros > 0) atomicAdd(bins, zeros);
}

constexpr int kHistogramBlocks = 3;  // per multiprocessor, as shared memory allows

// hist is zero; kHistogramBytes have been allowed.
inline void launch_histogram(const HistogramArgs& args, int sms, Stream stream) {
  const int chunks = static_cast<int>(grid_size(vectors(args.delta.count), kChunkVectors, sms, kHistogramBlocks));
  const dim3 grid(chunks, args.delta.tasks);
  LAUNCH(histogram_kernel, grid, kHistogramThreads, kHistogramBytes, stream, args);
}

}  // namespace pymerge::cuda
