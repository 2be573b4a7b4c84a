#include "finite_cast.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

std::tuple<Tensor, Tensor> cast(Tensor x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "pymerge::finite_cast: x must be float32, got ",
                  torch::headeronly::toString(x.scalar_type()));
  const Dtype code = check_dtype("finite_cast", "dtype", dtype);
  const DeviceGuard guard(x.get_device_index());
  const Tensor source = torch::stable::contiguous(x);
  Tensor y = new_tensor(x, sizes_of(x), dtype), bad = new_zeros(x, {}, ScalarType::Long);
  if (x.numel() == 0) return {y, bad};
  const float* from = static_cast<const float*>(source.const_data_ptr());
  launch_finite_cast({from, y.mutable_data_ptr(), code, x.numel(), counts_of(bad)}, multiprocessors(x),
                     current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, bad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("finite_cast", TORCH_BOX(&cast)); }

}  // namespace pymerge::cuda
