// The kernels of csrc/cuda run by the emulator of csrc/emu, for ctypes: launches and workspaces as on a device.
#include <vector>

#include "../../csrc/cuda/delta_gram.cuh"
#include "../../csrc/cuda/delta_kth.cuh"
#include "../../csrc/cuda/delta_l1.cuh"
#include "../../csrc/cuda/delta_merge.cuh"
#include "../../csrc/cuda/delta_signs.cuh"
#include "../../csrc/cuda/finite_cast.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

namespace {

constexpr int kMultiprocessors = 1;

}  // namespace

extern "C" {

struct TaskFields {
  const void* data;
  uint64_t key;
  int64_t rank;
  double keep;
  int32_t dtype;
  uint32_t prefix;
  float weight, rescale;
};

struct Problem {
  const void* base;
  const TaskFields* tasks;
  int64_t count, rows, row_length;
  const float* top_theta;
  const int64_t* top_index;
  const float* skip_theta;
  const int64_t* skip_index;
  int32_t base_dtype, task_count, masked, rescaled;
};

struct MergeFields {
  const void* add;
  void* out;
  int64_t* bad;
  int32_t add_dtype, out_dtype, add_is_base, elect, norm;
  float scale, divisor, tie_sign;
};
}

namespace {

struct Call {
  explicit Call(const Problem& p) : more(kInlineTasks + static_cast<size_t>(p.task_count)) {
    std::vector<Task> tasks;
    for (int t = 0; t < p.task_count; ++t) {
      const TaskFields& f = p.tasks[t];
      tasks.push_back(
          {{f.data, static_cast<Dtype>(f.dtype)}, f.weight, f.rescale, keep_limit(f.keep), f.prefix, f.key, f.rank});
    }
    args.base = {p.base, static_cast<Dtype>(p.base_dtype)};
    args.count = p.count, args.rows = p.rows, args.row_length = p.row_length;
    args.top = {p.top_theta, p.top_index}, args.skip = {p.skip_theta, p.skip_index};
    args.masked = p.masked != 0, args.rescaled = p.rescaled != 0;
    args.more = more.data();
    set_tasks(args, tasks.data(), p.task_count, more.data(), nullptr);
    for (const Task& task : tasks) read.push_back(task.tuned);
    if (p.base != nullptr) read.push_back(args.base);
  }
  DeltaArgs args = {};
  std::vector<Task> more;
  std::vector<Stored> read;
};

}  // namespace

extern "C" {

void emulate_merge(const Problem* problem, const MergeFields* f) {
  Call call(*problem);
  MergeArgs args = {};
  args.delta = call.args;
  args.add = {f->add, static_cast<Dtype>(f->add_dtype)};
  args.add_is_base = f->add_is_base != 0;
  args.out = f->out, args.out_dtype = static_cast<Dtype>(f->out_dtype);
  args.scale = f->scale, args.divisor = f->divisor, args.tie_sign = f->tie_sign;
  args.norm = static_cast<Norm>(f->norm), args.elect = f->elect != 0;
  args.bad = reinterpret_cast<Count*>(f->bad);
  if (f->add != nullptr && !args.add_is_base) call.read.push_back(args.add);
  launch_merge(args, common_dtype(call.read.data(), static_cast<int>(call.read.size())), kMultiprocessors, nullptr);
}

void emulate_kth(const Problem* problem, int long_row, float* theta, int64_t* index) {
  Call call(*problem);
  KthArgs args = {};
  args.delta = call.args, args.theta = theta, args.index = index;
  if (!long_row) return launch_kth_rows(args, nullptr);
  const KthSpace space = kth_space(problem->count, problem->task_count);
  std::vector<uint64_t> memory(static_cast<size_t>(space.zeroed + space.state + space.equal) / 8 + 1);
  launch_kth_long(args, memory.data(), kMultiprocessors, nullptr);
}

void emulate_histogram(const Problem* problem, int level, int64_t* hist) {
  Call call(*problem);
  launch_histogram({call.args, level, nullptr, reinterpret_cast<Count*>(hist)}, kMultiprocessors, nullptr);
}

void emulate_l1(const Problem* problem, double* norms) {
  Call call(*problem);
  std::vector<double> parts(static_cast<size_t>(l1_parts(problem->count) * 2 * problem->task_count));
  launch_l1({call.args, parts.data()}, norms, nullptr);
}

void emulate_gram(const Problem* problem, double* gram) {
  Call call(*problem);
  std::vector<double> parts(static_cast<size_t>(gram_parts(problem->count) * gram_pairs(problem->task_count)));
  launch_gram({call.args, parts.data(), gram, 0}, nullptr);
}

void emulate_signs(const Problem* problem, int64_t* total) {
  Call call(*problem);
  launch_signs({call.args, reinterpret_cast<Count*>(total)}, kMultiprocessors, nullptr);
}

void emulate_finite_cast(const float* x, void* y, int32_t dtype, int64_t count, int64_t* bad) {
  launch_finite_cast({x, y, static_cast<Dtype>(dtype), count, reinterpret_cast<Count*>(bad)}, kMultiprocessors,
                     nullptr);
}
}
