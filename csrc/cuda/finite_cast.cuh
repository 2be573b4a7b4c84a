// y = x as another dtype and the count of non-finite y. One thread: eight entries at a time, grid-stride. Memory bound:
// 4 bytes read and an entry of y written.
#pragma once

#include "common.cuh"

namespace pymerge::cuda {

struct CastArgs {
  const float* x;
  void* y;
  Dtype dtype;
  int64_t count;
  Count* bad;
};

static __global__ void __launch_bounds__(kThreads) finite_cast_kernel(const CastArgs args) {
  __shared__ Count scratch[kThreads / kWarp];
  const int64_t all = (args.count + kWidth - 1) / kWidth, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  Count bad = 0;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < all; v += stride) {
    const int64_t left = args.count - kWidth * v;
    const int n = left < kWidth ? static_cast<int>(left) : kWidth;
    bad += store8(load8({args.x, Dtype::kF32}, v, n), args.y, args.dtype, v, n);
  }
  bad = block_sum(bad, scratch);
  if (threadIdx.x == 0 && bad != 0) atomicAdd(args.bad, bad);
}

// bad is zero.
inline void launch_finite_cast(const CastArgs& args, int sms, Stream stream) {
  const int64_t items = (args.count + kWidth - 1) / kWidth;
  LAUNCH(finite_cast_kernel, grid_size(items, kThreads, sms, 8), kThreads, 0, stream, args);
}

}  // namespace pymerge::cuda
