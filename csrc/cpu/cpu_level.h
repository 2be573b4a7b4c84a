// Which set of kernels runs: the best that the CPU has, or the one that PYMERGE_CPU names (baseline, avx2, avx512).
#pragma once

#include <string>

#include "kernels.h"

namespace pymerge {

struct CpuFeatures {
  bool sse42 = false, avx2 = false, f16c = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;
};

const CpuFeatures& cpu_features();
const std::string& cpu_level();  // throws std::runtime_error: PYMERGE_CPU names no level, or one that this CPU lacks
const Kernels& kernels();

}  // namespace pymerge
