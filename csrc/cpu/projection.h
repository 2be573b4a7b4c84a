// Q^T (W - W_0) of one task on host memory, a strip of columns at a time. No torch here; arguments have been checked.
#pragma once

#include "kernels.h"

namespace pymerge {

// One of the two strides is 1: a transposed matrix is read in place.
struct Matrix {
  const void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::kF32;
  int64_t row_stride = 0, column_stride = 1;
};

struct Projection {
  Matrix basis;        // [m, r]
  Matrix base, tuned;  // [m, n]
  int64_t m = 0, n = 0, r = 0;
};

constexpr int64_t kStripColumns = 2048;               // of one job at most: long rows, so that memory streams
constexpr int64_t kStripStride = kStripColumns + 32;  // registers that overhang a strip write to the pad
constexpr int64_t kSlabRows = 64;     // of W converted at a time; sums over slabs are added in their order
constexpr int64_t kDirections = 128;  // of one job at most: their strip of the product stays in the L2 cache

constexpr int64_t kStripSize = kDirections * kStripStride;
constexpr int64_t kStripScratch = kSlabRows * (kStripStride + kDirections) + 2 * kStripStride;

struct ProjectionKernels {
  // strip [r, kStripStride] = Q^T D for columns [begin, begin + width); r <= kDirections, width <= kStripColumns.
  // scratch: kStripScratch floats, strip: kStripSize, both 64-byte aligned.
  void (*strip)(const Projection&, int64_t begin, int64_t width, float* scratch, float* strip);
  // sums[0] += <p, a>, sums[1] += <a, a> in float64, of n <= kStripColumns entries.
  void (*row_sums)(Buffer p, const float* a, int64_t n, double* sums);
};

const ProjectionKernels& projection_kernels();

}  // namespace pymerge
