// Q_t^T (W_t - W_0): a block of eight warps makes 64 directions x 128 columns of one task, 32 rows of W at a time. The
// next rows are on their way into registers while the block multiplies; they are subtracted, split and stored to shared
// memory between two barriers. Blocks of the same columns follow one another, so W comes from memory once and from the
// L2 cache for every further 64 directions.
#pragma once

#include "delta_source.cuh"
#include "product_tile.cuh"

namespace pymerge::cuda {

struct ProjectArgs {
  DeltaArgs delta;     // tuned and base [m, n]
  const float* basis;  // [m, r], tasks basis_step apart
  int64_t basis_step, m, n, r;
  float* out;              // [T, r, n], or null
  const float* reference;  // [r, n], tasks reference_step apart
  int64_t reference_step;
  double* parts;  // [T, column tiles, r, 2]
};

struct TileAt {
  int task;
  int64_t row, column;  // of the product; column tile column / kTileColumns
};

PYMERGE_HD int64_t row_tiles(int64_t r) { return (r + kTileRows - 1) / kTileRows; }
PYMERGE_HD int64_t column_tiles(int64_t n) { return (n + kTileColumns - 1) / kTileColumns; }

__device__ __forceinline__ TileAt tile_at(const ProjectArgs& args) {
  const int64_t rows = row_tiles(args.r), columns = column_tiles(args.n), i = blockIdx.x;
  return {static_cast<int>(i / (rows * columns)), i % rows * kTileRows, i / rows % columns * kTileColumns};
}

// What a thread fetches of one step: eight columns of two neighbouring rows of W, and pairs of entries of Q.
constexpr int kBasisPairs = kPairs * kTileRows / kThreads, kBasisStep = kThreads / kTileRows * 2;
static_assert(kPairs * kTileColumns / kWidth == kThreads && kThreads % kTileRows == 0);

template <int kDtype>
struct Fetched {
  Raw<kDtype> tuned[2], base[2];
  float basis[kBasisPairs][2];
};

// Where a thread is in W, W_0 and Q.
struct Place {
  const char *tuned, *base;  // base null: absent
  const float* basis;
  int64_t row, basis_row;  // of the step
  int width;               // columns of the eight that exist
  bool direction;          // whether the direction exists
};

__device__ __forceinline__ Place first_place(const ProjectArgs& args, const Stored& tuned, const TileAt& at) {
  const int64_t column = at.column + threadIdx.x % (kTileColumns / kWidth) * kWidth, left = args.n - column;
  const int64_t direction = at.row + threadIdx.x % kTileRows;
  Place p;
  p.row = threadIdx.x / (kTileColumns / kWidth) * 2;
  p.basis_row = threadIdx.x / kTileRows * 2;
  const int64_t entry = p.row * args.n + column;
  p.tuned = static_cast<const char*>(tuned.data) + entry * item_size(tuned.dtype);
  p.base = static_cast<const char*>(args.delta.base.data);
  if (p.base != nullptr) p.base += entry * item_size(args.delta.base.dtype);
  p.basis = args.basis + at.task * args.basis_step + p.basis_row * args.r + direction;
  p.width = left < 0 ? 0 : (left < kWidth ? static_cast<int>(left) : kWidth);
  p.direction = direction < args.r;
  return p;
}

// Eight columns of a row; zeros beyond the matrix. Typed: n is a multiple of 8 and the matrix of 16 bytes.
template <int kDtype>
__device__ __forceinline__ Raw<kDtype> fetch_row(const char* from, Dtype dtype, int64_t row, int64_t rows, int width) {
  Raw<kDtype> raw = {};
  if (from != nullptr && row < rows && width > 0) raw.fetch({from, dtype}, 0, width);
  return raw;
}

// One step, and the place moves on.
template <int kDtype>
__device__ __forceinline__ void fetch(const ProjectArgs& args, Dtype dtype, Place& p, Fetched<kDtype>& to) {
  const Dtype base = args.delta.base.dtype;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const char* second = p.base == nullptr ? nullptr : p.base + i * args.n * item_size(base);
    to.tuned[i] = fetch_row<kDtype>(p.tuned + i * args.n * item_size(dtype), dtype, p.row + i, args.m, p.width);
    to.base[i] = fetch_row<kDtype>(second, base, p.row + i, args.m, p.width);
  }
  p.tuned += kDepth * args.n * item_size(dtype);
  if (p.base != nullptr) p.base += kDepth * args.n * item_size(base);
  p.row += kDepth;
#pragma unroll
  for (int i = 0; i < kBasisPairs; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int k = i * kBasisStep + j;
      to.basis[i][j] = p.direction && p.basis_row + k < args.m ? p.basis[k * args.r] : 0.0f;
    }
  }
  p.basis += kDepth * args.r;
  p.basis_row += kDepth;
}

template <int kDtype, class Product>
__device__ __forceinline__ void stage(const Fetched<kDtype>& from, bool subtract, Tiles& tiles) {
  Vec low = from.tuned[0].widen(), high = from.tuned[1].widen();
  if (subtract) {
    subtract8(from.base[0].widen(), low);
    subtract8(from.base[1].widen(), high);
  }
  const int column = threadIdx.x % (kTileColumns / kWidth) * kWidth, pair = threadIdx.x / (kTileColumns / kWidth);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    WordPair word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = Product::encode(low.at[4 * half + j], high.at[4 * half + j]);
    uint32_t* to = tiles.columns + pair * kColumnStride + column + 4 * half;
    *reinterpret_cast<uint4*>(to) = {word[0].first, word[1].first, word[2].first, word[3].first};
    to += kPairs * kColumnStride;
    *reinterpret_cast<uint4*>(to) = {word[0].second, word[1].second, word[2].second, word[3].second};
  }
