#include "sketch.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

template <typename T>
void sparse(const Tensor& source, Dtype dtype, const Tensor& y, uint64_t seed) {
  const int64_t columns = source.size(source.dim() - 1), width = y.size(y.dim() - 1);
  const SketchArgs<T> args{{source.const_data_ptr(), dtype}, data_of<T>(y), y.numel() / width, columns, width, seed};
  launch_sparse_sketch(args, current_stream(source));
}

Tensor sketch(Tensor a, int64_t width, std::string kind, int64_t seed) {
  const SketchCall call = check_sketch(a, width, kind);
  const DeviceGuard guard(a.get_device_index());
  const uint64_t key = static_cast<uint64_t>(seed);
  std::vector<int64_t> sizes = sizes_of(a);
  const int64_t n = sizes.back();
  sizes.back() = width;
  if (a.numel() == 0) return new_zeros(a, sizes, call.out_dtype);
  if (call.gaussian) {
    Tensor omega = new_tensor(a, {n, width}, ScalarType::Float);
    launch_gaussian({data_of<float>(omega), n, width, key}, multiprocessors(a), current_stream(a));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return torch::stable::matmul(torch::stable::to(a, call.out_dtype), torch::stable::to(omega, call.out_dtype));
  }
  const Tensor source = torch::stable::contiguous(a);
  Tensor y = new_tensor(a, sizes, call.out_dtype);
  if (call.dtype == Dtype::kF64) {
    sparse<double>(source, call.dtype, y, key);
  } else {
    sparse<float>(source, call.dtype, y, key);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("sketch", TORCH_BOX(&sketch)); }

}  // namespace pymerge::cuda
