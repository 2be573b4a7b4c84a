// Element-wise merges on host memory: what both the torch operators and the host module call. Arguments have been
// checked.
#pragma once

#include <utility>
#include <vector>

#include "cpu_level.h"

namespace pymerge {

constexpr int64_t kEverything = INT64_MAX;  // cut index behind every entry
constexpr int64_t kCoarseBins = 1 << 16, kFineBins = 1 << 15;
constexpr int kFineBits = 15;

// 64-byte aligned float32 scratch of this thread, at least `floats` long; grows, never shrinks.
float* thread_scratch(int64_t floats);

// out = add + scale * (norm(sum_t x_t) / divisor); adds the non-finite entries to bad [tasks + 3].
void delta_merge(const DeltaSource& source, const DeltaRule& rule, MergeTarget target, int64_t* bad);

// One task, one row: the cut behind the first `rank` of entries [begin, begin + length).
std::pair<float, int64_t> delta_kth(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin,
                                    int64_t length, int64_t rank);

// Adds to hist: kCoarseBins a task of bits >> kFineBits, or, where prefix is given, kFineBins a task of the lower bits.
void delta_histogram(const DeltaSource& source, const DeltaRule& rule, const int64_t* prefix, int64_t* hist);

int64_t delta_count_equal(const DeltaSource& source, const DeltaRule& rule, int64_t task, float theta);

// Index within the tensor of the nth (from 0) entry whose magnitude is theta; -1 where there are fewer.
int64_t delta_find_equal(const DeltaSource& source, const DeltaRule& rule, int64_t task, float theta, int64_t nth);

inline int64_t sum_blocks(int64_t count) { return (count + kSumBlock - 1) / kSumBlock; }

// One block of kSumBlock entries (the last one shorter). l1 [tasks][2]; gram [tasks][tasks].
void delta_l1(const DeltaSource& source, const DeltaRule& rule, int64_t block, double* out);
void delta_gram(const DeltaSource& source, int64_t block, double* out);
int64_t delta_signs(const DeltaSource& source, const DeltaRule& rule);

// Adds what is known of all updates to `out`.
void delta_moments(const DeltaSource& source, const MomentSums& out);

// (how many, index of the first or -1)
std::pair<int64_t, int64_t> count_nonfinite(Buffer x, int64_t count);

}  // namespace pymerge
