// Functions that the host compiler and nvcc both compile: the CPU and the CUDA kernels share their arithmetic through
// these.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define PYMERGE_HD __host__ __device__ __forceinline__
#else
#define PYMERGE_HD inline __attribute__((always_inline))
#endif
