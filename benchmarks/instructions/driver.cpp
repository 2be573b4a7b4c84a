// Calls each CPU kernel on its AVX2 path with fixed inputs, first to make what is made once, then to be counted: what
// runs within measured() is the kernel's number of instructions under callgrind (count.py). Prints the kernels' names
// in the order of the calls. Needs neither torch nor Python. Exit code 3: no AVX2 here.
#include <cstdio>
#include <functional>

#include "cpu/assign.h"
#include "cpu/cov_kernels.h"
#include "cpu/crc32c.h"
#include "cpu/delta.h"
#include "cpu/gather.h"
#include "cpu/gram64.h"
#include "cpu/projection.h"
#include "cpu/scaled.h"
#include "cpu/sketch.h"

// In the place of csrc/cpu/cpu_level.cpp: AVX2, whatever this CPU has. callgrind knows no AVX-512.
namespace pymerge {

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = {.sse42 = true, .avx2 = true, .f16c = true};
  return features;
}

const std::string& cpu_level() {
  static const std::string level = "avx2";
  return level;
}

const Kernels& kernels() { return avx2::kernels(); }

}  // namespace pymerge

extern "C" __attribute__((noinline)) void measured(const std::function<void()>& run) {
  run();
  asm volatile("" ::: "memory");
}

namespace pymerge {
namespace {

constexpr int64_t kEntries = 100003, kTasks = 3;  // no multiple of anything: tails are part of the count

// Runs at once, so that inputs need not outlive the call that made them.
void kernel(const char* name, const std::function<void()>& run) {
  run();
  measured(run);
  std::puts(name);
}

// About normal, of the same bits everywhere: sums of four 16-bit numbers of splitmix64.
class Noise {
 public:
  float next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const auto sum = static_cast<int32_t>((z & 0xFFFF) + (z >> 16 & 0xFFFF) + (z >> 32 & 0xFFFF) + (z >> 48));
    return static_cast<float>(sum - 2 * 0xFFFF) * 0x1p-15f;
  }

 private:
  uint64_t state_ = 0;
};

// Entries in a dtype.
class Stored {
 public:
  Stored(const std::vector<float>& x, Dtype dtype) : dtype_(dtype), bytes_(x.size() * 8) {
    for (size_t i = 0; i < x.size(); ++i) {
      if (dtype == Dtype::kF32) reinterpret_cast<float*>(bytes_.data())[i] = x[i];
      if (dtype == Dtype::kF64) reinterpret_cast<double*>(bytes_.data())[i] = x[i];
      if (dtype == Dtype::kBF16) reinterpret_cast<uint16_t*>(bytes_.data())[i] = float_to_bf16(x[i]);
      if (dtype == Dtype::kF16) reinterpret_cast<uint16_t*>(bytes_.data())[i] = float_to_f16(x[i]);
    }
  }
  Buffer buffer() const { return {bytes_.data(), dtype_}; }
  void* data() { return bytes_.data(); }

 private:
  Dtype dtype_;
  std::vector<unsigned char> bytes_;
};

std::vector<float> noise(int64_t count, float scale) {
  Noise g;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = scale * g.next();
  return x;
}

// A base and fine-tuned models whose updates are a twentieth of it.
struct Models {
  explicit Models(Dtype dtype, int64_t count = kEntries) : base(noise(count, 0.02f), dtype), out(base) {
    Noise g;
    for (int64_t t = 0; t < kTasks; ++t) {
      std::vector<float> x = noise(count, 0.02f);
      for (float& value : x) value += 0.001f * g.next();
      stored.emplace_back(x, dtype);
    }
    for (const Stored& x : stored) tuned.push_back(x.buffer());
  }
  DeltaSource source(int64_t count = kEntries) const { return {base.buffer(), tuned.data(), kTasks, count, 0}; }

