#include "projection_stats.cuh"

#include "projection_call.h"

namespace pymerge::cuda {
namespace {

std::tuple<Tensor, Tensor> projection_stats(Tensor basis, Tensor reference, OptTensor base, std::vector<Tensor> tuned,
                                            std::string precision) {
  ProjectCall project("projection_stats", basis, base, tuned, precision);
  const ProjectionSizes& sizes = project.sizes;
  check_reference("projection_stats", reference, tuned[0], sizes);
  Tensor inner = new_zeros(tuned[0], {sizes.tasks, sizes.r}, ScalarType::Double);
  Tensor square = new_zeros(tuned[0], {sizes.tasks, sizes.r}, ScalarType::Double);
  if (project.empty()) return {inner, square};
  Tensor parts = new_tensor(tuned[0], {part_count(sizes.tasks, sizes.n, sizes.r)}, ScalarType::Double);
  project.args.parts = data_of<double>(parts);
  project.args.reference = project.floats(reference);
  project.args.reference_step = reference.dim() == 3 ? sizes.r * sizes.n : 0;
  project.args.delta = project.call.finish();
  launch_projection_stats(project.args, project.dtype(), project.split, data_of<double>(inner), data_of<double>(square),
                          project.call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {inner, square};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("projection_stats", TORCH_BOX(&projection_stats)); }

}  // namespace pymerge::cuda
