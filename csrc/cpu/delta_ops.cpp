// The delta operators on CPU tensors: check, make contiguous, allocate, run the kernels over entries, rows or blocks.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>

#include "../check.h"
#include "delta.h"

namespace pymerge {
namespace {

using OptTensor = std::optional<Tensor>;
using torch::stable::parallel_for;

constexpr int64_t kGrain = 16 * kBlock;  // entries worth a thread of their own

Tensor new_tensor(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Buffer buffer_of(const Tensor& x) { return {x.const_data_ptr(), check_dtype("tensor", "dtype", x.scalar_type())}; }

// The same entries in the same places, whichever tensor objects hold them; shapes have been compared.
bool is_same(const Tensor& a, const Tensor& b) {
  bool same = a.const_data_ptr() == b.const_data_ptr() && a.scalar_type() == b.scalar_type();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.stride(i) == b.stride(i);
  return same;
}

// Contiguous inputs and the arrays that a DeltaRule points to; lives as long as the call.
class Call {
 public:
  Call(const char* op, const OptTensor& base, const std::vector<Tensor>& tuned) : op_(op) {
    check_sources(op, base, tuned);
    if (base) base_ = buffer_of(keep_alive(*base));
    for (const Tensor& x : tuned) tuned_.push_back(buffer_of(keep_alive(x)));
    source = {base_, tuned_.data(), static_cast<int64_t>(tuned.size()), tuned[0].numel(), 0};
    rule.tasks = source.tasks;
  }
  Call(const Call&) = delete;

  const Tensor& keep_alive(const Tensor& x) {
    held_.push_back(torch::stable::contiguous(x));
    return held_.back();
  }

  void set_mask(const std::optional<Numbers>& keep, const std::optional<Integers>& keys) {
    check_mask(op_, keep, keys, tuned_.size());
    if (!keep) return;
    for (const double p : *keep) keep_.push_back(keep_limit(p));
    keys_.assign(keys->begin(), keys->end());
    rule.keep = keep_.data();
    rule.keys = keys_.data();
  }

  void set_weights(const Numbers& weights, const std::optional<Numbers>& rescales) {
    check_entries(op_, "weights", weights.size(), tuned_.size());
    weights_.assign(weights.begin(), weights.end());
    rule.weights = weights_.data();
    if (!rescales) return;
    check_entries(op_, "rescales", rescales->size(), tuned_.size());
    rescales_.assign(rescales->begin(), rescales->end());
    rule.rescales = rescales_.data();
  }

  void set_cuts(int64_t row_length, const OptTensor& top_theta, const OptTensor& top_index, const OptTensor& skip_theta,
                const OptTensor& skip_index) {
    rule.row_length = row_length;
    rule.rows = check_rows(op_, row_length, source.count);
    check_cut(op_, "top", top_theta, top_index, held_[0], source.tasks, rule.rows);
    check_cut(op_, "skip", skip_theta, skip_index, held_[0], source.tasks, rule.rows);
    if (top_theta) {
      rule.top_theta = static_cast<const float*>(keep_alive(*top_theta).const_data_ptr());
      rule.top_index = static_cast<const int64_t*>(keep_alive(*top_index).const_data_ptr());
    }
    if (skip_theta) {
      rule.skip_theta = static_cast<const float*>(keep_alive(*skip_theta).const_data_ptr());
      rule.skip_index = static_cast<const int64_t*>(keep_alive(*skip_index).const_data_ptr());
    }
  }

  // Entries [begin, end) as a source of their own; `tuned` holds the moved buffers.
  DeltaSource part(int64_t begin, int64_t end, std::vector<Buffer>& tuned) const {
    tuned.clear();
    for (const Buffer& x : tuned_) tuned.push_back(x.at(begin));
    return {base_.at(begin), tuned.data(), source.tasks, end - begin, begin};
  }

  DeltaSource source;
  DeltaRule rule;

 private:
  const char* op_;
  std::vector<Tensor> held_;
  Buffer base_;
  std::vector<Buffer> tuned_;
  std::vector<float> weights_, rescales_;
  std::vector<KeepLimit> keep_;
  std::vector<uint64_t> keys_;
};

std::tuple<Tensor, Tensor> merge(OptTensor base, std::vector<Tensor> tuned, OptTensor add, Numbers weights,
                                 double scale, double divisor, std::optional<Numbers> rescales,
                                 std::optional<Numbers> keep, std::optional<Integers> keys, int64_t row_length,
                                 OptTensor top_theta, OptTensor top_index, OptTensor skip_theta, OptTensor skip_index,
                                 bool elect, int64_t tie_sign, std::string norm, ScalarType out_dtype) {
  const char* op = "delta_merge";
  Call call(op, base, tuned);
  call.set_weights(weights, rescales);
  call.set_mask(keep, keys);
  call.set_cuts(row_length, top_theta, top_index, skip_theta, skip_index);
  STD_TORCH_CHECK(tie_sign == 1 || tie_sign == -1, "pymerge::delta_merge: tie_sign must be 1 or -1, got ", tie_sign);
  STD_TORCH_CHECK(static_cast<float>(divisor) != 0.0f, "pymerge::delta_merge: divisor is 0");
  call.rule.norm = check_norm(op, norm, elect);
  call.rule.elect = elect;
  call.rule.tie_sign = static_cast<float>(tie_sign);
  call.rule.scale = static_cast<float>(scale);
  call.rule.divisor = static_cast<float>(divisor);
  Buffer added;
  if (add) {
    check_same(op, "add", *add, tuned[0]);
    const bool same = base && is_same(*base, *add);
    added = same ? call.source.base : buffer_of(call.keep_alive(*add));
  }
  const Dtype dtype = check_dtype(op, "out_dtype", out_dtype);
  const auto sizes = tuned[0].sizes();
  Tensor out = new_tensor({sizes.begin(), sizes.end()}, out_dtype);
  Tensor bad = new_tensor({call.source.tasks + 3}, ScalarType::Long);
  torch::stable::zero_(bad);
  auto* totals = static_cast<int64_t*>(bad.mutable_data_ptr());
  char* target = static_cast<char*>(out.mutable_data_ptr());
  parallel_for(0, call.source.count, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<Buffer> moved;
    const DeltaSource part = call.part(begin, end, moved);
    std::vector<int64_t> counts(static_cast<size_t>(part.tasks) + 3);
    delta_merge(part, call.rule, {added.at(begin), target + begin * item_size(dtype), dtype}, counts.data());
    for (size_t i = 0; i < counts.size(); ++i) std::atomic_ref<int64_t>(totals[i]) += counts[i];
  });
  return {out, bad};
}

std::tuple<Tensor, Tensor> kth(OptTensor base, std::vector<Tensor> tuned, Integers ranks, int64_t row_length,
                               std::optional<Numbers> keep, std::optional<Integers> keys) {
  Call call("delta_kth", base, tuned);
  call.set_mask(keep, keys);
  check_entries("delta_kth", "ranks", ranks.size(), tuned.size());
  const int64_t rows = check_rows("delta_kth", row_length, call.source.count), tasks = call.source.tasks;
  const int64_t length = row_length == 0 ? call.source.count : row_length;
  Tensor theta = new_tensor({tasks, rows}, ScalarType::Float), index = new_tensor({tasks, rows}, ScalarType::Long);
  auto* thetas = static_cast<float*>(theta.mutable_data_ptr());
  auto* indices = static_cast<int64_t*>(index.mutable_data_ptr());
  const int64_t grain = length > 0 ? std::max<int64_t>(1, kGrain / length) : kGrain;
  parallel_for(0, tasks * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::tie(thetas[i], indices[i]) =
          delta_kth(call.source, call.rule, i / rows, i % rows * length, length, ranks[static_cast<size_t>(i / rows)]);
    }
  });
  return {theta, index};
}

