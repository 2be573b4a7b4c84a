// Arguments of the host module: buffers by (address, dtype), checked lists, and the immutable DeltaParams.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/delta.h"

namespace pymerge {

namespace py = pybind11;

inline void check_length(const char* what, size_t got, size_t wanted) {
  if (got == wanted) return;
  throw py::value_error(std::string(what) + ": expected " + std::to_string(wanted) + " entries, got " +
                        std::to_string(got));
}

inline Dtype parse_dtype(const char* what, const std::string& code) {
  if (code == "BF16") return Dtype::kBF16;
  if (code == "F16") return Dtype::kF16;
  if (code == "F32") return Dtype::kF32;
  if (code == "F64") return Dtype::kF64;
  throw py::value_error(std::string(what) + ": dtype must be BF16, F16, F32 or F64, got '" + code + "'");
}

inline Buffer parse_buffer(const char* what, const py::handle& object, int64_t count) {
  if (!py::isinstance<py::tuple>(object) || py::len(object) != 2) {
    throw py::type_error(std::string(what) + ": expected a tuple (address, dtype)");
  }
  const auto pair = py::reinterpret_borrow<py::tuple>(object);
  if (!py::isinstance<py::int_>(pair[0]) || !py::isinstance<py::str>(pair[1])) {
    throw py::type_error(std::string(what) + ": expected a tuple (address, dtype)");
  }
  const size_t address = PyLong_AsSize_t(py::object(pair[0]).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  if (address == 0 && count > 0) throw py::value_error(std::string(what) + ": address is 0");
  return {reinterpret_cast<const void*>(address), parse_dtype(what, pair[1].cast<std::string>())};
}

inline Buffer parse_optional(const char* what, const py::handle& object, int64_t count) {
  return object.is_none() ? Buffer{} : parse_buffer(what, object, count);
}

// The tensors of one call; view() points into this object.
class HostSource {
 public:
  HostSource(const py::object& base, const py::sequence& tuned, int64_t count, int64_t index0)
      : count_(count), index0_(index0) {
    constexpr int64_t limit = int64_t{1} << 60;
    if (count < 0 || index0 < 0 || count > limit || index0 > limit) {
      throw py::value_error("count and index0 must be in 0..2^60, got " + std::to_string(count) + " and " +
                            std::to_string(index0));
    }
    if (tuned.size() == 0) throw py::value_error("tuned: expected at least one tensor");
    base_ = parse_optional("base", base, count);
    for (const py::handle& one : tuned) tuned_.push_back(parse_buffer("tuned", one, count));
  }
  int64_t tasks() const { return static_cast<int64_t>(tuned_.size()); }
  DeltaSource view() const { return {base_, tuned_.data(), tasks(), count_, index0_}; }

 private:
  Buffer base_;
  std::vector<Buffer> tuned_;
  int64_t count_, index0_;
};

// keep and keys of every task, or no mask at all; rule() points into this object.
class HostMask {
 public:
  HostMask(int64_t tasks, const std::optional<std::vector<double>>& keep,
           const std::optional<std::vector<uint64_t>>& keys)
      : tasks_(tasks) {
    if (keep.has_value() != keys.has_value()) throw py::value_error("keep and keys: give both or neither");
    if (!keep) return;
    check_length("keep", keep->size(), static_cast<size_t>(tasks));
    check_length("keys", keys->size(), static_cast<size_t>(tasks));
    for (const double p : *keep) {
      if (!(p >= 0.0 && p <= 1.0)) throw py::value_error("keep: expected 0..1, got " + std::to_string(p));
      keep_.push_back(keep_limit(p));
    }
    keys_ = *keys;
  }
  DeltaRule rule() const {
    DeltaRule rule;
    rule.tasks = tasks_;
    if (!keep_.empty()) rule.keep = keep_.data();
    if (!keys_.empty()) rule.keys = keys_.data();
    return rule;
  }

 private:
  int64_t tasks_;
  std::vector<KeepLimit> keep_;
  std::vector<uint64_t> keys_;
};

template <typename T>
std::vector<T> from_bytes(const char* what, const std::string& bytes) {
  if (bytes.size() % sizeof(T) != 0) {
    throw py::value_error(std::string(what) + ": " + std::to_string(bytes.size()) + " bytes are not whole entries of " +
                          std::to_string(sizeof(T)) + " bytes");
  }
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// A resolved rule, made once a tensor. Immutable, so threads share it.
class DeltaParams {
 public:
  using Bytes = std::optional<py::bytes>;
  DeltaParams(const std::vector<double>& weights, double scale, double divisor,
              const std::optional<std::vector<double>>& rescales, const std::optional<std::vector<double>>& keep,
              const std::optional<std::vector<uint64_t>>& keys, int64_t row_length, const Bytes& top_theta,
              const Bytes& top_index, const Bytes& skip_theta, const Bytes& skip_index, bool elect, int tie_sign,
              const std::string& norm)
      : mask_(static_cast<int64_t>(weights.size()), keep, keys),
        weights_(weights.begin(), weights.end()),
        row_length_(row_length),
        scale_(static_cast<float>(scale)),
        divisor_(static_cast<float>(divisor)),
        tie_sign_(static_cast<float>(tie_sign)),
        elect_(elect),
        norm_(parse_norm(norm)) {
    if (weights.empty()) throw py::value_error("weights: expected at least one entry");
    if (row_length < 0) throw py::value_error("row_length must not be negative, got " + std::to_string(row_length));
    if (tie_sign != 1 && tie_sign != -1)
      throw py::value_error("tie_sign must be 1 or -1, got " + std::to_string(tie_sign));
    if (norm_ == Norm::kMax && !elect) throw py::value_error("norm 'max' needs elect: it takes the elected sign");
    if (divisor_ == 0.0f) throw py::value_error("divisor is 0");
    if (rescales) {
      check_length("rescales", rescales->size(), weights.size());
      rescales_.assign(rescales->begin(), rescales->end());
    }
    set_cut("top", top_theta, top_index, top_theta_, top_index_);
    set_cut("skip", skip_theta, skip_index, skip_theta_, skip_index_);
  }

  // Throws unless the rule fits T tensors and entries [index0, index0 + count).
  void check(int64_t tasks, int64_t index0, int64_t count) const {
    check_length("tuned", static_cast<size_t>(tasks), weights_.size());
    if (row_length_ == 0 || (top_theta_.empty() && skip_theta_.empty())) return;
    if (count > 0 && (index0 + count - 1) / row_length_ >= rows_) {
      throw py::value_error("cuts: " + std::to_string(rows_) + " rows of " + std::to_string(row_length_) +
                            " entries do not cover entry " + std::to_string(index0 + count - 1));
    }
  }

  DeltaRule rule() const {
    DeltaRule rule = mask_.rule();
    rule.rows = rows_;
    rule.row_length = row_length_;
    rule.weights = weights_.data();
    if (!rescales_.empty()) rule.rescales = rescales_.data();
    if (!top_theta_.empty()) rule.top_theta = top_theta_.data(), rule.top_index = top_index_.data();
    if (!skip_theta_.empty()) rule.skip_theta = skip_theta_.data(), rule.skip_index = skip_index_.data();
    rule.scale = scale_;
    rule.divisor = divisor_;
    rule.tie_sign = tie_sign_;
    rule.elect = elect_;
    rule.norm = norm_;
    return rule;
  }

  int64_t tasks() const { return static_cast<int64_t>(weights_.size()); }

 private:
  static Norm parse_norm(const std::string& name) {
    if (name == "none") return Norm::kNone;
    if (name == "weights") return Norm::kWeights;
    if (name == "count") return Norm::kCount;
    if (name == "max") return Norm::kMax;
    throw py::value_error("norm must be none, weights, count or max, got '" + name + "'");
  }

  void set_cut(const char* name, const Bytes& theta, const Bytes& index, std::vector<float>& thetas,
               std::vector<int64_t>& indices) {
    const std::string what = std::string(name) + " cut";
    if (theta.has_value() != index.has_value()) throw py::value_error(what + ": give theta and index, or neither");
    if (!theta) return;
    thetas = from_bytes<float>(what.c_str(), *theta);
    indices = from_bytes<int64_t>(what.c_str(), *index);
    check_length(what.c_str(), indices.size(), thetas.size());
    if (thetas.empty() || thetas.size() % weights_.size() != 0) {
      throw py::value_error(what + ": " + std::to_string(thetas.size()) + " entries for " +
                            std::to_string(weights_.size()) + " tasks");
    }
    const int64_t rows = static_cast<int64_t>(thetas.size() / weights_.size());
    if (row_length_ == 0 && rows != 1) throw py::value_error(what + ": several rows, but row_length is 0");
    if (rows_ != 0 && rows_ != rows) throw py::value_error("top and skip cuts differ in their number of rows");
    rows_ = rows;
  }

  HostMask mask_;
  std::vector<float> weights_, rescales_, top_theta_, skip_theta_;
  std::vector<int64_t> top_index_, skip_index_;
  int64_t rows_ = 0, row_length_ = 0;
  float scale_, divisor_, tie_sign_;
  bool elect_;
  Norm norm_;
};

inline void bind_params(py::module_& m) {
  using Bytes = DeltaParams::Bytes;
  using Numbers = std::optional<std::vector<double>>;
  py::class_<DeltaParams>(m, "DeltaParams")
      .def(py::init<const std::vector<double>&, double, double, const Numbers&, const Numbers&,
                    const std::optional<std::vector<uint64_t>>&, int64_t, const Bytes&, const Bytes&, const Bytes&,
                    const Bytes&, bool, int, const std::string&>(),
           py::arg("weights"), py::arg("scale") = 1.0, py::arg("divisor") = 1.0, py::arg("rescales") = py::none(),
           py::arg("keep") = py::none(), py::arg("keys") = py::none(), py::arg("row_length") = 0,
           py::arg("top_theta") = py::none(), py::arg("top_index") = py::none(), py::arg("skip_theta") = py::none(),
           py::arg("skip_index") = py::none(), py::arg("elect") = false, py::arg("tie_sign") = 1,
           py::arg("norm") = "none")
      .def_property_readonly("tasks", &DeltaParams::tasks);
}

}  // namespace pymerge
