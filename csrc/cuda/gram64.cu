#include "gram64.cuh"

#include "call.h"

namespace pymerge::cuda {
namespace {

// A dense batch of transposed matrices: read as it lies.
bool is_transposed(const Tensor& x) {
  const int64_t dims = x.dim(), depth = x.size(dims - 2), width = x.size(dims - 1);
  if (x.stride(dims - 2) != 1 || x.stride(dims - 1) != depth) return false;
  int64_t expected = depth * width;
  for (int64_t d = dims - 3; d >= 0; expected *= x.size(d--)) {
    if (x.stride(d) != expected) return false;
  }
  return true;
}

Tensor gram64(Tensor x) {
  check_matrices("gram64", "x", x);
  Gram64Args args = {};
  args.dtype = check_dtype("gram64", "x", x.scalar_type());
  const DeviceGuard guard(x.get_device_index());
  const int64_t dims = x.dim();
  args.depth = x.size(dims - 2);
  args.width = x.size(dims - 1);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[static_cast<size_t>(dims) - 2] = args.width;
  Tensor gram = new_zeros(x, sizes, ScalarType::Double);
  if (x.numel() == 0) return gram;
  args.batch = gram.numel() / (args.width * args.width);
  const int sms = multiprocessors(x);
  args.splits = gram64_splits(args.depth, args.width, args.batch, sms);
  STD_TORCH_CHECK(args.splits * args.batch <= 65535, "pymerge::gram64: at most 65535 matrices, got ", args.batch);
  args.transposed = is_transposed(x);
  const Tensor source = args.transposed ? x : torch::stable::contiguous(x);
  args.x = source.const_data_ptr();
  args.gram = data_of<double>(gram);
  const bool several = args.splits > 1;
  const Tensor parts = several ? new_tensor(x, {args.splits, gram.numel()}, ScalarType::Double) : gram;
  args.parts = data_of<double>(parts);
  launch_gram64(args, sms, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return gram;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("gram64", TORCH_BOX(&gram64)); }

}  // namespace pymerge::cuda
