// What cov_accumulate requires of its arguments; shared by all backends.
#pragma once

#include "check.h"

namespace pymerge {

struct CovShape {
  int64_t batch;          // matrices: 1 where x has two dimensions
  int64_t rows, columns;  // of each x
  int64_t size;           // of each cov: columns, or rows where small
  bool wide;              // products in float64
};

// Rows of one piece each, matrices apart from each other: every entry of cov has its own memory.
inline void check_cov_strides(const Tensor& cov, int64_t size) {
  const int64_t last = cov.dim() - 1, rows = last - 1;
  if (cov.numel() == 0) return;
  const bool columns_ok = size <= 1 || cov.stride(last) == 1, rows_ok = size <= 1 || cov.stride(rows) >= size;
  const int64_t extent = (size - 1) * cov.stride(rows) + size;
  const bool batch_ok = last < 2 || cov.size(0) <= 1 || cov.stride(0) >= extent;
  STD_TORCH_CHECK(columns_ok && rows_ok && batch_ok,
                  "pymerge::cov_accumulate: cov must have contiguous rows that do not overlap, its row stride is ",
                  cov.stride(rows), " and its column stride ", cov.stride(last), ": give a contiguous tensor");
}

inline CovShape check_cov(const Tensor& cov, const Tensor& x, const std::optional<Tensor>& mask, bool small,
                          const std::string& precision) {
  const char* op = "cov_accumulate";
  check_dtype(op, "x", x.scalar_type());
  STD_TORCH_CHECK(cov.scalar_type() == ScalarType::Float || cov.scalar_type() == ScalarType::Double,
                  "pymerge::cov_accumulate: cov must be float32 or float64, got ",
                  torch::headeronly::toString(cov.scalar_type()));
  STD_TORCH_CHECK(precision == "float32" || precision == "float64",
                  "pymerge::cov_accumulate: precision must be float32 or float64, got '", precision, "'");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "pymerge::cov_accumulate: x must be [N, n] or [B, N, n], got ",
                  shape_text(x));
  const int64_t last = x.dim() - 1, batch = last == 2 ? x.size(0) : 1;
  const CovShape shape = {batch, x.size(last - 1), x.size(last), x.size(small ? last - 1 : last),
                          precision == "float64" || x.scalar_type() == ScalarType::Double};
  const bool fits = cov.dim() == x.dim() && cov.size(last) == shape.size && cov.size(last - 1) == shape.size &&
                    (last == 1 || cov.size(0) == batch);
  STD_TORCH_CHECK(fits, "pymerge::cov_accumulate: cov must be ", last == 2 ? "[B, " : "[", shape.size, ", ", shape.size,
                  "] for x ", shape_text(x), small ? " (small)" : "", ", got ", shape_text(cov));
  STD_TORCH_CHECK(cov.device() == x.device(), "pymerge::cov_accumulate: cov and x are on different devices");
  check_cov_strides(cov, shape.size);
  if (!mask) return shape;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "pymerge::cov_accumulate: mask must be bool, got ",
                  torch::headeronly::toString(mask->scalar_type()));
  const bool covers =
      mask->dim() == last && mask->size(last - 1) == shape.rows && (last == 1 || mask->size(0) == batch);
  STD_TORCH_CHECK(covers, "pymerge::cov_accumulate: mask must be ", last == 2 ? "[B, " : "[", shape.rows, "] for x ",
                  shape_text(x), ", got ", shape_text(*mask));
  STD_TORCH_CHECK(mask->device() == x.device(), "pymerge::cov_accumulate: mask and x are on different devices");
  return shape;
}

}  // namespace pymerge
