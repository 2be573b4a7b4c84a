// The rank[t]-th largest |d_t| of each row, ties by lowest index, exactly and without a word from the host.
// One long row: histogram, pick the bin, histogram of that bin, pick the magnitude, count the entries equal to it in
// each chunk, find the chunk and in it the entry: three reads of base and tensor per task.
// Short rows: one block per row and task does the same in shared memory.
#pragma once

#include "delta_histogram.cuh"

namespace pymerge::cuda {

constexpr int64_t kEverything = 0x7FFFFFFFFFFFFFFF;  // cut index behind every entry
constexpr int kPickThreads = 1024;
constexpr int64_t kEqualVectors = 8192;  // vectors of a chunk in which equal entries are counted
constexpr uint32_t kNoPrefix = 0xFFFFFFFFu;
constexpr int kRowBins = 2048;

// Per task: what the steps of the long-row form hand on.
struct KthState {
  uint32_t* prefix;  // [T] bits >> 15 of the magnitude; kNoPrefix where no search is needed
  uint32_t* theta;   // [T] bits of the magnitude
  long long* nth;    // [T] rank (from 1) among the entries that are left
  int32_t* equal;    // [T, chunks] entries equal to theta
};

struct KthArgs {
  DeltaArgs delta;
  KthState state;
  const Count* hist;
  int level;
  float* theta;    // [T, R]
  int64_t* index;  // [T, R]
};

PYMERGE_HD int64_t equal_chunks(int64_t count) { return (vectors(count) + kEqualVectors - 1) / kEqualVectors; }

// Rank 0: nothing is among the first. Rank >= length: everything is. True where that settles the cut.
__device__ __forceinline__ bool settle(int64_t rank, int64_t length, float* theta, int64_t* index) {
  if (rank > 0 && rank < length) return false;
  *theta = rank <= 0 ? __uint_as_float(kInfinityBits) : 0.0f;
  *index = rank <= 0 ? 0 : kEverything;
  return true;
}

struct Pick {
  int bin;
  long long nth;  // rank (from 1) within the bin
};

// The bin, counted from the highest, that holds the nth entry (from 1); every thread returns it. bins: a multiple of
// blockDim.x. scratch: one long long per warp; found: one Pick.
template <typename T>
__device__ __forceinline__ Pick pick_bin(const T* hist, int bins, long long nth, long long* scratch, Pick* found) {
  const int each = bins / blockDim.x, top = bins - 1 - threadIdx.x * each;  // thread 0 holds the highest bins
  long long mine = 0;
  for (int b = 0; b < each; ++b) mine += hist[top - b];
  const Scan scan = block_scan(mine, scratch);
  if (scan.before < nth && nth <= scan.before + mine) {
    long long left = nth - scan.before;
    int bin = top;
    while (left > static_cast<long long>(hist[bin])) left -= hist[bin--];
    *found = {bin, left};
  }
  __syncthreads();
  return *found;
}

// One block per task, kPickThreads.
static __global__ void __launch_bounds__(kPickThreads) pick_kernel(const __grid_constant__ KthArgs args) {
  __shared__ long long scratch[kPickThreads / kWarp];
  __shared__ Pick found;
  const int t = blockIdx.x, bins = args.level == 0 ? kCoarseBins : kFineBins;
  const int64_t rank = task_at(args.delta, t).rank;
  if (rank <= 0 || rank >= args.delta.count) {
    if (threadIdx.x == 0) args.state.prefix[t] = kNoPrefix;
    return;
  }
  const long long nth = args.level == 0 ? rank : args.state.nth[t];
  const Pick pick = pick_bin(args.hist + static_cast<int64_t>(t) * bins, bins, nth, scratch, &found);
  if (threadIdx.x != 0) return;
  if (args.level == 0) args.state.prefix[t] = pick.bin;
  if (args.level == 1) args.state.theta[t] = args.state.prefix[t] << kFineBits | static_cast<uint32_t>(pick.bin);
  args.state.nth[t] = pick.nth;
}

__device__ __forceinline__ uint32_t equal_lanes(const DeltaArgs& args, const Task& task, uint32_t theta, int64_t v) {
  const int n = width_at(args.count, v);
  Vec d = delta8(args, task, v, n);
  mask8(args, task, v, d);
  uint32_t lanes = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) lanes |= static_cast<uint32_t>(j < n && magnitude_bits(d.at[j]) == theta) << j;
  return lanes;
}

