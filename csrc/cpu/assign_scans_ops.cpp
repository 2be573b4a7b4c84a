// The row scans of the assignment for every CPU level. Headers come before the pragmas, so that nothing shared is
// compiled for a level that the CPU may lack.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "assign.h"
#include "cpu_level.h"

#pragma GCC diagnostic ignored "-Wpsabi"          // wide vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics

#define PYMERGE_LEVEL baseline
#define PYMERGE_WIDE 2
#include "assign_scans.inl"
#undef PYMERGE_LEVEL
#undef PYMERGE_WIDE

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,bmi2,popcnt,lzcnt")
#define PYMERGE_LEVEL avx2
#define PYMERGE_WIDE 4
#include "assign_scans.inl"
#undef PYMERGE_LEVEL
#undef PYMERGE_WIDE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#define PYMERGE_LEVEL avx512
#define PYMERGE_WIDE 8
#include "assign_scans.inl"
#undef PYMERGE_LEVEL
#undef PYMERGE_WIDE
#pragma GCC pop_options
#endif

namespace pymerge {

const AssignScans& assign_scans() {
#if defined(__x86_64__)
  if (cpu_level() == "avx512" || cpu_level() == "amx") return avx512::assign_scans();
  if (cpu_level() == "avx2") return avx2::assign_scans();
#endif
  return baseline::assign_scans();
}

}  // namespace pymerge
