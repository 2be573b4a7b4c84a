// Exact rank selection. A sample brackets the k-th magnitude, one pass counts what lies above the bracket and stores
// what lies inside, and the selection goes on among those; a bracket that misses is widened, so the sample decides the
// speed and never the result. Entries are ordered by (magnitude descending, index ascending).
#include <algorithm>
#include <cmath>
#include <functional>

#include "delta.h"

namespace pymerge {
namespace {

constexpr int64_t kSmall = 2048;        // at most: nth_element at once
constexpr int64_t kInMemory = 1 << 16;  // rows up to this long are held as magnitudes
constexpr int64_t kSampleRun = 8;       // neighbours taken together: one Philox group
constexpr int64_t kLargeSample = 1 << 15;
constexpr uint32_t kLargest = 0x7FFFFFFFu;

struct Kth {
  uint32_t theta;
  int64_t nth;  // which of the entries equal to theta, from 0
};

struct Bracket {
  uint32_t low, high;
};

uint32_t sample_rank(std::vector<uint32_t>& sample, double rank, uint32_t before, uint32_t behind) {
  if (rank < 0) return before;
  if (rank >= static_cast<double>(sample.size())) return behind;
  const auto at = sample.begin() + static_cast<int64_t>(rank);
  std::nth_element(sample.begin(), at, sample.end(), std::greater<>());
  return *at;
}

// Values between which the k-th of n lies, by `width` standard deviations of the sample's rank.
Bracket bracket(std::vector<uint32_t>& sample, int64_t k, int64_t n, double width) {
  const double size = static_cast<double>(sample.size()), share = static_cast<double>(k) / static_cast<double>(n);
  const double margin = width * std::sqrt(size * share * (1.0 - share)) + 2.0;
  return {sample_rank(sample, size * share + margin, kLargest, 0),
          sample_rank(sample, size * share - margin, kLargest, 0)};
}

Kth select_by_sorting(const uint32_t* values, int64_t n, int64_t k) {
  std::vector<uint32_t> copy(values, values + n);
  std::nth_element(copy.begin(), copy.begin() + (k - 1), copy.end(), std::greater<>());
  const uint32_t theta = copy[static_cast<size_t>(k - 1)];
  const int64_t above = std::count_if(copy.begin(), copy.begin() + (k - 1), [&](uint32_t v) { return v > theta; });
  return {theta, k - 1 - above};
}

// The k-th largest (from 1) of n values in memory.
Kth select_in_memory(const uint32_t* values, int64_t n, int64_t k) {
  if (n <= kSmall) return select_by_sorting(values, n, k);
  const int64_t size = std::max<int64_t>(512, static_cast<int64_t>(std::pow(static_cast<double>(n), 2.0 / 3.0)));
  std::vector<uint32_t> sample(static_cast<size_t>(size)), inside(static_cast<size_t>(n) + 64);
  for (int64_t i = 0; i < size; ++i) sample[static_cast<size_t>(i)] = values[i * n / size];
  for (double width = 4.0; width < 1e4; width *= 8.0) {
    const Bracket b = bracket(sample, k, n, width);
    int64_t above = 0;
    const int64_t stored = kernels().collect(values, n, b.low, b.high, inside.data(), &above);
    if (k <= above || k > above + stored) continue;
    if (b.low == b.high) return {b.low, k - above - 1};
    if (stored > n / 2) break;
    return select_in_memory(inside.data(), stored, k - above);
  }
  return select_by_sorting(values, n, k);
}

// Walks entries [begin, begin + length) of one task as blocks of magnitude bits; `visit` returns false to stop.
template <typename Visit>
void each_block(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t length,
                Visit visit) {
  float* scratch = thread_scratch(merge_scratch(1));
  alignas(64) uint32_t values[kBlock];
  for (int64_t at = 0; at < length; at += kBlock) {
    const int64_t n = std::min(kBlock, length - at);
    kernels().magnitudes(source, rule, task, begin + at, begin + at + n, scratch, values);
    if (!visit(at, n, values)) return;
  }
}

int64_t nth_equal(const uint32_t* values, int64_t n, uint32_t theta, int64_t nth) {
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] == theta && nth-- == 0) return i;
  }
  return -1;
}

