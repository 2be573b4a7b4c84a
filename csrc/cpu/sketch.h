// The loops of sketch, one set per CPU level. Raw pointers only: neither torch nor Python here.
#pragma once

#include "../common/dtype.h"
#include "../common/sketch_math.h"

namespace pymerge::sketching {

constexpr int kLanes = 16;        // rows of A that are worked on together
constexpr int64_t kColumns = 64;  // columns of A that are widened at a time

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

struct Source {
  int64_t columns, row_stride, column_stride;
};

// The sparse Omega: for each of its rows and segments column << 1 | negative.
struct Picks {
  const uint32_t* at;
  int segments;
  int64_t width;
  double scale;
};

// y [count, width] = rows of A times the sparse Omega, count <= kLanes; in T, which is double for double and float
// else. panel: width * kLanes entries, block: kColumns * 2 * kLanes, both 64-byte aligned.
template <typename Stored, typename T>
void sparse_rows(const Source& source, const Stored* a, int64_t count, const Picks& picks, T* panel, T* block, T* y);

// Rows [begin, end) of the Gaussian Omega.
void gaussian_rows(uint64_t seed, int64_t begin, int64_t end, int64_t width, float* omega);

}  // namespace pymerge::sketching
