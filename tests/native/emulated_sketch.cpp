// The sketch kernels of csrc/cuda run by the emulator of csrc/emu, for ctypes.
#include "../../csrc/cuda/sketch.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

extern "C" {

void sparse_float(const void* a, int32_t dtype, float* y, int64_t rows, int64_t columns, int64_t width, uint64_t seed) {
  launch_sparse_sketch(SketchArgs<float>{{a, static_cast<Dtype>(dtype)}, y, rows, columns, width, seed}, nullptr);
}

void sparse_double(const void* a, double* y, int64_t rows, int64_t columns, int64_t width, uint64_t seed) {
  launch_sparse_sketch(SketchArgs<double>{{a, Dtype::kF64}, y, rows, columns, width, seed}, nullptr);
}

void gaussian(float* omega, int64_t rows, int64_t width, uint64_t seed) {
  launch_gaussian({omega, rows, width, seed}, 1, nullptr);
}
}
