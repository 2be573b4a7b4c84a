// What the two projection operators do before their kernels.
#pragma once

#include <string>

#include "call.h"
#include "projection.cuh"

namespace pymerge::cuda {

class ProjectCall {
 public:
  ProjectCall(const char* op, const Tensor& basis, const OptTensor& base, const std::vector<Tensor>& tuned,
              const std::string& precision)
      : sizes(check_projection(op, basis, base, tuned, precision)),
        split(precision == "bf16x3"),
        call(op, base, tuned) {
    constexpr int64_t limit = (int64_t{1} << 31) - 1;
    const int64_t blocks = project_blocks(sizes.tasks, sizes.n, sizes.r);
    STD_TORCH_CHECK(blocks <= limit, "pymerge::", op, ": ", blocks, " tiles of the product are more than ", limit);
    args.m = sizes.m, args.n = sizes.n, args.r = sizes.r;
    args.basis = floats(basis);
    args.basis_step = basis.dim() == 3 ? sizes.m * sizes.r : 0;
  }
  ProjectCall(const ProjectCall&) = delete;

  bool empty() const { return sizes.m * sizes.n * sizes.r == 0; }

  // float32, contiguous; lives as long as the call.
  const float* floats(const Tensor& x) {
    held_.push_back(torch::stable::contiguous(torch::stable::to(x, ScalarType::Float)));
    return static_cast<const float*>(held_.back().const_data_ptr());
  }

  int dtype() const { return common_dtype(call.read().data(), static_cast<int>(call.read().size())); }

  const ProjectionSizes sizes;
  const bool split;
  Call call;
  ProjectArgs args = {};

 private:
  std::vector<Tensor> held_;
};

}  // namespace pymerge::cuda