int64_t find_equal(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t length,
                   uint32_t theta, int64_t nth) {
  int64_t found = -1;
  each_block(source, rule, task, begin, length, [&](int64_t at, int64_t n, const uint32_t* values) {
    const int64_t equal = kernels().count_equal(values, n, theta);
    if (nth < equal) found = begin + at + nth_equal(values, n, theta, nth);
    nth -= equal;
    return found < 0;
  });
  return found;
}

using Cut = std::pair<float, int64_t>;  // theta, index within the tensor just behind the k-th entry

Cut select_small(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t length,
                 int64_t k) {
  std::vector<uint32_t> row(static_cast<size_t>(length));
  each_block(source, rule, task, begin, length, [&](int64_t at, int64_t n, const uint32_t* values) {
    std::copy(values, values + n, row.begin() + at);
    return true;
  });
  const Kth kth = select_in_memory(row.data(), length, k);
  const int64_t at = nth_equal(row.data(), length, kth.theta, kth.nth);
  return {bits_to_float(kth.theta), source.index0 + begin + at + 1};
}

// Runs of neighbours, one in each of equal strata at a place that a fixed hash chooses (a plain stride could beat with
// rows).
std::vector<uint32_t> take_sample(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin,
                                  int64_t length) {
  const int64_t runs = kLargeSample / kSampleRun, stratum = length / runs;
  std::vector<uint32_t> sample(static_cast<size_t>(kLargeSample));
  float* scratch = thread_scratch(merge_scratch(1));
  for (int64_t i = 0; i < runs; ++i) {
    const uint64_t hash = (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15ull >> 33;
    const int64_t room = std::max<int64_t>(1, stratum - kSampleRun + 1);
    const int64_t at = begin + i * stratum + static_cast<int64_t>(hash) % room;
    kernels().magnitudes(source, rule, task, at, at + kSampleRun, scratch, sample.data() + i * kSampleRun);
  }
  return sample;
}

// What one pass found inside a bracket, in index order, with the number stored before each block.
struct Inside {
  std::vector<uint32_t> values;
  std::vector<int64_t> before;
  int64_t above = 0, stored = 0;
  bool overflow = false;
};

Inside collect_inside(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t length,
                      Bracket b) {
  Inside found;
  const int64_t limit = length / 8 + kLargeSample;
  each_block(source, rule, task, begin, length, [&](int64_t, int64_t n, const uint32_t* values) {
    const int64_t room = static_cast<int64_t>(found.values.size());
    if (room < found.stored + kBlock + 16)
      found.values.resize(static_cast<size_t>(std::max(2 * room, length / 64 + 2 * kBlock)));
    found.before.push_back(found.stored);
    found.stored += kernels().collect(values, n, b.low, b.high, found.values.data() + found.stored, &found.above);
    found.overflow = found.stored > limit;
    return !found.overflow;
  });
  return found;
}

// Bounded memory whatever the values are: two histograms, then a search for the index.
Cut select_by_histogram(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t length,
                        int64_t k) {
  std::vector<int64_t> hist(static_cast<size_t>(kCoarseBins));
  int64_t bin = kCoarseBins;
  const auto descend = [&] {
    while (k > hist[static_cast<size_t>(--bin)]) k -= hist[static_cast<size_t>(bin)];
  };
  each_block(source, rule, task, begin, length, [&](int64_t, int64_t n, const uint32_t* values) {
    for (int64_t i = 0; i < n; ++i) ++hist[values[i] >> kFineBits];
    return true;
  });
  descend();
  const uint32_t prefix = static_cast<uint32_t>(bin);
  hist.assign(static_cast<size_t>(kFineBins), 0);
  bin = kFineBins;
  each_block(source, rule, task, begin, length, [&](int64_t, int64_t n, const uint32_t* values) {
    for (int64_t i = 0; i < n; ++i) {
      if (values[i] >> kFineBits == prefix) ++hist[values[i] & (kFineBins - 1)];
    }
    return true;
  });
  descend();
  const uint32_t theta = prefix << kFineBits | static_cast<uint32_t>(bin);
  return {bits_to_float(theta), source.index0 + find_equal(source, rule, task, begin, length, theta, k - 1) + 1};
}

// The bracket is one value, mostly 0: count what is above it and, block by block, what equals it; nothing is stored.
// False: the k-th entry is another value.
bool select_at_value(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t length,
                     int64_t k, uint32_t value, Cut* cut) {
  uint32_t equal[kBlock + 16];
  std::vector<int64_t> before;  // entries equal to value in front of each block
  int64_t above = 0, count = 0;
  each_block(source, rule, task, begin, length, [&](int64_t, int64_t n, const uint32_t* values) {
    before.push_back(count);
    count += kernels().collect(values, n, value, value, equal, &above);
    return true;
  });
  if (k <= above || k > above + count) return false;
  const int64_t nth = k - above - 1;
  const auto block = std::upper_bound(before.begin(), before.end(), nth) - before.begin() - 1;
  const int64_t at = begin + block * kBlock, n = std::min(kBlock, begin + length - at);
  const int64_t earlier = nth - before[static_cast<size_t>(block)];
  *cut = {bits_to_float(value), source.index0 + find_equal(source, rule, task, at, n, value, earlier) + 1};
  return true;
}

Cut select_large(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t length,
                 int64_t k) {
  std::vector<uint32_t> sample = take_sample(source, rule, task, begin, length);
  for (double width = 4.5; width < 100.0; width *= 4.0) {
    const Bracket b = bracket(sample, k, length, width);
    Cut cut;
    if (b.low == b.high && select_at_value(source, rule, task, begin, length, k, b.low, &cut)) return cut;
    if (b.low == b.high) continue;
    const Inside found = collect_inside(source, rule, task, begin, length, b);
    if (found.overflow) break;
    if (k <= found.above || k > found.above + found.stored) continue;
    const Kth kth = select_in_memory(found.values.data(), found.stored, k - found.above);
    const int64_t place = nth_equal(found.values.data(), found.stored, kth.theta, kth.nth);
    const auto block = std::upper_bound(found.before.begin(), found.before.end(), place) - found.before.begin() - 1;
    const int64_t earlier = std::count(found.values.begin() + found.before[static_cast<size_t>(block)],
                                       found.values.begin() + place, kth.theta);
    const int64_t at = begin + block * kBlock, n = std::min(kBlock, begin + length - at);
    return {bits_to_float(kth.theta), source.index0 + find_equal(source, rule, task, at, n, kth.theta, earlier) + 1};
  }
  return select_by_histogram(source, rule, task, begin, length, k);
}

}  // namespace

