// Covariance tiles for any CPU that the compiler targets by default: vectors of 16 bytes, multiply then add.
#include "cov_kernels.h"

namespace pymerge::baseline {
namespace {

#include "cov_tile.inl"

template <class T>
struct Plain {
  using Item = T;
  using Sum = T;
  typedef T Lanes __attribute__((vector_size(16)));
  typedef T LanesAt __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = 16 / sizeof(T), kRows = 4, kVectors = 2, kSegment = 256;
  static Lanes zero() { return Lanes{}; }
  static Lanes spread(T x) { return Lanes{} + x; }
  static Lanes load(const T* p) { return *reinterpret_cast<const LanesAt*>(p); }
  static Lanes load_sums(const T* p) { return load(p); }
  static Lanes add(Lanes a, Lanes b) { return a + b; }
  static void store(T* p, Lanes x) { *reinterpret_cast<LanesAt*>(p) = x; }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return sum + a * b; }
};

}  // namespace

const CovKernels& cov_float() { return kernels_of<Plain<float>>(1, pack<Plain<float>>); }
const CovKernels& cov_double() { return kernels_of<Plain<double>>(1, pack<Plain<double>>); }

}  // namespace pymerge::baseline