  Stored base, out;
  std::vector<Stored> stored;
  std::vector<Buffer> tuned;
};

constexpr float kWeights[kTasks] = {0.5f, 0.3f, 0.2f}, kRescales[kTasks] = {2.0f, 2.0f, 2.0f};
constexpr uint64_t kKeys[kTasks] = {11, 12, 13};

DeltaRule plain() { return {.tasks = kTasks, .weights = kWeights, .scale = 0.9f}; }

struct Cuts {
  std::vector<float> theta;
  std::vector<int64_t> index;
};

Cuts cuts(const DeltaSource& source, int64_t rank, int64_t rows = 1) {
  const int64_t length = source.count / rows;
  Cuts found;
  for (int64_t i = 0; i < kTasks * rows; ++i) {
    const auto [theta, index] = delta_kth(source, plain(), i / rows, i % rows * length, length, rank);
    found.theta.push_back(theta);
    found.index.push_back(index);
  }
  return found;
}

void merges() {
  Models bf16(Dtype::kBF16), f16(Dtype::kF16), f32(Dtype::kF32);
  const auto merge = [](const char* name, Models& m, const DeltaRule& rule, int64_t count = kEntries) {
    std::vector<int64_t> bad(kTasks + 3);
    const MergeTarget target = {m.base.buffer(), m.out.data(), m.base.buffer().dtype};
    kernel(name, [&] { delta_merge(m.source(count), rule, target, bad.data()); });
  };
  merge("merge linear bf16", bf16, plain());
  merge("merge linear f16", f16, plain());
  merge("merge linear f32", f32, plain());

  const DeltaSource source = bf16.source();
  const Cuts top = cuts(source, kEntries / 5), skip = cuts(source, kEntries / 100);
  DeltaRule rule = plain();
  rule.top_theta = top.theta.data();
  rule.top_index = top.index.data();
  merge("merge trimmed", bf16, rule);
  rule.skip_theta = skip.theta.data();
  rule.skip_index = skip.index.data();
  merge("merge breadcrumbs", bf16, rule);
  rule.skip_theta = nullptr;
  rule.skip_index = nullptr;
  rule.elect = true;
  rule.norm = Norm::kCount;
  merge("merge ties", bf16, rule);
  rule.norm = Norm::kMax;
  merge("merge ties max", bf16, rule);

  constexpr int64_t rows = 97, length = 1021;
  const Cuts by_row = cuts(bf16.source(rows * length), length / 5, rows);
  rule = plain();
  rule.rows = rows;
  rule.row_length = length;
  rule.top_theta = by_row.theta.data();
  rule.top_index = by_row.index.data();
  merge("merge trimmed by rows", bf16, rule, rows * length);

  const KeepLimit keep[kTasks] = {keep_limit(0.5), keep_limit(0.5), keep_limit(0.5)};
  rule = plain();
  rule.keep = keep;
  rule.keys = kKeys;
  rule.rescales = kRescales;
  merge("merge dare", bf16, rule);
  rule.elect = true;
  rule.norm = Norm::kWeights;
  merge("merge dare ties", bf16, rule);
}

void selections() {
  const Models m(Dtype::kBF16), f32(Dtype::kF32);
  const DeltaSource source = m.source();
  const DeltaRule rule = plain();
  const KeepLimit keep[kTasks] = {keep_limit(0.5), keep_limit(0.5), keep_limit(0.5)};
  DeltaRule masked = rule;
  masked.keep = keep;
  masked.keys = kKeys;
  kernel("kth large bf16", [&] { delta_kth(source, rule, 0, 0, kEntries, kEntries / 5); });
  kernel("kth large f32", [&] { delta_kth(f32.source(), rule, 0, 0, kEntries, kEntries / 5); });
  kernel("kth large masked", [&] { delta_kth(source, masked, 0, 0, kEntries, kEntries / 5); });
  kernel("kth in memory", [&] { delta_kth(source, rule, 0, 0, 1 << 16, 1 << 13); });
  kernel("kth of a row", [&] { delta_kth(source, rule, 0, 0, 1021, 204); });

  std::vector<int64_t> coarse(static_cast<size_t>(kCoarseBins * kTasks));
  kernel("histogram coarse", [&] { delta_histogram(source, rule, nullptr, coarse.data()); });
  const float theta = delta_kth(source, rule, 0, 0, kEntries, kEntries / 5).first;
  const int64_t bin = float_to_bits(theta) >> kFineBits, prefix[kTasks] = {bin, bin, bin};
  kernel("histogram fine", [&] { delta_histogram(source, rule, prefix, coarse.data()); });
  kernel("count equal", [&] { delta_count_equal(source, rule, 0, theta); });
  const int64_t last = delta_count_equal(source, rule, 0, theta) - 1;
  kernel("find equal", [&] { delta_find_equal(source, rule, 0, theta, last); });
}

void sums() {
  const Models m(Dtype::kBF16);
  const DeltaSource source = m.source();
  std::vector<double> out(kTasks * kTasks);
  kernel("l1", [&] { delta_l1(source, plain(), 0, out.data()); });
  kernel("gram", [&] { delta_gram(source, 0, out.data()); });
  kernel("signs", [&] { delta_signs(source, plain()); });
  std::vector<double> moments(2 + kTasks * (kTasks + 1));
  std::vector<int64_t> counts(3 + kTasks * (2 * kTasks + kOctaves + 1));
  double *gram = moments.data() + 2, *l1 = gram + kTasks * kTasks;
  int64_t *octaves = counts.data() + 2, *both = octaves + kTasks * kOctaves, *opposed = both + kTasks * kTasks;
  const MomentSums all = {
      moments.data(),           gram, l1, moments.data() + 1, octaves, both, opposed, counts.data(), counts.data() + 1,
      opposed + kTasks * kTasks};
  kernel("moments", [&] { delta_moments(source, all); });
}

void conversions() {
  const std::vector<float> x = noise(kEntries, 1.0f);
  Stored bf16(x, Dtype::kBF16), f16(x, Dtype::kF16);
  kernel("cast to bf16", [&] { kernels().cast(x.data(), bf16.data(), Dtype::kBF16, kEntries); });
  kernel("cast to f16", [&] { kernels().cast(x.data(), f16.data(), Dtype::kF16, kEntries); });
  kernel("count non-finite bf16", [&] { count_nonfinite(bf16.buffer(), kEntries); });

  constexpr int64_t rows = 384, columns = 256, block = 128;
  std::vector<float> table(256), scales(rows * columns / (block * block)), wide(rows * columns);
  for (size_t i = 0; i < 256; ++i) table[i] = static_cast<float>(i);
  const auto* bytes = static_cast<const unsigned char*>(bf16.data());
  const Scaled scaled = {bytes, wide.data(), table.data(), scales.data(),  0, rows * columns, rows, columns,
                         block, block,       rows / block, columns / block};
  kernel("decode fp8 in blocks", [&] { decode_scaled(scaled); });
  kernel("crc32c", [&] { crc32c(bytes, 200000); });
  kernel("crc32c combine", [&] { crc32c_combine(1, 2, 123456789); });
}

void gathers() {
  constexpr int64_t rows = 256, columns = 384;
  std::vector<int64_t> order(rows), places(rows);
  std::vector<int32_t> within(columns);
  for (int64_t i = 0; i < rows; ++i) order[static_cast<size_t>(i)] = i * 101 % rows;
  for (int64_t i = 0; i < rows; ++i) places[static_cast<size_t>(i)] = i;
  for (int64_t i = 0; i < columns; ++i) within[static_cast<size_t>(i)] = static_cast<int32_t>(i * 101 % columns);
  std::vector<uint64_t> memory(2 * rows * columns);
  const auto* from = reinterpret_cast<const unsigned char*>(memory.data());
  auto* to = reinterpret_cast<unsigned char*>(memory.data() + rows * columns);
  const auto gather = [&](const char* name, int64_t unit, int64_t blocks) {
    const Gather g = {from, to, order.data(), places.data(), rows, blocks * unit, within.data(), blocks, unit};
    kernel(name, [&] { gather_rows(g); });
  };
  gather("gather 2 bytes", 2, columns);
  gather("gather 4 bytes", 4, columns);
  gather("gather blocks", 3, columns);
}

// 64-byte aligned and zero.
class Floats {
 public:
  explicit Floats(int64_t count) : memory_(static_cast<size_t>(count) + 16) {}
  float* get() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64); }

 private:
  std::vector<float> memory_;
};

