// Any CPU that the compiler targets by default.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define PYMERGE_LEVEL baseline
#define PYMERGE_F16C 0
#define PYMERGE_AVX512 0
#include "kernels.inl"
