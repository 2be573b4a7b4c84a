#include "project_delta.cuh"

#include "projection_call.h"

namespace pymerge::cuda {
namespace {

Tensor project_delta(Tensor basis, OptTensor base, std::vector<Tensor> tuned, std::string precision) {
  ProjectCall project("project_delta", basis, base, tuned, precision);
  const ProjectionSizes& sizes = project.sizes;
  const std::vector<int64_t> shape = {sizes.tasks, sizes.r, sizes.n};
  if (project.empty()) return new_zeros(tuned[0], shape, ScalarType::Float);
  Tensor out = new_tensor(tuned[0], shape, ScalarType::Float);
  project.args.out = data_of<float>(out);
  project.args.delta = project.call.finish();
  launch_project_delta(project.args, project.dtype(), project.split, project.call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("project_delta", TORCH_BOX(&project_delta)); }

}  // namespace pymerge::cuda
