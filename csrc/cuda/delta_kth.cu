#include "delta_kth.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

void long_row(const Call& call, const KthArgs& args) {
  const KthSpace space = kth_space(call.count(), call.tasks());
  const int64_t words = (space.zeroed + space.state + space.equal + 7) / 8;
  Tensor memory = new_tensor(call.like(), {words}, ScalarType::Long);
  STD_CUDA_CHECK(cudaMemsetAsync(memory.mutable_data_ptr(), 0, static_cast<size_t>(space.zeroed), call.stream()));
  STD_CUDA_CHECK(cudaFuncSetAttribute(histogram_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kHistogramBytes));
  launch_kth_long(args, memory.mutable_data_ptr(), call.sms(), call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> kth(OptTensor base, std::vector<Tensor> tuned, Integers ranks, int64_t row_length,
                               OptNumbers keep, OptIntegers keys) {
  Call call("delta_kth", base, tuned);
  call.set_mask(keep, keys);
  call.set_ranks(ranks);
  call.set_rows(row_length);
  STD_TORCH_CHECK(row_length <= UINT32_MAX, "pymerge::delta_kth: row_length must be below 2^32, got ", row_length);
  Tensor theta = new_tensor(call.like(), {call.tasks(), call.rows()}, ScalarType::Float);
  Tensor index = new_tensor(call.like(), {call.tasks(), call.rows()}, ScalarType::Long);
  if (call.rows() == 0) return {theta, index};
  KthArgs args = {};
  args.delta = call.finish();
  args.theta = data_of<float>(theta);
  args.index = data_of<int64_t>(index);
  if (!takes_rows(args.delta)) {
    long_row(call, args);
    return {theta, index};
  }
  launch_kth_rows(args, call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {theta, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("delta_kth", TORCH_BOX(&kth)); }

}  // namespace pymerge::cuda
