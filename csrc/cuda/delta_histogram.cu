#include "delta_histogram.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

Tensor histogram(OptTensor base, std::vector<Tensor> tuned, OptNumbers keep, OptIntegers keys, OptIntegers prefix) {
  Call call("delta_histogram", base, tuned);
  call.set_mask(keep, keys);
  if (prefix) call.set_prefix(*prefix);
  Tensor hist = new_zeros(call.like(), {call.tasks(), prefix ? kFineBins : kCoarseBins}, ScalarType::Long);
  if (call.empty()) return hist;
  STD_CUDA_CHECK(cudaFuncSetAttribute(histogram_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kHistogramBytes));
  launch_histogram({call.finish(), prefix ? 1 : 0, nullptr, counts_of(hist)}, call.sms(), call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return hist;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("delta_histogram", TORCH_BOX(&histogram)); }

}  // namespace pymerge::cuda
