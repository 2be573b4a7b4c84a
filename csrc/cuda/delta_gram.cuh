// Inner products of the flattened d_t in float64, two deterministic stages as delta_l1. Grid (parts, pairs s <= t);
// each pair reads its two tensors and base (its callers have two tasks).
#pragma once

#include "delta_source.cuh"

namespace pymerge::cuda {

constexpr int64_t kGramVectors = 2048;  // of one partial sum: 16384 entries

struct GramArgs {
  DeltaArgs delta;
  double* parts;  // [pairs, parts]
  double* gram;   // [T, T]
  int64_t part_count;
};

struct TaskPair {
  int s, t;  // s <= t
};

__device__ __forceinline__ TaskPair pair_at(int pair, int tasks) {
  int s = 0;
  for (; pair >= tasks - s; ++s) pair -= tasks - s;
  return {s, s + pair};
}

static __global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ GramArgs args) {
  __shared__ double scratch[kThreads / kWarp];
  const TaskPair at = pair_at(blockIdx.y, args.delta.tasks);
  const Task one = task_at(args.delta, at.s), other = task_at(args.delta, at.t);
  const int64_t begin = blockIdx.x * kGramVectors, all = vectors(args.delta.count);
  const int64_t end = begin + kGramVectors < all ? begin + kGramVectors : all;
  double sum = 0.0;
  for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
    const int n = width_at(args.delta.count, v);
    Vec a = load8(one.tuned, v, n), b = load8(other.tuned, v, n);
    if (args.delta.base.data != nullptr) {
      const Vec base = load8(args.delta.base, v, n);
      subtract8(base, a);
      subtract8(base, b);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += static_cast<double>(a.at[j]) * static_cast<double>(b.at[j]);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) args.parts[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// One block per pair.
static __global__ void __launch_bounds__(kThreads) gram_add_kernel(const __grid_constant__ GramArgs args) {
  __shared__ double scratch[kThreads / kWarp];
  const TaskPair at = pair_at(blockIdx.x, args.delta.tasks);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < args.part_count; i += blockDim.x) {
    sum += args.parts[blockIdx.x * args.part_count + i];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x != 0) return;
  args.gram[at.s * args.delta.tasks + at.t] = sum;
  args.gram[at.t * args.delta.tasks + at.s] = sum;
}

inline int64_t gram_parts(int64_t count) { return (vectors(count) + kGramVectors - 1) / kGramVectors; }
inline int64_t gram_pairs(int64_t tasks) { return tasks * (tasks + 1) / 2; }

inline void launch_gram(GramArgs args, Stream stream) {
  args.part_count = gram_parts(args.delta.count);
  const unsigned pairs = static_cast<unsigned>(gram_pairs(args.delta.tasks));
  const dim3 grid(static_cast<unsigned>(args.part_count), pairs);
  LAUNCH(gram_kernel, grid, kThreads, 0, stream, args);
  LAUNCH(gram_add_kernel, pairs, kThreads, 0, stream, args);
}

}  // namespace pymerge::cuda
