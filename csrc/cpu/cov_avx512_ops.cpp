// Covariance tiles for AVX512, with bfloat16 pairs (vdpbf16ps) where the CPU has them. Every header comes before the
// pragma, so that nothing shared is compiled for this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cov_kernels.h"

#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx512bf16,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")

namespace pymerge::avx512 {
namespace {

#include "cov_tile.inl"
#include "cov_pairs.inl"

struct Float {
  using Item = float;
  using Sum = float;
  using Lanes = __m512;
  static constexpr int kLanes = 16, kRows = 8, kVectors = 3, kSegment = 128;
  static Lanes zero() { return _mm512_setzero_ps(); }
  static Lanes spread(float x) { return _mm512_set1_ps(x); }
  static Lanes load(const float* p) { return _mm512_loadu_ps(p); }
  static Lanes load_sums(const float* p) { return _mm512_loadu_ps(p); }
  static Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
  static void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm512_fmadd_ps(a, b, sum); }
};

struct Double {
  using Item = double;
  using Sum = double;
  using Lanes = __m512d;
  static constexpr int kLanes = 8, kRows = 8, kVectors = 3, kSegment = 128;
  static Lanes zero() { return _mm512_setzero_pd(); }
  static Lanes spread(double x) { return _mm512_set1_pd(x); }
  static Lanes load(const double* p) { return _mm512_loadu_pd(p); }
  static Lanes load_sums(const double* p) { return _mm512_loadu_pd(p); }
  static Lanes add(Lanes a, Lanes b) { return _mm512_add_pd(a, b); }
  static void store(double* p, Lanes x) { _mm512_storeu_pd(p, x); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm512_fmadd_pd(a, b, sum); }
};

// Each lane: sum + low half * low half + high half * high half; the products are exact in float32.
struct Pairs {
  using Item = uint32_t;
  using Sum = float;
  using Lanes = __m512;
  static constexpr int kLanes = 16, kRows = 8, kVectors = 3, kSegment = 128;
  static Lanes zero() { return _mm512_setzero_ps(); }
  static Lanes spread(uint32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x))); }
  static Lanes load(const uint32_t* p) { return _mm512_loadu_ps(p); }
  static Lanes load_sums(const float* p) { return _mm512_loadu_ps(p); }
  static Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
  static void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

const CovKernels& cov_float() { return kernels_of<Float>(1, pack<Float>); }
const CovKernels& cov_double() { return kernels_of<Double>(1, pack<Double>); }
const CovKernels& cov_pairs() { return kernels_of<Pairs>(2, pack_pairs); }

}  // namespace pymerge::avx512
#endif
