// The common merges in one loop with every task in registers: inputs of one dtype, at most kFusedTasks tasks. A block
// in which anything may be non-finite is left to the general code, which counts it and makes the quiet NaNs; the bits
// are the same.

#if PYMERGE_AVX512
#define PYMERGE_LANES 16
#elif PYMERGE_F16C
#define PYMERGE_LANES 8
#else
#define PYMERGE_LANES 4
#endif
typedef float vf __attribute__((vector_size(4 * PYMERGE_LANES)));  // as wide as the level's registers
typedef uint32_t vu __attribute__((vector_size(4 * PYMERGE_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * PYMERGE_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * PYMERGE_LANES)));
typedef int16_t vs __attribute__((vector_size(2 * PYMERGE_LANES)));

constexpr int64_t kLanes = PYMERGE_LANES, kFusedTasks = 32;
#define PYMERGE_INLINE inline __attribute__((always_inline))

#if PYMERGE_AVX512
PYMERGE_INLINE vu widen(vh x) { return (vu)_mm512_cvtepu16_epi32((__m256i)x); }
PYMERGE_INLINE vi widen_sign(vs x) { return (vi)_mm512_cvtepi16_epi32((__m256i)x); }
PYMERGE_INLINE vh narrow(vu x) { return (vh)_mm512_cvtepi32_epi16((__m512i)x); }
PYMERGE_INLINE vu larger(vu a, vu b) { return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b); }
#elif PYMERGE_F16C
PYMERGE_INLINE vu widen(vh x) { return (vu)_mm256_cvtepu16_epi32((__m128i)x); }
PYMERGE_INLINE vi widen_sign(vs x) { return (vi)_mm256_cvtepi16_epi32((__m128i)x); }
PYMERGE_INLINE vh narrow(vu x) {
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
PYMERGE_INLINE vu larger(vu a, vu b) { return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b); }
#else
PYMERGE_INLINE vu widen(vh x) { return __builtin_convertvector(x, vu); }
PYMERGE_INLINE vi widen_sign(vs x) { return __builtin_convertvector(x, vi); }
PYMERGE_INLINE vh narrow(vu x) { return __builtin_convertvector(x, vh); }
PYMERGE_INLINE vu larger(vu a, vu b) { return (vi)a > (vi)b ? a : b; }  // both below 2^31
#endif

// Floats from one task's mask to the next: room for the draws of a block, and no multiple of a page, so that masks and
// inputs do not crowd into the same sets of the L1 cache.
constexpr int64_t kMaskStride = 704;
static_assert(4 * kMaskStride >= 2 * (kBlock + 8 + 31 * 8) && kMaskStride <= kBlock);

// Where magnitudes pass: above `theta` from entry `ties` on, above `below` (the next smaller float: at least theta)
// before it.
struct Threshold {
  float theta = 0.0f, below = 0.0f;
  int64_t ties = 0;
};

struct Fused {
  const void* base = nullptr;
  const void* tuned[kFusedTasks] = {};
  const uint16_t* mask[kFusedTasks] = {};
  Threshold top[kFusedTasks], skip[kFusedTasks];
  bool add = false, top_cut = false, skip_cut = false;
};

