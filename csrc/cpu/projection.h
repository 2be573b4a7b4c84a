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

constexpr int64_t kStripColumns = 2048;  // of one strip at most: long rows, so that memory streams
constexpr int64_t kStripPad = 32;        // registers that overhang a strip write here
constexpr int64_t kSlabRows = 64;        // of W converted at a time; sums over slabs are added in their order
constexpr int64_t kBasisColumns = 128;   // of Q packed at a time

// Columns of a job: with many directions the strip of the product would leave the cache.
inline int64_t strip_columns(int64_t r) { return r <= 256 ? kStripColumns : kStripColumns / 2; }
inline int64_t strip_stride(int64_t r) { return strip_columns(r) + kStripPad; }

struct ProjectionKernels {
  // strip [r, strip_stride(r)] = Q^T D for columns [begin, begin + width), width <= strip_columns(r).
  // scratch: strip_scratch() floats, 64-byte aligned, as is strip.
  void (*strip)(const Projection&, int64_t begin, int64_t width, float* scratch, float* strip);
  // sums[0] += <p, a>, sums[1] += <a, a> in float64, of n <= kStripColumns entries.
  void (*row_sums)(Buffer p, const float* a, int64_t n, double* sums);
};

inline int64_t strip_scratch() {
  return kSlabRows * (kStripColumns + kStripPad + kBasisColumns) + 2 * (kStripColumns + kStripPad);
}
inline int64_t strip_size(int64_t r) { return (r + 7) / 8 * 8 * strip_stride(r); }  // whole register tiles

const ProjectionKernels& projection_kernels();

}  // namespace pymerge
