// Sum over entries of sign(sum_t x_t). One thread: eight entries at a time, grid-stride, all tasks; integer atomics, so
// the total does not depend on their order.
#pragma once

#include "delta_source.cuh"

namespace pymerge::cuda {

struct SignsArgs {
  DeltaArgs delta;
  Count* total;
};

static __global__ void __launch_bounds__(kThreads) signs_kernel(const __grid_constant__ SignsArgs args) {
  __shared__ long long scratch[kThreads / kWarp];
  const DeltaArgs& delta = args.delta;
  const int64_t all = vectors(delta.count), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  long long signs = 0;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < all; v += stride) {
    const int n = width_at(delta.count, v);
    Vec base = {}, sum = {};
    if (delta.base.data != nullptr) base = load8(delta.base, v, n);
#pragma unroll 1
    for (int t = 0; t < delta.tasks; ++t) {
      const Task task = task_at(delta, t);
      Vec x = load8(task.tuned, v, n);
      if (delta.base.data != nullptr) subtract8(base, x);
      select8(delta, task, t, v, x);
      weigh8(delta, task, x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum.at[j] += x.at[j];
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) signs += (sum.at[j] > 0.0f) - (sum.at[j] < 0.0f);
  }
  signs = block_sum(signs, scratch);
  if (threadIdx.x == 0 && signs != 0) atomicAdd(args.total, static_cast<Count>(signs));
}

// total is zero.
inline void launch_signs(const SignsArgs& args, int sms, Stream stream) {
  LAUNCH(signs_kernel, grid_size(vectors(args.delta.count), kThreads, sms, 4), kThreads, 0, stream, args);
}

}  // namespace pymerge::cuda
