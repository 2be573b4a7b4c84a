// How a block multiplies two tiles of shared memory: [kDepth, columns] each, the sum over the kDepth rows. A policy
// says how the entries of two neighbouring rows are kept (`encode`: two words) and multiplies for one warp
// (`multiply`). All policies give a thread the entries of mma.sync.m16n8k16: rows g and g + 8, columns 2 t and 2 t + 1
// of each 16 x 8 tile, where g = lane / 4 and t = lane % 4.
#pragma once

#include "common.cuh"

namespace pymerge::cuda {

constexpr int kDepth = 32, kPairs = kDepth / 2;    // rows of a step: the sums of a step are added to the total
constexpr int kTileRows = 64, kTileColumns = 128;  // of a block of eight warps, two by four
constexpr int kWarpRows = 32, kWarpColumns = 32;   // of a warp
constexpr int kMmaRows = 16, kMmaColumns = 8;      // of one instruction
constexpr int kBankPad = 8;                        // words: the eight g of a load lie in different banks
constexpr int kRowStride = kTileRows + kBankPad, kColumnStride = kTileColumns + kBankPad;
constexpr int kRowTiles = kWarpRows / kMmaRows, kColumnTiles = kWarpColumns / kMmaColumns;

// The sums of a thread: [.][.][2 h + e] is row g + 8 h, column 2 t + e of a 16 x 8 tile.
struct Sums {
  float at[kRowTiles][kColumnTiles][4] = {};
};

struct WordPair {
  uint32_t first, second;
};

// A tile in shared memory: word [which * kPairs + pair][column] of the pair of rows 2 pair, 2 pair + 1.
struct Tiles {
  alignas(16) uint32_t rows[kDepth * kRowStride];        // of Q
  alignas(16) uint32_t columns[kDepth * kColumnStride];  // of D
};

// bfloat16 of `low` in the lower half, of `high` in the upper one, nearest even.
__device__ __forceinline__ uint32_t pair_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return pair(to_bf16(low), to_bf16(high));
#endif
}

#ifndef __CUDACC__
// The documented layout of the instruction; a barrier stands for the lanes' exchange, so all warps come here together.
inline void emulate_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static uint32_t rows[kThreads][4], columns[kThreads][2];
  const unsigned lane = threadIdx.x % kWarp, first = threadIdx.x - lane, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) rows[threadIdx.x][i] = a[i];
  for (int i = 0; i < 2; ++i) columns[threadIdx.x][i] = b[i];
  __syncthreads();
  for (unsigned i = 0; i < 4; ++i) {
    double sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned source = k / 2 % 4, upper = k / 8, shift = 16 * (k % 2);
      const uint32_t x = rows[first + 4 * g + source][i / 2 + 2 * upper] >> shift & 0xFFFFu;
      const uint32_t y = columns[first + 4 * (2 * t + i % 2) + source][upper] >> shift & 0xFFFFu;
      sum += static_cast<double>(from_bf16(x)) * static_cast<double>(from_bf16(y));
    }
    c[i] = static_cast<float>(sum);
  }
  __syncthreads();
}
#endif

// c [16, 8] += a [16, 16] b [16, 8], bfloat16 factors.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulate_mma(c, a, b);
#endif
}

// Both factors as two bfloat16 terms, x = h + l up to 2^-17 |x|; h h, h l and l h, of which l l would be the smallest.
// Tensor cores cut their sums off, so they add up 16 rows only; the total is added in float32, to nearest.
struct SplitProduct {
  static __device__ __forceinline__ WordPair encode(float x, float y) {
    const uint32_t high = pair_bf16(x, y);
    return {high, pair_bf16(x - from_bf16(high & 0xFFFFu), y - __uint_as_float(high & 0xFFFF0000u))};
  }

  // The two terms of the factors of an instruction: `at` is the word of pair t and of row or column g.
  static __device__ __forceinline__ void load_rows(const uint32_t* at, uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int offset = (i / 2 * 4) * kRowStride + i % 2 * 8;
      high[i] = at[offset];
      low[i] = at[offset + kPairs * kRowStride];
    }
  }

  static __device__ __forceinline__ void load_columns(const uint32_t* at, uint32_t (&high)[2], uint32_t (&low)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = at[i * 4 * kColumnStride];
      low[i] = at[i * 4 * kColumnStride + kPairs * kColumnStride];
    }
  }

  // `row`, `column`: where the warp's part of the block's tile begins.
  static __device__ __forceinline__ void multiply(const Tiles& tiles, int row, int column, Sums& sums) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 1  // else the loads of the second half move up and their registers spill
    for (int pair = 0; pair < kPairs; pair += 8) {
      uint32_t high[kRowTiles][4], low[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_rows(tiles.rows + (pair + t) * kRowStride + row + kMmaRows * i + g, high[i], low[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        uint32_t right_high[2], right_low[2];
        load_columns(tiles.columns + (pair + t) * kColumnStride + column + kMmaColumns * j + g, right_high, right_low);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          float sum[4] = {};
          mma_bf16(sum, low[i], right_high);
          mma_bf16(sum, high[i], right_low);
          mma_bf16(sum, high[i], right_high);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums.at[i][j][e] += sum[e];
        }
      }
    }
  }
};

// float32 multiply-adds.
struct PlainProduct {
  static __device__ __forceinline__ WordPair encode(float x, float y) { return {bits_of(x), bits_of(y)}; }

  static __device__ __forceinline__ void multiply(const Tiles& tiles, int row, int column, Sums& sums) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 2
    for (int k = 0; k < kDepth; ++k) {
      float a[2 * kRowTiles], b[2 * kColumnTiles];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) a[i] = __uint_as_float(tiles.rows[k * kRowStride + row + 8 * i + g]);
#pragma unroll
      for (int j = 0; j < 2 * kColumnTiles; ++j) {
        b[j] = __uint_as_float(tiles.columns[k * kColumnStride + column + kMmaColumns * (j / 2) + 2 * t + j % 2]);
      }
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kColumnTiles; ++j) {
          float& sum = sums.at[i / 2][j / 2][2 * (i % 2) + j % 2];
          sum = fmaf(a[i], b[j], sum);
        }
      }
    }
  }
};

}  // namespace pymerge::cuda
