// Tensor-core tiles for sm_80 and later: fragments of mma.sync with fp32 accumulators, ldmatrix, cp.async and operand
// conversions. nvcc compiles them to PTX, g++ to the emulation of ../emu/tile.h, so that a kernel written on this
// header is tested without a GPU. A warp computes C [16, 8] += A [16, K] B [K, 8]; K = 16 for bf16 and f16, 8 for tf32.
//
// Which lane holds what, group = lane / 4, member = lane % 4 (PTX ISA, matrix fragments for mma.m16n8k16 and m16n8k8):
//   A  .at[i], i < 4   row group + 8 (i % 2)   half types: k = 2 member + 8 (i / 2) in bits 0..15, k + 1 in 16..31
//                                              tf32:       k = member + 4 (i / 2)
//   B  .at[i], i < 2   column group            half types: k = 2 member + 8 i in bits 0..15, k + 1 in bits 16..31
//                                              tf32:       k = member + 4 i
//   C  .at[i], i < 4   row group + 8 (i / 2), column 2 member + i % 2
// Everything here that touches other lanes (mma, load_matrix) must be reached by all 32 lanes of the warp together.
#pragma once

#include "common.cuh"
#ifndef __CUDACC__
#include "../emu/tile.h"
#endif

namespace pymerge::cuda {

enum Operand : int { kOperandBF16, kOperandF16, kOperandTF32 };

constexpr int kTileM = 16, kTileN = 8;
template <int kOperand>
constexpr int kTileK = kOperand == kOperandTF32 ? 8 : 16;

struct FragmentA {
  uint32_t at[4];
};
struct FragmentB {
  uint32_t at[2];
};
struct FragmentC {
  float at[4];
};

PYMERGE_HD int a_row(int lane, int i) { return lane / 4 + 8 * (i % 2); }
PYMERGE_HD int b_column(int lane) { return lane / 4; }
PYMERGE_HD int c_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
PYMERGE_HD int c_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// k of the entry in the low bits of A .at[i]; the half types have k + 1 above it.
template <int kOperand>
PYMERGE_HD int a_k(int lane, int i) {
  return kOperand == kOperandTF32 ? lane % 4 + 4 * (i / 2) : 2 * (lane % 4) + 8 * (i / 2);
}

template <int kOperand>
PYMERGE_HD int b_k(int lane, int i) {
  return kOperand == kOperandTF32 ? lane % 4 + 4 * i : 2 * (lane % 4) + 8 * i;
}

// c += a b. The hardware adds exact products in fp32 and cuts (it does not round) what lies below: sums over a long K
// should leave the accumulator now and then for an ordinary fp32 addition. The emulation cuts likewise.
template <int kOperand>
__device__ __forceinline__ void mma(FragmentC& c, const FragmentA& a, const FragmentB& b) {
#ifdef __CUDACC__
#define PYMERGE_MMA(shape, type)                                            \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type      \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(c.at[0]), "+f"(c.at[1]), "+f"(c.at[2]), "+f"(c.at[3]) \
               : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]))
  if constexpr (kOperand == kOperandBF16) PYMERGE_MMA("m16n8k16", "bf16");
  if constexpr (kOperand == kOperandF16) PYMERGE_MMA("m16n8k16", "f16");
  if constexpr (kOperand == kOperandTF32) PYMERGE_MMA("m16n8k8", "tf32");
#undef PYMERGE_MMA
#else
  emu::mma<kOperand == kOperandBF16, kOperand == kOperandTF32>(c.at, a.at, b.at);
#endif
}

// ldmatrix: kMatrices (1, 2 or 4) matrices of 8 x 8 half-precision entries from shared memory. Lane 8 j + r passes the
// address of row r of matrix j (16 bytes, aligned; lanes from 8 kMatrices on: any valid address). out[j]: the entries
// (row group, columns 2 member and 2 member + 1) of matrix j; kTransposed: (rows 2 member and 2 member + 1, column
// group).
//   A stored [m, k]: kMatrices = 4, not transposed, lane l passes &a[m0 + l % 16][k0 + 8 * (l / 16)]
//   A stored [k, m]: kMatrices = 4, transposed, lane l passes &a[k0 + l % 8 + 8 * (l / 16)][m0 + 8 * (l / 8 % 2)]
//   B stored [n, k]: kMatrices = 2, not transposed, lane l passes &b[n0 + l % 8][k0 + 8 * (l / 8 % 2)]
//   B stored [k, n]: kMatrices = 2, transposed, lane l passes &b[k0 + l % 16][n0]
template <int kMatrices, bool kTransposed>
__device__ __forceinline__ void load_matrix(uint32_t* out, const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
#ifdef __CUDACC__
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kMatrices == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(from) : "memory");
  } else if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(from) : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }
#else
  emu::load_matrix<kMatrices, kTransposed>(out, row);
#endif
}

// cp.async: starts a copy of kBytes (4, 8 or 16; both places aligned to it) into shared memory; !valid stores zeros and
// reads nothing. Done for the calling thread after copy_async_wait, for the block after a barrier behind that.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  emu::copy_async(shared, global, kBytes, valid);
#endif
}

// Closes the group of copies that this thread has started since the last commit.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::copy_async_commit();
#endif
}

// Waits until at most kLeft of this thread's newest groups are under way.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emu::copy_async_wait(kLeft);
#endif
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) { return pair(to_bf16(low), to_bf16(high)); }
__device__ __forceinline__ uint32_t f16_pair(float low, float high) { return pair(to_f16(low), to_f16(high)); }

// 10 mantissa bits, nearest, ties away from zero; the low 13 bits are 0.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return is_bad(x) ? bits : (bits + 0x1000u) & 0xFFFFE000u;
}

// x = high + low + what two operands cannot hold: about 2^-17 |x| for bf16, 2^-22 |x| for tf32.
struct Split {
  float high, low;
};

__device__ __forceinline__ Split split_bf16(float x) {
  const float high = from_bf16(to_bf16(x));
  return {high, x - high};
}

__device__ __forceinline__ Split split_tf32(float x) {
  const float high = __uint_as_float(to_tf32(x));
  return {high, x - high};
}

}  // namespace pymerge::cuda
