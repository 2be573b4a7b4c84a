// Upper triangle of cov += alpha * x^T x. Grid (tiles i <= j of 128 x 128, parts of the rows); 8 warps a block. Bound
// by the tensor cores; each tile reads its two column panels of x once. With one part a tile adds to cov itself; with
// more, parts go to memory and a second kernel adds them in order: the same bits each time.
#pragma once

#include "cov_product.cuh"

namespace pymerge::cuda {

constexpr int64_t kCovChunk = 8192;  // rows summed in float32 before they meet cov

struct CovArgs {
  Stored x;
  int64_t row_stride, column_stride;  // in entries, of the matrix whose x^T x is taken
  int64_t begin, end, columns;        // rows [begin, end)
  int64_t part_rows;                  // a multiple of kCovFlush
  const bool* rows_kept;              // null: all; at most one of the two is given
  const bool* columns_kept;
  void* cov;
  int64_t cov_stride;
  double alpha;
  void* parts;   // [parts][tiles][128][128] sums; null: one part
  bool wide;     // cov float64
  bool vectors;  // panels can be read 16 bytes at a time
};

struct TileAt {
  int64_t row, column;  // of cov
};

__device__ __forceinline__ TileAt tile_at(int tile) {
  int j = 0;
  for (; tile > j; ++j) tile -= j + 1;
  return {int64_t{tile} * kCovTile, int64_t{j} * kCovTile};
}

// One 16-byte vector of a panel: row `k` of the step, columns from `column` of the tile.
template <class P>
struct Place {
  static constexpr int kItems = 16 / sizeof(typename P::Item), kVectors = P::kStep * kCovTile / kItems / kThreads;
  static __device__ __forceinline__ int row(int v) { return (threadIdx.x + v * kThreads) / (kCovTile / kItems); }
  static __device__ __forceinline__ int column(int v) {
    return (threadIdx.x + v * kThreads) % (kCovTile / kItems) * kItems;
  }
};

template <class P>
__device__ __forceinline__ void fetch(const CovArgs& args, int64_t k, int64_t end, int64_t column,
                                      uint4 (&out)[Place<P>::kVectors]) {
#pragma unroll
  for (int v = 0; v < Place<P>::kVectors; ++v) {
    const int64_t row = k + Place<P>::row(v), c = column + Place<P>::column(v);
    const bool wanted = row < end && c < args.columns && (args.rows_kept == nullptr || args.rows_kept[row]);
    out[v] = uint4{0, 0, 0, 0};
    if (wanted) out[v] = load16(args.x.data, (row * args.row_stride + c) / Place<P>::kItems);
  }
}

template <class P>
__device__ __forceinline__ void put(const uint4 (&from)[Place<P>::kVectors], typename P::Item* panel) {
#pragma unroll
  for (int v = 0; v < Place<P>::kVectors; ++v) {
    *reinterpret_cast<uint4*>(panel + Place<P>::row(v) * P::kPitch + Place<P>::column(v)) = from[v];
  }
}

// Any strides, places and dtypes, entry by entry, neighbouring threads along the stride of one.
template <class P>
__device__ __forceinline__ void gather(const CovArgs& args, int64_t k, int64_t end, int64_t column,
                                       typename P::Item* panel) {
  for (int i = threadIdx.x; i < P::kStep * kCovTile; i += kThreads) {
    const bool along_rows = args.column_stride == 1;
    const int row = along_rows ? i / kCovTile : i % P::kStep, at = along_rows ? i % kCovTile : i / P::kStep;
    const int64_t r = k + row, c = column + at;
    const bool wanted = r < end && c < args.columns && (args.rows_kept == nullptr || args.rows_kept[r]) &&
                        (args.columns_kept == nullptr || args.columns_kept[c]);
    typename P::Item value = {};
    if (wanted) value = P::widen(args.x, r * args.row_stride + c * args.column_stride);
    panel[row * P::kPitch + at] = value;
  }
}

template <class S, class Use>
__device__ __forceinline__ void each_sum(Use use) {
#pragma unroll
  for (int m = 0; m < S::kRowBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < S::kColumnBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < S::kEach; ++e) use(m, n, e);
    }
  }
}

__device__ __forceinline__ void add_to_cov(const CovArgs& args, int64_t row, int64_t column, double sum) {
  if (row > column || column >= args.columns) return;
  const int64_t at = row * args.cov_stride + column;
  if (args.wide) {
    static_cast<double*>(args.cov)[at] += args.alpha * sum;
  } else {
    float* cov = static_cast<float*>(args.cov);
    cov[at] = static_cast<float>(static_cast<double>(cov[at]) + args.alpha * sum);
  }
}

template <class P>
__device__ __forceinline__ void finish_tile(const CovArgs& args, const typename P::Sums& sums, TileAt at) {
  using S = typename P::Sums;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = warp / 4 * kCovWarpRows, column = warp % 4 * kCovWarpColumns;
  using Sum = typename S::Sum;
  Sum* part = static_cast<Sum*>(args.parts);
  const int64_t tile = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  each_sum<S>([&](int m, int n, int e) {
    const int r = row + S::row(m, e, lane), c = column + S::column(n, e, lane);
    if (part == nullptr) {
      add_to_cov(args, at.row + r, at.column + c, static_cast<double>(sums.at[m][n][e]));
    } else {
      part[(tile * kCovTile + r) * kCovTile + c] = sums.at[m][n][e];
    }
  });
}