std::pair<float, int64_t> delta_kth(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin,
                                    int64_t length, int64_t rank) {
  if (rank <= 0) return {INFINITY, 0};
  if (rank >= length) return {0.0f, kEverything};
  if (length <= kInMemory) return select_small(source, rule, task, begin, length, rank);
  return select_large(source, rule, task, begin, length, rank);
}

void delta_histogram(const DeltaSource& source, const DeltaRule& rule, const int64_t* prefix, int64_t* hist) {
  for (int64_t task = 0; task < source.tasks; ++task) {
    int64_t* bins = hist + task * (prefix == nullptr ? kCoarseBins : kFineBins);
    each_block(source, rule, task, 0, source.count, [&](int64_t, int64_t n, const uint32_t* values) {
      if (prefix == nullptr) {
        for (int64_t i = 0; i < n; ++i) ++bins[values[i] >> kFineBits];
      } else {
        for (int64_t i = 0; i < n; ++i) {
          if (values[i] >> kFineBits == prefix[task]) ++bins[values[i] & (kFineBins - 1)];
        }
      }
      return true;
    });
  }
}

int64_t delta_count_equal(const DeltaSource& source, const DeltaRule& rule, int64_t task, float theta) {
  int64_t total = 0;
  each_block(source, rule, task, 0, source.count, [&](int64_t, int64_t n, const uint32_t* values) {
    total += kernels().count_equal(values, n, float_to_bits(theta));
    return true;
  });
  return total;
}

int64_t delta_find_equal(const DeltaSource& source, const DeltaRule& rule, int64_t task, float theta, int64_t nth) {
  const int64_t at = find_equal(source, rule, task, 0, source.count, float_to_bits(theta), nth);
  return at < 0 ? -1 : source.index0 + at;
}

}  // namespace pymerge