Tensor histogram(OptTensor base, std::vector<Tensor> tuned, std::optional<Numbers> keep, std::optional<Integers> keys,
                 std::optional<Integers> prefix) {
  Call call("delta_histogram", base, tuned);
  call.set_mask(keep, keys);
  if (prefix) check_entries("delta_histogram", "prefix", prefix->size(), tuned.size());
  Tensor hist = new_tensor({call.source.tasks, prefix ? kFineBins : kCoarseBins}, ScalarType::Long);
  torch::stable::zero_(hist);
  auto* bins = static_cast<int64_t*>(hist.mutable_data_ptr());
  delta_histogram(call.source, call.rule, prefix ? prefix->data() : nullptr, bins);
  return hist;
}

// Sums of blocks, each by one thread, added in the blocks' order.
template <typename PerBlock>
Tensor sum_over_blocks(const Call& call, std::vector<int64_t> sizes, PerBlock per_block) {
  int64_t width = 1;
  for (const int64_t size : sizes) width *= size;
  const int64_t blocks = sum_blocks(call.source.count);
  std::vector<double> sums(static_cast<size_t>(blocks * width));
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) per_block(block, sums.data() + block * width);
  });
  Tensor result = new_tensor(std::move(sizes), ScalarType::Double);
  torch::stable::zero_(result);
  auto* total = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < blocks * width; ++i) total[i % width] += sums[static_cast<size_t>(i)];
  return result;
}

