// pymerge._C: the same kernels on host buffers given by address, for merges from disk to disk that never import torch.
// Every call releases the interpreter lock, runs in the calling thread and may run in many threads at once.
#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <optional>
#include <system_error>

#include "cpu/crc32c.h"
#include "cpu/delta.h"
#include "cpu/gather.h"
#include "cpu/scaled.h"
#include "host_params.h"

namespace py = pybind11;
using namespace pymerge;

namespace {

py::bytes to_bytes(const void* data, size_t bytes) { return py::bytes(static_cast<const char*>(data), bytes); }

std::vector<int64_t> delta_merge_host(const py::object& base, const py::sequence& tuned, const py::object& add,
                                      const py::object& out, int64_t count, int64_t index0, const DeltaParams& params) {
  const HostSource source(base, tuned, count, index0);
  params.check(source.tasks(), index0, count);
  const Buffer added = parse_optional("add", add, count), result = parse_buffer("out", out, count);
  std::vector<int64_t> bad(static_cast<size_t>(source.tasks()) + 3);
  {
    py::gil_scoped_release release;
    delta_merge(source.view(), params.rule(), {added, const_cast<void*>(result.data), result.dtype}, bad.data());
  }
  return bad;
}

py::tuple delta_kth_host(const py::object& base, const py::sequence& tuned, int64_t count,
                         const std::vector<int64_t>& ranks, int64_t row_length,
                         const std::optional<std::vector<double>>& keep,
                         const std::optional<std::vector<uint64_t>>& keys, int64_t index0) {
  const HostSource source(base, tuned, count, index0);
  const HostMask mask(source.tasks(), keep, keys);
  check_length("ranks", ranks.size(), static_cast<size_t>(source.tasks()));
  if (row_length < 0 || (row_length > 0 && count % row_length != 0)) {
    throw py::value_error("delta_kth: row_length must divide count " + std::to_string(count) + ", got " +
                          std::to_string(row_length));
  }
  const int64_t length = row_length > 0 ? row_length : count, rows = row_length > 0 ? count / row_length : 1;
  std::vector<float> theta(static_cast<size_t>(source.tasks() * rows));
  std::vector<int64_t> index(theta.size());
  {
    py::gil_scoped_release release;
    for (int64_t i = 0; i < source.tasks() * rows; ++i) {
      const auto at = static_cast<size_t>(i);
      std::tie(theta[at], index[at]) = delta_kth(source.view(), mask.rule(), i / rows, i % rows * length, length,
                                                 ranks[static_cast<size_t>(i / rows)]);
    }
  }
  return py::make_tuple(to_bytes(theta.data(), theta.size() * 4), to_bytes(index.data(), index.size() * 8));
}

void delta_histogram_host(const py::object& base, const py::sequence& tuned, int64_t count, int64_t index0,
                          const std::optional<std::vector<double>>& keep,
                          const std::optional<std::vector<uint64_t>>& keys,
                          const std::optional<std::vector<int64_t>>& prefix, const py::buffer& hist) {
  const HostSource source(base, tuned, count, index0);
  const HostMask mask(source.tasks(), keep, keys);
  if (prefix) check_length("prefix", prefix->size(), static_cast<size_t>(source.tasks()));
  const py::buffer_info info = hist.request(true);
  const int64_t bins = source.tasks() * (prefix ? kFineBins : kCoarseBins);
  if (info.itemsize != 8 || info.size != bins || !PyBuffer_IsContiguous(info.view(), 'C')) {
    throw py::value_error("delta_histogram: hist must be a contiguous buffer of " + std::to_string(bins) +
                          " int64, got " + std::to_string(info.size) + " items of " + std::to_string(info.itemsize) +
                          " bytes");
  }
  py::gil_scoped_release release;
  delta_histogram(source.view(), mask.rule(), prefix ? prefix->data() : nullptr, static_cast<int64_t*>(info.ptr));
}

std::vector<int64_t> delta_count_equal_host(const py::object& base, const py::sequence& tuned, int64_t count,
                                            int64_t index0, const std::optional<std::vector<double>>& keep,
                                            const std::optional<std::vector<uint64_t>>& keys,
                                            const std::vector<double>& theta) {
  const HostSource source(base, tuned, count, index0);
  const HostMask mask(source.tasks(), keep, keys);
  check_length("theta", theta.size(), static_cast<size_t>(source.tasks()));
  std::vector<int64_t> totals;
  py::gil_scoped_release release;
  for (int64_t task = 0; task < source.tasks(); ++task) {
    const float wanted = static_cast<float>(theta[static_cast<size_t>(task)]);
    totals.push_back(delta_count_equal(source.view(), mask.rule(), task, wanted));
  }
  return totals;
}

int64_t delta_find_equal_host(const py::object& base, const py::object& tuned, int64_t count, int64_t index0,
                              std::optional<double> keep, std::optional<uint64_t> key, double theta, int64_t nth) {
  py::list one;
  one.append(tuned);
  const HostSource source(base, one, count, index0);
  using Keep = std::optional<std::vector<double>>;
  using Keys = std::optional<std::vector<uint64_t>>;
  const HostMask mask(1, keep ? Keep(std::in_place, 1, *keep) : Keep(), key ? Keys(std::in_place, 1, *key) : Keys());
  if (nth < 0) throw py::value_error("delta_find_equal: nth must not be negative, got " + std::to_string(nth));
  py::gil_scoped_release release;
  return delta_find_equal(source.view(), mask.rule(), 0, static_cast<float>(theta), nth);
}

void check_block_start(const char* function, int64_t index0) {
  if (index0 % kSumBlock != 0) {
    throw py::value_error(std::string(function) + ": index0 must be a multiple of 2^20, got " + std::to_string(index0));
  }
}

py::bytes delta_l1_host(const py::object& base, const py::sequence& tuned, int64_t count, int64_t index0,
                        const DeltaParams& params) {
  const HostSource source(base, tuned, count, index0);
  params.check(source.tasks(), index0, count);
  check_block_start("delta_l1", index0);
  std::vector<double> sums(static_cast<size_t>(sum_blocks(count) * source.tasks() * 2));
  {
    py::gil_scoped_release release;
    for (int64_t block = 0; block < sum_blocks(count); ++block) {
      delta_l1(source.view(), params.rule(), block, sums.data() + block * source.tasks() * 2);
    }
  }
  return to_bytes(sums.data(), sums.size() * sizeof(double));
}

py::bytes delta_gram_host(const py::object& base, const py::sequence& tuned, int64_t count) {
  const HostSource source(base, tuned, count, 0);
  const int64_t pairs = source.tasks() * source.tasks();
  std::vector<double> sums(static_cast<size_t>(sum_blocks(count) * pairs));
  {
    py::gil_scoped_release release;
    for (int64_t block = 0; block < sum_blocks(count); ++block)
      delta_gram(source.view(), block, sums.data() + block * pairs);
  }
  return to_bytes(sums.data(), sums.size() * sizeof(double));
}

int64_t delta_signs_host(const py::object& base, const py::sequence& tuned, int64_t count, int64_t index0,
                         const DeltaParams& params) {
  const HostSource source(base, tuned, count, index0);
  params.check(source.tasks(), index0, count);
  py::gil_scoped_release release;
  return delta_signs(source.view(), params.rule());
}

py::tuple delta_moments_host(const py::object& base, const py::sequence& tuned, int64_t count) {
  const HostSource source(base, tuned, count, 0);
  const auto tasks = static_cast<size_t>(source.tasks());
  std::vector<double> sums(2 + tasks * (tasks + 1));
  std::vector<int64_t> counts(3 + tasks * (2 * tasks + kOctaves + 1));
  double *gram = sums.data() + 2, *l1 = gram + tasks * tasks;
  int64_t *octaves = counts.data() + 2, *both = octaves + tasks * kOctaves, *opposed = both + tasks * tasks;
  int64_t* bad = opposed + tasks * tasks;
  {
    py::gil_scoped_release release;
    delta_moments(source.view(), {sums.data(), gram, l1, sums.data() + 1, octaves, both, opposed, counts.data(),
                                  counts.data() + 1, bad});
  }
  return py::make_tuple(to_bytes(sums.data(), sums.size() * 8), to_bytes(counts.data(), counts.size() * 8));
}

std::pair<int64_t, int64_t> count_nonfinite_host(const py::object& buffer, int64_t count) {
  const Buffer x = parse_buffer("buffer", buffer, count);
  py::gil_scoped_release release;
  return count_nonfinite(x, count);
}

uint32_t crc32c_host(const py::object& data, uint32_t crc) {
  if (py::isinstance<py::tuple>(data)) {
    const auto [address, bytes] = data.cast<std::pair<uintptr_t, int64_t>>();
    if (bytes < 0 || (bytes > 0 && address == 0)) throw py::value_error("crc32c: need an address and a length >= 0");
    py::gil_scoped_release release;
    return crc32c(reinterpret_cast<const void*>(address), bytes, crc);
  }
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  {
    py::gil_scoped_release release;
    crc = crc32c(view.buf, view.len, crc);
  }
  PyBuffer_Release(&view);
  return crc;
}

uint32_t crc32c_combine_host(uint32_t first, uint32_t second, int64_t second_bytes) {
  if (second_bytes < 0) throw py::value_error("crc32c_combine: length must not be negative");
  return crc32c_combine(first, second, second_bytes);
}

// A contiguous buffer of Python, let go at the end of the scope.
class View {
 public:
  View(const py::object& object, bool writable = false) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() { PyBuffer_Release(&view_); }

