// Everything that `pymerge inspect` counts of the updates of T models, in one read of the bytes.

typedef int8_t vb __attribute__((vector_size(4 * PYMERGE_LANES)));
constexpr int64_t kByteLanes = 4 * PYMERGE_LANES;
constexpr int64_t kBytePad = 64;  // blocks are zero-padded to whole byte vectors of every level

PYMERGE_INLINE vb bytes_at(const int8_t* x, int64_t i) {
  vb value;
  __builtin_memcpy(&value, x + i, sizeof(value));
  return value;
}

// Sum of the lanes, each from 0 to 127: one block adds at most 1024 / 16 to a lane.
PYMERGE_INLINE int64_t lane_total(vb lanes) {
#if PYMERGE_AVX512
  return _mm512_reduce_add_epi64(_mm512_sad_epu8((__m512i)lanes, _mm512_setzero_si512()));
#else
  int32_t total = 0;
  for (int64_t i = 0; i < kByteLanes; ++i) total += lanes[i];
  return total;
#endif
}

int64_t pad_bytes(float* d, int64_t n) {
  const int64_t padded = (n + kBytePad - 1) / kBytePad * kBytePad;
  for (int64_t i = n; i < padded; ++i) d[i] = 0.0f;
  return padded;
}

// Magnitudes by powers of two: bin b counts those in [2^(b + kFirstOctave), twice that), the outer bins all beyond.
// Counted by comparing bytes, bin after bin: no increment waits for the one before it.
void add_octaves(const float* d, int64_t n, int64_t padded, int8_t* octave, int64_t* bins) {
  for (int64_t i = 0; i < padded; ++i) {
    int32_t bin = static_cast<int32_t>((float_to_bits(d[i]) & kMagnitudeBits) >> 23) - (127 + kFirstOctave);
    bin = bin < 0 ? 0 : bin;
    octave[i] = static_cast<int8_t>(bin >= kOctaves ? kOctaves - 1 : bin);
  }
  const vb behind = vb{} + static_cast<int8_t>(kOctaves);
  vb most = {}, least_bin = behind;
  for (int64_t i = 0; i < padded; i += kByteLanes) {
    const vb bin = bytes_at(octave, i), above = bin == 0 ? behind : bin;
    most = bin > most ? bin : most;
    least_bin = above < least_bin ? above : least_bin;
  }
  int32_t first = kOctaves, last = 0;  // of the bins but 0 that occur
  for (int64_t i = 0; i < kByteLanes; ++i) {
    first = least_bin[i] < first ? least_bin[i] : first;
    last = most[i] > last ? most[i] : last;
  }
  int64_t rest = n;
  for (int32_t bin = first; bin <= last; ++bin) {
    vb equal = {};
    for (int64_t i = 0; i < padded; i += kByteLanes) equal -= (vb)(bytes_at(octave, i) == static_cast<int8_t>(bin));
    const int64_t found = lane_total(equal);
    bins[bin] += found;
    rest -= found;
  }
  bins[0] += rest;
}

// Entries at which both updates are not zero, and those of them at which their signs differ.
void add_signs(const int8_t* a, const int8_t* b, int64_t padded, int64_t* both, int64_t* opposed) {
  vb together = {}, apart = {};
  for (int64_t i = 0; i < padded; i += kByteLanes) {
    const vb x = bytes_at(a, i), y = bytes_at(b, i), changed = x & y & 1;
    together += changed;
    apart += changed & (vb)(x != y);
  }
  *both += lane_total(together);
  *opposed += lane_total(apart);
}

// Entries that at least two updates change, and those of them at which some update is positive and some negative.
void add_conflicts(const int8_t* signs, int64_t tasks, int64_t padded, int64_t* contested, int64_t* conflicted) {
  vb twice = {}, apart = {};
  for (int64_t i = 0; i < padded; i += kByteLanes) {
    vb once = {}, more = {}, positive = {}, negative = {};
    for (int64_t task = 0; task < tasks; ++task) {
      const vb sign = bytes_at(signs + task * kBlock, i), changed = sign & 1;
      more |= once & changed;
      once |= changed;
      positive |= (vb)(sign > 0);
      negative |= (vb)(sign < 0);
    }
    twice += more;
    apart -= positive & negative;
  }
  *contested += lane_total(twice);
  *conflicted += lane_total(apart);
}

