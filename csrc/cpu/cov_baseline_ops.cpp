// Covariance tiles for any CPU that the compiler targets by default: vectors of 16 bytes, multiply then add.
#include "cov_kernels.h"

namespace pymerge::baseline {
namespace {

template <class Lanes>
Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
  return sum + a * b;
}

#include "cov_tile.inl"

using Float = Vectors<float, 16, 4, 2, 256>;
using Double = Vectors<double, 16, 4, 2, 256>;

}  // namespace

const CovKernels& cov_float() { return kernels_of<Float>(1, pack<Float>); }
const CovKernels& cov_double() { return kernels_of<Double>(1, pack<Double>); }

}  // namespace pymerge::baseline
