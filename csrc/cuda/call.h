// What every launcher does before its kernels: check, guard the device, make contiguous, gather the tasks' parameters.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "../check.h"
#include "delta_source.cuh"
#ifdef PYMERGE_NVRTC
#include "../nvrtc/runtime.h"
#else
#include <cuda_runtime.h>
#endif

namespace pymerge::cuda {

#ifndef PYMERGE_EMULATED
using torch::stable::accelerator::DeviceGuard;
#endif
using OptTensor = std::optional<Tensor>;
using OptNumbers = std::optional<Numbers>;
using OptIntegers = std::optional<Integers>;

inline Stream current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

inline int multiprocessors(const Tensor& like) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.get_device_index()));
  return count;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

inline Tensor new_zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  Tensor result = new_tensor(like, std::move(sizes), dtype);
  torch::stable::zero_(result);
  return result;
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

template <typename T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline Count* counts_of(const Tensor& x) { return data_of<Count>(x); }

// The tensors of one delta operator. Arguments are set one group at a time, each checked; `finish` hands out the
// kernel's arguments. Holds what the kernels read until the call returns; later uses of that memory are ordered by the
// stream.
class Call {
 public:
  Call(const char* op, const OptTensor& base, const std::vector<Tensor>& tuned)
      : op_(op), guard_((check_sources(op, base, tuned), tuned[0].get_device_index())), tasks_(tuned.size()) {
    for (size_t t = 0; t < tuned.size(); ++t) {
      tasks_[t] = {};
      tasks_[t].tuned = hold(tuned[t]);
      tasks_[t].keep = keep_limit(1.0);
    }
    if (base) args_.base = hold(*base);
    args_.count = tuned[0].numel();
    args_.rows = 1;
  }
  Call(const Call&) = delete;

  Stored hold(const Tensor& x) {
    held_.push_back(torch::stable::contiguous(x));
    read_.push_back({held_.back().const_data_ptr(), check_dtype(op_, "tensor", x.scalar_type())});
    return read_.back();
  }

  void set_mask(const OptNumbers& keep, const OptIntegers& keys) {
    check_mask(op_, keep, keys, tasks_.size());
    args_.masked = keep.has_value();
    for (size_t t = 0; keep && t < tasks_.size(); ++t) {
      tasks_[t].keep = keep_limit((*keep)[t]);
      tasks_[t].key = static_cast<uint64_t>((*keys)[t]);
    }
  }

  void set_weights(const Numbers& weights, const OptNumbers& rescales) {
    check_entries(op_, "weights", weights.size(), tasks_.size());
    if (rescales) check_entries(op_, "rescales", rescales->size(), tasks_.size());
    args_.rescaled = rescales.has_value();
    for (size_t t = 0; t < tasks_.size(); ++t) {
      tasks_[t].weight = static_cast<float>(weights[t]);
      tasks_[t].rescale = rescales ? static_cast<float>((*rescales)[t]) : 1.0f;
    }
  }

  void set_rows(int64_t row_length) {
    args_.row_length = row_length;
    args_.rows = check_rows(op_, row_length, args_.count);
  }

  void set_cuts(int64_t row_length, const OptTensor& top_theta, const OptTensor& top_index, const OptTensor& skip_theta,
                const OptTensor& skip_index) {
    set_rows(row_length);
    const int64_t tasks = static_cast<int64_t>(tasks_.size());
    check_cut(op_, "top", top_theta, top_index, held_[0], tasks, args_.rows);
    check_cut(op_, "skip", skip_theta, skip_index, held_[0], tasks, args_.rows);
    if (top_theta) args_.top = hold_cut(*top_theta, *top_index);
    if (skip_theta) args_.skip = hold_cut(*skip_theta, *skip_index);
  }

  void set_ranks(const Integers& ranks) {
    check_entries(op_, "ranks", ranks.size(), tasks_.size());
    for (size_t t = 0; t < tasks_.size(); ++t) tasks_[t].rank = ranks[t];
  }

  void set_prefix(const Integers& prefix) {
    check_entries(op_, "prefix", prefix.size(), tasks_.size());
    for (size_t t = 0; t < tasks_.size(); ++t) tasks_[t].prefix = static_cast<uint32_t>(prefix[t]);
  }

  // The kernel's arguments; parameters of tasks beyond those that a launch carries are on their way to the device.
  const DeltaArgs& finish() {
    const int count = static_cast<int>(tasks_.size());
    Task* more = nullptr;
    if (count > kInlineTasks) {
      const int64_t bytes = int64_t{count - kInlineTasks} * static_cast<int64_t>(sizeof(Task));
      held_.push_back(new_tensor(held_[0], {bytes}, ScalarType::Byte));
      more = data_of<Task>(held_.back());
    }
    set_tasks(args_, tasks_.data(), count, more, stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return args_;
  }

  bool empty() const { return args_.count == 0; }
  int64_t count() const { return args_.count; }
  int64_t rows() const { return args_.rows; }
  int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }
  const Tensor& like() const { return held_[0]; }
  const Stored& base() const { return args_.base; }
  const std::vector<Stored>& read() const { return read_; }
  Stream stream() const { return current_stream(held_[0]); }
  int sms() const { return multiprocessors(held_[0]); }

 private:
  Cut hold_cut(const Tensor& theta, const Tensor& index) {
    held_.push_back(torch::stable::contiguous(theta));
    const float* thetas = static_cast<const float*>(held_.back().const_data_ptr());
    held_.push_back(torch::stable::contiguous(index));
    return {thetas, static_cast<const int64_t*>(held_.back().const_data_ptr())};
  }

  const char* op_;
  DeviceGuard guard_;
  DeltaArgs args_ = {};
  std::vector<Task> tasks_;
  std::vector<Stored> read_;
  std::vector<Tensor> held_;
};

}  // namespace pymerge::cuda
