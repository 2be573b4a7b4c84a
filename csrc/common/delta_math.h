// The arithmetic of one entry of an element-wise merge, shared by CPU and CUDA. float32, in this order, never
// contracted to fused multiply-adds: every backend, vector width, tiling and thread count gives the same bits.
//
//   d_t = W_t - W_0;  d_t = 0 where not selected;  x_t = weight_t * (rescale_t * d_t)
//   s = 0 + x_0 + x_1 + ...              (elect: only x_t whose sign is the elected one)
//   out = add + scale * (normalised(s) / divisor)
#pragma once

#include "host_device.h"
#include "philox.h"

namespace pymerge {

enum class Norm : int32_t { kNone = 0, kWeights = 1, kCount = 2, kMax = 3 };

constexpr float kSmallestWeightSum = 1e-8f;  // mergekit's guard: a smaller sum of weights divides by 1

// Everything but the tensors. Pointers have one entry a task; cuts one a task and row, [tasks][rows]; null where
// absent.
struct DeltaRule {
  int64_t tasks = 0;
  int64_t rows = 1;
  int64_t row_length = 0;  // 0: one row
  const float* weights = nullptr;
  const float* rescales = nullptr;
  const KeepLimit* keep = nullptr;
  const uint64_t* keys = nullptr;
  const float* top_theta = nullptr;
  const int64_t* top_index = nullptr;
  const float* skip_theta = nullptr;
  const int64_t* skip_index = nullptr;
  float scale = 1.0f;
  float divisor = 1.0f;
  float tie_sign = 1.0f;  // elected sign where the sum is exactly zero
  bool elect = false;
  Norm norm = Norm::kNone;
};

// Entries are ordered by (magnitude descending, index ascending): is this one before the cut?
PYMERGE_HD bool among_first(float magnitude, int64_t index, float theta, int64_t cut) {
  return magnitude > theta || (magnitude == theta && index < cut);
}

PYMERGE_HD float elected_sign(float sum, float tie_sign) { return sum > 0.0f ? 1.0f : (sum < 0.0f ? -1.0f : tie_sign); }

// Entries that take part: of the elected sign, or, without election, those that are not zero.
PYMERGE_HD bool takes_part(float x, float sign, bool elect) { return elect ? x * sign > 0.0f : x != 0.0f; }

// s: sum of what takes part; aux: their sum of weights (kWeights), number (kCount) or largest magnitude (kMax).
PYMERGE_HD float normalised(float s, float aux, float sign, Norm norm) {
  switch (norm) {
    case Norm::kWeights:
      return s / ((aux < kSmallestWeightSum && aux > -kSmallestWeightSum) ? 1.0f : aux);
    case Norm::kCount:
      return s / (aux < 1.0f ? 1.0f : aux);
    case Norm::kMax:
      return sign * aux;
    default:
      return s;
  }
}

PYMERGE_HD float scaled(float s, float divisor, float scale) { return scale * (divisor == 1.0f ? s : s / divisor); }

}  // namespace pymerge