#pragma unroll
  for (int i = 0; i < kBasisPairs; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const WordPair word = Product::encode(from.basis[i][0], from.basis[i][1]);
    uint32_t* to = tiles.rows + index / kTileRows * kRowStride + index % kTileRows;
    to[0] = word.first;
    to[kPairs * kRowStride] = word.second;
  }
}

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int warp_row() { return threadIdx.x / kWarp / 4 * kWarpRows; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / kWarp % 4 * kWarpColumns; }

__device__ __forceinline__ void store_tile(const ProjectArgs& args, const TileAt& at, const Sums& sums) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int64_t row = at.row + warp_row() + 8 * i + g;
    if (row >= args.r) continue;
    float* out = args.out + (at.task * args.r + row) * args.n;
#pragma unroll
    for (int j = 0; j < 2 * kColumnTiles; ++j) {
      const int64_t column = at.column + warp_column() + kMmaColumns * (j / 2) + 2 * t + j % 2;
      if (column < args.n) out[column] = sums.at[i / 2][j / 2][2 * (i % 2) + j % 2];
    }
  }
}

// <p, a> and <a, a> of the rows of the tile in float64: a thread's columns, the four threads of a row, the four warps.
__device__ __forceinline__ void add_up_tile(const ProjectArgs& args, const TileAt& at, const Sums& sums) {
  __shared__ double partial[kThreads / kWarp / 2][kTileRows][2];
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int first = warp_column() + 2 * t, columns = static_cast<int>(least(args.n - at.column, kTileColumns)) - first;
  const int rows = static_cast<int>(least(args.r - at.row, kTileRows));
  const float* line = args.reference + at.task * args.reference_step + at.column + first;
  line += (at.row + warp_row() + g) * args.n;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i, line += 8 * args.n) {
    const int local = warp_row() + 8 * i + g;
    double inner = 0.0, square = 0.0;
#pragma unroll
    for (int j = 0; j < 2 * kColumnTiles; ++j) {
      const int column = kMmaColumns * (j / 2) + j % 2;
      if (column >= columns || local >= rows) continue;
      const double a = static_cast<double>(sums.at[i / 2][j / 2][2 * (i % 2) + j % 2]);
      inner += a * static_cast<double>(line[column]);
      square += a * a;
    }
    for (int step = 2; step > 0; step /= 2) {
      inner += __shfl_down_sync(0xFFFFFFFFu, inner, step);
      square += __shfl_down_sync(0xFFFFFFFFu, square, step);
    }
    if (t != 0) continue;
    partial[threadIdx.x / kWarp % 4][local][0] = inner;
    partial[threadIdx.x / kWarp % 4][local][1] = square;
  }
  __syncthreads();
  const int row = threadIdx.x / 2, which = threadIdx.x % 2;
  if (row >= kTileRows || at.row + row >= args.r) return;
  double sum = 0.0;
  for (int warp = 0; warp < 4; ++warp) sum += partial[warp][row][which];
  const int64_t tile = at.task * column_tiles(args.n) + at.column / kTileColumns;
  args.parts[(tile * args.r + at.row + row) * 2 + which] = sum;
}

template <int kDtype, class Product, bool kStats>
static __global__ void __launch_bounds__(kThreads, kDtype == kBF16 || kDtype == kF16 ? 2 : 1)
    project_kernel(const __grid_constant__ ProjectArgs args) {
  __shared__ Tiles tiles;
  const TileAt at = tile_at(args);
  const Stored tuned = task_at(args.delta, at.task).tuned;
  Place place = first_place(args, tuned, at);
  Fetched<kDtype> fetched;
  fetch(args, tuned.dtype, place, fetched);
  Sums sums;
  for (int64_t k0 = 0; k0 < args.m; k0 += kDepth) {
    stage<kDtype, Product>(fetched, args.delta.base.data != nullptr, tiles);
    __syncthreads();
    if (k0 + kDepth < args.m) fetch(args, tuned.dtype, place, fetched);
    Product::multiply(tiles, warp_row(), warp_column(), sums);
    __syncthreads();
  }
  if constexpr (kStats) {
    add_up_tile(args, at, sums);
  } else {
    store_tile(args, at, sums);
  }
}

inline int64_t project_blocks(int64_t tasks, int64_t n, int64_t r) { return tasks * row_tiles(r) * column_tiles(n); }

// m, n, r > 0. `dtype`: the dtype of all matrices where they begin at multiples of 16 bytes, else kAny.
template <class Product, bool kStats>
void launch_product(const ProjectArgs& args, int dtype, Stream stream) {
  const unsigned blocks = static_cast<unsigned>(project_blocks(args.delta.tasks, args.n, args.r));
  if (args.n % kWidth != 0) dtype = kAny;
  if (dtype == kBF16) {
    LAUNCH((project_kernel<kBF16, Product, kStats>), blocks, kThreads, 0, stream, args);
  } else if (dtype == kF16) {
    LAUNCH((project_kernel<kF16, Product, kStats>), blocks, kThreads, 0, stream, args);
  } else if (dtype == kF32) {
    LAUNCH((project_kernel<kF32, Product, kStats>), blocks, kThreads, 0, stream, args);
  } else {
    LAUNCH((project_kernel<kAny, Product, kStats>), blocks, kThreads, 0, stream, args);
  }
}

}  // namespace pymerge::cuda
