#include "cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pymerge {
namespace {

#if defined(__x86_64__)
// Leaf 7 tells that the tiles exist; the kernel must also grant their state (arch_prctl ARCH_REQ_XCOMP_PERM,
// XTILEDATA).
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

CpuFeatures detect() {
  __builtin_cpu_init();
  CpuFeatures f;
  f.sse42 = __builtin_cpu_supports("sse4.2");
  unsigned a = 0, b = 0, c = 0, d = 0;
  f.f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  f.avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && f.f16c;
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512cd");
  f.avx512_bf16 = f.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  f.amx_bf16 = f.avx512 && has_amx_bf16();
  return f;
}
#else
CpuFeatures detect() { return {}; }
#endif

// "amx" has no element-wise loops of its own: it runs those of avx512.
std::string choose_level() {
  const CpuFeatures& f = cpu_features();
  const char* asked = std::getenv("PYMERGE_CPU");
  if (asked == nullptr || *asked == 0) return f.amx_bf16 ? "amx" : f.avx512 ? "avx512" : f.avx2 ? "avx2" : "baseline";
  const std::string level = asked;
  const bool known = level == "baseline" || level == "avx2" || level == "avx512" || level == "amx";
  const bool present = level == "baseline" || (level == "avx2" && f.avx2) || (level == "avx512" && f.avx512) ||
                       (level == "amx" && f.amx_bf16);
  if (!known) throw std::runtime_error("PYMERGE_CPU must be baseline, avx2, avx512 or amx, got '" + level + "'");
  if (!present) throw std::runtime_error("PYMERGE_CPU=" + level + ": this CPU does not have it; unset the variable");
  return level;
}

const Kernels& choose_kernels() {
#if defined(__x86_64__)
  if (cpu_level() == "avx512" || cpu_level() == "amx") return avx512::kernels();
  if (cpu_level() == "avx2") return avx2::kernels();
#endif
  return baseline::kernels();
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const std::string& cpu_level() {
  static const std::string level = choose_level();
  return level;
}

const Kernels& kernels() {
  static const Kernels& table = choose_kernels();
  return table;
}

}  // namespace pymerge
