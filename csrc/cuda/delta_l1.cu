#include "delta_l1.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

Tensor l1(OptTensor base, std::vector<Tensor> tuned, OptNumbers keep, OptIntegers keys, int64_t row_length,
          OptTensor top_theta, OptTensor top_index, OptTensor skip_theta, OptTensor skip_index) {
  Call call("delta_l1", base, tuned);
  call.set_mask(keep, keys);
  call.set_cuts(row_length, top_theta, top_index, skip_theta, skip_index);
  Tensor norms = new_zeros(call.like(), {call.tasks(), 2}, ScalarType::Double);
  if (call.empty()) return norms;
  Tensor parts = new_tensor(call.like(), {call.tasks(), 2, l1_parts(call.count())}, ScalarType::Double);
  launch_l1({call.finish(), data_of<double>(parts)}, data_of<double>(norms), call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("delta_l1", TORCH_BOX(&l1)); }

}  // namespace pymerge::cuda
