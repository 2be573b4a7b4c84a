// The same loops for AVX512. Every header comes before the pragma, so that nothing shared is compiled for this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#define PYMERGE_LEVEL avx512
#define PYMERGE_F16C 1
#define PYMERGE_AVX512 1
#include "kernels.inl"
#endif
