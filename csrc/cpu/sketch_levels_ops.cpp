// The loops of sketch for every CPU level, and the choice among them. Every header comes before the pragmas, so that
// nothing shared is compiled for a level.
#include "cpu_level.h"
#include "sketch.h"

namespace pymerge::sketching {
namespace {

typedef float Floats __attribute__((vector_size(64), may_alias));
typedef double Doubles __attribute__((vector_size(64), may_alias));

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Half x) { return f16_to_float(x.bits); }
inline float widen(Brain x) { return bf16_to_float(x.bits); }

namespace baseline {
#include "sketch.inl"
}
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,bmi2,popcnt,lzcnt")
namespace avx2 {
#include "sketch.inl"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace avx512 {
#include "sketch.inl"
}
#pragma GCC pop_options
#endif

}  // namespace

template <typename Stored, typename T>
void sparse_rows(const Source& source, const Stored* a, int64_t count, const Picks& picks, T* panel, T* block, T* y) {
#if defined(__x86_64__)
  static const bool wide = cpu_level() == "avx512" || cpu_level() == "amx", middle = cpu_level() == "avx2";
  if (wide) return avx512::sparse_rows(source, a, count, picks, panel, block, y);
  if (middle) return avx2::sparse_rows(source, a, count, picks, panel, block, y);
#endif
  baseline::sparse_rows(source, a, count, picks, panel, block, y);
}

void gaussian_rows(uint64_t seed, int64_t begin, int64_t end, int64_t width, float* omega) {
#if defined(__x86_64__)
  static const bool wide = cpu_level() == "avx512" || cpu_level() == "amx", middle = cpu_level() == "avx2";
  if (wide) return avx512::gaussian_rows(seed, begin, end, width, omega);
  if (middle) return avx2::gaussian_rows(seed, begin, end, width, omega);
#endif
  baseline::gaussian_rows(seed, begin, end, width, omega);
}

#define PYMERGE_SPARSE_ROWS(Stored, T) \
  template void sparse_rows(const Source&, const Stored*, int64_t, const Picks&, T*, T*, T*)
PYMERGE_SPARSE_ROWS(Brain, float);
PYMERGE_SPARSE_ROWS(Half, float);
PYMERGE_SPARSE_ROWS(float, float);
PYMERGE_SPARSE_ROWS(double, double);
#undef PYMERGE_SPARSE_ROWS

}  // namespace pymerge::sketching
