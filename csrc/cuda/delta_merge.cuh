// out = add + scale * (norm(sum_t x_t) / divisor), all tasks in one pass.
// One thread: eight entries at a time, grid-stride. Memory bound: (T + 1) reads and one write per entry; with a random
// mask one Philox call per task and eight entries.
#pragma once

#include "delta_source.cuh"

namespace pymerge::cuda {

struct MergeArgs {
  DeltaArgs delta;
  Stored add;
  bool add_is_base;
  void* out;
  Dtype out_dtype;
  float scale, divisor, tie_sign;
  Norm norm;
  bool elect;
  int64_t first_vector, end_vector;
  Count* bad;  // [T + 3]: base, tuned.., add, out
};

// Sums of eight entries over the tasks. Election needs the sign of the whole sum before it knows which x_t take part,
// so both outcomes are summed: [0] the positive, [1] the negative x_t (without election [0] is all of them that are not
// 0). Adding the entries of one sign in the order of the tasks gives the bits that a second walk would give.
template <bool kParts>
struct Votes {
  float total[kWidth] = {};
  float sum[kParts ? 2 : 1][kWidth] = {};
  float aux[kParts ? 2 : 1][kWidth] = {};
};

__device__ __forceinline__ float more_aux(float aux, bool part, float x, float weight, Norm norm) {
  if (norm == Norm::kMax) return part && fabsf(x) > aux ? fabsf(x) : aux;
  if (norm == Norm::kNone) return aux;
  return aux + (part ? (norm == Norm::kWeights ? weight : 1.0f) : 0.0f);
}

template <bool kParts>
__device__ __forceinline__ void vote(const MergeArgs& args, const Task& task, const Vec& x, Votes<kParts>& votes) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    votes.total[j] += x.at[j];
    if constexpr (kParts) {
      const bool positive = args.elect ? x.at[j] > 0.0f : x.at[j] != 0.0f, negative = args.elect && x.at[j] < 0.0f;
      votes.sum[0][j] += positive ? x.at[j] : 0.0f;
      votes.sum[1][j] += negative ? x.at[j] : 0.0f;
      votes.aux[0][j] = more_aux(votes.aux[0][j], positive, x.at[j], task.weight, args.norm);
      votes.aux[1][j] = more_aux(votes.aux[1][j], negative, x.at[j], task.weight, args.norm);
    }
  }
}

template <bool kParts>
__device__ __forceinline__ float outcome(const MergeArgs& args, const Votes<kParts>& votes, int j) {
  if constexpr (kParts) {
    const float sign = args.elect ? elected_sign(votes.total[j], args.tie_sign) : 1.0f;
    const bool negative = sign < 0.0f;
    return normalised(negative ? votes.sum[1][j] : votes.sum[0][j], negative ? votes.aux[1][j] : votes.aux[0][j], sign,
                      args.norm);
  } else {
    return votes.total[j];
  }
}

// NaN once any entry is not finite, else 0: one instruction an entry.
__device__ __forceinline__ void taint(const Vec& x, float& poison) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) poison = fmaf(x.at[j], 0.0f, poison);
}

__device__ __forceinline__ void count_bad(Stored x, int64_t v, int n, Count* bad) {
  const Vec entries = load8(x, v, n);
  int count = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) count += is_bad(entries.at[j]);
  if (count > 0) atomicAdd(bad, static_cast<Count>(count));
}

// Only for vectors that hold a non-finite entry: which tensors it was.
static __device__ COLD void count_bad_inputs(const MergeArgs& args, int64_t v, int n, Count* bad) {
  const int tasks = args.delta.tasks;
  if (args.delta.base.data != nullptr) count_bad(args.delta.base, v, n, bad);
  for (int t = 0; t < tasks; ++t) count_bad(task_at(args.delta, t).tuned, v, n, bad + 1 + t);
  if (args.add.data != nullptr && !args.add_is_base) count_bad(args.add, v, n, bad + 1 + tasks);
}

