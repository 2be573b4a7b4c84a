// Covariance tiles for AMX. Every header comes before the pragma, so that nothing shared is compiled for this level.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cov_kernels.h"

#pragma GCC target( \
    "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")

namespace pymerge::amx {
namespace {

#include "cov_tile.inl"
#include "cov_pairs.inl"
#include "cov_amx.inl"

}  // namespace

const CovKernels& cov_pairs() { return kTilePairs; }

}  // namespace pymerge::amx
#endif
