// sketch on CPU tensors. Rows of A are shared out between threads; each is worked on alone, in a fixed order, so that
// neither the batch nor the number of threads shows in the bits of a sparse sketch.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../check.h"
#include "sketch.h"

namespace pymerge {
namespace {

using namespace sketching;
using torch::stable::parallel_for;

constexpr int64_t kRowGrain = 256;

Tensor new_tensor(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Scratch on whole cache lines: a vector that lies across two of them costs several times as much.
class Lines {
 public:
  explicit Lines(size_t bytes) : memory_(bytes + 64) {}
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<unsigned char> memory_;
};

std::vector<uint32_t> sparse_picks(uint64_t seed, int64_t rows, int64_t width) {
  const int segments = sketch_segments(width);
  std::vector<uint32_t> picks(static_cast<size_t>(rows * segments));
  parallel_for(0, rows, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Philox4 draws = sparse_draws(seed, row);
      for (int s = 0; s < segments; ++s) {
        const SparseEntry entry = sparse_entry(draws, s, segments, width);
        picks[static_cast<size_t>(row * segments + s)] = static_cast<uint32_t>(entry.column) << 1 | entry.negative;
      }
    }
  });
  return picks;
}

// Entries before each matrix of the batch, whatever the strides.
std::vector<int64_t> batch_offsets(const Tensor& a) {
  std::vector<int64_t> offsets{0};
  for (int64_t d = 0; d < a.dim() - 2; ++d) {
    std::vector<int64_t> next;
    for (const int64_t offset : offsets) {
      for (int64_t i = 0; i < a.size(d); ++i) next.push_back(offset + i * a.stride(d));
    }
    offsets = std::move(next);
  }
  return offsets;
}

template <typename Stored, typename T>
void sparse_sketch(const Tensor& a, int64_t width, uint64_t seed, T* y) {
  const int64_t m = a.size(a.dim() - 2), n = a.size(a.dim() - 1), tiles = (m + kLanes - 1) / kLanes;
  const std::vector<int64_t> offsets = batch_offsets(a);
  const std::vector<uint32_t> entries = sparse_picks(seed, n, width);
  const int segments = sketch_segments(width);
  const Picks picks{entries.data(), segments, width, 1.0 / std::sqrt(static_cast<double>(segments))};
  const Source source{n, a.stride(a.dim() - 2), a.stride(a.dim() - 1)};
  const auto* data = static_cast<const Stored*>(a.const_data_ptr());
  parallel_for(0, static_cast<int64_t>(offsets.size()) * tiles, kRowGrain / kLanes, [&](int64_t begin, int64_t end) {
    Lines panel(static_cast<size_t>(width) * kLanes * sizeof(T)), block(kColumns * 2 * kLanes * sizeof(T));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i / tiles, row = i % tiles * kLanes, count = std::min<int64_t>(kLanes, m - row);
      sparse_rows(source, data + offsets[static_cast<size_t>(item)] + row * source.row_stride, count, picks,
                  panel.as<T>(), block.as<T>(), y + (item * m + row) * width);
    }
  });
}

Tensor gaussian_sketch(const Tensor& a, int64_t width, uint64_t seed, ScalarType dtype) {
  const int64_t n = a.size(a.dim() - 1);
  Tensor omega = new_tensor({n, width}, ScalarType::Float);
  auto* to = static_cast<float*>(omega.mutable_data_ptr());
  parallel_for(0, n, std::max<int64_t>(1, 65536 / width),
               [&](int64_t begin, int64_t end) { gaussian_rows(seed, begin, end, width, to); });
  return torch::stable::matmul(torch::stable::to(a, dtype), torch::stable::to(omega, dtype));
}

Tensor sketch(Tensor a, int64_t width, std::string kind, int64_t seed) {
  const SketchCall call = check_sketch(a, width, kind);
  const uint64_t key = static_cast<uint64_t>(seed);
  if (call.gaussian && a.numel() > 0) return gaussian_sketch(a, width, key, call.out_dtype);
  std::vector<int64_t> sizes{a.sizes().begin(), a.sizes().end()};
  sizes.back() = width;
  Tensor y = new_tensor(sizes, call.out_dtype);
  if (a.numel() == 0) {
    torch::stable::zero_(y);
    return y;
  }
  void* to = y.mutable_data_ptr();
  switch (call.dtype) {
    case Dtype::kBF16:
      sparse_sketch<Brain>(a, width, key, static_cast<float*>(to));
      break;
    case Dtype::kF16:
      sparse_sketch<Half>(a, width, key, static_cast<float*>(to));
      break;
    case Dtype::kF32:
      sparse_sketch<float>(a, width, key, static_cast<float*>(to));
      break;
    default:
      sparse_sketch<double>(a, width, key, static_cast<double*>(to));
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CPU, m) { m.impl("sketch", TORCH_BOX(&sketch)); }

}  // namespace pymerge