// kDtype: of base, all tuned and add, with pointers that are multiples of 16 bytes and whole vectors; or kAny.
template <int kDtype, bool kParts>
__device__ __forceinline__ void merge8(const MergeArgs& args, int64_t v, Count* bad) {
  const DeltaArgs& delta = args.delta;
  const int n = kDtype == kAny ? width_at(delta.count, v) : kWidth;
  const bool has_base = delta.base.data != nullptr, own_add = args.add.data != nullptr && !args.add_is_base;
  Raw<kDtype> raw_base, raw_add, raw, next;
  if (has_base) raw_base.fetch(delta.base, v, n);
  raw.fetch(task_at(delta, 0).tuned, v, n);
  constexpr bool kTwoAhead = kDtype == kBF16 || kDtype == kF16;  // float32: one vector ahead is as many bytes
  if (kTwoAhead && delta.tasks > 1) next.fetch(task_at(delta, 1).tuned, v, n);
  if (own_add) raw_add.fetch(args.add, v, n);
  Votes<kParts> votes;
  Vec base = {};
  float poison = 0.0f;
  if (has_base) base = raw_base.widen();
  taint(base, poison);
#pragma unroll 1
  for (int t = 0; t < delta.tasks; ++t) {
    const Task task = task_at(delta, t);
    Vec x = raw.widen();
    constexpr int kAhead = kTwoAhead ? 2 : 1;
    if (kTwoAhead) raw = next;
    if (t + kAhead < delta.tasks) (kTwoAhead ? next : raw).fetch(task_at(delta, t + kAhead).tuned, v, n);
    taint(x, poison);
    if (has_base) subtract8(base, x);
    select8(delta, task, t, v, x);
    weigh8(delta, task, x);
    vote(args, task, x, votes);
  }
  if (own_add) base = raw_add.widen();
  if (own_add) taint(base, poison);
  Vec out;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float s = scaled(outcome(args, votes, j), args.divisor, args.scale);
    out.at[j] = args.add.data != nullptr ? base.at[j] + s : s;
  }
  const int overflowed = store8(out, args.out, args.out_dtype, v, n);
  if (overflowed > 0) atomicAdd(bad + 2 + delta.tasks, static_cast<Count>(overflowed));
  if (poison != 0.0f) count_bad_inputs(args, v, n, bad);
}

// Shared memory: Count [T + 3].
template <int kDtype, bool kParts>
__global__ void __launch_bounds__(kThreads, 2) merge_kernel(const __grid_constant__ MergeArgs args) {
  DYNAMIC_SHARED(Count, bad);
  const int slots = args.delta.tasks + 3;
  for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) bad[slot] = 0;
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t v = args.first_vector + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < args.end_vector;
       v += stride) {
    merge8<kDtype, kParts>(args, v, bad);
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) {
    if (bad[slot] != 0) atomicAdd(args.bad + slot, bad[slot]);
  }
}

constexpr int kMergeBlocks = 4;  // per multiprocessor

template <int kDtype>
inline void launch_merge_range(const MergeArgs& args, int sms, Stream stream) {
  const unsigned grid = grid_size(args.end_vector - args.first_vector, kThreads, sms, kMergeBlocks);
  const size_t shared = static_cast<size_t>(args.delta.tasks + 3) * sizeof(Count);
  if (args.elect || args.norm != Norm::kNone) {
    LAUNCH((merge_kernel<kDtype, true>), grid, kThreads, shared, stream, args);
  } else {
    LAUNCH((merge_kernel<kDtype, false>), grid, kThreads, shared, stream, args);
  }
}

// count > 0; bad is zero. `dtype`: common_dtype of all that is read.
inline void launch_merge(MergeArgs args, int dtype, int sms, Stream stream) {
  const int64_t whole = dtype == kAny ? 0 : args.delta.count / kWidth;
  args.first_vector = 0;
  args.end_vector = whole;
  if (whole > 0 && dtype == kBF16) launch_merge_range<kBF16>(args, sms, stream);
  if (whole > 0 && dtype == kF16) launch_merge_range<kF16>(args, sms, stream);
  if (whole > 0 && dtype == kF32) launch_merge_range<kF32>(args, sms, stream);
  args.first_vector = whole;
  args.end_vector = (args.delta.count + kWidth - 1) / kWidth;
  if (args.end_vector > whole) launch_merge_range<kAny>(args, sms, stream);
}

}  // namespace pymerge::cuda
