// A Omega with Omega made in the kernel.
//
// sparse_sign: a block takes 32 rows of A and up to kSegmentColumns columns of each of the (at most) 8 segments of the
// width; warp s owns segment s, lane i row i. A comes through shared memory, read once for each block in y; every sum
// runs over the columns of A in ascending order, as on the CPU. Per entry of A: 8 additions in shared memory.
// gaussian: Omega itself, one thread four columns of a row; the product is the library's.
#pragma once

#include "../common/sketch_math.h"
#include "common.cuh"

namespace pymerge::cuda {

constexpr int kSketchRows = kWarp;  // rows of A of a block
constexpr int kSketchColumns = 32;  // columns of A in shared memory
constexpr int kPanelBytes = 32768;  // of sums of a block

template <typename T>
constexpr int kSegmentColumns = kPanelBytes / (kSketchNonzeros * kSketchRows * static_cast<int>(sizeof(T)));

template <typename T>
struct SketchArgs {
  Stored a;  // [rows, columns], the matrices of a batch one below the other
  T* y;      // [rows, width]
  int64_t rows, columns, width;
  uint64_t seed;
};

template <typename T>
__device__ __forceinline__ T widened(Stored x, int64_t i) {
  return x.dtype == Dtype::kF64 ? static_cast<T>(entry<double>(x.data, i)) : static_cast<T>(load1(x, i));
}

// Rows row0.. and columns column0.. of A; zeros outside.
template <typename T>
__device__ __forceinline__ void load_tile(const SketchArgs<T>& args, int64_t row0, int64_t column0,
                                          T (&tile)[kSketchColumns][kSketchRows + 1]) {
  for (int i = threadIdx.x; i < kSketchRows * kSketchColumns; i += kThreads) {
    const int64_t row = row0 + i / kSketchColumns, column = column0 + i % kSketchColumns;
    const bool inside = row < args.rows && column < args.columns;
    tile[i % kSketchColumns][i / kSketchColumns] =
        inside ? widened<T>(args.a, row * args.columns + column) : static_cast<T>(0);
  }
}

template <typename T>
static __global__ void __launch_bounds__(kThreads) sparse_sketch_kernel(const SketchArgs<T> args) {
  constexpr int kSpan = kSegmentColumns<T>;
  __shared__ T tile[kSketchColumns][kSketchRows + 1];
  __shared__ int picks[kSketchColumns][kSketchNonzeros];
  DYNAMIC_SHARED(T, panel);  // [segment][kSpan][row]
  const int lane = threadIdx.x % kWarp, segment = threadIdx.x / kWarp, segments = sketch_segments(args.width);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSketchRows, first = static_cast<int64_t>(blockIdx.y) * kSpan;
  T* sums = panel + segment * kSpan * kSketchRows + lane;
  for (int c = 0; c < kSpan; ++c) sums[c * kSketchRows] = static_cast<T>(0);
  for (int64_t column0 = 0; column0 < args.columns; column0 += kSketchColumns) {
    __syncthreads();
    load_tile(args, row0, column0, tile);
    const int j = threadIdx.x / kSketchNonzeros, s = threadIdx.x % kSketchNonzeros;
    if (s < segments) {  // column within the segment << 1 | negative
      const SparseEntry at = sparse_entry(sparse_draws(args.seed, column0 + j), s, segments, args.width);
      picks[j][s] = static_cast<int>(at.column - segment_begin(s, segments, args.width)) << 1 | (at.negative ? 1 : 0);
    }
    __syncthreads();
    const int64_t left = args.columns - column0;
    const int count = left < kSketchColumns ? static_cast<int>(left) : kSketchColumns;
    for (int k = 0; k < count && segment < segments; ++k) {
      const int64_t at = (picks[k][segment] >> 1) - first;
      if (at < 0 || at >= kSpan) continue;
      const T x = tile[k][lane];
      sums[at * kSketchRows] += (picks[k][segment] & 1) != 0 ? -x : x;
    }
  }
  if (segment >= segments || row0 + lane >= args.rows) return;
  const T scale = static_cast<T>(1.0 / sqrt(static_cast<double>(segments)));
  const int64_t begin = segment_begin(segment, segments, args.width) + first;
  const int64_t end = segment_begin(segment + 1, segments, args.width);
  for (int c = 0; c < kSpan && begin + c < end; ++c) {
    args.y[(row0 + lane) * args.width + begin + c] = sums[c * kSketchRows] * scale;
  }
}

struct OmegaArgs {
  float* omega;  // [rows, width]
  int64_t rows, width;
  uint64_t seed;
};

static __global__ void __launch_bounds__(kThreads) gaussian_kernel(const OmegaArgs args) {
  const int64_t groups = (args.width + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.rows * groups; i += stride) {
    const int64_t row = i / groups, column = i % groups * 4;
    const Normal4 x = gaussian4(args.seed, row, i % groups);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j < args.width) args.omega[row * args.width + column + j] = x.at[j];
    }
  }
}

static_assert(kThreads == kSketchRows * kSketchNonzeros && kThreads == kSketchColumns * kSketchNonzeros,
              "a warp for each segment, and a thread for each entry of a tile's rows of Omega");

template <typename T>
inline void launch_sparse_sketch(const SketchArgs<T>& args, Stream stream) {
  const int64_t span = kSegmentColumns<T>, segments = sketch_segments(args.width);
  const int64_t longest = (args.width + segments - 1) / segments;
  const dim3 grid(static_cast<unsigned>((args.rows + kSketchRows - 1) / kSketchRows),
                  static_cast<unsigned>((longest + span - 1) / span));
  LAUNCH(sparse_sketch_kernel<T>, grid, kThreads, kPanelBytes, stream, args);
}

inline void launch_gaussian(const OmegaArgs& args, int sms, Stream stream) {
  LAUNCH(gaussian_kernel, grid_size(args.rows * ((args.width + 3) / 4), kThreads, sms, 8), kThreads, 0, stream, args);
}

}  // namespace pymerge::cuda