Tensor l1(OptTensor base, std::vector<Tensor> tuned, std::optional<Numbers> keep, std::optional<Integers> keys,
          int64_t row_length, OptTensor top_theta, OptTensor top_index, OptTensor skip_theta, OptTensor skip_index) {
  Call call("delta_l1", base, tuned);
  call.set_mask(keep, keys);
  call.set_cuts(row_length, top_theta, top_index, skip_theta, skip_index);
  return sum_over_blocks(call, {call.source.tasks, 2},
                         [&](int64_t block, double* out) { delta_l1(call.source, call.rule, block, out); });
}

Tensor gram(OptTensor base, std::vector<Tensor> tuned) {
  const Call call("delta_gram", base, tuned);
  return sum_over_blocks(call, {call.source.tasks, call.source.tasks},
                         [&](int64_t block, double* out) { delta_gram(call.source, block, out); });
}

Tensor signs(OptTensor base, std::vector<Tensor> tuned, Numbers weights, std::optional<Numbers> rescales,
             std::optional<Numbers> keep, std::optional<Integers> keys, int64_t row_length, OptTensor top_theta,
             OptTensor top_index, OptTensor skip_theta, OptTensor skip_index) {
  Call call("delta_signs", base, tuned);
  call.set_weights(weights, rescales);
  call.set_mask(keep, keys);
  call.set_cuts(row_length, top_theta, top_index, skip_theta, skip_index);
  std::atomic<int64_t> total{0};
  parallel_for(0, call.source.count, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<Buffer> moved;
    total += delta_signs(call.part(begin, end, moved), call.rule);
  });
  Tensor result = new_tensor({}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = total;
  return result;
}

std::tuple<Tensor, Tensor> cast(Tensor x, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "pymerge::finite_cast: x must be float32, got ",
                  torch::headeronly::toString(x.scalar_type()));
  const Dtype code = check_dtype("finite_cast", "dtype", dtype);
  const Tensor source = torch::stable::contiguous(x);
  const auto sizes = x.sizes();
  Tensor y = new_tensor({sizes.begin(), sizes.end()}, dtype), bad = new_tensor({}, ScalarType::Long);
  const auto* from = static_cast<const float*>(source.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  std::atomic<int64_t> total{0};
  parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    total += kernels().cast(from + begin, to + begin * item_size(code), code, end - begin);
  });
  *static_cast<int64_t*>(bad.mutable_data_ptr()) = total;
  return {y, bad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CPU, m) {
  m.impl("delta_merge", TORCH_BOX(&merge));
  m.impl("delta_kth", TORCH_BOX(&kth));
  m.impl("delta_histogram", TORCH_BOX(&histogram));
  m.impl("delta_l1", TORCH_BOX(&l1));
  m.impl("delta_gram", TORCH_BOX(&gram));
  m.impl("delta_signs", TORCH_BOX(&signs));
  m.impl("finite_cast", TORCH_BOX(&cast));
}

}  // namespace pymerge
