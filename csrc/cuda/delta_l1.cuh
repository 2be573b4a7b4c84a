// ||d_t||_1 and ||selected d_t||_1 in float64. Grid (parts, T): a block sums one part, a second kernel adds the parts
// in their order: no float atomics, the same bits each time. Reads base and tensor once per task.
#pragma once

#include "delta_source.cuh"

namespace pymerge::cuda {

constexpr int64_t kPartVectors = 2048;  // of one partial sum: 16384 entries

struct L1Args {
  DeltaArgs delta;
  double* parts;  // [T, 2, parts]
};

static __global__ void __launch_bounds__(kThreads) l1_kernel(const __grid_constant__ L1Args args) {
  __shared__ double scratch[kThreads / kWarp];
  const Task task = task_at(args.delta, blockIdx.y);
  const int64_t begin = blockIdx.x * kPartVectors, all = vectors(args.delta.count);
  const int64_t end = begin + kPartVectors < all ? begin + kPartVectors : all;
  double whole = 0.0, selected = 0.0;
  for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
    Vec d = delta8(args.delta, task, v, width_at(args.delta.count, v));
#pragma unroll
    for (int j = 0; j < kWidth; ++j) whole += fabsf(d.at[j]);
    select8(args.delta, task, blockIdx.y, v, d);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) selected += fabsf(d.at[j]);
  }
  whole = block_sum(whole, scratch);
  selected = block_sum(selected, scratch);
  if (threadIdx.x != 0) return;
  double* parts = args.parts + static_cast<int64_t>(blockIdx.y) * 2 * gridDim.x + blockIdx.x;
  parts[0] = whole;
  parts[gridDim.x] = selected;
}

// One block per sum: total[i] = sum of parts [i, 0..count).
static __global__ void __launch_bounds__(kThreads) add_parts_kernel(const double* parts, int64_t count, double* total) {
  __shared__ double scratch[kThreads / kWarp];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += parts[blockIdx.x * count + i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) total[blockIdx.x] = sum;
}

inline int64_t l1_parts(int64_t count) { return (vectors(count) + kPartVectors - 1) / kPartVectors; }

// norms: [T, 2]
inline void launch_l1(const L1Args& args, double* norms, Stream stream) {
  const int64_t parts = l1_parts(args.delta.count);
  const dim3 grid(static_cast<unsigned>(parts), args.delta.tasks);
  LAUNCH(l1_kernel, grid, kThreads, 0, stream, args);
  LAUNCH(add_parts_kernel, 2 * args.delta.tasks, kThreads, 0, stream, args.parts, parts, norms);
}

}  // namespace pymerge::cuda