template <class P>
static __global__ void __launch_bounds__(kThreads) cov_kernel(const __grid_constant__ CovArgs args) {
  using Item = typename P::Item;
  using S = typename P::Sums;
  alignas(16) __shared__ Item left[2][P::kStep * P::kPitch];
  alignas(16) __shared__ Item right[2][P::kStep * P::kPitch];
  const TileAt at = tile_at(blockIdx.x);
  const int warp = threadIdx.x / kWarp;
  const int row = warp / 4 * kCovWarpRows, column = warp % 4 * kCovWarpColumns;
  const int64_t begin = args.begin + blockIdx.y * args.part_rows;
  const int64_t end = begin + args.part_rows < args.end ? begin + args.part_rows : args.end;
  S sums, total;
  each_sum<S>([&](int m, int n, int e) { sums.at[m][n][e] = total.at[m][n][e] = 0; });
  uint4 next_left[Place<P>::kVectors], next_right[Place<P>::kVectors];
  for (int64_t k = begin - P::kStep; k < end; k += P::kStep) {  // the first round only loads
    const int64_t next = k + P::kStep;
    const int64_t steps = (next - begin) / P::kStep;
    const int into = steps % 2, from = 1 - into;
    const bool more = next < end;
    if (more && args.vectors) {
      fetch<P>(args, next, end, at.row, next_left);
      fetch<P>(args, next, end, at.column, next_right);
    }
    if (k >= begin) P::multiply(left[from] + row, right[from] + column, sums);
    if (P::kFlushes && (steps % (kCovFlush / P::kStep) == 0 || !more)) {
      each_sum<S>([&](int m, int n, int e) {
        total.at[m][n][e] += sums.at[m][n][e];
        sums.at[m][n][e] = 0;
      });
    }
    if (more && args.vectors) {
      put<P>(next_left, left[into]);
      put<P>(next_right, right[into]);
    } else if (more) {
      gather<P>(args, next, end, at.row, left[into]);
      gather<P>(args, next, end, at.column, right[into]);
    }
    __syncthreads();
  }
  finish_tile<P>(args, P::kFlushes ? total : sums, at);
}

// Grid (tiles, rows of a tile): adds the parts of 128 entries each.
template <class Sum>
static __global__ void __launch_bounds__(kCovTile) cov_add_kernel(const __grid_constant__ CovArgs args, int parts) {
  const TileAt at = tile_at(blockIdx.x);
  const int64_t entry = (int64_t{blockIdx.x} * kCovTile + blockIdx.y) * kCovTile + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kCovTile * kCovTile;
  double sum = 0.0;
  for (int part = 0; part < parts; ++part)
    sum += static_cast<double>(static_cast<const Sum*>(args.parts)[entry + part * stride]);
  add_to_cov(args, at.row + blockIdx.y, at.column + threadIdx.x, sum);
}

inline int64_t cov_tiles(int64_t columns) {
  const int64_t side = (columns + kCovTile - 1) / kCovTile;
  return side * (side + 1) / 2;
}

// Parts of the rows: more than one only where the tiles alone leave multiprocessors idle.
inline int64_t cov_parts(int64_t rows, int64_t columns, int sms) {
  const int64_t wanted = sms / cov_tiles(columns), most = (rows + 4 * kCovFlush - 1) / (4 * kCovFlush);
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts;
}

inline int64_t cov_parts_bytes(int64_t parts, int64_t columns, bool wide_products) {
  return parts <= 1 ? 0 : parts * cov_tiles(columns) * kCovTile * kCovTile * (wide_products ? 8 : 4);
}

template <class P>
void launch_cov_product(CovArgs args, int64_t rows, int64_t parts, Stream stream) {
  const int64_t item = static_cast<int64_t>(sizeof(typename P::Item)), per_vector = 16 / item;
  args.vectors = static_cast<int>(args.x.dtype) == P::kDtype && args.column_stride == 1 &&
                 args.columns_kept == nullptr && reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0 &&
                 args.row_stride % per_vector == 0 && args.columns % per_vector == 0;
  const unsigned tiles = static_cast<unsigned>(cov_tiles(args.columns));
  for (int64_t begin = 0; begin < rows; begin += parts * kCovChunk) {
    args.begin = begin;
    args.end = begin + parts * kCovChunk < rows ? begin + parts * kCovChunk : rows;
    const int64_t share = (args.end - begin + parts - 1) / parts;
    args.part_rows = (share + kCovFlush - 1) / kCovFlush * kCovFlush;
    const unsigned used = static_cast<unsigned>((args.end - begin + args.part_rows - 1) / args.part_rows);
    LAUNCH((cov_kernel<P>), dim3(tiles, used), kThreads, 0, stream, args);
    if (parts == 1) continue;
    LAUNCH((cov_add_kernel<typename P::Sums::Sum>), dim3(tiles, kCovTile), kCovTile, 0, stream, args,
           static_cast<int>(used));
  }
}

// args: all but begin, end, part_rows and vectors. `parts` and the memory behind args.parts: cov_parts,
// cov_parts_bytes.
inline void launch_cov(const CovArgs& args, int64_t rows, int64_t parts, bool wide_products, Stream stream) {
  if (wide_products) return launch_cov_product<DoubleProduct>(args, rows, parts, stream);
  if (args.x.dtype == Dtype::kBF16) return launch_cov_product<HalfProduct<true>>(args, rows, parts, stream);
  if (args.x.dtype == Dtype::kF16) return launch_cov_product<HalfProduct<false>>(args, rows, parts, stream);
  launch_cov_product<FloatProduct>(args, rows, parts, stream);
}

}  // namespace pymerge::cuda