  unsigned char* data() const { return static_cast<unsigned char*>(view_.buf); }
  int64_t bytes() const { return view_.len; }
  const int64_t* indices() const { return reinterpret_cast<const int64_t*>(view_.buf); }
  int64_t count() const { return view_.len / 8; }

 private:
  Py_buffer view_;
};

void check_indices(const char* name, const View& indices, int64_t size) {
  for (int64_t i = 0; i < indices.count(); ++i) {
    const int64_t index = indices.indices()[i];
    if (index < 0 || index >= size) {
      throw py::value_error("gather_rows: " + std::string(name) + "[" + std::to_string(i) + "] is " +
                            std::to_string(index) + ", must be from 0 to " + std::to_string(size - 1));
    }
  }
}

void gather_rows_host(const py::object& source, const py::object& out, int64_t row_bytes, const py::object& rows,
                      const py::object& places, const std::optional<py::object>& columns, int64_t unit) {
  const View from(source), to(out, true), wanted(rows), put(places);
  const View order(columns.value_or(py::bytes("")));
  const int64_t n = order.count();
  if (row_bytes <= 0 || unit <= 0 || (n > 0 && row_bytes % (n * unit) != 0) || wanted.count() != put.count()) {
    throw py::value_error("gather_rows: " + std::to_string(wanted.count()) + " rows of " + std::to_string(row_bytes) +
                          " bytes to " + std::to_string(put.count()) + " places, in " + std::to_string(n) +
                          " blocks of " + std::to_string(unit) + ": these do not go together");
  }
  check_indices("rows", wanted, from.bytes() / row_bytes);
  check_indices("places", put, to.bytes() / row_bytes);
  check_indices("columns", order, n);
  py::gil_scoped_release release;
  const std::vector<int32_t> narrow(order.indices(), order.indices() + n);
  gather_rows({from.data(), to.data(), wanted.indices(), put.indices(), wanted.count(), row_bytes,
               n > 0 ? narrow.data() : nullptr, n, unit});
}

void decode_scaled_host(const py::object& source, const py::object& out, const py::object& table,
                        const py::object& scales, int64_t first, const std::array<int64_t, 2>& shape,
                        const std::array<int64_t, 2>& block) {
  const View from(source), to(out, true), values(table), factors(scales);
  const auto [rows, columns] = shape;
  const auto [block_rows, block_columns] = block;
  if (first < 0 || rows <= 0 || columns <= 0 || block_rows <= 0 || block_columns <= 0 || values.bytes() != 256 * 4) {
    throw py::value_error("decode_scaled: need first >= 0, positive sizes and a table of 256 float32");
  }
  const int64_t scale_rows = (rows - 1) / block_rows + 1, scale_columns = (columns - 1) / block_columns + 1;
  const int64_t count = from.bytes(), matrices = factors.bytes() / 4 / (scale_rows * scale_columns);
  if (to.bytes() != 4 * count || first > matrices * rows * columns - count) {
    throw py::value_error("decode_scaled: " + std::to_string(count) + " entries from " + std::to_string(first) +
                          " on to " + std::to_string(to.bytes()) + " bytes, scales of " + std::to_string(matrices) +
                          " matrices: these do not go together");
  }
  py::gil_scoped_release release;
  decode_scaled({from.data(), reinterpret_cast<float*>(to.data()), reinterpret_cast<const float*>(values.data()),
                 reinterpret_cast<const float*>(factors.data()), first, count, rows, columns, block_rows, block_columns,
                 scale_rows, scale_columns});
}

// Two paths change places in one step; false where the kernel or the file system cannot.
bool rename_exchange(const std::string& a, const std::string& b) {
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE
  if (renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), kExchange) == 0) return true;
  if (errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP) return false;
  PyErr_SetFromErrnoWithFilename(PyExc_OSError, a.c_str());
  throw py::error_already_set();
}

