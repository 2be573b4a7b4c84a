// Which entries of a task take part in a merge, and how those that do are put together. float32, tasks in order, no contraction:
// every backend that follows these steps gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hd.h"

namespace pymerge {

enum class Norm : int32_t { kNone = 0, kWeights = 1, kCount = 2, kMax = 3 };

PYMERGE_HD uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

PYMERGE_HD float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

PYMERGE_HD uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7FFFFFFFu; }
PYMERGE_HD bool is_nonfinite(float x) { return magnitude_bits(x) >= 0x7F800000u; }

// Entries of a row are ordered by (|d| descending, index ascending); a cut is the place after the first k of them.
struct CutPoint {
  float theta;
  int64_t index;
};

PYMERGE_HD bool among_first(float magnitude, int64_t index, CutPoint cut) {
  return magnitude > cut.theta || (magnitude == cut.theta && index < cut.index);
}

// Sums of one entry over the tasks, split by sign so that the election needs no second pass: adding the entries of one sign in task
// order gives the bits that adding the elected entries in task order gives.
struct Ballot {
  float total = 0.0f;                    // all x_t
  float sum[2] = {0.0f, 0.0f};           // x_t > 0, x_t < 0
  float measure[2] = {0.0f, 0.0f};       // by norm: weights, counts or largest magnitudes of those
};

PYMERGE_HD void cast_vote(Ballot& ballot, float x, float weight, Norm norm) {
  ballot.total += x;
  if (!(x > 0.0f) && !(x < 0.0f)) return;
  const int side = x < 0.0f;
  ballot.sum[side] += x;
  if (norm == Norm::kWeights) ballot.measure[side] += weight;
  if (norm == Norm::kCount) ballot.measure[side] += 1.0f;
  if (norm == Norm::kMax) ballot.measure[side] = std::fabs(x) > ballot.measure[side] ? std::fabs(x) : ballot.measure[side];
}

}  // namespace pymerge
