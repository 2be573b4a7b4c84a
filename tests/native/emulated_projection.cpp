// The projection kernels of csrc/cuda run by the emulator of csrc/emu, for ctypes.
#include <vector>

#include "../../csrc/cuda/project_delta.cuh"
#include "../../csrc/cuda/projection_stats.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

extern "C" {

struct ProjectFields {
  const float* basis;  // [T, m, r] or [m, r]
  const void* base;
  const void* const* tuned;
  const float* reference;  // [T, r, n] or [r, n]; null: project_delta
  void* out;               // float [T, r, n], or double [2, T, r]
  int64_t m, n, r, basis_step, reference_step;
  int32_t tasks, dtype, split, aligned;
};

void emulate_projection(const ProjectFields* f) {
  std::vector<Task> tasks(static_cast<size_t>(f->tasks)), more(tasks.size() + kInlineTasks);
  for (int t = 0; t < f->tasks; ++t) tasks[static_cast<size_t>(t)].tuned = {f->tuned[t], static_cast<Dtype>(f->dtype)};
  ProjectArgs args = {};
  args.delta.base = {f->base, static_cast<Dtype>(f->dtype)};
  args.delta.count = f->m * f->n, args.delta.rows = 1;
  set_tasks(args.delta, tasks.data(), f->tasks, more.data(), nullptr);
  args.basis = f->basis, args.basis_step = f->basis_step;
  args.m = f->m, args.n = f->n, args.r = f->r;
  const int dtype = f->aligned ? f->dtype : kAny;
  if (f->reference == nullptr) {
    args.out = static_cast<float*>(f->out);
    return launch_project_delta(args, dtype, f->split != 0, nullptr);
  }
  std::vector<double> parts(static_cast<size_t>(part_count(f->tasks, f->n, f->r)));
  args.parts = parts.data(), args.reference = f->reference, args.reference_step = f->reference_step;
  double* inner = static_cast<double*>(f->out);
  launch_projection_stats(args, dtype, f->split != 0, inner, inner + f->tasks * f->r, nullptr);
}
}
