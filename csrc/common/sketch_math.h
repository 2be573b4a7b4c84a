// The random matrix Omega [n, width] of a sketch A Omega: every entry is a function of (seed, row, column) alone, made
// of integer arithmetic and of float32 additions, multiplications and square roots that all backends round alike.
#pragma once

#include "philox.h"

namespace pymerge {

constexpr int kSketchNonzeros = 8;  // of a sparse row: one in each of as many equal segments of the columns
constexpr uint32_t kSparsePlane = 2, kGaussianPlane = 3;  // apart from the planes of the mask
constexpr int64_t kSketchMaxWidth = int64_t{kSketchNonzeros} << 15;

PYMERGE_HD int sketch_segments(int64_t width) {
  return width < kSketchNonzeros ? static_cast<int>(width) : kSketchNonzeros;
}

PYMERGE_HD int64_t segment_begin(int segment, int segments, int64_t width) { return segment * width / segments; }

// Where row `row` of a sparse Omega has its entry of `segment`, and its sign (OSNAP, block form: Nelson and Nguyen
// 2013).
struct SparseEntry {
  int32_t column;
  bool negative;
};

PYMERGE_HD SparseEntry sparse_entry(const Philox4& draws, int segment, int segments, int64_t width) {
  const uint32_t half = (draws.word[segment >> 1] >> (16 * (segment & 1))) & 0xFFFFu;
  const int64_t begin = segment_begin(segment, segments, width), end = segment_begin(segment + 1, segments, width);
  return {static_cast<int32_t>(begin + ((half & 0x7FFFu) * (end - begin) >> 15)), (half >> 15) != 0};
}

PYMERGE_HD Philox4 sparse_draws(uint64_t seed, int64_t row) {
  return philox4x32(seed, static_cast<uint64_t>(row), kSparsePlane);
}

PYMERGE_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

PYMERGE_HD uint32_t as_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(uint32_t, x);
#endif
}

PYMERGE_HD float root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// ln x of 0 < x <= 1, normal; relative error 2e-7. Polynomial of Cephes' logf; mantissa in [0.5, 1), then moved to
// [sqrt(0.5), sqrt(2)).
PYMERGE_HD float log_unit(float x) {
  const uint32_t bits = as_bits(x);
  const float mantissa = as_float((bits & 0x007FFFFFu) | 0x3F000000u);
  const bool low = mantissa < 0.707106781186547524f;
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - (low ? 127 : 126));
  const float f = (low ? mantissa + mantissa : mantissa) - 1.0f, z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * z;
  p = p + exponent * -2.12194440e-4f;
  p = p - 0.5f * z;
  return (f + p) + exponent * 0.693359375f;
}

struct NormalPair {
  float first, second;
};

// Box-Muller: radius from 24 bits of `size`, angle from `turn` (two bits choose the quadrant). |x| <= 5.77.
PYMERGE_HD NormalPair normal_pair(uint32_t size, uint32_t turn) {
  const float u = static_cast<float>((size >> 8) + 1u) * 0x1p-24f;
  const float radius = root(-2.0f * log_unit(u));
  const float t = static_cast<float>(static_cast<int32_t>((turn & 0x3FFFFFFFu) >> 6) - (1 << 23));
  const float angle = t * (1.57079632679489662f * 0x1p-24f), z = angle * angle;  // within pi / 4
  float s = -1.9515295891e-4f, c = 2.443315711809948e-5f;
  s = s * z + 8.3321608736e-3f;
  s = s * z + -1.6666654611e-1f;
  s = s * z * angle + angle;
  c = c * z + -1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  const bool swap = (turn & 0x40000000u) != 0, flip = (turn & 0x80000000u) != 0;
  const float x = swap ? -s : c, y = swap ? c : s;
  const float signed_radius = flip ? -radius : radius;
  return {signed_radius * x, signed_radius * y};
}

struct Normal4 {
  float at[4];
};

// Columns 4 g .. 4 g + 3 of row `row` of a Gaussian Omega.
PYMERGE_HD Normal4 gaussian4(uint64_t seed, int64_t row, int64_t group) {
  const uint64_t index = static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(group);
  const Philox4 draws = philox4x32(seed, index, kGaussianPlane);
  const NormalPair low = normal_pair(draws.word[0], draws.word[1]), high = normal_pair(draws.word[2], draws.word[3]);
  return {{low.first, low.second, high.first, high.second}};
}

}  // namespace pymerge