// Grid (chunks, T).
static __global__ void __launch_bounds__(kThreads) count_equal_kernel(const __grid_constant__ KthArgs args) {
  __shared__ int scratch[kThreads / kWarp];
  const int t = blockIdx.y;
  if (args.state.prefix[t] == kNoPrefix) return;
  const Task task = task_at(args.delta, t);
  const uint32_t theta = args.state.theta[t];
  const int64_t begin = blockIdx.x * kEqualVectors, all = vectors(args.delta.count);
  const int64_t end = begin + kEqualVectors < all ? begin + kEqualVectors : all;
  int equal = 0;
  for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
    equal += __popc(equal_lanes(args.delta, task, theta, v));
  }
  equal = block_sum(equal, scratch);
  if (threadIdx.x == 0) args.state.equal[static_cast<int64_t>(t) * gridDim.x + blockIdx.x] = equal;
}

// The thread whose share holds the nth entry (from 1) writes what `place(nth within the share)` returns.
template <typename Place>
__device__ __forceinline__ bool place_nth(long long mine, long long& nth, long long* scratch, int64_t* found,
                                          Place place) {
  const Scan scan = block_scan(mine, scratch);
  const bool here = nth <= scan.total;
  if (here && scan.before < nth && nth <= scan.before + mine) {
    found[0] = place();
    found[1] = nth - scan.before;
  }
  if (!here) nth -= scan.total;
  __syncthreads();
  return here;
}

__device__ __forceinline__ int nth_lane(uint32_t lanes, int64_t nth) {
  for (; nth > 1; --nth) lanes &= lanes - 1;
  return __ffs(lanes) - 1;
}

// One block per task, kPickThreads: first the chunk, then the entry.
static __global__ void __launch_bounds__(kPickThreads) locate_kernel(const __grid_constant__ KthArgs args) {
  __shared__ long long scratch[kPickThreads / kWarp];
  __shared__ int64_t found[2];
  const int t = blockIdx.x;
  const Task task = task_at(args.delta, t);
  if (args.state.prefix[t] == kNoPrefix) {
    if (threadIdx.x == 0) settle(task.rank, args.delta.count, args.theta + t, args.index + t);
    return;
  }
  const int64_t chunks = equal_chunks(args.delta.count), all = vectors(args.delta.count);
  const int32_t* equal = args.state.equal + t * chunks;
  const uint32_t theta = args.state.theta[t];
  long long nth = args.state.nth[t];
  for (int64_t tile = 0; tile < chunks; tile += blockDim.x) {
    const int64_t chunk = tile + threadIdx.x;
    if (place_nth(chunk < chunks ? equal[chunk] : 0, nth, scratch, found, [&] { return chunk; })) break;
  }
  const int64_t begin = found[0] * kEqualVectors;  // `found` is written again behind the barriers of block_scan
  nth = found[1];
  for (int64_t tile = begin; tile < all; tile += blockDim.x) {
    const int64_t v = tile + threadIdx.x;
    const uint32_t lanes = v < all ? equal_lanes(args.delta, task, theta, v) : 0;
    if (!place_nth(__popc(lanes), nth, scratch, found, [&] { return v; })) continue;
    if (v == found[0]) {
      args.theta[t] = __uint_as_float(theta);
      args.index[t] = kWidth * v + nth_lane(lanes, found[1]) + 1;
    }
    return;
  }
}

__device__ __forceinline__ uint32_t magnitude_at(const DeltaArgs& args, const Task& task, int64_t i) {
  float d = load1(task.tuned, i);
  if (args.base.data != nullptr) d -= load1(args.base, i);
  if (args.masked && !task.keep.all) {
    const uint64_t index = static_cast<uint64_t>(i);
    if (!keeps(task.keep, task.key, index, philox_draw(task.key, index, 0))) d = 0.0f;
  }
  return magnitude_bits(d);
}

