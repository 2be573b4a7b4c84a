// x^T x in float64 of stored matrices. One block: a tile of 64 x 64 products over a part of the rows, tiles on and
// above the diagonal only; a thread: 4 x 4 of them, 16 threads apart, so that a warp reads neighbouring words. Then one
// thread per entry adds the parts in their order and mirrors. Bound by float64 arithmetic.
#pragma once

#include "common.cuh"

namespace pymerge::cuda {

constexpr int kGramTile = 64, kGramSlab = 16, kGramSide = 16, kGramCell = kGramTile / kGramSide;

struct Gram64Args {
  const void* x;  // [batch, depth, width], or [batch, width, depth] where `transposed`
  double* parts;  // [splits, batch, width, width]: upper tiles; is `gram` where there is one part
  double* gram;   // [batch, width, width]
  int64_t depth, width, batch;
  int64_t split_depth;  // rows of a part, a multiple of kGramSlab
  int splits;
  int transposed;
  Dtype dtype;
};

__device__ __forceinline__ double load_double(const void* x, Dtype dtype, int64_t at) {
  return dtype == Dtype::kF64 ? entry<double>(x, at) : static_cast<double>(load1({x, dtype}, at));
}

// Rows [row, row + 16) and columns [column, column + 64) of one matrix; 0 beyond `end` and the last column.
__device__ __forceinline__ void load_slab(const Gram64Args& args, int64_t matrix, int64_t row, int64_t end,
                                          int64_t column, double (&slab)[kGramSlab][kGramTile + 1]) {
  for (int i = threadIdx.x; i < kGramSlab * kGramTile; i += kThreads) {
    const int k = args.transposed ? i % kGramSlab : i / kGramTile, c = args.transposed ? i / kGramSlab : i % kGramTile;
    const int64_t r = row + k, j = column + c;
    double value = 0.0;
    if (r < end && j < args.width) {
      const int64_t at = args.transposed ? j * args.depth + r : r * args.width + j;
      value = load_double(args.x, args.dtype, matrix * args.depth * args.width + at);
    }
    slab[k][c] = value;
  }
}

// The tiles of the upper triangle, row by row.
__device__ __forceinline__ void tile_at(int64_t index, int64_t tiles, int64_t& row, int64_t& column) {
  row = 0;
  for (; index >= tiles - row; ++row) index -= tiles - row;
  column = row + index;
}

// Grid (upper tiles, splits * batch).
static __global__ void __launch_bounds__(kThreads) gram64_kernel(const __grid_constant__ Gram64Args args) {
  __shared__ double left[kGramSlab][kGramTile + 1], right[kGramSlab][kGramTile + 1];
  int64_t tile_row, tile_column;
  tile_at(blockIdx.x, (args.width + kGramTile - 1) / kGramTile, tile_row, tile_column);
  const int64_t matrix = blockIdx.y % args.batch, split = blockIdx.y / args.batch;
  const int64_t begin = split * args.split_depth;
  const int64_t end = begin + args.split_depth < args.depth ? begin + args.split_depth : args.depth;
  const int ty = threadIdx.x / kGramSide, tx = threadIdx.x % kGramSide;
  double sums[kGramCell][kGramCell] = {};
  for (int64_t row = begin; row < end; row += kGramSlab) {
    load_slab(args, matrix, row, end, tile_row * kGramTile, left);
    load_slab(args, matrix, row, end, tile_column * kGramTile, right);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kGramSlab; ++k) {
      double a[kGramCell], b[kGramCell];
#pragma unroll
      for (int i = 0; i < kGramCell; ++i) {
        a[i] = left[k][ty + i * kGramSide];
        b[i] = right[k][tx + i * kGramSide];
      }
#pragma unroll
      for (int i = 0; i < kGramCell; ++i) {
#pragma unroll
        for (int j = 0; j < kGramCell; ++j) sums[i][j] = fma(a[i], b[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
  double* out = args.parts + (split * args.batch + matrix) * args.width * args.width;
#pragma unroll
  for (int i = 0; i < kGramCell; ++i) {
    const int64_t r = tile_row * kGramTile + ty + i * kGramSide;
#pragma unroll
    for (int j = 0; j < kGramCell; ++j) {
      const int64_t c = tile_column * kGramTile + tx + j * kGramSide;
      if (r < args.width && c < args.width) out[r * args.width + c] = sums[i][j];
    }
  }
}

// Grid-stride over the entries on and above the diagonal of all matrices; each is written twice.
static __global__ void __launch_bounds__(kThreads) gram64_add_kernel(const __grid_constant__ Gram64Args args) {
  const int64_t size = args.width * args.width, all = args.batch * size;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < all; at += stride) {
    const int64_t i = at % size / args.width, j = at % args.width;
    if (i > j) continue;
    double sum = 0.0;
    for (int split = 0; split < args.splits; ++split) sum += args.parts[split * all + at];
    args.gram[at] = sum;
    args.gram[at - i * args.width - j + j * args.width + i] = sum;
  }
}

inline int64_t gram64_tiles(int64_t width) {
  const int64_t tiles = (width + kGramTile - 1) / kGramTile;
  return tiles * (tiles + 1) / 2;
}

// Parts of the rows: enough blocks to fill the device twice, none shorter than 256 rows.
inline int gram64_splits(int64_t depth, int64_t width, int64_t batch, int sms) {
  const int64_t wanted = 2 * int64_t{sms} / (gram64_tiles(width) * batch) + 1, most = depth / 256 + 1;
  return static_cast<int>(wanted < most ? wanted : most);
}

// args.splits is set, args.parts has room for them; nothing is empty.
inline void launch_gram64(Gram64Args args, int sms, Stream stream) {
  const int64_t slabs = (args.depth + kGramSlab - 1) / kGramSlab;
  args.split_depth = (slabs + args.splits - 1) / args.splits * kGramSlab;
  const dim3 grid(static_cast<unsigned>(gram64_tiles(args.width)), static_cast<unsigned>(args.splits * args.batch));
  LAUNCH(gram64_kernel, grid, kThreads, 0, stream, args);
  const int64_t entries = args.batch * args.width * args.width;
  LAUNCH(gram64_add_kernel, grid_size(entries, kThreads, sms, 8), kThreads, 0, stream, args);
}

}  // namespace pymerge::cuda