void products() {
  constexpr int64_t m = 192, n = 500, r = 20;
  Floats scratch(kStripScratch), strip(kStripSize);
  const Stored basis(noise(m * r, 0.1f), Dtype::kF32);
  for (const Dtype dtype : {Dtype::kBF16, Dtype::kF32}) {
    const Models models(dtype, m * n);
    const Matrix q = {basis.buffer().data, Dtype::kF32, r, 1};
    const Matrix base = {models.base.buffer().data, dtype, n, 1}, tuned = {models.tuned[0].data, dtype, n, 1};
    kernel(dtype == Dtype::kBF16 ? "project delta bf16" : "project delta f32",
           [&] { projection_kernels().strip({q, base, tuned, m, n, r}, 0, n, scratch.get(), strip.get()); });
  }
  double pair[2] = {};
  const Stored row(noise(kStripColumns, 1.0f), Dtype::kF32);
  kernel("projection row sums", [&] {
    projection_kernels().row_sums(row.buffer(), static_cast<const float*>(row.buffer().data), kStripColumns, pair);
  });

  constexpr int64_t depth = kGramDepth, width = 100;
  const GramKernels& gram = gram64_kernels();
  const int64_t panels = (width + gram.panel - 1) / gram.panel;
  std::vector<double> packed(static_cast<size_t>(panels * depth * gram.panel)), out(width * width);
  const Stored f16(noise(depth * width, 1.0f), Dtype::kF16);
  const GramInput x = {f16.buffer().data, Dtype::kF16, depth, width, width, 1};
  kernel("gram64 pack f16", [&] {
    for (int64_t p = 0; p < panels; ++p) gram.pack(x, p, 0, depth, packed.data() + p * depth * gram.panel);
  });
  kernel("gram64 add", [&] {
    for (int64_t p = 0; p < panels; ++p) gram.add(packed.data(), depth, width, p, out.data());
  });
}

