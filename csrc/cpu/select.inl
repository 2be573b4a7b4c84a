// Which entries of a delta stay: the random mask, the magnitude window, and the compress-store of the rank selection.

// Fates of entries in a mask: 0 dropped, kKept, or kOpen: the draw equals the limit's upper half, the second plane
// decides.
constexpr uint16_t kKept = 0xFFFF, kOpen = 1;

// mark_draws: fates of `groups` groups of eight entries, in entry order, up to 31 groups more than asked; returns
// whether any is open.
#if PYMERGE_AVX512 || PYMERGE_F16C

#if PYMERGE_AVX512
typedef __m512i Words;  // one 32-bit Philox word of 8 groups, in the low halves of 64-bit lanes
constexpr int64_t kWordLanes = 8;
inline Words splat64(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
// Groups in the order in which interleave() puts them down one after another.
inline Words group_lanes(uint64_t first) {
  return _mm512_add_epi64(splat64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
}
inline Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
typedef __mmask32 Open;
inline Words limits(uint32_t high) { return _mm512_set1_epi16(static_cast<short>(high)); }
inline Open mark(Words draws, Words limit, char* out) {
  const Open open = _mm512_cmpeq_epu16_mask(draws, limit);
  const Words kept = _mm512_movm_epi16(_mm512_cmplt_epu16_mask(draws, limit));
  _mm512_storeu_si512(out, _mm512_mask_mov_epi16(kept, open, _mm512_set1_epi16(kOpen)));
  return open;
}
inline Open interleave(Words c0, Words c1, Words c2, Words c3, Words limit, char* out) {
  const Words a = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
  const Words b = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
  return mark(_mm512_unpacklo_epi64(a, b), limit, out) | mark(_mm512_unpackhi_epi64(a, b), limit, out + 64);
}
#else
typedef __m256i Words;
constexpr int64_t kWordLanes = 4;
inline Words splat64(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline Words group_lanes(uint64_t first) { return _mm256_add_epi64(splat64(first), _mm256_setr_epi64x(0, 2, 1, 3)); }
inline Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words xor3(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
typedef int Open;
inline Words limits(uint32_t high) { return _mm256_set1_epi16(static_cast<short>(high)); }
inline Open mark(Words draws, Words limit, char* out) {
  const Words open = _mm256_cmpeq_epi16(draws, limit);
  const Words kept = _mm256_andnot_si256(open, _mm256_cmpeq_epi16(_mm256_min_epu16(draws, limit), draws));
  const Words fates = _mm256_or_si256(kept, _mm256_and_si256(open, _mm256_set1_epi16(kOpen)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), fates);
  return _mm256_movemask_epi8(open);
}
inline Open interleave(Words c0, Words c1, Words c2, Words c3, Words limit, char* out) {
  const Words a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const Words b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  return mark(_mm256_unpacklo_epi64(a, b), limit, out) | mark(_mm256_unpackhi_epi64(a, b), limit, out + 32);
}
#endif

// Four vectors at a time hide the latency of the multiplications. Upper halves hold rubbish, which product() ignores.
bool mark_draws(uint32_t high_limit, uint64_t key, uint64_t group, int64_t groups, uint16_t* out) {
  constexpr int kVectors = 4;
  const Words limit = limits(high_limit);
  Open open = 0;
  const Words m0 = splat64(kPhiloxM0), m1 = splat64(kPhiloxM1);
  char* to = reinterpret_cast<char*>(out);
  for (int64_t g = 0; g < groups; g += kVectors * kWordLanes) {
    Words c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = group_lanes(group + static_cast<uint64_t>(g + v * kWordLanes));
      c1[v] = high(c0[v]);
      c2[v] = c3[v] = splat64(0);
    }
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      const Words key0 = splat64(k0), key1 = splat64(k1);
      for (int v = 0; v < kVectors; ++v) {
        const Words p0 = product(c0[v], m0), p1 = product(c2[v], m1);
        c0[v] = xor3(high(p1), c1[v], key0);
        c2[v] = xor3(high(p0), c3[v], key1);
        c1[v] = p1;
        c3[v] = p0;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      open |= interleave(c0[v], c1[v], c2[v], c3[v], limit, to + (g + v * kWordLanes) * 16);
    }
  }
  return open != 0;
}
#else
bool mark_draws(uint32_t high_limit, uint64_t key, uint64_t group, int64_t groups, uint16_t* out) {
  bool open = false;
  for (int64_t g = 0; g < groups; ++g) {
    const Philox4 r = philox4x32(key, group + static_cast<uint64_t>(g), 0);
    for (int half = 0; half < 8; ++half) {
      const uint32_t draw = r.word[half >> 1] >> (16 * (half & 1)) & 0xFFFFu;
      out[8 * g + half] = draw == high_limit ? kOpen : (draw < high_limit ? kKept : 0);
      open |= draw == high_limit;
    }
  }
  return open;
}
#endif

// 0xffff or 0 for each of n entries from `index` on, somewhere in scratch (a block and kDrawSlack of 16 bits each);
// null where the mask keeps everything.
const uint16_t* draw_mask(const DeltaRule& rule, int64_t task, int64_t index, int64_t n, float* scratch) {
  const KeepLimit limit = rule.keep[task];
  if (limit.all) return nullptr;
  const uint64_t key = rule.keys[task];
  uint16_t* fates = reinterpret_cast<uint16_t*>(scratch);
  uint16_t* mask = fates + (index & 7);
  if (mark_draws(limit.high, key, static_cast<uint64_t>(index) >> 3, ((index & 7) + n + 7) / 8, fates)) {
    for (int64_t i = 0; i < n; ++i) {
      if (mask[i] == kOpen) mask[i] = keeps(limit, key, static_cast<uint64_t>(index + i), limit.high) ? kKept : 0;
    }
  }
  return mask;
}

// d = 0 where the random mask drops the entry.
void apply_mask(const DeltaRule& rule, int64_t task, int64_t index, int64_t n, float* scratch, float* d) {
  const uint16_t* mask = draw_mask(rule, task, index, n, scratch);
  if (mask == nullptr) return;
  u32_at* bits = reinterpret_cast<u32_at*>(d);
  const int16_t* wide = reinterpret_cast<const int16_t*>(mask);
  for (int64_t i = 0; i < n; ++i) bits[i] &= static_cast<uint32_t>(int32_t{wide[i]});
}

// d = 0 where among_first(...) != wanted, within one row.
void cut_segment(float theta, int64_t first, int64_t n, bool wanted, float* d) {
  const int64_t ties =
      first < 0 ? 0 : least(first, n);  // entries before the cut's index: equal magnitudes belong to the first k
  for (int64_t i = 0; i < ties; ++i) d[i] = (__builtin_fabsf(d[i]) >= theta) == wanted ? d[i] : 0.0f;
  for (int64_t i = ties; i < n; ++i) d[i] = (__builtin_fabsf(d[i]) > theta) == wanted ? d[i] : 0.0f;
}

void apply_cut(const DeltaRule& rule, const float* theta, const int64_t* cut, bool wanted, int64_t index, int64_t n,
               float* d) {
  const int64_t length = rule.row_length > 0 ? rule.row_length : index + n;
  for (int64_t i = 0; i < n;) {
    const int64_t row = rule.row_length > 0 ? (index + i) / length : 0;
    const int64_t segment = least(n - i, (row + 1) * length - (index + i));
    cut_segment(theta[row], cut[row] - (index + i), segment, wanted, d + i);
    i += segment;
  }
}

// Mask, then the window of ranks. Both cuts look at the magnitudes after the mask, before either cut: the second cut
// can drop nothing that the first left out, since zeros stay zeros.
void select(const DeltaRule& rule, int64_t task, int64_t index, int64_t n, float* scratch, float* d) {
  if (rule.keep != nullptr) apply_mask(rule, task, index, n, scratch, d);
  const int64_t row = task * rule.rows;
  if (rule.top_theta != nullptr) apply_cut(rule, rule.top_theta + row, rule.top_index + row, true, index, n, d);
  if (rule.skip_theta != nullptr) apply_cut(rule, rule.skip_theta + row, rule.skip_index + row, false, index, n, d);
}

#if PYMERGE_AVX512
int64_t collect(const uint32_t* values, int64_t n, uint32_t low, uint32_t high, uint32_t* out, int64_t* above) {
  const __m512i lows = _mm512_set1_epi32(static_cast<int>(low)), highs = _mm512_set1_epi32(static_cast<int>(high));
  int64_t stored = 0, larger = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 live = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1);
    const __m512i value = _mm512_maskz_loadu_epi32(live, values + i);
    const __mmask16 over = _mm512_mask_cmpgt_epu32_mask(live, value, highs);
    const __mmask16 inside = _mm512_mask_cmpge_epu32_mask(live, value, lows) & static_cast<__mmask16>(~over);
    _mm512_storeu_si512(out + stored, _mm512_maskz_compress_epi32(inside, value));
    stored += __builtin_popcount(inside);
    larger += __builtin_popcount(over);
  }
  *above += larger;
  return stored;
}
#else
int64_t collect(const uint32_t* values, int64_t n, uint32_t low, uint32_t high, uint32_t* out, int64_t* above) {
  int64_t stored = 0, larger = 0;
  const uint32_t width = high - low;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t value = values[i];
    larger += value > high;
    out[stored] = value;
    stored += value - low <= width;
  }
  *above += larger;
  return stored;
}
#endif
