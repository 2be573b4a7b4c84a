#include "cov_accumulate.cuh"

#include "../check_cov.h"
#include "call.h"

namespace pymerge::cuda {
namespace {

void cov_accumulate(Tensor cov, Tensor x, double alpha, OptTensor mask, bool small, std::string precision) {
  const CovShape shape = check_cov(cov, x, mask, small, precision);
  if (shape.batch == 0 || shape.size == 0 || shape.rows == 0 || shape.columns == 0) return;
  const DeviceGuard guard(x.get_device_index());
  const int64_t last = x.dim() - 1, reduced = small ? shape.columns : shape.rows;
  const Dtype dtype = check_dtype("cov_accumulate", "x", x.scalar_type());
  OptTensor masks, space;  // read and written by the kernels; the stream orders later uses of their memory
  if (mask) masks = torch::stable::contiguous(*mask);
  const int64_t parts = cov_parts(reduced, shape.size, multiprocessors(x));
  const int64_t bytes = cov_parts_bytes(parts, shape.size, shape.wide);
  if (bytes > 0) space = new_tensor(x, {bytes}, ScalarType::Byte);
  CovArgs args = {};
  args.row_stride = x.stride(small ? last : last - 1);
  args.column_stride = x.stride(small ? last - 1 : last);
  args.columns = shape.size;
  args.cov_stride = cov.stride(last - 1);
  args.alpha = alpha;
  args.parts = space ? space->mutable_data_ptr() : nullptr;
  args.wide = cov.scalar_type() == ScalarType::Double;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t x_at = last == 2 ? b * x.stride(0) : 0, cov_at = last == 2 ? b * cov.stride(0) : 0;
    args.x = {static_cast<const char*>(x.const_data_ptr()) + x_at * item_size(dtype), dtype};
    args.cov = data_of<char>(cov) + cov_at * (args.wide ? 8 : 4);
    const bool* kept = masks ? static_cast<const bool*>(masks->const_data_ptr()) + b * shape.rows : nullptr;
    (small ? args.columns_kept : args.rows_kept) = kept;
    launch_cov(args, reduced, parts, shape.wide, current_stream(x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("cov_accumulate", TORCH_BOX(&cov_accumulate)); }

}  // namespace pymerge::cuda
