// Dtypes that pymerge merges, by their safetensors codes, and their exact conversions to and from float32.
#pragma once

#include "host_device.h"

namespace pymerge {

enum class Dtype : int32_t { kBF16 = 0, kF16 = 1, kF32 = 2, kF64 = 3 };

PYMERGE_HD int64_t item_size(Dtype dtype) { return dtype == Dtype::kF64 ? 8 : (dtype == Dtype::kF32 ? 4 : 2); }

constexpr uint32_t kMagnitudeBits = 0x7FFFFFFFu, kInfinityBits = 0x7F800000u;
constexpr uint16_t kNanBF16 = 0x7FC0, kNanF16 = 0x7E00;
constexpr uint32_t kNanF32 = 0x7FC00000u;

#if !defined(__CUDACC__)  // device code has its own conversions, which agree with these

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float bf16_to_float(uint16_t value) { return bits_to_float(uint32_t{value} << 16); }

// Nearest even; every NaN becomes the quiet one.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & kMagnitudeBits) > kInfinityBits ? kNanBF16 : rounded);
}

// Exponent and mantissa moved up, then the bias corrected by one exact multiplication (subnormals come out right too).
inline float f16_to_float(uint16_t value) {
  const uint32_t magnitude = uint32_t{value} & 0x7FFFu, sign = (uint32_t{value} & 0x8000u) << 16;
  const float scaled = bits_to_float(magnitude << 13) * 0x1p+112f;
  const uint32_t special = (magnitude << 13) | kInfinityBits;  // Inf and NaN keep their mantissa
  return bits_to_float((magnitude >= 0x7C00u ? special : float_to_bits(scaled)) | sign);
}

// Nearest even. Subnormal results: adding 0.5 lets the addition round at the right bit; normal ones round by integers.
inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & kMagnitudeBits, sign = (bits >> 16) & 0x8000u;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to infinity
  half = magnitude > kInfinityBits ? kNanF16 : half;
  return static_cast<uint16_t>(half | (magnitude > kInfinityBits ? 0u : sign));
}

#endif

}  // namespace pymerge
