#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "delta.h"

namespace pymerge {
namespace {

constexpr int64_t kStreamBytes = int64_t{4} << 20;  // outputs at least this large bypass the caches

struct Release {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

float* thread_scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Release> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    float* fresh = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (fresh == nullptr) throw std::bad_alloc();
    memory.reset(fresh);
    size = floats;
  }
  return memory.get();
}

void delta_merge(const DeltaSource& source, const DeltaRule& rule, MergeTarget target, int64_t* bad) {
  target.stream = source.count * item_size(target.dtype) >= kStreamBytes;
  kernels().merge(source, rule, target, 0, source.count, thread_scratch(merge_scratch(source.tasks)), bad);
}

void delta_l1(const DeltaSource& source, const DeltaRule& rule, int64_t block, double* out) {
  const int64_t begin = block * kSumBlock, end = std::min(source.count, begin + kSumBlock);
  kernels().l1(source, rule, begin, end, thread_scratch(merge_scratch(source.tasks)), out);
}

void delta_gram(const DeltaSource& source, int64_t block, double* out) {
  const int64_t begin = block * kSumBlock, end = std::min(source.count, begin + kSumBlock);
  kernels().gram(source, begin, end, thread_scratch(merge_scratch(source.tasks)), out);
}

int64_t delta_signs(const DeltaSource& source, const DeltaRule& rule) {
  return kernels().signs(source, rule, 0, source.count, thread_scratch(merge_scratch(source.tasks)));
}

void delta_moments(const DeltaSource& source, const MomentSums& out) {
  kernels().moments(source, thread_scratch(moments_scratch(source.tasks)), out);
}

std::pair<int64_t, int64_t> count_nonfinite(Buffer x, int64_t count) {
  int64_t bad = 0, first = -1;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t n = std::min(kBlock, count - at), here = kernels().count_bad(x.at(at), n);
    for (int64_t i = 0; first < 0 && here > 0 && i < n; ++i) {
      if (kernels().count_bad(x.at(at + i), 1)) first = at + i;
    }
    bad += here;
  }
  return {bad, first};
}

}  // namespace pymerge
