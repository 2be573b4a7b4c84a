#include "delta_signs.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

Tensor signs(OptTensor base, std::vector<Tensor> tuned, Numbers weights, OptNumbers rescales, OptNumbers keep,
             OptIntegers keys, int64_t row_length, OptTensor top_theta, OptTensor top_index, OptTensor skip_theta,
             OptTensor skip_index) {
  Call call("delta_signs", base, tuned);
  call.set_weights(weights, rescales);
  call.set_mask(keep, keys);
  call.set_cuts(row_length, top_theta, top_index, skip_theta, skip_index);
  Tensor total = new_zeros(call.like(), {}, ScalarType::Long);
  if (call.empty()) return total;
  launch_signs({call.finish(), counts_of(total)}, call.sms(), call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("delta_signs", TORCH_BOX(&signs)); }

}  // namespace pymerge::cuda
