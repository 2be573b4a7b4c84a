// What must hold for memory safety even if someone calls torch.ops directly; shared by all backends. Values in every
// message.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/delta_math.h"
#include "common/dtype.h"
#include "common/sketch_math.h"

namespace pymerge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Numbers = std::vector<double>;
using Integers = std::vector<int64_t>;

inline Dtype check_dtype(const char* op, const char* what, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Dtype::kBF16;
    case ScalarType::Half:
      return Dtype::kF16;
    case ScalarType::Float:
      return Dtype::kF32;
    case ScalarType::Double:
      return Dtype::kF64;
    default:
      STD_TORCH_CHECK(false, "pymerge::", op, ": ", what, " must be bfloat16, float16, float32 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

inline std::string shape_text(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

inline void check_same(const char* op, const char* what, const Tensor& x, const Tensor& first) {
  check_dtype(op, what, x.scalar_type());
  bool same = x.dim() == first.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == first.size(i);
  STD_TORCH_CHECK(same, "pymerge::", op, ": ", what, " is ", shape_text(x), ", tuned[0] is ", shape_text(first));
  STD_TORCH_CHECK(x.device() == first.device(), "pymerge::", op, ": ", what, " and tuned[0] are on different devices");
}

inline void check_sources(const char* op, const std::optional<Tensor>& base, const std::vector<Tensor>& tuned) {
  STD_TORCH_CHECK(!tuned.empty(), "pymerge::", op, ": tuned must hold at least one tensor");
  for (const Tensor& x : tuned) check_same(op, "tuned", x, tuned[0]);
  if (base) check_same(op, "base", *base, tuned[0]);
}

inline void check_entries(const char* op, const char* what, size_t got, size_t tasks) {
  STD_TORCH_CHECK(got == tasks, "pymerge::", op, ": ", what, " must have one entry per tuned tensor (", tasks,
                  "), got ", got);
}

inline void check_mask(const char* op, const std::optional<Numbers>& keep, const std::optional<Integers>& keys,
                       size_t tasks) {
  STD_TORCH_CHECK(keep.has_value() == keys.has_value(), "pymerge::", op, ": give keep and keys, or neither");
  if (!keep) return;
  check_entries(op, "keep", keep->size(), tasks);
  check_entries(op, "keys", keys->size(), tasks);
  for (const double p : *keep)
    STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "pymerge::", op, ": keep must be in 0..1, got ", p);
}

// 0: one row. Returns the number of rows.
inline int64_t check_rows(const char* op, int64_t row_length, int64_t numel) {
  const bool whole = row_length == 0 || (row_length > 0 && numel % row_length == 0);
  STD_TORCH_CHECK(whole, "pymerge::", op, ": row_length must divide ", numel, ", got ", row_length);
  return row_length == 0 ? 1 : numel / row_length;
}

// A cut is theta float32 [T, R] and index int64 [T, R], both or neither.
inline void check_cut(const char* op, const char* what, const std::optional<Tensor>& theta,
                      const std::optional<Tensor>& index, const Tensor& like, int64_t tasks, int64_t rows) {
  STD_TORCH_CHECK(theta.has_value() == index.has_value(), "pymerge::", op, ": give ", what, "_theta and ", what,
                  "_index, or neither");
  if (!theta) return;
  STD_TORCH_CHECK(theta->scalar_type() == ScalarType::Float && index->scalar_type() == ScalarType::Long,
                  "pymerge::", op, ": ", what, "_theta must be float32 and ", what, "_index int64");
  for (const Tensor* x : {&*theta, &*index}) {
    STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == tasks && x->size(1) == rows, "pymerge::", op, ": ", what,
                    " cut must be [", tasks, ", ", rows, "], got ", shape_text(*x));
    STD_TORCH_CHECK(x->device() == like.device(), "pymerge::", op, ": ", what,
                    " cut and tuned[0] are on different devices");
  }
}

inline Norm check_norm(const char* op, const std::string& name, bool elect) {
  if (name == "none") return Norm::kNone;
  if (name == "weights") return Norm::kWeights;
  if (name == "count") return Norm::kCount;
  STD_TORCH_CHECK(name == "max", "pymerge::", op, ": norm must be none, weights, count or max, got '", name, "'");
  STD_TORCH_CHECK(elect, "pymerge::", op, ": norm 'max' needs elect: it takes the elected sign");
  return Norm::kMax;
}

// Of projections: basis [m, r] or [T, m, r], base and tuned [m, n].
struct ProjectionSizes {
  int64_t tasks, m, n, r;
};

inline ProjectionSizes check_projection(const char* op, const Tensor& basis, const std::optional<Tensor>& base,
                                        const std::vector<Tensor>& tuned, const std::string& precision) {
  check_sources(op, base, tuned);
  check_dtype(op, "basis", basis.scalar_type());
  STD_TORCH_CHECK(tuned[0].dim() == 2, "pymerge::", op, ": tuned must be [m, n], got ", shape_text(tuned[0]));
  const int64_t tasks = static_cast<int64_t>(tuned.size()), m = tuned[0].size(0), dims = basis.dim();
  const bool fits = (dims == 2 && basis.size(0) == m) || (dims == 3 && basis.size(0) == tasks && basis.size(1) == m);
  STD_TORCH_CHECK(fits, "pymerge::", op, ": basis must be [", m, ", r] or [", tasks, ", ", m, ", r], got ",
                  shape_text(basis));
  STD_TORCH_CHECK(basis.device() == tuned[0].device(), "pymerge::", op,
                  ": basis and tuned[0] are on different devices");
  STD_TORCH_CHECK(precision == "fp32" || precision == "bf16x3", "pymerge::", op,
                  ": precision must be fp32 or bf16x3, got '", precision, "'");
  return {tasks, m, tuned[0].size(1), basis.size(dims - 1)};
}

inline void check_reference(const char* op, const Tensor& reference, const Tensor& like, const ProjectionSizes& sizes) {
  check_dtype(op, "reference", reference.scalar_type());
  const int64_t dims = reference.dim(), r = sizes.r, n = sizes.n;
  const bool fits = (dims == 2 || (dims == 3 && reference.size(0) == sizes.tasks)) && reference.size(dims - 2) == r &&
                    reference.size(dims - 1) == n;
  STD_TORCH_CHECK(fits, "pymerge::", op, ": reference must be [", r, ", ", n, "] or [", sizes.tasks, ", ", r, ", ", n,
                  "], got ", shape_text(reference));
  STD_TORCH_CHECK(reference.device() == like.device(), "pymerge::", op,
                  ": reference and tuned[0] are on different devices");
}

inline void check_matrices(const char* op, const char* what, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "pymerge::", op, ": ", what, " must be [..., m, n], got ", shape_text(x));
}

