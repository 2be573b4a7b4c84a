// Two sums a row of the product: each block adds up its tile, then one thread a row adds up the tiles.
#pragma once

#include "projection.cuh"

namespace pymerge::cuda {

// One thread per task and direction, over the column tiles in their order.
static __global__ void __launch_bounds__(kThreads)
    projection_add_kernel(const double* parts, int64_t count, int64_t r, int64_t tiles, double* inner, double* square) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const double* from = parts + (i / r * tiles * r + i % r) * 2;
  double sums[2] = {};
  for (int64_t tile = 0; tile < tiles; ++tile, from += 2 * r) sums[0] += from[0], sums[1] += from[1];
  inner[i] = sums[0];
  square[i] = sums[1];
}

inline int64_t part_count(int64_t tasks, int64_t n, int64_t r) { return tasks * column_tiles(n) * r * 2; }

inline void launch_projection_stats(const ProjectArgs& args, int dtype, bool split, double* inner, double* square,
                                    Stream stream) {
  split ? launch_product<SplitProduct, true>(args, dtype, stream)
        : launch_product<PlainProduct, true>(args, dtype, stream);
  const int64_t count = args.delta.tasks * args.r;
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  LAUNCH(projection_add_kernel, blocks, kThreads, 0, stream, args.parts, count, args.r, column_tiles(args.n), inner,
         square);
}

}  // namespace pymerge::cuda
