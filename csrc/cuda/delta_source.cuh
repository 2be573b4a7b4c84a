// T tensors, what is subtracted from them, and which of their entries stay: d_t of eight entries at a time.
#pragma once

#include "common.cuh"

namespace pymerge::cuda {

constexpr int kInlineTasks = 16;  // tasks whose parameters travel with the launch; more of them lie in device memory

struct Task {
  Stored tuned;
  float weight, rescale;
  KeepLimit keep;
  uint32_t prefix;  // delta_histogram, level 1
  uint64_t key;
  int64_t rank;  // delta_kth
};

// [T, R] on the device; null: absent.
struct Cut {
  const float* theta;
  const int64_t* index;
};

struct DeltaArgs {
  Stored base;
  int64_t count;             // entries of each tensor
  int64_t rows, row_length;  // row_length 0: one row
  Cut top, skip;
  int32_t tasks;
  bool masked, rescaled;
  Task first[kInlineTasks];
  const Task* more;
};

// By value: read from the launch's constant memory with an index that is the same for all threads.
__device__ __forceinline__ Task task_at(const DeltaArgs& args, int t) {
  if (t < kInlineTasks) return args.first[t];
  return args.more[t - kInlineTasks];
}

PYMERGE_HD int64_t vectors(int64_t count) { return (count + kWidth - 1) / kWidth; }

__device__ __forceinline__ int width_at(int64_t count, int64_t v) {
  return count - kWidth * v < kWidth ? static_cast<int>(count - kWidth * v) : kWidth;
}

// Bit j: the mask keeps entry 8 v + j. Bit for bit `keeps` of common/philox.h, with one Philox call for all eight.
__device__ __forceinline__ uint32_t keep_lanes(const KeepLimit& limit, uint64_t key, int64_t v) {
  const Philox4 draws = philox4x32(key, static_cast<uint64_t>(v), 0);
  uint32_t kept = 0, equal = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const uint32_t draw = (draws.word[j >> 1] >> (16 * (j & 1))) & 0xFFFFu;
    kept |= static_cast<uint32_t>(draw < limit.high) << j;
    equal |= static_cast<uint32_t>(draw == limit.high) << j;
  }
  if (equal == 0) return kept;
  const Philox4 second = philox4x32(key, static_cast<uint64_t>(v), 1);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const uint32_t draw = (second.word[j >> 1] >> (16 * (j & 1))) & 0xFFFFu;
    kept |= ((equal >> j) & static_cast<uint32_t>(draw < limit.low)) << j;
  }
  return kept;
}

__device__ __forceinline__ void mask8(const DeltaArgs& args, const Task& task, int64_t v, Vec& d) {
  if (!args.masked || task.keep.all) return;
  const uint32_t kept = keep_lanes(task.keep, task.key, v);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) d.at[j] = (kept >> j) & 1u ? d.at[j] : 0.0f;
}

// d = 0 where among_first(...) != wanted, in a vector that begins in one row and ends in another.
static __device__ COLD void cut_across_rows(const DeltaArgs& args, const Cut& cut, int t, int64_t v, bool wanted,
                                            Vec& d) {
  const int64_t first = static_cast<int64_t>(t) * args.rows;
  for (int j = 0; j < kWidth && kWidth * v + j < args.count; ++j) {
    const int64_t i = kWidth * v + j, slot = first + i / args.row_length;
    if (among_first(fabsf(d.at[j]), i, cut.theta[slot], cut.index[slot]) != wanted) d.at[j] = 0.0f;
  }
}

__device__ __forceinline__ void cut8(const DeltaArgs& args, const Cut& cut, int t, int64_t v, bool wanted, Vec& d) {
  const int64_t i = kWidth * v, row = args.row_length > 0 ? i / args.row_length : 0;
  if (args.row_length > 0 && i + kWidth > (row + 1) * args.row_length) {
    Vec copy = d;
    cut_across_rows(args, cut, t, v, wanted, copy);
    d = copy;
    return;
  }
  const int64_t slot = static_cast<int64_t>(t) * args.rows + row;
  const float theta = cut.theta[slot];
  const int64_t left = cut.index[slot] - i;
  const int ties = left < 0 ? 0 : (left > kWidth ? kWidth : static_cast<int>(left));  // equal magnitudes that are taken
#pragma unroll
  for (int j = 0; j < kWidth; ++j) d.at[j] = among_first(fabsf(d.at[j]), j, theta, ties) == wanted ? d.at[j] : 0.0f;
}

__device__ __forceinline__ void select8(const DeltaArgs& args, const Task& task, int t, int64_t v, Vec& d) {
  mask8(args, task, v, d);
  if (args.top.theta != nullptr) cut8(args, args.top, t, v, true, d);
  if (args.skip.theta != nullptr) cut8(args, args.skip, t, v, false, d);
}

__device__ __forceinline__ void subtract8(const Vec& base, Vec& x) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) x.at[j] -= base.at[j];
}

// d_t, not yet selected.
__device__ __forceinline__ Vec delta8(const DeltaArgs& args, const Task& task, int64_t v, int n) {
  Vec d = load8(task.tuned, v, n);
  if (args.base.data != nullptr) subtract8(load8(args.base, v, n), d);
  return d;
}

// x_t = weight * (rescale * d_t)
__device__ __forceinline__ void weigh8(const DeltaArgs& args, const Task& task, Vec& d) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) d.at[j] = task.weight * (args.rescaled ? task.rescale * d.at[j] : d.at[j]);
}

constexpr int kUploadTasks = 32;

struct TaskBatch {
  Task task[kUploadTasks];
};

// Task parameters reach device memory as arguments of a launch: neither a copy from pageable memory nor a wait.
static __global__ void upload_kernel(const __grid_constant__ TaskBatch batch, Task* out, int n) {
  const int t = threadIdx.x;
  if (t < n) out[t] = batch.task[t];
}

// The parameters of all tasks into args; `more` is device memory for those that the launch itself cannot carry.
inline void set_tasks(DeltaArgs& args, const Task* tasks, int count, Task* more, Stream stream) {
  args.tasks = count;
  args.more = more;
  for (int t = 0; t < count && t < kInlineTasks; ++t) args.first[t] = tasks[t];
  for (int done = kInlineTasks; done < count; done += kUploadTasks) {
    TaskBatch batch = {};
    const int n = count - done < kUploadTasks ? count - done : kUploadTasks;
    for (int t = 0; t < n; ++t) batch.task[t] = tasks[done + t];
    LAUNCH(upload_kernel, 1, kUploadTasks, 0, stream, batch, more + (done - kInlineTasks), n);
  }
}

// The dtype of all of them where whole vectors can be fetched from each, else kAny.
inline int common_dtype(const Stored* stored, int count) {
  for (int i = 0; i < count; ++i) {
    const bool whole = reinterpret_cast<uintptr_t>(stored[i].data) % 16 == 0 && stored[i].dtype != Dtype::kF64;
    if (!whole || stored[i].dtype != stored[0].dtype) return kAny;
  }
  return static_cast<int>(stored[0].dtype);
}

}  // namespace pymerge::cuda