py::dict cpu_features_host() {
  const CpuFeatures& f = cpu_features();
  py::dict d;
  d["sse4.2"] = f.sse42;
  d["avx2"] = f.avx2;
  d["f16c"] = f.f16c;
  d["avx512"] = f.avx512;
  d["avx512_bf16"] = f.avx512_bf16;
  d["amx_bf16"] = f.amx_bf16;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  cpu_level();  // a wrong PYMERGE_CPU is told at import
  const py::arg base("base"), tuned("tuned"), count("count"), index0("index0"), keep("keep"), keys("keys");
  bind_params(m);
  m.def("delta_merge", &delta_merge_host, base, tuned, py::arg("add"), py::arg("out"), count, index0,
        py::arg("params"));
  m.def("delta_kth", &delta_kth_host, base, tuned, count, py::arg("ranks"), py::arg("row_length") = 0,
        py::arg("keep") = py::none(), py::arg("keys") = py::none(), py::arg("index0") = 0);
  m.def("delta_histogram", &delta_histogram_host, base, tuned, count, index0, keep, keys, py::arg("prefix"),
        py::arg("hist"));
  m.def("delta_count_equal", &delta_count_equal_host, base, tuned, count, index0, keep, keys, py::arg("theta"));
  m.def("delta_find_equal", &delta_find_equal_host, base, tuned, count, index0, keep, py::arg("key"), py::arg("theta"),
        py::arg("nth"));
  m.def("delta_l1", &delta_l1_host, base, tuned, count, index0, py::arg("params"));
  m.def("delta_gram", &delta_gram_host, base, tuned, count);
  m.def("delta_signs", &delta_signs_host, base, tuned, count, index0, py::arg("params"));
  m.def("delta_moments", &delta_moments_host, base, tuned, count);
  m.def("count_nonfinite", &count_nonfinite_host, py::arg("buffer"), count);
  m.def("crc32c", &crc32c_host, py::arg("data"), py::arg("crc") = 0);
  m.def("crc32c_combine", &crc32c_combine_host, py::arg("first"), py::arg("second"), py::arg("second_bytes"));
  m.def("gather_rows", &gather_rows_host, py::arg("source"), py::arg("out"), py::arg("row_bytes"), py::arg("rows"),
        py::arg("places"), py::arg("columns"), py::arg("unit"));
  m.def("decode_scaled", &decode_scaled_host, py::arg("source"), py::arg("out"), py::arg("table"), py::arg("scales"),
        py::arg("first"), py::arg("shape"), py::arg("block"));
  m.def("rename_exchange", &rename_exchange, py::arg("a"), py::arg("b"));
  m.def("cpu_level", &cpu_level);
  m.def("cpu_features", &cpu_features_host);
}
