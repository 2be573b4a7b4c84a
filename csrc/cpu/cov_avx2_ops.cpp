// Covariance tiles for AVX2. Every header comes before the pragma, so that nothing shared is compiled for this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cov_kernels.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

namespace pymerge::avx2 {
namespace {

#include "cov_tile.inl"

struct Float {
  using Item = float;
  using Sum = float;
  using Lanes = __m256;
  static constexpr int kLanes = 8, kRows = 6, kVectors = 2, kSegment = 256;
  static Lanes zero() { return _mm256_setzero_ps(); }
  static Lanes spread(float x) { return _mm256_set1_ps(x); }
  static Lanes load(const float* p) { return _mm256_loadu_ps(p); }
  static Lanes load_sums(const float* p) { return _mm256_loadu_ps(p); }
  static Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
  static void store(float* p, Lanes x) { _mm256_storeu_ps(p, x); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_ps(a, b, sum); }
};

struct Double {
  using Item = double;
  using Sum = double;
  using Lanes = __m256d;
  static constexpr int kLanes = 4, kRows = 6, kVectors = 2, kSegment = 256;
  static Lanes zero() { return _mm256_setzero_pd(); }
  static Lanes spread(double x) { return _mm256_set1_pd(x); }
  static Lanes load(const double* p) { return _mm256_loadu_pd(p); }
  static Lanes load_sums(const double* p) { return _mm256_loadu_pd(p); }
  static Lanes add(Lanes a, Lanes b) { return _mm256_add_pd(a, b); }
  static void store(double* p, Lanes x) { _mm256_storeu_pd(p, x); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_pd(a, b, sum); }
};

}  // namespace

const CovKernels& cov_float() { return kernels_of<Float>(1, pack<Float>); }
const CovKernels& cov_double() { return kernels_of<Double>(1, pack<Double>); }

}  // namespace pymerge::avx2
#endif
