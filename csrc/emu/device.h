// The device language for g++: keywords, launches, vector types, barriers, warp collectives, atomics, bit functions.
// Only tests compile this; emulator.h says what is checked.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __restrict__
#define __constant__ static const
#define __grid_constant__
#define __launch_bounds__(...)
#define COLD
#define LAUNCH(kernel, grid, block, shmem, stream, ...) \
  pymerge::emu::launch(#kernel, (grid), (block), (shmem), (stream), [&] { (kernel)(__VA_ARGS__); })
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(pymerge::emu::dynamic_shared())

#define PYMERGE_VECTOR_TYPES(name, type)                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(16) name##4 { type x, y, z, w; };                 \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
PYMERGE_VECTOR_TYPES(float, float)
PYMERGE_VECTOR_TYPES(int, int)
PYMERGE_VECTOR_TYPES(uint, unsigned)
#undef PYMERGE_VECTOR_TYPES
struct alignas(16) double2 {
  double x, y;
};

using std::max;
using std::min;

#define PYMERGE_PLACE pymerge::emu::Place place = pymerge::emu::Place::current()

inline void __syncthreads(PYMERGE_PLACE) { pymerge::emu::wait_at_barrier(false, place); }
inline int __syncthreads_count(int predicate, PYMERGE_PLACE) {
  return pymerge::emu::wait_at_barrier(predicate != 0, place);
}
inline int __syncthreads_or(int predicate, PYMERGE_PLACE) {
  return pymerge::emu::wait_at_barrier(predicate != 0, place) > 0;
}
inline int __syncthreads_and(int predicate, PYMERGE_PLACE) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  return pymerge::emu::wait_at_barrier(predicate != 0, place) == static_cast<int>(threads);
}

inline void __syncwarp(unsigned mask = pymerge::emu::kAllLanes, PYMERGE_PLACE) {
  const pymerge::emu::Collected<int> all(mask, 0, place, true);
}

// `lane` counts within groups of `width` lanes; outside of them a lane gets its own value.
template <typename T>
T emu_shuffle(unsigned mask, T x, int lane, int width, const pymerge::emu::Place& place) {
  const pymerge::emu::Collected<T> all(mask, x, place);
  return lane < 0 || lane >= width ? x : all.from(pymerge::emu::lane_id() / width * width + lane);
}
template <typename T>
T __shfl_sync(unsigned mask, T x, int lane, int width = 32, PYMERGE_PLACE) {
  return emu_shuffle(mask, x, lane & (width - 1), width, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned step, int width = 32, PYMERGE_PLACE) {
  return emu_shuffle(mask, x, pymerge::emu::lane_id() % width + static_cast<int>(step), width, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned step, int width = 32, PYMERGE_PLACE) {
  return emu_shuffle(mask, x, pymerge::emu::lane_id() % width - static_cast<int>(step), width, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, PYMERGE_PLACE) {
  return emu_shuffle(mask, x, (pymerge::emu::lane_id() % width) ^ bits, width, place);
}

// Folds what the lanes of the mask offer, in the order of the lanes.
template <typename T, typename Fold>
T emu_fold(unsigned mask, T mine, T start, const pymerge::emu::Place& place, Fold fold) {
  const pymerge::emu::Collected<T> all(mask, mine, place);
  for (unsigned lane = 0; lane < pymerge::emu::kLanes; ++lane) {
    if (mask >> lane & 1u) start = fold(start, all.from(static_cast<int>(lane)));
  }
  return start;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, PYMERGE_PLACE) {
  const unsigned mine = predicate != 0 ? 1u << pymerge::emu::lane_id() : 0u;
  return emu_fold(mask, mine, 0u, place, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, PYMERGE_PLACE) {
  return emu_fold(mask, int{predicate != 0}, 0, place, [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, PYMERGE_PLACE) {
  return emu_fold(mask, int{predicate != 0}, 1, place, [](int a, int b) { return a & b; });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T x, PYMERGE_PLACE) {
  return emu_fold(mask, x, T{0}, place, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T x, PYMERGE_PLACE) {
  return emu_fold(mask, x, x, place, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T x, PYMERGE_PLACE) {
  return emu_fold(mask, x, x, place, [](T a, T b) { return a < b ? b : a; });
}

// Threads give way at no other place than barriers and collectives, so plain code is atomic.
template <typename T, typename Change>
__attribute__((no_sanitize("thread"))) T emu_atomic(T* p, Change change) {
  pymerge::emu::note_atomic(p, sizeof(T));
  const T old = *p;
  *p = change(old);
  return old;
}
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  return emu_atomic(p, [x](T old) { return static_cast<T>(old + x); });
}
template <typename T>
T atomicMin(T* p, std::type_identity_t<T> x) {
  return emu_atomic(p, [x](T old) { return x < old ? x : old; });
}
template <typename T>
T atomicMax(T* p, std::type_identity_t<T> x) {
  return emu_atomic(p, [x](T old) { return old < x ? x : old; });
}
template <typename T>
T atomicOr(T* p, std::type_identity_t<T> x) {
  return emu_atomic(p, [x](T old) { return old | x; });
}
template <typename T>
T atomicExch(T* p, std::type_identity_t<T> x) {
  return emu_atomic(p, [x](T) { return x; });
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return emu_atomic(p, [expected, x](T old) { return old == expected ? x : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
