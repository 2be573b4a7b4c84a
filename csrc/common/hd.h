// What lets one header serve g++ and nvcc.
#pragma once

#ifdef __CUDACC__
#define PYMERGE_HD __host__ __device__ __forceinline__
#else
#define PYMERGE_HD inline
#endif
