// How one warp multiplies a 64 x 32 part of a tile, by what x holds: 16-bit entries as they are, float32 as three tf32
// products (high * high + high * low + low * high), float64. Panels lie in shared memory as [kStep][kPitch]: rows of x.
#pragma once

#include "cov_mma.cuh"

namespace pymerge::cuda {

constexpr int kCovTile = 128;  // rows and columns of a tile of cov
constexpr int kCovWarpRows = 64, kCovWarpColumns = 32;
constexpr int kCovFlush = 128;  // rows of x whose sums stay in the tensor core's accumulators

// Sums of a warp in the layout of m16n8: [row block][column block][4].
struct FloatSums {
  static constexpr int kRowBlocks = kCovWarpRows / 16, kColumnBlocks = kCovWarpColumns / 8, kEach = 4;
  using Sum = float;
  float at[kRowBlocks][kColumnBlocks][kEach];
  static __device__ __forceinline__ int row(int block, int e, int lane) { return 16 * block + lane / 4 + 8 * (e / 2); }
  static __device__ __forceinline__ int column(int block, int e, int lane) { return 8 * block + lane % 4 * 2 + e % 2; }
};

template <bool bf16>
struct HalfProduct {
  using Item = uint16_t;
  using Sums = FloatSums;
  static constexpr int kDtype = bf16 ? kBF16 : kF16, kStep = 32, kPitch = kCovTile + 8;
  static constexpr bool kFlushes = true;

  static __device__ __forceinline__ Item widen(Stored x, int64_t i) { return entry<uint16_t>(x.data, i); }

  static __device__ __forceinline__ void multiply(const Item* left, const Item* right, Sums& sums) {
    const int lane = threadIdx.x % kWarp, row = lane % 8, odd = lane / 8 % 2, upper = lane / 16;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t b[Sums::kColumnBlocks / 2][4];
#pragma unroll
      for (int n = 0; n < Sums::kColumnBlocks / 2; ++n) {
        load_transposed(right + (k + 8 * odd + row) * kPitch + 16 * n + 8 * upper, b[n]);
      }
#pragma unroll
      for (int m = 0; m < Sums::kRowBlocks; ++m) {
        uint32_t a[4];
        load_transposed(left + (k + 8 * upper + row) * kPitch + 16 * m + 8 * odd, a);
#pragma unroll
        for (int n = 0; n < Sums::kColumnBlocks; ++n) {
          const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          multiply_add16<bf16>(a, pair, sums.at[m][n]);
        }
      }
    }
  }
};

// x = high + low to 2^-22 of x: cutting (not rounding) leaves a low part of x's sign, with 11 bits again.
__device__ __forceinline__ void split(float x, float& high, float& low) {
  high = __uint_as_float(bits_of(x) & 0xFFFFE000u);
  low = x - high;
}

struct FloatProduct {
  using Item = float;
  using Sums = FloatSums;
  static constexpr int kDtype = kF32, kStep = 16, kPitch = kCovTile + 8;
  static constexpr bool kFlushes = true;

  static __device__ __forceinline__ Item widen(Stored x, int64_t i) { return entry<float>(x.data, i); }

  static __device__ __forceinline__ void multiply(const Item* left, const Item* right, Sums& sums) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kStep; k += 8) {
      float high_b[Sums::kColumnBlocks][2], low_b[Sums::kColumnBlocks][2];
#pragma unroll
      for (int n = 0; n < Sums::kColumnBlocks; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) split(right[(k + t + 4 * h) * kPitch + 8 * n + g], high_b[n][h], low_b[n][h]);
      }
#pragma unroll
      for (int m = 0; m < Sums::kRowBlocks; ++m) {
        float high_a[4], low_a[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          split(left[(k + t + 4 * (e / 2)) * kPitch + 16 * m + g + 8 * (e % 2)], high_a[e], low_a[e]);
        }
#pragma unroll
        for (int n = 0; n < Sums::kColumnBlocks; ++n) {
          multiply_add_tf32(low_a, high_b[n], sums.at[m][n]);
          multiply_add_tf32(high_a, low_b[n], sums.at[m][n]);
          multiply_add_tf32(high_a, high_b[n], sums.at[m][n]);
        }
      }
    }
  }
};

struct DoubleSums {
  static constexpr int kRowBlocks = kCovWarpRows / 8, kColumnBlocks = kCovWarpColumns / 8, kEach = 2;
  using Sum = double;
  double at[kRowBlocks][kColumnBlocks][kEach];
  static __device__ __forceinline__ int row(int block, int, int lane) { return 8 * block + lane / 4; }
  static __device__ __forceinline__ int column(int block, int e, int lane) { return 8 * block + lane % 4 * 2 + e; }
};

struct DoubleProduct {
  using Item = double;
  using Sums = DoubleSums;
  static constexpr int kDtype = static_cast<int>(Dtype::kF64), kStep = 8, kPitch = kCovTile + 4;
  static constexpr bool kFlushes = false;

  static __device__ __forceinline__ Item widen(Stored x, int64_t i) {
    return x.dtype == Dtype::kF64 ? entry<double>(x.data, i) : static_cast<double>(load1(x, i));
  }

  static __device__ __forceinline__ void multiply(const Item* left, const Item* right, Sums& sums) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kStep; k += 4) {
      double b[Sums::kColumnBlocks];
#pragma unroll
      for (int n = 0; n < Sums::kColumnBlocks; ++n) b[n] = right[(k + t) * kPitch + 8 * n + g];
#pragma unroll
      for (int m = 0; m < Sums::kRowBlocks; ++m) {
        const double a = left[(k + t) * kPitch + 8 * m + g];
#pragma unroll
        for (int n = 0; n < Sums::kColumnBlocks; ++n) multiply_add_f64(a, b[n], sums.at[m][n]);
      }
    }
  }
};

}  // namespace pymerge::cuda
