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
