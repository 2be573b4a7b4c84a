// Which entries of a delta stay: the random mask, the magnitude window, and the compress-store of the rank selection.

// Draws of `groups` groups of eight entries, in entry order; writes up to 31 groups more than asked.
void philox_draws(uint64_t key, uint64_t group, int64_t groups, uint16_t* out) {
  u32_at* words = reinterpret_cast<u32_at*>(out);
  for (int64_t g = 0; g < groups; ++g) {
    const Philox4 r = philox4x32(key, group + static_cast<uint64_t>(g), 0);
    for (int w = 0; w < 4; ++w) words[4 * g + w] = r.word[w];
  }
}

// Draws become 0xffff (stays) or 0; a draw equal to the limit's upper half is settled by the second plane.
void draws_to_mask(KeepLimit limit, uint64_t key, uint64_t index, int64_t n, uint16_t* draws) {
  const uint16_t high = static_cast<uint16_t>(limit.high);
  uint16_t equal = 0;
  for (int64_t i = 0; i < n; ++i) equal |= draws[i] == high ? 0xFFFF : 0;
  if (equal) {
    for (int64_t i = 0; i < n; ++i) {
      draws[i] = keeps(limit, key, index + static_cast<uint64_t>(i), draws[i]) ? 0xFFFF : 0;
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) draws[i] = draws[i] < high ? 0xFFFF : 0;
}

// d = 0 where the random mask drops the entry. scratch: a block and kDrawSlack of 16-bit draws.
void apply_mask(const DeltaRule& rule, int64_t task, int64_t index, int64_t n, float* scratch, float* d) {
  const KeepLimit limit = rule.keep[task];
  if (limit.all) return;
  const uint64_t key = rule.keys[task], first = static_cast<uint64_t>(index) >> 3;
  uint16_t* draws = reinterpret_cast<uint16_t*>(scratch);
  uint16_t* mask = draws + (index & 7);
  philox_draws(key, first, ((index & 7) + n + 7) / 8, draws);
  draws_to_mask(limit, key, static_cast<uint64_t>(index), n, mask);
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
