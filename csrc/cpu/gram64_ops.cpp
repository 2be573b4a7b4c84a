// gram64 on CPU tensors: x^T x in float64 from x as it is stored. Blocks of rows are widened into panels that stay in
// the caches; only the upper triangle is multiplied.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "../check.h"
#include "gram64.h"

namespace pymerge {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kGrainProducts = 1 << 18;  // multiply-adds worth a thread of their own
constexpr int64_t kMirror = 32;              // block that is transposed at a time

struct Free {
  void operator()(double* p) const { std::free(p); }
};

std::unique_ptr<double, Free> new_doubles(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(double) + 63) / 64 * 64;
  auto* memory = static_cast<double*>(std::aligned_alloc(64, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<double, Free>(memory);
}

void mirror(double* gram, int64_t width) {
  const int64_t blocks = (width + kMirror - 1) / kMirror;
  parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kMirror; row < std::min(width, end * kMirror); row += kMirror) {
      for (int64_t column = 0; column <= row; column += kMirror) {
        for (int64_t i = row; i < std::min(width, row + kMirror); ++i) {
          for (int64_t j = column; j < std::min(i, column + kMirror); ++j) gram[i * width + j] = gram[j * width + i];
        }
      }
    }
  });
}

// gram [width, width] is zero.
void gram_of(const GramKernels& kernels, const GramInput& x, double* gram) {
  const int64_t panels = (x.width + kernels.panel - 1) / kernels.panel, size = kGramDepth * kernels.panel;
  const auto packed = new_doubles(panels * size);
  const int64_t pairs = (panels + 1) / 2;  // a short column of tiles and a long one: equal work for every index
  for (int64_t begin = 0; begin < x.depth; begin += kGramDepth) {
    const int64_t depth = std::min(kGramDepth, x.depth - begin);
    parallel_for(0, panels, 1 + kGrainProducts / (4 * size), [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) kernels.pack(x, p, begin, depth, packed.get() + p * size);
    });
    const int64_t grain = 1 + kGrainProducts / (x.width * depth * kernels.panel);
    parallel_for(0, pairs, grain, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        kernels.add(packed.get(), depth, x.width, p, gram);
        if (panels - 1 - p != p) kernels.add(packed.get(), depth, x.width, panels - 1 - p, gram);
      }
    });
  }
  mirror(gram, x.width);
}

Tensor gram64(Tensor x) {
  check_matrices("gram64", "x", x);
  const Dtype dtype = check_dtype("gram64", "x", x.scalar_type());
  const int64_t dims = x.dim(), depth = x.size(dims - 2), width = x.size(dims - 1);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[static_cast<size_t>(dims) - 2] = width;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  Tensor gram = torch::stable::empty(sizes, ScalarType::Double, std::nullopt, cpu);
  torch::stable::zero_(gram);
  if (x.numel() == 0) return gram;
  const GramKernels& kernels = gram64_kernels();
  auto* out = static_cast<double*>(gram.mutable_data_ptr());
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  const int64_t batch = gram.numel() / (width * width);
  const auto one = [&](int64_t index) {
    int64_t offset = 0, rest = index;
    for (int64_t d = dims - 3; d >= 0; rest /= x.size(d--)) offset += rest % x.size(d) * x.stride(d);
    const GramInput input = {
        data + offset * item_size(dtype), dtype, depth, width, x.stride(dims - 2), x.stride(dims - 1)};
    gram_of(kernels, input, out + index * width * width);
  };
  const bool whole = batch < 4 || width > 512;  // the threads share each matrix, or each takes matrices of its own
  parallel_for(0, batch, whole ? batch : 1 + kGrainProducts / (depth * width * width), [&](int64_t from, int64_t to) {
    for (int64_t index = from; index < to; ++index) one(index);
  });
  return gram;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CPU, m) { m.impl("gram64", TORCH_BOX(&gram64)); }

}  // namespace pymerge
