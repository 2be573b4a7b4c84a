// The loops of gram64 for every CPU level, and the choice among them. Every header comes before the pragmas, so that
// nothing shared is compiled for a level.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_level.h"
#include "gram64.h"

namespace pymerge::baseline {
constexpr int kLanes = 2, kVectors = 2, kRows = 4;
}
#define PYMERGE_LEVEL baseline
#include "gram64.inl"
#undef PYMERGE_LEVEL

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
namespace pymerge::avx2 {
constexpr int kLanes = 4, kVectors = 3, kRows = 4;
}
#define PYMERGE_LEVEL avx2
#include "gram64.inl"
#undef PYMERGE_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace pymerge::avx512 {
constexpr int kLanes = 8, kVectors = 3, kRows = 8;
}
#define PYMERGE_LEVEL avx512
#include "gram64.inl"
#undef PYMERGE_LEVEL
#pragma GCC pop_options
#endif

namespace pymerge {

const GramKernels& gram64_kernels() {
#if defined(__x86_64__)
  if (cpu_level() == "avx512" || cpu_level() == "amx") return avx512::gram64;
  if (cpu_level() == "avx2" && __builtin_cpu_supports("fma")) return avx2::gram64;
#endif
  return baseline::gram64;
}

}  // namespace pymerge
