// Covariance tiles for AVX2. Every header comes before the pragma, so that nothing shared is compiled for this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cov_kernels.h"

#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

namespace pymerge::avx2 {
namespace {

inline __m256 multiply_add(__m256 a, __m256 b, __m256 sum) { return _mm256_fmadd_ps(a, b, sum); }
inline __m256d multiply_add(__m256d a, __m256d b, __m256d sum) { return _mm256_fmadd_pd(a, b, sum); }

#include "cov_tile.inl"

using Float = Vectors<float, 32, 6, 2, 256>;
using Double = Vectors<double, 32, 6, 2, 256>;

}  // namespace

const CovKernels& cov_float() { return kernels_of<Float>(1, pack<Float>); }
const CovKernels& cov_double() { return kernels_of<Double>(1, pack<Double>); }

}  // namespace pymerge::avx2
#endif
