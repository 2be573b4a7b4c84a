// The loops of gram64, one set per CPU level. Raw pointers only: neither torch nor Python here.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace pymerge {

constexpr int64_t kGramDepth = 256;  // rows of x that are added up in registers; fixed, so sums do not depend on levels

// x [depth, width] anywhere in memory; strides in entries.
struct GramInput {
  const void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t depth = 0, width = 0;
  int64_t depth_stride = 0, width_stride = 0;
};

// x is packed in panels of `panel` columns: packed[p][k][c] is entry (k, p * panel + c), 0 beyond the last column.
struct GramKernels {
  int64_t panel;
  // Rows [begin, begin + depth) of panel p, depth <= kGramDepth, to out [depth][panel].
  void (*pack)(const GramInput& x, int64_t p, int64_t begin, int64_t depth, double* out);
  // Adds the products of the packed rows to the upper triangle of gram [width, width], columns of panel p. `packed`
  // holds all panels, kGramDepth * panel entries apart.
  void (*add)(const double* packed, int64_t depth, int64_t width, int64_t p, double* gram);
};

const GramKernels& gram64_kernels();  // of the CPU level in use

}  // namespace pymerge
