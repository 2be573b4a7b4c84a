// Covariance tiles for AVX512, with bfloat16 pairs (vdpbf16ps) where the CPU has them. Every header comes before the
// pragma, so that nothing shared is compiled for this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cov_kernels.h"

#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx512bf16,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")

namespace pymerge::avx512 {
namespace {

inline __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
inline __m512d multiply_add(__m512d a, __m512d b, __m512d sum) { return _mm512_fmadd_pd(a, b, sum); }

#include "cov_tile.inl"
#include "cov_pairs.inl"

using Float = Vectors<float, 64, 8, 3, 128>;
using Double = Vectors<double, 64, 8, 3, 128>;

// Each lane: sum + low half * low half + high half * high half; the products are exact in float32.
struct Pairs : Float {
  using Item = uint32_t;
  static Lanes spread(uint32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x))); }
  static Lanes load(const uint32_t* p) { return _mm512_loadu_ps(p); }
  static Lanes add_product(Lanes a, Lanes b, Lanes sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

const CovKernels& cov_float() { return kernels_of<Float>(1, pack<Float>); }
const CovKernels& cov_double() { return kernels_of<Double>(1, pack<Double>); }
const CovKernels& cov_pairs() { return kernels_of<Pairs>(2, pack_pairs); }

}  // namespace pymerge::avx512
#endif
