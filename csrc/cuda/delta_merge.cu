#include "delta_merge.cuh"

#include <string>

#include "call.h"

namespace pymerge::cuda {
namespace {

std::tuple<Tensor, Tensor> merge(OptTensor base, std::vector<Tensor> tuned, OptTensor add, Numbers weights,
                                 double scale, double divisor, OptNumbers rescales, OptNumbers keep, OptIntegers keys,
                                 int64_t row_length, OptTensor top_theta, OptTensor top_index, OptTensor skip_theta,
                                 OptTensor skip_index, bool elect, int64_t tie_sign, std::string norm,
                                 ScalarType out_dtype) {
  const char* op = "delta_merge";
  Call call(op, base, tuned);
  call.set_weights(weights, rescales);
  call.set_mask(keep, keys);
  call.set_cuts(row_length, top_theta, top_index, skip_theta, skip_index);
  STD_TORCH_CHECK(tie_sign == 1 || tie_sign == -1, "pymerge::delta_merge: tie_sign must be 1 or -1, got ", tie_sign);
  STD_TORCH_CHECK(static_cast<float>(divisor) != 0.0f, "pymerge::delta_merge: divisor is 0");
  MergeArgs args = {};
  args.norm = check_norm(op, norm, elect);
  args.elect = elect;
  args.tie_sign = static_cast<float>(tie_sign);
  args.scale = static_cast<float>(scale);
  args.divisor = static_cast<float>(divisor);
  args.out_dtype = check_dtype(op, "out_dtype", out_dtype);
  if (add) {
    check_same(op, "add", *add, tuned[0]);
    args.add_is_base = base && base->const_data_ptr() == add->const_data_ptr() &&
                       base->scalar_type() == add->scalar_type() && base->is_contiguous() && add->is_contiguous();
    args.add = args.add_is_base ? call.base() : call.hold(*add);
  }
  Tensor out = new_tensor(call.like(), sizes_of(tuned[0]), out_dtype);
  Tensor bad = new_zeros(call.like(), {call.tasks() + 3}, ScalarType::Long);
  if (call.empty()) return {out, bad};
  args.delta = call.finish();
  args.out = out.mutable_data_ptr();
  args.bad = counts_of(bad);
  const int dtype = common_dtype(call.read().data(), static_cast<int>(call.read().size()));
  launch_merge(args, dtype, call.sms(), call.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, bad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("delta_merge", TORCH_BOX(&merge)); }

}  // namespace pymerge::cuda
