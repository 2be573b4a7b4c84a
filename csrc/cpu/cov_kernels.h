// x^T x in packed panels: what the operator schedules and each CPU level computes. Raw pointers only.
//
// Columns of the product are cut into panels of `width`. A packed panel holds, for a run of at most kCovRows rows of x,
// [depth][width] items: one float or double of one row, or the bfloat16 pair of two rows. One packing serves both
// operands of the product, whose tiles are width x width.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace pymerge {

constexpr int64_t kCovRows = 1024;  // rows of one packed run: sums of so many products before they meet the total
constexpr int64_t kCovPanel = 192;  // bytes of `width` items

// Rows and columns of the matrix whose x^T x is taken; strides in entries.
struct CovSource {
  const char* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t row_stride = 0, column_stride = 1, columns = 0;
  const int64_t* kept = nullptr;      // rows that count, in order
  const bool* column_kept = nullptr;  // null: all; other columns are packed as zeros
};

// Where the product of panels i <= j goes: cov[r][c] += alpha * sum for r <= c < columns.
struct CovTarget {
  char* cov = nullptr;
  bool wide = false;  // float64 totals
  int64_t row_stride = 0, columns = 0;
  double alpha = 1.0;
};

struct CovKernels {
  int64_t width;        // columns of a panel
  int64_t rows_a_item;  // 2: bfloat16 pairs
  int64_t unit;         // depth is a multiple of this many items
  int64_t copies;       // forms of a packed panel, one after another, each of depth * width items
  // Rows kept[begin .. begin + count) of one panel; what is missing to whole items, units and columns is zero.
  void (*pack)(const CovSource&, int64_t begin, int64_t count, int64_t panel, void* out);
  void (*tile)(const void* a, const void* b, int64_t i, int64_t j, int64_t depth, const CovTarget&);
  void (*enter)();  // around the tiles of one thread; null: nothing to prepare
  void (*leave)();
};

// Items of a column of a packed panel that holds `rows` rows.
inline int64_t cov_depth(const CovKernels& kernels, int64_t rows) {
  const int64_t rows_a_unit = kernels.rows_a_item * kernels.unit;
  return (rows + rows_a_unit - 1) / rows_a_unit * kernels.unit;
}

namespace baseline {
const CovKernels& cov_float();
const CovKernels& cov_double();
}  // namespace baseline
namespace avx2 {
const CovKernels& cov_float();
const CovKernels& cov_double();
}  // namespace avx2
namespace avx512 {
const CovKernels& cov_float();
const CovKernels& cov_double();
const CovKernels& cov_pairs();  // bfloat16 x; needs avx512_bf16
}  // namespace avx512
namespace amx {
const CovKernels& cov_pairs();  // bfloat16 x
}  // namespace amx

}  // namespace pymerge
