// Philox4x32-10 (Salmon et al., SC 2011) and the random mask built on it. Counter-based: the draw of an entry depends on the key and
// on the entry's index alone, so that threads, tiles and devices agree bit for bit.
#pragma once

#include <cstdint>

#include "hd.h"

namespace pymerge {

struct Philox4 {
  uint32_t word[4];
};

PYMERGE_HD uint32_t mul_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

PYMERGE_HD Philox4 philox4x32_10(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = mul_high(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = mul_high(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The random mask of one task: entry i is kept when its draw of 32 bits is below threshold = floor(keep * 2^32). The upper 16 bits of
// eight entries come from one Philox call; the lower 16 bits are drawn only when the upper ones do not decide.
struct RandomMask {
  uint64_t threshold;  // 0..2^32; 2^32 keeps everything
  uint64_t key;
};

constexpr uint64_t kKeepAll = uint64_t{1} << 32;

inline uint64_t mask_threshold(double keep) {
  if (!(keep > 0.0)) return 0;
  if (keep >= 1.0) return kKeepAll;
  return static_cast<uint64_t>(keep * 4294967296.0);
}

// Draws of entries 8 * group .. 8 * group + 7; lane j is the (j & 1)-th half of word j >> 1, low half first. level 0 or 1.
PYMERGE_HD Philox4 mask_draws(uint64_t key, uint64_t group, uint32_t level) {
  return philox4x32_10(key, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), level, 0);
}

PYMERGE_HD uint32_t mask_lane(const Philox4& draws, int lane) {
  return (draws.word[lane >> 1] >> ((lane & 1) * 16)) & 0xFFFFu;
}

// Bit j: entry 8 * group + j is kept.
PYMERGE_HD uint32_t keep_bits(const RandomMask& mask, uint64_t group) {
  if (mask.threshold >= kKeepAll) return 0xFFu;
  const uint32_t high = static_cast<uint32_t>(mask.threshold >> 16), low = static_cast<uint32_t>(mask.threshold & 0xFFFFu);
  const Philox4 draws = mask_draws(mask.key, group, 0);
  uint32_t bits = 0, undecided = 0;
  for (int lane = 0; lane < 8; ++lane) {
    const uint32_t draw = mask_lane(draws, lane);
    bits |= static_cast<uint32_t>(draw < high) << lane;
    undecided |= static_cast<uint32_t>(draw == high) << lane;
  }
  if (undecided) {
    const Philox4 second = mask_draws(mask.key, group, 1);
    for (int lane = 0; lane < 8; ++lane) {
      bits |= (undecided >> lane & 1u & static_cast<uint32_t>(mask_lane(second, lane) < low)) << lane;
    }
  }
  return bits;
}

PYMERGE_HD bool kept(const RandomMask& mask, int64_t index) {
  const uint64_t i = static_cast<uint64_t>(index);
  return keep_bits(mask, i >> 3) >> (i & 7) & 1u;
}

}  // namespace pymerge
