// The assignment operator on CPU tensors: widen, make contiguous, turn wide side up, one problem a thread.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "../check.h"
#include "assign.h"

namespace pymerge {
namespace {

Tensor new_tensor(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

template <typename T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// The matching of the transposed problem, which had more rows than columns: rows that no column took get -1.
void turn_back(const Tensor& taken, int64_t batch, int64_t rows, int64_t columns, int64_t* match) {
  const int64_t* row_of = data_of<int64_t>(taken);
  std::fill(match, match + batch * rows, int64_t{-1});
  for (int64_t k = 0; k < batch * columns; ++k) {
    if (row_of[k] >= 0) match[k / columns * rows + row_of[k]] = k % columns;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> assign(Tensor score, bool maximize, std::optional<Tensor> prices,
                                                  std::optional<double> tolerance) {
  check_assign(score, prices, tolerance);
  const int64_t batch = score.size(0), rows = score.size(1), columns = score.size(2);
  const bool tall = rows > columns;
  const Tensor turned = tall ? torch::stable::transpose(score, 1, 2) : score;
  const Tensor source = torch::stable::contiguous(torch::stable::to(turned, ScalarType::Float));
  const Tensor start = prices ? torch::stable::contiguous(*prices) : score;
  Tensor match = new_tensor({batch, rows}, ScalarType::Long), value = new_tensor({batch, 3}, ScalarType::Double);
  Tensor row_prices = new_tensor({batch, rows}, ScalarType::Double);
  Tensor col_prices = new_tensor({batch, columns}, ScalarType::Double);
  const int64_t few = tall ? columns : rows, many = tall ? rows : columns;
  Tensor found = tall ? new_tensor({batch, few}, ScalarType::Long) : match;
  const float* scores = static_cast<const float*>(source.const_data_ptr());
  const double* starts = prices && !tall ? static_cast<const double*>(start.const_data_ptr()) : nullptr;
  int64_t* columns_of = data_of<int64_t>(found);
  double *few_prices = data_of<double>(tall ? col_prices : row_prices),
         *many_prices = data_of<double>(tall ? row_prices : col_prices), *values = data_of<double>(value);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const AssignProblem problem = {scores + b * few * many, few, many, maximize ? -1.0f : 1.0f,
                                     starts == nullptr ? nullptr : starts + b * many};
      const AssignResult result = {columns_of + b * few, few_prices + b * few, many_prices + b * many, values + b * 3};
      if (few > 0 && assign_solve(problem, result)) continue;
      const double nothing = few > 0 ? std::numeric_limits<double>::quiet_NaN() : 0.0;
      std::fill(result.columns, result.columns + few, int64_t{-1});
      std::fill(result.row_prices, result.row_prices + few, nothing);
      std::fill(result.col_prices, result.col_prices + many, nothing);
      std::fill(result.value, result.value + 3, nothing);
    }
  });
  if (tall) turn_back(found, batch, rows, columns, data_of<int64_t>(match));
  return {match, row_prices, col_prices, value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CPU, m) { m.impl("assign", TORCH_BOX(&assign)); }

}  // namespace pymerge
