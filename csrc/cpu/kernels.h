// The loops over entries, one set per CPU level, chosen once at load. Raw pointers only: neither torch nor Python here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/delta_math.h"
#include "../common/dtype.h"

namespace pymerge {

constexpr int64_t kBlock = 1024;         // entries worked on at a time: float32 scratch of a block stays in L1
constexpr int64_t kSumBlock = 1 << 20;   // entries of one float64 partial sum; fixed, so sums do not depend on tiling
constexpr int64_t kDrawSlack = 8 + 512;  // draws before the first and after the last entry of a block
constexpr int64_t kBlockLanes = 16;      // float64 partial sums of entries i % 16

struct Buffer {
  const void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::kF32;
  Buffer at(int64_t entry) const {
    return {data == nullptr ? nullptr : static_cast<const char*>(data) + entry * item_size(dtype), dtype};
  }
};

// T tensors (or a tile of each) and what is subtracted from them; index0 is the index of entry 0 within the tensor.
struct DeltaSource {
  Buffer base;
  const Buffer* tuned = nullptr;
  int64_t tasks = 0;
  int64_t count = 0;
  int64_t index0 = 0;
};

struct MergeTarget {
  Buffer add;
  void* out = nullptr;
  Dtype dtype = Dtype::kF32;
  bool stream = false;  // stores bypass the caches: for outputs that would only push the inputs out
};

constexpr int32_t kOctaves = 32, kFirstOctave = -31;  // bins of magnitudes: below 2^-30, 31 powers of two, 1 and above

// What the moments are added to. T tasks; pairs s <= t at [s * T + t].
struct MomentSums {
  double* base;         // squares of the base's entries
  double* gram;         // [T][T] inner products of updates
  double* l1;           // [T] sums of magnitudes
  double* l1_of_sum;    // of the sum of all updates
  int64_t* octaves;     // [T][kOctaves]
  int64_t* both;        // [T][T] entries that both updates change; s = t: that the update changes
  int64_t* opposed;     // [T][T] those of them with different signs
  int64_t* contested;   // entries that at least two updates change
  int64_t* conflicted;  // those of them that one raises and another one lowers
  int64_t* bad;         // [1 + T] entries of base and models that are not finite
};

// Entries [begin, end) of the source throughout; begin a multiple of kBlock.
struct Kernels {
  // Merges; adds to bad [tasks + 3]. scratch: merge_scratch() floats, 64-byte aligned.
  void (*merge)(const DeltaSource&, const DeltaRule&, const MergeTarget&, int64_t begin, int64_t end, float* scratch,
                int64_t* bad);
  // bits of |d_t|, after the random mask; at most kBlock entries. scratch: 2 blocks.
  void (*magnitudes)(const DeltaSource&, const DeltaRule&, int64_t task, int64_t begin, int64_t end, float* scratch,
                     uint32_t* out);
  // Counts values > high, stores those in [low, high] in order; out has room for n + 16.
  int64_t (*collect)(const uint32_t* values, int64_t n, uint32_t low, uint32_t high, uint32_t* out, int64_t* above);
  int64_t (*count_equal)(const uint32_t* values, int64_t n, uint32_t value);
  // One kSumBlock or less. l1: out [tasks][2]; gram: out [tasks][tasks].
  void (*l1)(const DeltaSource&, const DeltaRule&, int64_t begin, int64_t end, float* scratch, double* out);
  void (*gram)(const DeltaSource&, int64_t begin, int64_t end, float* scratch, double* out);
  int64_t (*signs)(const DeltaSource&, const DeltaRule&, int64_t begin, int64_t end, float* scratch);
  void (*moments)(const DeltaSource&, float* scratch, const MomentSums&);  // scratch: moments_scratch() floats
  int64_t (*cast)(const float* x, void* y, Dtype dtype, int64_t n);
  int64_t (*count_bad)(Buffer, int64_t n);
};

inline int64_t merge_scratch(int64_t tasks) { return (tasks + 8) * kBlock + 2 * kDrawSlack; }

// In floats: blocks in float64, partial sums in lanes, three blocks of float32, bytes.
inline int64_t moments_scratch(int64_t tasks) {
  return 2 * (tasks + 1) * kBlock + 2 * kBlockLanes * (tasks * tasks + tasks + 3) + 3 * kBlock +
         (1 + tasks) * kBlock / 4;
}

namespace baseline {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

}  // namespace pymerge
