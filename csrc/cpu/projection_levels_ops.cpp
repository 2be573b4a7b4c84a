// The projection kernels of every CPU level, and the choice among them. Every header comes before the first pragma, so
// that nothing shared is compiled for a level.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_level.h"
#include "projection.h"

#pragma GCC diagnostic ignored "-Wpsabi"            // wide vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wunused-function"  // convert.inl: stores, which projections leave to others

namespace pymerge {
namespace {

namespace baseline {

typedef float Lanes __attribute__((vector_size(16), may_alias));
constexpr int kLanes = 4, kTileRows = 4, kTileLanes = 2;
inline Lanes spread(float x) { return Lanes{x, x, x, x}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }

#define PYMERGE_F16C 0
#define PYMERGE_AVX512 0
#include "projection.inl"
#undef PYMERGE_F16C
#undef PYMERGE_AVX512

}  // namespace baseline

#if defined(__x86_64__)
#define PYMERGE_F16C 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
namespace avx2 {

typedef __m256 Lanes;
constexpr int kLanes = 8, kTileRows = 4, kTileLanes = 3;
inline Lanes spread(float x) { return _mm256_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }

#define PYMERGE_AVX512 0
#include "projection.inl"
#undef PYMERGE_AVX512

}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace avx512 {

typedef __m512 Lanes;
constexpr int kLanes = 16, kTileRows = 8, kTileLanes = 2;
inline Lanes spread(float x) { return _mm512_set1_ps(x); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }

#define PYMERGE_AVX512 1
#include "projection.inl"
#undef PYMERGE_AVX512

}  // namespace avx512
#pragma GCC pop_options
#endif

ProjectionKernels choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fused = __builtin_cpu_supports("fma");
  if (cpu_level() == "avx512" || cpu_level() == "amx") return {avx512::project_strip, avx512::row_sums};
  if (cpu_level() == "avx2" && fused) return {avx2::project_strip, avx2::row_sums};
#endif
  return {baseline::project_strip, baseline::row_sums};
}

}  // namespace

const ProjectionKernels& projection_kernels() {
  static const ProjectionKernels table = choose();
  return table;
}

}  // namespace pymerge
