// project_delta and projection_stats on CPU tensors. A job is one task and some strips of columns: it converts W,
// subtracts and multiplies slab by slab into scratch of its thread; neither a delta nor, for the statistics, the
// product is stored.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "../check.h"
#include "delta.h"
#include "projection.h"

namespace pymerge {
namespace {

using OptTensor = std::optional<Tensor>;
using torch::stable::parallel_for;

constexpr int64_t kJobWork = 1 << 22;  // multiply-adds worth a thread of their own
constexpr int64_t kGroups = 16;  // of strips, each summed by one job: partial sums stay small and in a fixed order

Tensor new_tensor(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

bool has_rows(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1; }
bool has_columns(const Tensor& x) { return x.size(0) <= 1 || x.stride(0) == 1; }

// Matrices of one call. All have rows of consecutive entries, or all have columns of them; what fits neither is copied.
class Call {
 public:
  Call(const char* op, const Tensor& basis, const OptTensor& base, const std::vector<Tensor>& tuned,
       const std::string& precision)
      : sizes(check_projection(op, basis, base, tuned, precision)) {
    const bool all_columns =
        std::all_of(tuned.begin(), tuned.end(), has_columns) && (!base || has_columns(*base)) && !has_rows(tuned[0]);
    const Matrix subtracted = base ? matrix(*base, all_columns) : Matrix{};
    for (int64_t t = 0; t < sizes.tasks; ++t) {
      const Tensor q = basis.dim() == 3 ? torch::stable::select(basis, 0, t) : basis;
      const bool by_column = !has_rows(q) && has_columns(q);
      const Matrix changed = matrix(tuned[static_cast<size_t>(t)], all_columns);
      tasks_.push_back({matrix(q, by_column), subtracted, changed, sizes.m, sizes.n, sizes.r});
    }
  }
  Call(const Call&) = delete;

  bool empty() const { return sizes.m * sizes.n * sizes.r == 0; }
  int64_t strips() const { return (sizes.n + kStripColumns - 1) / kStripColumns; }
  int64_t width(int64_t strip) const { return std::min(kStripColumns, sizes.n - strip * kStripColumns); }
  // Chunks of directions, as equal as whole register tiles allow.
  int64_t chunks() const { return (sizes.r + kDirections - 1) / kDirections; }
  int64_t chunk_begin(int64_t chunk) const {
    const int64_t each = ((sizes.r + chunks() - 1) / chunks() + 7) / 8 * 8;
    return std::min(sizes.r, chunk * each);
  }
  int64_t grain() const {
    const int64_t work = sizes.m * std::min(sizes.r, kDirections) * std::min(sizes.n, kStripColumns);
    return std::max<int64_t>(1, kJobWork / std::max<int64_t>(1, work));
  }

  // Q_t^T D_t of a chunk and a strip, [directions, kStripStride], in memory of this thread that the next call reuses.
  const float* project(int64_t task, int64_t chunk, int64_t strip) const {
    float* scratch = thread_scratch(kStripScratch + kStripSize);
    float* out = scratch + kStripScratch;
    Projection p = tasks_[static_cast<size_t>(task)];
    const Buffer q = Buffer{p.basis.data, p.basis.dtype}.at(chunk_begin(chunk) * p.basis.column_stride);
    p.basis.data = q.data;
    p.r = chunk_begin(chunk + 1) - chunk_begin(chunk);
    projection_kernels().strip(p, strip * kStripColumns, width(strip), scratch, out);
    return out;
  }

  Matrix matrix(const Tensor& x, bool by_column) {
    held_.push_back((by_column ? has_columns(x) : has_rows(x)) ? x : torch::stable::contiguous(x));
    const Tensor& kept = held_.back();
    const Dtype dtype = check_dtype("projection", "dtype", kept.scalar_type());
    if (by_column) return {kept.const_data_ptr(), dtype, 1, kept.stride(1)};
    return {kept.const_data_ptr(), dtype, kept.stride(0), 1};
  }

  const ProjectionSizes sizes;

 private:
  std::vector<Projection> tasks_;
  std::vector<Tensor> held_;
};

Tensor project_delta(Tensor basis, OptTensor base, std::vector<Tensor> tuned, std::string precision) {
  const Call call("project_delta", basis, base, tuned, precision);
  const auto [tasks, m, n, r] = call.sizes;
  Tensor out = new_tensor({tasks, r, n}, ScalarType::Float);
  if (call.empty()) {
    torch::stable::zero_(out);
    return out;
  }
  auto* target = static_cast<float*>(out.mutable_data_ptr());
  const int64_t strips = call.strips(), chunks = call.chunks();
  parallel_for(0, tasks * strips * chunks, call.grain(), [&, n = n, r = r](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t task = job / (strips * chunks), strip = job / chunks % strips, chunk = job % chunks;
      const float* from = call.project(task, chunk, strip);
      float* to = target + task * r * n + strip * kStripColumns;
      const size_t bytes = static_cast<size_t>(call.width(strip)) * sizeof(float);
      for (int64_t i = call.chunk_begin(chunk); i < call.chunk_begin(chunk + 1); ++i, from += kStripStride) {
        std::memcpy(to + i * n, from, bytes);
      }
    }
  });
  return out;
}

// Sums of a chunk over strips [first, last) of one task, into sums [r][2].
void sum_strips(const Call& call, const Matrix& p, int64_t task, int64_t chunk, int64_t first, int64_t last,
                double* sums) {
  for (int64_t strip = first; strip < last; ++strip) {
    const float* a = call.project(task, chunk, strip);
    for (int64_t i = call.chunk_begin(chunk); i < call.chunk_begin(chunk + 1); ++i, a += kStripStride) {
      const Buffer row = Buffer{p.data, p.dtype}.at(i * p.row_stride + strip * kStripColumns);
      projection_kernels().row_sums(row, a, call.width(strip), sums + 2 * i);
    }
  }
}

std::tuple<Tensor, Tensor> projection_stats(Tensor basis, Tensor reference, OptTensor base, std::vector<Tensor> tuned,
                                            std::string precision) {
  Call call("projection_stats", basis, base, tuned, precision);
  check_reference("projection_stats", reference, tuned[0], call.sizes);
  const int64_t tasks = call.sizes.tasks, r = call.sizes.r, strips = call.strips();
  Tensor inner = new_tensor({tasks, r}, ScalarType::Double), square = new_tensor({tasks, r}, ScalarType::Double);
  torch::stable::zero_(inner);
  torch::stable::zero_(square);
  if (call.empty()) return {inner, square};
  std::vector<Matrix> rows;
  for (int64_t t = 0; t < (reference.dim() == 3 ? tasks : 1); ++t) {
    rows.push_back(call.matrix(reference.dim() == 3 ? torch::stable::select(reference, 0, t) : reference, false));
  }
  const int64_t groups = std::min(kGroups, strips), chunks = call.chunks();
  std::vector<double> sums(static_cast<size_t>(tasks * groups * r * 2));
  parallel_for(0, tasks * groups * chunks, call.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t task = job / (groups * chunks), group = job / chunks % groups;
      const Matrix& p = rows[rows.size() == 1 ? 0 : static_cast<size_t>(task)];
      sum_strips(call, p, task, job % chunks, group * strips / groups, (group + 1) * strips / groups,
                 sums.data() + job / chunks * r * 2);
    }
  });
  auto* inners = static_cast<double*>(inner.mutable_data_ptr());
  auto* squares = static_cast<double*>(square.mutable_data_ptr());
  for (int64_t job = 0; job < tasks * groups; ++job) {
    for (int64_t i = 0; i < r; ++i) {
      inners[job / groups * r + i] += sums[static_cast<size_t>((job * r + i) * 2)];
      squares[job / groups * r + i] += sums[static_cast<size_t>((job * r + i) * 2 + 1)];
    }
  }
  return {inner, square};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CPU, m) {
  m.impl("project_delta", TORCH_BOX(&project_delta));
  m.impl("projection_stats", TORCH_BOX(&projection_stats));
}

}  // namespace pymerge