// Grid (rows, T): the row is read once for each of three digits of the magnitude (11, 10 and 10 bits) and once for the
// index.
static __global__ void __launch_bounds__(kThreads) row_kth_kernel(const __grid_constant__ KthArgs args) {
  __shared__ uint32_t hist[kRowBins];
  __shared__ long long scratch[kThreads / kWarp];
  __shared__ Pick picked;
  __shared__ int64_t found[2];
  const int64_t length = args.delta.row_length > 0 ? args.delta.row_length : args.delta.count;
  const Task task = task_at(args.delta, blockIdx.y);
  const int64_t first = blockIdx.x * length, slot = blockIdx.y * args.delta.rows + blockIdx.x;
  if (task.rank <= 0 || task.rank >= length) {
    if (threadIdx.x == 0) settle(task.rank, length, args.theta + slot, args.index + slot);
    return;
  }
  uint32_t theta = 0;
  long long nth = task.rank;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = 20 - 10 * digit, bins = digit == 0 ? kRowBins : kRowBins / 2,
              known = shift + (digit == 0 ? 11 : 10);
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) hist[bin] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      const uint32_t bits = magnitude_at(args.delta, task, first + i);
      if (bits >> known == theta >> known) atomicAdd(hist + ((bits >> shift) & (bins - 1)), 1u);
    }
    __syncthreads();
    const Pick pick = pick_bin(hist, bins, nth, scratch, &picked);
    theta |= static_cast<uint32_t>(pick.bin) << shift;
    nth = pick.nth;
    __syncthreads();
  }
  for (int64_t tile = 0; tile < length; tile += blockDim.x) {
    const int64_t i = tile + threadIdx.x;
    const bool equal = i < length && magnitude_at(args.delta, task, first + i) == theta;
    if (!place_nth(equal, nth, scratch, found, [&] { return first + i; })) continue;
    if (threadIdx.x == 0) {
      args.theta[slot] = __uint_as_float(theta);
      args.index[slot] = found[0] + 1;
    }
    return;
  }
}

constexpr int64_t kShortRow = 1 << 16;  // one row up to this long: one block is faster than seven launches

inline bool takes_rows(const DeltaArgs& delta) { return delta.row_length > 0 || delta.count <= kShortRow; }

// Bytes of the long-row form: two histograms, which must be zero, then the state.
struct KthSpace {
  int64_t zeroed, state, equal;
};

inline KthSpace kth_space(int64_t count, int64_t tasks) {
  const int64_t chunks = equal_chunks(count);
  return {tasks * (kCoarseBins + kFineBins) * 8, tasks * 16, tasks * chunks * 4};
}

inline void launch_kth_rows(const KthArgs& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(args.delta.rows), args.delta.tasks);
  LAUNCH(row_kth_kernel, grid, kThreads, 0, stream, args);
}

// space: zeroed + state + equal bytes of kth_space, the first of them zero, 16-byte aligned.
inline void launch_kth_long(KthArgs args, void* space, int sms, Stream stream) {
  const int tasks = args.delta.tasks;
  Count *coarse = static_cast<Count*>(space), *fine = coarse + int64_t{tasks} * kCoarseBins;
  long long* nth = reinterpret_cast<long long*>(fine + int64_t{tasks} * kFineBins);
  uint32_t* prefix = reinterpret_cast<uint32_t*>(nth + tasks);
  args.state = {prefix, prefix + tasks, nth, reinterpret_cast<int32_t*>(prefix + 2 * tasks)};
  for (int level = 0; level < 2; ++level) {
    args.level = level;
    args.hist = level == 0 ? coarse : fine;
    launch_histogram({args.delta, level, prefix, level == 0 ? coarse : fine}, sms, stream);
    LAUNCH(pick_kernel, tasks, kPickThreads, 0, stream, args);
  }
  const int64_t chunks = equal_chunks(args.delta.count);
  const dim3 grid(static_cast<unsigned>(chunks), tasks);
  LAUNCH(count_equal_kernel, grid, kThreads, 0, stream, args);
  LAUNCH(locate_kernel, tasks, kPickThreads, 0, stream, args);
}

}  // namespace pymerge::cuda
