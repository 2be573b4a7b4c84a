// The same loops for AVX2. Every header comes before the pragma, so that nothing shared is compiled for this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#pragma GCC target("avx2,f16c,bmi,bmi2,popcnt,lzcnt")
#define PYMERGE_LEVEL avx2
#define PYMERGE_F16C 1
#define PYMERGE_AVX512 0
#include "kernels.inl"
#endif
