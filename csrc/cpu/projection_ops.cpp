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
      : sizes(check_projection(op, basis, base, tuned, precision)),
        columns(strip_columns(sizes.r)),
        stride(strip_stride(sizes.r)) {
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
  int64_t strips() const { return (sizes.n + columns - 1) / columns; }
  int64_t grain() const {
    const int64_t work = sizes.m * sizes.r * std::min(sizes.n, columns);
    return std::max<int64_t>(1, kJobWork / std::max<int64_t>(1, work));
  }
  int64_t width(int64_t strip) const { return std::min(columns, sizes.n - strip * columns); }

  // Q_t^T D_t of one strip, [r, stride], in memory of this thread that the next call takes again.
  const float* project(int64_t task, int64_t strip) const {
    float* scratch = thread_scratch(strip_scratch() + strip_size(sizes.r));
    float* out = scratch + strip_scratch();
    const Projection& p = tasks_[static_cast<size_t>(task)];
    projection_kernels().strip(p, strip * columns, width(strip), scratch, out);
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
  const int64_t columns, stride;  // of a strip

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
  const int64_t strips = call.strips();
  parallel_for(0, tasks * strips, call.grain(), [&, n = n, r = r](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t task = job / strips, strip = job % strips;
      const float* from = call.project(task, strip);
      float* to = target + task * r * n + strip * call.columns;
      const size_t bytes = static_cast<size_t>(call.width(strip)) * sizeof(float);
      for (int64_t i = 0; i < r; ++i) std::memcpy(to + i * n, from + i * call.stride, bytes);
    }
  });
  return out;
}

// Sums of the strips [first, last) of one task: [r][2].
void sum_strips(const Call& call, const std::vector<Matrix>& reference, int64_t task, int64_t first, int64_t last,
                double* sums) {
  const Matrix& p = reference[reference.size() == 1 ? 0 : static_cast<size_t>(task)];
  for (int64_t strip = first; strip < last; ++strip) {
    const float* a = call.project(task, strip);
    for (int64_t i = 0; i < call.sizes.r; ++i) {
      const Buffer row = Buffer{p.data, p.dtype}.at(i * p.row_stride + strip * call.columns);
      projection_kernels().row_sums(row, a + i * call.stride, call.width(strip), sums + 2 * i);
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
  const int64_t groups = std::min(kGroups, strips);
  std::vector<double> sums(static_cast<size_t>(tasks * groups * r * 2));
  parallel_for(0, tasks * groups, call.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t task = job / groups, group = job % groups;
      double* out = sums.data() + job * r * 2;
      sum_strips(call, rows, task, group * strips / groups, (group + 1) * strips / groups, out);
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
