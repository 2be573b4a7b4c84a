// Tensor-core products of one warp, sums += a * b, in the documented lane layouts of mma.sync, and ldmatrix with
// transposition. g = lane / 4, t = lane % 4. For the emulator: the same in plain C++, over what the lanes offer.
#pragma once

#include "common.cuh"

namespace pymerge::cuda {

#ifndef __CUDACC__
// Calls `use` with the values that all lanes pass; every lane of the warp calls it.
template <typename T, typename Use>
inline void with_warp(const T& mine, Use use) {
  const emu::Collected<const T*> all(emu::kAllLanes, &mine, emu::Place::current());
  const T* lanes[kWarp];
  for (int i = 0; i < kWarp; ++i) lanes[i] = all.from(i);
  use(lanes);
  __syncwarp();  // `mine` lives until all have looked
}

// tf32 as the tensor cores read it: the low 13 bits do not count.
inline float tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xFFFFE000u); }
#endif

// Four 8 x 8 matrices of 16-bit entries; lane 8 m + r gives the address of row r of matrix m (16 bytes, aligned).
// out[m] holds entries [2 t][g] (low half) and [2 t + 1][g] of matrix m.
__device__ __forceinline__ void load_transposed(const uint16_t* row, uint32_t (&out)[4]) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
#else
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  with_warp(row, [&](const uint16_t* const* const* lanes) {
    for (int m = 0; m < 4; ++m) {
      out[m] = uint32_t{(*lanes[8 * m + 2 * t])[g]} | uint32_t{(*lanes[8 * m + 2 * t + 1])[g]} << 16;
    }
  });
#endif
}

// a: rows g (a[0], a[2]) and g + 8 (a[1], a[3]), columns 2 t, 2 t + 1 (+ 8 for a[2], a[3]); b: rows 2 t, 2 t + 1 (+ 8
// for b[1]), column g; sums: rows g, g + 8 (sums[2], sums[3]), columns 2 t, 2 t + 1.
template <bool bf16>
__device__ __forceinline__ void multiply_add16(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sums)[4]) {
#ifdef __CUDACC__
  if (bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  struct Fragments {
    const uint32_t *a, *b;
  };
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const auto half = [](uint32_t pair, int odd) {
    const uint16_t bits = static_cast<uint16_t>(odd ? pair >> 16 : pair & 0xFFFFu);
    return bf16 ? from_bf16(bits) : from_f16(bits);
  };
  with_warp(Fragments{a, b}, [&](const Fragments* const* lanes) {
    for (int s = 0; s < 4; ++s) {
      for (int k = 0; k < 16; ++k) {
        const Fragments &left = *lanes[g * 4 + k % 8 / 2], &right = *lanes[(2 * t + s % 2) * 4 + k % 8 / 2];
        sums[s] += half(left.a[s / 2 + 2 * (k / 8)], k % 2) * half(right.b[k / 8], k % 2);
      }
    }
  });
#endif
}

// The same for 8 rows of b in tf32. a: columns t (a[0], a[1]) and t + 4; b: rows t and t + 4, column g.
__device__ __forceinline__ void multiply_add_tf32(const float (&a)[4], const float (&b)[2], float (&sums)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b[0])),
        "r"(bits_of(b[1])));
#else
  struct Fragments {
    const float *a, *b;
  };
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  with_warp(Fragments{a, b}, [&](const Fragments* const* lanes) {
    for (int s = 0; s < 4; ++s) {
      for (int k = 0; k < 8; ++k) {
        const Fragments &left = *lanes[g * 4 + k % 4], &right = *lanes[(2 * t + s % 2) * 4 + k % 4];
        sums[s] += tf32(left.a[s / 2 + 2 * (k / 4)]) * tf32(right.b[k / 4]);
      }
    }
  });
#endif
}

// 8 x 4 times 4 x 8 in float64. a: row g, column t; b: row t, column g; sums: row g, columns 2 t, 2 t + 1.
__device__ __forceinline__ void multiply_add_f64(double a, double b, double (&sums)[2]) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sums[0]), "+d"(sums[1])
               : "d"(a), "d"(b));
#else
  struct Fragments {
    double a, b;
  };
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  with_warp(Fragments{a, b}, [&](const Fragments* const* lanes) {
    for (int s = 0; s < 2; ++s) {
      for (int k = 0; k < 4; ++k) sums[s] += lanes[g * 4 + k]->a * lanes[(2 * t + s) * 4 + k]->b;
    }
  });
#endif
}

}  // namespace pymerge::cuda
