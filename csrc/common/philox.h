// The random mask: Philox4x32-7 (Salmon et al., SC 2011), counter-based, so that an entry's fate depends on nothing
// but the 64-bit key of (seed, tensor, task) and the entry's index: not on tiling, threads, order or device.
#pragma once

#include "host_device.h"

namespace pymerge {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers and Weyl increments of the paper
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;  // the fewest that pass BigCrush (table 2 there); masks need no further margin

struct Philox4 {
  uint32_t word[4];
};

PYMERGE_HD Philox4 philox4x32(uint64_t key, uint64_t group, uint32_t plane) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = plane, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxM0} * c0, p1 = uint64_t{kPhiloxM1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// 16 random bits of entry `index`: eight entries share one Philox call. Plane 1 holds the draws that settle ties.
PYMERGE_HD uint32_t philox_draw(uint64_t key, uint64_t index, uint32_t plane) {
  const Philox4 r = philox4x32(key, index >> 3, plane);
  const uint32_t half = static_cast<uint32_t>(index & 7);
  return (r.word[half >> 1] >> (16 * (half & 1))) & 0xFFFFu;
}

// A keep probability p as the 32-bit integer T = floor(p * 2^32), split in halves; p >= 1 keeps every entry.
struct KeepLimit {
  uint32_t high;  // T >> 16
  uint32_t low;   // T & 0xffff
  bool all;
};

PYMERGE_HD KeepLimit keep_limit(double keep) {
  if (keep >= 1.0) return {0xFFFFu, 0xFFFFu, true};
  const uint64_t limit = keep > 0.0 ? static_cast<uint64_t>(keep * 4294967296.0) : 0;
  return {static_cast<uint32_t>(limit >> 16), static_cast<uint32_t>(limit & 0xFFFFu), false};
}

// `draw` is the entry's draw of plane 0; plane 1 is looked at once in 65536 times.
PYMERGE_HD bool keeps(KeepLimit limit, uint64_t key, uint64_t index, uint32_t draw) {
  if (limit.all || draw < limit.high) return true;
  return draw == limit.high && philox_draw(key, index, 1) < limit.low;
}

}  // namespace pymerge
