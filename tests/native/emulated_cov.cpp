// The CUDA kernels of cov_accumulate run by the emulator of csrc/emu, for ctypes.
#include <vector>

#include "../../csrc/cuda/cov_accumulate.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

extern "C" {

struct CovFields {
  const void* x;
  void* cov;
  const bool* rows_kept;
  const bool* columns_kept;
  int64_t rows, columns, row_stride, column_stride, cov_stride;
  double alpha;
  int32_t dtype, wide_totals, wide_products, multiprocessors;
};

int64_t emulate_cov(const CovFields* f) {
  CovArgs args = {};
  args.x = {f->x, static_cast<Dtype>(f->dtype)};
  args.row_stride = f->row_stride, args.column_stride = f->column_stride, args.columns = f->columns;
  args.rows_kept = f->rows_kept, args.columns_kept = f->columns_kept;
  args.cov = f->cov, args.cov_stride = f->cov_stride, args.wide = f->wide_totals != 0, args.alpha = f->alpha;
  const bool wide = f->wide_products != 0 || args.x.dtype == Dtype::kF64;
  const int64_t parts = cov_parts(f->rows, f->columns, f->multiprocessors);
  std::vector<double> space(static_cast<size_t>(cov_parts_bytes(parts, f->columns, wide) / 8), NAN);
  args.parts = parts > 1 ? space.data() : nullptr;
  launch_cov(args, f->rows, parts, wide, nullptr);
  return parts;
}
}