void covariances() {
  constexpr int64_t rows = 300, columns = 100;
  std::vector<int64_t> kept(rows);
  for (int64_t i = 0; i < rows; ++i) kept[static_cast<size_t>(i)] = i;
  const auto covariance = [&](const char* name, const CovKernels& cov, Dtype dtype, bool wide) {
    const Stored x(noise(rows * columns, 1.0f), dtype);
    const int64_t panels = (columns + cov.width - 1) / cov.width, depth = cov_depth(cov, rows);
    Floats packed(panels * depth * kCovPanel / 4), total(2 * columns * columns);
    const CovSource source = {static_cast<const char*>(x.buffer().data), dtype, columns, 1, columns, kept.data()};
    const CovTarget target = {reinterpret_cast<char*>(total.get()), wide, columns, columns, 1.0};
    const auto panel = [&](int64_t p) { return reinterpret_cast<char*>(packed.get()) + p * depth * kCovPanel; };
    kernel(name, [&] {
      for (int64_t p = 0; p < panels; ++p) cov.pack(source, 0, rows, p, panel(p));
      for (int64_t i = 0; i < panels; ++i) {
        for (int64_t j = i; j < panels; ++j) cov.tile(panel(i), panel(j), i, j, depth, target);
      }
    });
  };
  covariance("covariance bf16", avx2::cov_float(), Dtype::kBF16, false);
  covariance("covariance f32", avx2::cov_float(), Dtype::kF32, true);
  covariance("covariance f64", avx2::cov_double(), Dtype::kF64, true);
}

void sketches() {
  using namespace sketching;
  constexpr int64_t n = 500, width = 100;
  const int segments = sketch_segments(width);
  std::vector<uint32_t> picks;
  for (int64_t row = 0; row < n; ++row) {
    for (int s = 0; s < segments; ++s) {
      const SparseEntry entry = sparse_entry(sparse_draws(7, row), s, segments, width);
      picks.push_back(static_cast<uint32_t>(entry.column) << 1 | entry.negative);
    }
  }
  Floats panel(width * kLanes), block(kColumns * 2 * kLanes), y(kLanes * width);
  const Picks chosen = {picks.data(), segments, width, 0.35};
  const Stored f32(noise(kLanes * n, 1.0f), Dtype::kF32), bf16(noise(kLanes * n, 1.0f), Dtype::kBF16);
  kernel("sketch sparse f32", [&] {
    sparse_rows({n, n, 1}, static_cast<const float*>(f32.buffer().data), kLanes, chosen, panel.get(), block.get(),
                y.get());
  });
  kernel("sketch sparse bf16", [&] {
    sparse_rows({n, n, 1}, static_cast<const Brain*>(bf16.buffer().data), kLanes, chosen, panel.get(), block.get(),
                y.get());
  });
  std::vector<float> omega(100 * width);
  kernel("sketch gaussian", [&] { gaussian_rows(7, 0, 100, width, omega.data()); });
}

// Scores whose best matching takes searches.
void assignments() {
  const auto assign = [](const char* name, int64_t rows, int64_t columns) {
    const std::vector<float> score = noise(rows * columns + kScanPad, 1.0f);
    std::vector<int64_t> match(static_cast<size_t>(rows));
    std::vector<double> row_prices(match.size()), prices(static_cast<size_t>(columns)), value(3);
    const AssignResult result = {match.data(), row_prices.data(), prices.data(), value.data()};
    kernel(name, [&] { assign_solve({score.data(), rows, columns, -1.0f, nullptr}, result); });
  };
  assign("assign square", 200, 200);
  assign("assign wide", 100, 250);
  assign("assign by lists", 1600, 1600);
}

}  // namespace
}  // namespace pymerge

int main() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 3;
  pymerge::merges();
  pymerge::selections();
  pymerge::sums();
  pymerge::conversions();
  pymerge::gathers();
  pymerge::products();
  pymerge::covariances();
  pymerge::sketches();
  pymerge::assignments();
}
