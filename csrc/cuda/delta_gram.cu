#include "delta_gram.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

Tensor gram(OptTensor base, std::vector<Tensor> tuned) {
  Call call("delta_gram", base, tuned);
  Tensor result = new_zeros(call.like(), {call.tasks(), call.tasks()}, ScalarType::Double);
  if (call.empty()) return result;
  STD_TORCH_CHECK(gram_pairs(call.tasks()) <= 65535, "pymerge::delta_gram: at most 361 tensors, got ", call.tasks());
  const std::vector<int64_t> sizes = {gram_pairs(call.tasks()), gram_parts(call.count())};
  Tensor parts = new_tensor(call.like(), sizes, ScalarType::Double);
  launch_gram({call.finish(), data_of<double>(parts), data_of<double>(result), 0}, call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("delta_gram", TORCH_BOX(&gram)); }

}  // namespace pymerge::cuda