struct SketchCall {
  Dtype dtype;
  ScalarType out_dtype;
  bool gaussian;
};

inline SketchCall check_sketch(const Tensor& a, int64_t width, const std::string& kind) {
  const Dtype dtype = check_dtype("sketch", "a", a.scalar_type());
  STD_TORCH_CHECK(a.dim() >= 2, "pymerge::sketch: a must be [..., m, n], got ", shape_text(a));
  STD_TORCH_CHECK(width >= 1 && width <= kSketchMaxWidth, "pymerge::sketch: width must be in 1..", kSketchMaxWidth,
                  ", got ", width);
  STD_TORCH_CHECK(kind == "gaussian" || kind == "sparse_sign",
                  "pymerge::sketch: kind must be gaussian or sparse_sign, got '", kind, "'");
  const int64_t n = a.size(a.dim() - 1);
  STD_TORCH_CHECK(n < (int64_t{1} << 31), "pymerge::sketch: a must have fewer than 2^31 columns, got ", n);
  return {dtype, dtype == Dtype::kF64 ? ScalarType::Double : ScalarType::Float, kind == "gaussian"};
}

constexpr int64_t kAssignColumns = 1 << 20;  // of the longer side

inline void check_assign(const Tensor& score, const std::optional<Tensor>& prices,
                         const std::optional<double>& tolerance) {
  const Dtype dtype = check_dtype("assign", "score", score.scalar_type());
  STD_TORCH_CHECK(dtype != Dtype::kF64, "pymerge::assign: score must be bfloat16, float16 or float32, got Double");
  STD_TORCH_CHECK(score.dim() == 3, "pymerge::assign: score must be [B, n, m], got ", shape_text(score));
  STD_TORCH_CHECK(score.size(1) <= kAssignColumns && score.size(2) <= kAssignColumns, "pymerge::assign: at most ",
                  kAssignColumns, " rows and columns, got ", shape_text(score));
  STD_TORCH_CHECK(!tolerance || *tolerance >= 0.0, "pymerge::assign: tolerance must be at least 0, got ", *tolerance);
  if (!prices) return;
  STD_TORCH_CHECK(prices->scalar_type() == ScalarType::Double && prices->dim() == 2 &&
                      prices->size(0) == score.size(0) && prices->size(1) == score.size(2),
                  "pymerge::assign: prices must be float64 [", score.size(0), ", ", score.size(2), "], got ",
                  torch::headeronly::toString(prices->scalar_type()), " ", shape_text(*prices));
  STD_TORCH_CHECK(prices->device() == score.device(), "pymerge::assign: prices and score are on different devices");
}

}  // namespace pymerge