// A block in float64, zero-padded, and its magnitudes into `size`.
void widen_block(const float* d, int64_t padded, double* wide, LaneSums* size) {
  LaneSums local = *size;
  for (int64_t i = 0; i < padded; i += kBlockLanes) {
    for (int v = 0; v < kSumVectors; ++v) {
      const vd value = wide_lanes(d + i + v * PYMERGE_LANES / 2);
      __builtin_memcpy(wide + i + v * PYMERGE_LANES / 2, &value, sizeof(value));
      local.lane[v] += value < 0.0 ? -value : value;
    }
  }
  *size = local;
}

PYMERGE_INLINE vd doubles_at(const double* x) {
  vd value;
  __builtin_memcpy(&value, x, sizeof(value));
  return value;
}

void add_products(const double* a, const double* b, int64_t padded, LaneSums* sums) {
  LaneSums local = *sums;
  for (int64_t i = 0; i < padded; i += kBlockLanes) {
    for (int v = 0; v < kSumVectors; ++v) {
      const int64_t at = i + v * PYMERGE_LANES / 2;
      local.lane[v] += doubles_at(a + at) * doubles_at(b + at);
    }
  }
  *sums = local;
}

// Parts of the scratch; sums stay in lanes until the last block.
struct MomentScratch {
  double* wide;    // [tasks][kBlock]
  LaneSums* gram;  // [tasks][tasks], s <= t
  LaneSums* l1;    // [tasks], of the sum, of the base, the base's squares
  float *base, *sum, *d;
  int8_t *octave, *signs;  // signs [tasks][kBlock]
  MomentScratch(float* scratch, int64_t tasks) {
    wide = reinterpret_cast<double*>(scratch);
    gram = reinterpret_cast<LaneSums*>(wide + (tasks + 1) * kBlock);
    l1 = gram + tasks * tasks;
    base = reinterpret_cast<float*>(l1 + tasks + 3);
    sum = base + kBlock;
    d = sum + kBlock;
    octave = reinterpret_cast<int8_t*>(d + kBlock);
    signs = octave + kBlock;
    for (LaneSums* sums = gram; sums < l1 + tasks + 3; ++sums) *sums = LaneSums{};
  }
};

void moments_block(const DeltaSource& source, int64_t begin, int64_t n, const MomentScratch& room,
                   const MomentSums& out) {
  const int64_t tasks = source.tasks;
  const float* base = load_base(source, begin, n, room.base);
  const int64_t padded = pad_bytes(room.base, n);
  double* last = room.wide + tasks * kBlock;
  if (base != nullptr) {
    out.bad[0] += count_bad(source.base.at(begin), n);
    widen_block(base, padded, last, room.l1 + tasks + 1);
    add_products(last, last, padded, room.l1 + tasks + 2);
  }
  for (int64_t i = 0; i < padded; ++i) room.sum[i] = 0.0f;
  for (int64_t task = 0; task < tasks; ++task) {
    float *d = room.d, *sum = room.sum;
    int8_t* sign = room.signs + task * kBlock;
    delta(source, task, begin, n, base, d);
    pad_bytes(d, n);
    out.bad[1 + task] += count_bad(source.tuned[task].at(begin), n);
    for (int64_t i = 0; i < padded; ++i) {
      sum[i] += d[i];
      sign[i] = static_cast<int8_t>((d[i] > 0.0f) - (d[i] < 0.0f));
    }
    add_octaves(d, n, padded, room.octave, out.octaves + task * kOctaves);
    double* wide = room.wide + task * kBlock;
    widen_block(d, padded, wide, room.l1 + task);
    for (int64_t other = 0; other <= task; ++other) {
      const int64_t at = other * tasks + task;
      add_products(room.wide + other * kBlock, wide, padded, room.gram + at);
      add_signs(room.signs + other * kBlock, sign, padded, out.both + at, out.opposed + at);
    }
  }
  widen_block(room.sum, padded, last, room.l1 + tasks);
  add_conflicts(room.signs, tasks, padded, out.contested, out.conflicted);
}

void moments(const DeltaSource& source, float* scratch, const MomentSums& out) {
  const int64_t tasks = source.tasks;
  const MomentScratch room(scratch, tasks);
  for (int64_t at = 0; at < source.count; at += kBlock) {
    moments_block(source, at, least(kBlock, source.count - at), room, out);
  }
  for (int64_t pair = 0; pair < tasks * tasks; ++pair) out.gram[pair] += room.gram[pair].total();
  for (int64_t task = 0; task < tasks; ++task) out.l1[task] += room.l1[task].total();
  *out.l1_of_sum += room.l1[tasks].total();
  *out.base += room.l1[tasks + 2].total();
}