template <Dtype D>
PYMERGE_INLINE vf load_lanes(const void* data, int64_t i) {
  vf value;
  if constexpr (D == Dtype::kF32) {
    __builtin_memcpy(&value, static_cast<const char*>(data) + 4 * i, sizeof(value));
  } else {
    const char* p = static_cast<const char*>(data) + 2 * i;
#if PYMERGE_AVX512
    if constexpr (D == Dtype::kF16) {
      return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
#endif
    if constexpr (D == Dtype::kF16) {
      float lanes[kLanes];
      load({p, Dtype::kF16}, kLanes, lanes);
      __builtin_memcpy(&value, lanes, sizeof(value));
    } else {
      vh half;
      __builtin_memcpy(&half, p, sizeof(half));
      value = (vf)(widen(half) << 16);
    }
  }
  return value;
}

PYMERGE_INLINE vf splat(float value) { return value - vf{}; }

PYMERGE_INLINE vf magnitude(vf d) { return (vf)((vu)d & kMagnitudeBits); }

PYMERGE_INLINE vi above(vf size, const Threshold& cut, int64_t i) {
  if (i >= cut.ties) return size > splat(cut.theta);
  if (i + kLanes <= cut.ties) return size > splat(cut.below);
  vi lane = {};
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  const vi before = lane < (vi{} + static_cast<int32_t>(cut.ties - i));
  return size > (before ? splat(cut.below) : splat(cut.theta));
}

// Nearest even, as float_to_bf16; of finite values only.
PYMERGE_INLINE vh round_bf16(vf value) {
  const vu bits = (vu)value;
  return narrow((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

PYMERGE_INLINE bool reaches(vu sizes, uint32_t infinity) {
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= sizes[i] >= infinity;
  return any;
}

template <int T>
PYMERGE_INLINE vf elected(const DeltaRule& rule, const vf* x, int64_t tasks, vf sum) {
  const vf zero = {}, one = splat(1.0f);
  const vf sign = sum > zero ? one : (sum < zero ? -one : splat(rule.tie_sign));
  vf total = {}, aux = {};
  for (int64_t task = 0; task < (T ? T : tasks); ++task) {
    const vi part = x[task] * sign > zero;
    total += part ? x[task] : zero;
    if (rule.norm == Norm::kWeights) aux += part ? splat(rule.weights[task]) : zero;
    if (rule.norm == Norm::kCount) aux += part ? one : zero;
  }
  if (rule.norm == Norm::kWeights) {
    const vf least_sum = splat(kSmallestWeightSum);
    total = total / ((aux < least_sum) & (aux > -least_sum) ? one : aux);
  }
  if (rule.norm == Norm::kCount) total = total / (aux < one ? one : aux);
  return total;
}

// What may stand between a delta and the sum. In kPlain a bad entry always shows in the output; else deltas are watched
// too.
enum class Steps { kPlain, kMasked, kAll };

// n entries, a multiple of kLanes; out16 takes bfloat16, or else out32 takes float32. False: something may not be
// finite.
template <int T, Dtype D, Steps steps>
__attribute__((noinline)) bool fused_block(const DeltaRule& rule, const Fused& f, int64_t n, uint16_t* out16,
                                           float* out32) {
  const int64_t tasks = T ? T : rule.tasks;
  const vf zero = {}, scale = splat(rule.scale);
  vf weights[T ? T : kFusedTasks], rescales[T ? T : kFusedTasks];
  for (int64_t task = 0; task < tasks; ++task) {
    weights[task] = splat(rule.weights[task]);
    rescales[task] = splat(rule.rescales == nullptr ? 1.0f : rule.rescales[task]);  // multiplying by 1 changes no bit
  }
  vu largest = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf base = f.base == nullptr ? zero : load_lanes<D>(f.base, i);
    vf x[T ? T : kFusedTasks], sum = {};
    for (int64_t task = 0; task < (T ? T : tasks); ++task) {
      vf d = load_lanes<D>(f.tuned[task], i);
      if (f.base != nullptr) d -= base;
      if constexpr (steps != Steps::kPlain) {
        largest = larger(largest, (vu)magnitude(d));
        if (f.mask[task] != nullptr) {
          vs keep;
          __builtin_memcpy(&keep, f.mask[task] + i, sizeof(keep));
          d = (vf)((vi)d & widen_sign(keep));
        }
      }
      if constexpr (steps == Steps::kAll) {
        const vf size = magnitude(d);
        if (f.top_cut) d = above(size, f.top[task], i) ? d : zero;
        if (f.skip_cut) d = above(size, f.skip[task], i) ? zero : d;
      }
      x[task] = weights[task] * (rescales[task] * d);
      sum += x[task];
    }
    if constexpr (steps == Steps::kAll) {
      if (rule.elect) sum = elected<T>(rule, x, tasks, sum);
    }
    if (rule.divisor != 1.0f) sum = sum / rule.divisor;
    sum = scale * sum;
    if (f.add) sum = base + sum;
    if (out16 == nullptr) {
      largest = larger(largest, (vu)magnitude(sum));
      __builtin_memcpy(out32 + i, &sum, sizeof(sum));
    } else {
      const vh half = round_bf16(sum);
      largest = larger(largest, widen(half & 0x7FFF) << 16);
      __builtin_memcpy(out16 + i, &half, sizeof(half));
    }
  }
  return !reaches(largest, kInfinityBits);
}

template <int T, Dtype D>
bool fused_steps(const DeltaRule& rule, const Fused& f, int64_t n, uint16_t* out16, float* out32) {
  if (f.top_cut || f.skip_cut || rule.elect) return fused_block<T, D, Steps::kAll>(rule, f, n, out16, out32);
  if (rule.keep != nullptr) return fused_block<T, D, Steps::kMasked>(rule, f, n, out16, out32);
  return fused_block<T, D, Steps::kPlain>(rule, f, n, out16, out32);
}

template <Dtype D>
bool fused_tasks(const DeltaRule& rule, const Fused& f, int64_t n, uint16_t* out16, float* out32) {
  switch (rule.tasks) {
    case 1:
      return fused_steps<1, D>(rule, f, n, out16, out32);
    case 2:
      return fused_steps<2, D>(rule, f, n, out16, out32);
    case 3:
      return fused_steps<3, D>(rule, f, n, out16, out32);
    case 4:
      return fused_steps<4, D>(rule, f, n, out16, out32);
    default:
      return fused_steps<0, D>(rule, f, n, out16, out32);
  }
}

bool can_fuse(const DeltaSource& source, const DeltaRule& rule, const MergeTarget& target) {
  const Dtype dtype = source.tuned[0].dtype;
  bool same = dtype != Dtype::kF64 && source.tasks <= kFusedTasks;
  for (int64_t task = 1; task < source.tasks; ++task) same = same && source.tuned[task].dtype == dtype;
  if (source.base.data != nullptr) same = same && source.base.dtype == dtype;
  const bool added = target.add.data == nullptr || target.add.data == source.base.data;
  return same && added && rule.norm != Norm::kMax && (rule.elect || rule.norm == Norm::kNone);
}

Threshold threshold(float theta, int64_t cut, int64_t index) {
  const float below = theta > 0.0f ? bits_to_float(float_to_bits(theta) - 1) : -1.0f;
  return {theta, below, cut - index};
}

// Entries [begin, begin + n) of one row, n a multiple of 16. True: merged and stored.
bool merge_fused(const DeltaSource& source, const DeltaRule& rule, const MergeTarget& target, int64_t begin, int64_t n,
                 float* scratch) {
  const int64_t index = source.index0 + begin, row = rule.row_length > 0 ? index / rule.row_length : 0;
  float *sum = scratch + kBlock, *room = scratch + 2 * kBlock, *masks = scratch + 6 * kBlock + 2 * kDrawSlack;
  Fused f;
  f.base = source.base.at(begin).data;
  f.add = target.add.data != nullptr;
  f.top_cut = rule.top_theta != nullptr;
  f.skip_cut = rule.skip_theta != nullptr;
  for (int64_t task = 0; task < source.tasks; ++task) {
    f.tuned[task] = source.tuned[task].at(begin).data;
    if (rule.keep != nullptr) f.mask[task] = draw_mask(rule, task, index, n, masks + task * kMaskStride);
    const int64_t at = task * rule.rows + row;
    if (f.top_cut) f.top[task] = threshold(rule.top_theta[at], rule.top_index[at], index);
    if (f.skip_cut) f.skip[task] = threshold(rule.skip_theta[at], rule.skip_index[at], index);
  }
  const int64_t size = item_size(target.dtype);
  char* out = static_cast<char*>(target.out) + begin * size;
  uint16_t* out16 = target.dtype == Dtype::kBF16 ? reinterpret_cast<uint16_t*>(room) : nullptr;
  const Dtype dtype = source.tuned[0].dtype;
  const bool clean = dtype == Dtype::kBF16  ? fused_tasks<Dtype::kBF16>(rule, f, n, out16, sum)
                     : dtype == Dtype::kF16 ? fused_tasks<Dtype::kF16>(rule, f, n, out16, sum)
                                            : fused_tasks<Dtype::kF32>(rule, f, n, out16, sum);
  if (!clean) return false;
  if (out16 != nullptr || target.dtype == Dtype::kF32) {
    copy_out(out16 != nullptr ? static_cast<void*>(room) : sum, out, n * size, target.stream);
    return true;
  }
  return store(sum, n, target.dtype, out, target.stream, room) == 0;
}

template <Dtype D>
void fused_magnitudes(const void* base, const void* tuned, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    vf d = load_lanes<D>(tuned, i);
    if (base != nullptr) d -= load_lanes<D>(base, i);
    const vf size = magnitude(d);
    __builtin_memcpy(out + i, &size, sizeof(size));
  }
}
