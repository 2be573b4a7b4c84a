// cov_accumulate on CPU tensors: which kernels run, the rows that count, packed runs of rows, triangular tiles.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "../check_cov.h"
#include "cov_kernels.h"
#include "cpu_level.h"

namespace pymerge {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kGroup = 6;  // panels of the right operand that stay in the second-level cache

struct Run {
  const CovKernels* kernels;
  std::vector<std::pair<int32_t, int32_t>> tiles;  // (i, j), i <= j
  Tensor packed;
  int64_t panels;
};

const CovKernels& choose_cov_kernels(Dtype dtype, bool wide) {
  const bool doubles = wide || dtype == Dtype::kF64;
#if defined(__x86_64__)
  const std::string& level = cpu_level();
  // float32 as two bfloat16 terms would be 1.3 to 1.7 times as fast there, and 30 times less accurate.
  if (level == "amx" && dtype == Dtype::kBF16 && !doubles) return amx::cov_pairs();
  if (level == "amx" || level == "avx512") {
    if (doubles) return avx512::cov_double();
    return dtype == Dtype::kBF16 && cpu_features().avx512_bf16 ? avx512::cov_pairs() : avx512::cov_float();
  }
  if (level == "avx2") return doubles ? avx2::cov_double() : avx2::cov_float();
#endif
  return doubles ? baseline::cov_double() : baseline::cov_float();
}

// Tiles in groups of kGroup columns of tiles: each left panel is used by the whole group when it comes.
std::vector<std::pair<int32_t, int32_t>> triangle(int64_t panels) {
  std::vector<std::pair<int32_t, int32_t>> tiles;
  tiles.reserve(static_cast<size_t>(panels * (panels + 1) / 2));
  for (int64_t group = 0; group < panels; group += kGroup) {
    const int64_t end = std::min(group + kGroup, panels);
    for (int64_t i = 0; i < end; ++i) {
      for (int64_t j = std::max(group, i); j < end; ++j) tiles.emplace_back(i, j);
    }
  }
  return tiles;
}

Run make_run(const CovKernels& kernels, int64_t columns, int64_t rows) {
  const int64_t panels = (columns + kernels.width - 1) / kernels.width;
  const int64_t bytes = kernels.copies * cov_depth(kernels, std::min(rows, kCovRows)) * kCovPanel * panels + 64;
  Tensor packed = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CPU));
  return {&kernels, triangle(panels), std::move(packed), panels};
}

// One matrix: rows kept [0, rows) in runs of kCovRows; each tile is one thread's, so threads do not change the bits.
void accumulate(const Run& run, const CovSource& source, int64_t rows, const CovTarget& target) {
  const CovKernels& kernels = *run.kernels;
  const auto address = reinterpret_cast<uintptr_t>(run.packed.mutable_data_ptr());
  char* packed = reinterpret_cast<char*>((address + 63) / 64 * 64);
  for (int64_t begin = 0; begin < rows; begin += kCovRows) {
    const int64_t count = std::min(kCovRows, rows - begin), depth = cov_depth(kernels, count);
    const int64_t bytes = kernels.copies * depth * kCovPanel;
    parallel_for(0, run.panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) kernels.pack(source, begin, count, p, packed + p * bytes);
    });
    parallel_for(0, static_cast<int64_t>(run.tiles.size()), kGroup, [&](int64_t first, int64_t last) {
      if (kernels.enter != nullptr) kernels.enter();
      for (int64_t t = first; t < last; ++t) {
        const auto [i, j] = run.tiles[static_cast<size_t>(t)];
        kernels.tile(packed + i * bytes, packed + j * bytes, i, j, depth, target);
      }
      if (kernels.leave != nullptr) kernels.leave();
    });
  }
}

// Rows of the matrix whose x^T x is taken, in order; `mask` null: all of them.
std::vector<int64_t> kept_rows(const bool* mask, int64_t rows) {
  std::vector<int64_t> kept;
  kept.reserve(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) {
    if (mask == nullptr || mask[i]) kept.push_back(i);
  }
  return kept;
}

void cov_accumulate(Tensor cov, Tensor x, double alpha, std::optional<Tensor> mask, bool small, std::string precision) {
  const CovShape shape = check_cov(cov, x, mask, small, precision);
  if (shape.batch == 0 || shape.size == 0 || shape.rows == 0 || shape.columns == 0) return;
  const Dtype dtype = check_dtype("cov_accumulate", "x", x.scalar_type());
  std::optional<Tensor> masks;
  if (mask) masks = torch::stable::contiguous(*mask);
  const int64_t reduced = small ? shape.columns : shape.rows, last = x.dim() - 1;
  const Run run = make_run(choose_cov_kernels(dtype, shape.wide), shape.size, reduced);
  const bool wide_totals = cov.scalar_type() == ScalarType::Double;
  const int64_t item = wide_totals ? 8 : 4;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const bool* kept = masks ? static_cast<const bool*>(masks->const_data_ptr()) + b * shape.rows : nullptr;
    const std::vector<int64_t> rows = kept_rows(small ? nullptr : kept, reduced);
    CovSource source;
    source.data = static_cast<const char*>(x.const_data_ptr()) + (last == 2 ? b * x.stride(0) : 0) * item_size(dtype);
    source.dtype = dtype;
    source.row_stride = x.stride(small ? last : last - 1);
    source.column_stride = x.stride(small ? last - 1 : last);
    source.columns = shape.size;
    source.kept = rows.data();
    source.column_kept = small ? kept : nullptr;
    const CovTarget target = {static_cast<char*>(cov.mutable_data_ptr()) + (last == 2 ? b * cov.stride(0) : 0) * item,
                              wide_totals, cov.stride(last - 1), shape.size, alpha};
    accumulate(run, source, static_cast<int64_t>(rows.size()), target);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CPU, m) { m.impl("cov_accumulate", TORCH_BOX(&cov_accumulate)); }

}  // namespace pymerge
