// Functions that the host compiler and nvcc both compile: the CPU and the CUDA kernels share their arithmetic through
// these.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYMERGE_HD __host__ __device__ __forceinline__
#else
#define PYMERGE_HD inline __attribute__((always_inline))
#endif
