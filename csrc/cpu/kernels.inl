// All loops of kernels.h, compiled once per CPU level into namespace PYMERGE_LEVEL. Templates of the standard library
// stay out of here: their instantiations would be shared between levels.

#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors are passed between inlined functions only

namespace pymerge::PYMERGE_LEVEL {
namespace {

typedef uint16_t u16_at __attribute__((aligned(1), may_alias));
typedef uint32_t u32_at __attribute__((aligned(1), may_alias));
typedef float f32_at __attribute__((aligned(1), may_alias));
typedef double f64_at __attribute__((aligned(1), may_alias));
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#include "convert.inl"
#include "select.inl"
#include "fused.inl"

// d_t of one block (before selection) into d; base32 is null where there is no base.
void delta(const DeltaSource& source, int64_t task, int64_t begin, int64_t n, const float* base32, float* d) {
  load(source.tuned[task].at(begin), n, d);
  if (base32 == nullptr) return;
  for (int64_t i = 0; i < n; ++i) d[i] -= base32[i];
}

const float* load_base(const DeltaSource& source, int64_t begin, int64_t n, float* scratch) {
  if (source.base.data == nullptr) return nullptr;
  load(source.base.at(begin), n, scratch);
  return scratch;
}

// x_t = weight * (rescale * d)
void weigh(const DeltaRule& rule, int64_t task, int64_t n, float* d) {
  const float weight = rule.weights[task];
  if (rule.rescales == nullptr) {
    for (int64_t i = 0; i < n; ++i) d[i] = weight * d[i];
    return;
  }
  const float rescale = rule.rescales[task];
  for (int64_t i = 0; i < n; ++i) d[i] = weight * (rescale * d[i]);
}

// What election and normalisation add: x holds every task's block of x_t, sum their plain sum; sum becomes normalised.
template <Norm norm, bool elect>
void combine_parts(const DeltaRule& rule, const float* x, int64_t n, float* sum, float* sign, float* aux) {
  if (elect) {
    for (int64_t i = 0; i < n; ++i) sign[i] = elected_sign(sum[i], rule.tie_sign);
  }
  for (int64_t i = 0; i < n; ++i) sum[i] = aux[i] = 0.0f;
  for (int64_t task = 0; task < rule.tasks; ++task) {
    const float* xt = x + task * kBlock;
    const float weight = rule.weights[task];
    for (int64_t i = 0; i < n; ++i) {
      const bool part = takes_part(xt[i], elect ? sign[i] : 1.0f, elect);
      const float size = __builtin_fabsf(xt[i]);
      sum[i] += part ? xt[i] : 0.0f;
      if (norm == Norm::kWeights) aux[i] += part ? weight : 0.0f;
      if (norm == Norm::kCount) aux[i] += part ? 1.0f : 0.0f;
      if (norm == Norm::kMax) aux[i] = part && size > aux[i] ? size : aux[i];
    }
  }
  for (int64_t i = 0; i < n; ++i) sum[i] = normalised(sum[i], aux[i], elect ? sign[i] : 1.0f, norm);
}

template <bool elect>
void combine_norm(const DeltaRule& rule, const float* x, int64_t n, float* sum, float* sign, float* aux) {
  if (rule.norm == Norm::kNone) combine_parts<Norm::kNone, elect>(rule, x, n, sum, sign, aux);
  if (rule.norm == Norm::kWeights) combine_parts<Norm::kWeights, elect>(rule, x, n, sum, sign, aux);
  if (rule.norm == Norm::kCount) combine_parts<Norm::kCount, elect>(rule, x, n, sum, sign, aux);
  if (rule.norm == Norm::kMax) combine_parts<Norm::kMax, elect>(rule, x, n, sum, sign, aux);
}

// add + scale * (sum / divisor), in place
void finish(const DeltaRule& rule, int64_t n, const float* add, float* sum) {
  if (rule.divisor != 1.0f) {
    for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] / rule.divisor;
  }
  if (add == nullptr) {
    for (int64_t i = 0; i < n; ++i) sum[i] = rule.scale * sum[i];
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] = add[i] + rule.scale * sum[i];
  }
}

void merge_block(const DeltaSource& source, const DeltaRule& rule, const MergeTarget& target, int64_t begin, int64_t n,
                 float* scratch, int64_t* bad) {
  float *base32 = scratch, *sum = scratch + kBlock, *sign = scratch + 2 * kBlock, *aux = scratch + 3 * kBlock;
  float *add32 = scratch + 4 * kBlock, *mask = scratch + 5 * kBlock, *x = scratch + 6 * kBlock + 2 * kDrawSlack;
  const bool parts = rule.elect || rule.norm != Norm::kNone, same = target.add.data == source.base.data;
  const float* base = load_base(source, begin, n, base32);
  if (base != nullptr) bad[0] += count_bad(source.base.at(begin), n);
  for (int64_t i = 0; i < n; ++i) sum[i] = 0.0f;
  for (int64_t task = 0; task < source.tasks; ++task) {
    float* d = parts ? x + task * kBlock : x;
    delta(source, task, begin, n, base, d);
    bad[1 + task] += count_bad(source.tuned[task].at(begin), n);
    select(rule, task, source.index0 + begin, n, mask, d);
    weigh(rule, task, n, d);
    for (int64_t i = 0; i < n; ++i) sum[i] += d[i];
  }
  if (parts && rule.elect) combine_norm<true>(rule, x, n, sum, sign, aux);
  if (parts && !rule.elect) combine_norm<false>(rule, x, n, sum, sign, aux);
  const float* add = nullptr;
  if (target.add.data != nullptr) {
    add = same ? base32 : add32;
    if (!same) {
      load(target.add.at(begin), n, add32);
      bad[1 + source.tasks] += count_bad(target.add.at(begin), n);
    }
  }
  finish(rule, n, add, sum);
  char* out = static_cast<char*>(target.out) + begin * item_size(target.dtype);
  bad[2 + source.tasks] += store(sum, n, target.dtype, out, target.stream, x);
}

// Blocks end where rows end, so that one block has one threshold a task.
void merge(const DeltaSource& source, const DeltaRule& rule, const MergeTarget& target, int64_t begin, int64_t end,
           float* scratch, int64_t* bad) {
  const bool rows = rule.row_length > 0 && (rule.top_theta != nullptr || rule.skip_theta != nullptr);
  const bool fuse = can_fuse(source, rule, target) && (!rows || rule.row_length >= 4 * kLanes);
  for (int64_t at = begin; at < end;) {
    int64_t n = least(kBlock, end - at);
    if (fuse && rows) n = least(n, rule.row_length - (source.index0 + at) % rule.row_length);
    const int64_t whole = fuse ? n / kLanes * kLanes : 0;
    const bool merged = whole > 0 && merge_fused(source, rule, target, at, whole, scratch);
    const int64_t done = merged ? whole : 0;
    if (done < n) merge_block(source, rule, target, at + done, n - done, scratch, bad);
    at += n;
  }
}

void magnitudes(const DeltaSource& source, const DeltaRule& rule, int64_t task, int64_t begin, int64_t end,
                float* scratch, uint32_t* out) {
  const int64_t n = end - begin;
  const Buffer base = source.base.at(begin), tuned = source.tuned[task].at(begin);
  float* d = reinterpret_cast<float*>(out);
  int64_t done = 0;
  if (base.data == nullptr || base.dtype == tuned.dtype) {
    done = tuned.dtype == Dtype::kF64 ? 0 : n / kLanes * kLanes;
    if (tuned.dtype == Dtype::kBF16) fused_magnitudes<Dtype::kBF16>(base.data, tuned.data, done, d);
    if (tuned.dtype == Dtype::kF16) fused_magnitudes<Dtype::kF16>(base.data, tuned.data, done, d);
    if (tuned.dtype == Dtype::kF32) fused_magnitudes<Dtype::kF32>(base.data, tuned.data, done, d);
  }
  if (done < n) {
    const int64_t rest = begin + done;
    delta(source, task, rest, n - done, load_base(source, rest, n - done, scratch), d + done);
    for (int64_t i = done; i < n; ++i) d[i] = __builtin_fabsf(d[i]);
  }
  if (rule.keep != nullptr) apply_mask(rule, task, source.index0 + begin, n, scratch + kBlock, d);
}

typedef double vd __attribute__((vector_size(4 * PYMERGE_LANES)));
typedef float vhalf __attribute__((vector_size(2 * PYMERGE_LANES)));
constexpr int kSumVectors = 2 * kBlockLanes / PYMERGE_LANES;

int64_t count_equal(const uint32_t* values, int64_t n, uint32_t value) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i] == value;
  return total;
}

// Zero-padded to whole lanes: 0 adds nothing to a sum of magnitudes or products.
int64_t pad_lanes(float* d, int64_t n) {
  const int64_t padded = (n + kBlockLanes - 1) / kBlockLanes * kBlockLanes;
  for (int64_t i = n; i < padded; ++i) d[i] = 0.0f;
  return padded;
}

// The kBlockLanes partial sums in registers of the level's width; lane i % kBlockLanes takes entry i, whatever the
// width.
struct LaneSums {
  vd lane[kSumVectors] = {};
  double total() const {
    double sum = 0.0;
    for (int v = 0; v < kSumVectors; ++v) {
      for (int i = 0; i < PYMERGE_LANES / 2; ++i) sum += lane[v][i];
    }
    return sum;
  }
};

PYMERGE_INLINE vd wide_lanes(const float* x) {
  vhalf value;
  __builtin_memcpy(&value, x, sizeof(value));
  return __builtin_convertvector(value, vd);
}

void add_magnitudes(const float* d, int64_t n, LaneSums* sums) {
  LaneSums local = *sums;
  for (int64_t i = 0; i < n; i += kBlockLanes) {
    for (int v = 0; v < kSumVectors; ++v) {
      const vd value = wide_lanes(d + i + v * PYMERGE_LANES / 2);
      local.lane[v] += value < 0.0 ? -value : value;
    }
  }
  *sums = local;
}

// Vector v of a group of kBlockLanes entries into its lanes.
PYMERGE_INLINE void add_lanes(vf x, int v, LaneSums& sums) {
  vhalf half[2];
  __builtin_memcpy(half, &x, sizeof(half));
  sums.lane[2 * v] += __builtin_convertvector(half[0], vd);
  sums.lane[2 * v + 1] += __builtin_convertvector(half[1], vd);
}

// n entries, a multiple of kBlockLanes, of one task: magnitudes in registers, the same lanes as add_magnitudes.
template <Dtype D>
void add_masked(const void* base, const void* tuned, const uint16_t* mask, int64_t n, LaneSums* all,
                LaneSums* selected) {
  LaneSums a = *all, s = *selected;
  for (int64_t i = 0; i < n; i += kBlockLanes) {
    for (int v = 0; v < kBlockLanes / kLanes; ++v) {
      const int64_t at = i + v * kLanes;
      vf d = load_lanes<D>(tuned, at);
      if (base != nullptr) d -= load_lanes<D>(base, at);
      const vf size = magnitude(d);
      add_lanes(size, v, a);
      if (mask == nullptr) continue;
      vs keep;
      __builtin_memcpy(&keep, mask + at, sizeof(keep));
      add_lanes((vf)((vi)size & widen_sign(keep)), v, s);
    }
  }
  *all = a;
  *selected = mask == nullptr ? a : s;
}

// Random mask only, inputs of one dtype: what DARE asks.
template <Dtype D>
void l1_fused(const DeltaSource& source, const DeltaRule& rule, int64_t begin, int64_t end, float* scratch,
              double* out) {
  float *base32 = scratch, *d = scratch + kBlock, *room = scratch + 2 * kBlock;
  for (int64_t task = 0; task < source.tasks; ++task) {
    LaneSums all, selected;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = least(kBlock, end - at), whole = n / kBlockLanes * kBlockLanes;
      const uint16_t* mask = rule.keep == nullptr ? nullptr : draw_mask(rule, task, source.index0 + at, n, room);
      add_masked<D>(source.base.at(at).data, source.tuned[task].at(at).data, mask, whole, &all, &selected);
      if (whole == n) continue;
      delta(source, task, at + whole, n - whole, load_base(source, at + whole, n - whole, base32), d);
      add_magnitudes(d, pad_lanes(d, n - whole), &all);
      for (int64_t i = whole; i < n && mask != nullptr; ++i) d[i - whole] = mask[i] != 0 ? d[i - whole] : 0.0f;
      add_magnitudes(d, pad_lanes(d, n - whole), &selected);
    }
    out[2 * task] = all.total();
    out[2 * task + 1] = selected.total();
  }
}

bool same_dtype(const DeltaSource& source) {
  bool same = source.base.data == nullptr || source.base.dtype == source.tuned[0].dtype;
  for (int64_t task = 1; task < source.tasks; ++task) same = same && source.tuned[task].dtype == source.tuned[0].dtype;
  return same;
}

void l1(const DeltaSource& source, const DeltaRule& rule, int64_t begin, int64_t end, float* scratch, double* out) {
  if (rule.top_theta == nullptr && rule.skip_theta == nullptr && same_dtype(source)) {
    switch (source.tuned[0].dtype) {
      case Dtype::kBF16:
        return l1_fused<Dtype::kBF16>(source, rule, begin, end, scratch, out);
      case Dtype::kF16:
        return l1_fused<Dtype::kF16>(source, rule, begin, end, scratch, out);
      case Dtype::kF32:
        return l1_fused<Dtype::kF32>(source, rule, begin, end, scratch, out);
      case Dtype::kF64:
        break;
    }
  }
  float *base32 = scratch, *d = scratch + kBlock, *mask = scratch + 2 * kBlock;
  for (int64_t task = 0; task < source.tasks; ++task) {
    LaneSums all, selected;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = least(kBlock, end - at);
      delta(source, task, at, n, load_base(source, at, n, base32), d);
      const int64_t padded = pad_lanes(d, n);
      add_magnitudes(d, padded, &all);
      select(rule, task, source.index0 + at, n, mask, d);
      add_magnitudes(d, padded, &selected);
    }
    out[2 * task] = all.total();
    out[2 * task + 1] = selected.total();
  }
}

double product_sum(const float* a, const float* b, int64_t n) {
  LaneSums sums;
  for (int64_t i = 0; i < n; i += kBlockLanes) {
    for (int v = 0; v < kSumVectors; ++v) {
      const int64_t at = i + v * PYMERGE_LANES / 2;
      sums.lane[v] += wide_lanes(a + at) * wide_lanes(b + at);
    }
  }
  return sums.total();
}

void gram(const DeltaSource& source, int64_t begin, int64_t end, float* scratch, double* out) {
  const int64_t tasks = source.tasks;
  float *base32 = scratch, *d = scratch + kBlock;
  for (int64_t i = 0; i < tasks * tasks; ++i) out[i] = 0.0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = least(kBlock, end - at);
    const float* base = load_base(source, at, n, base32);
    int64_t padded = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      delta(source, task, at, n, base, d + task * kBlock);
      padded = pad_lanes(d + task * kBlock, n);
    }
    for (int64_t s = 0; s < tasks; ++s) {
      for (int64_t t = s; t < tasks; ++t) out[s * tasks + t] += product_sum(d + s * kBlock, d + t * kBlock, padded);
    }
  }
  for (int64_t s = 0; s < tasks; ++s) {
    for (int64_t t = 0; t < s; ++t) out[s * tasks + t] = out[t * tasks + s];
  }
}

int64_t signs(const DeltaSource& source, const DeltaRule& rule, int64_t begin, int64_t end, float* scratch) {
  float *base32 = scratch, *d = scratch + kBlock, *sum = scratch + 2 * kBlock, *mask = scratch + 3 * kBlock;
  int64_t total = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = least(kBlock, end - at);
    const float* base = load_base(source, at, n, base32);
    for (int64_t i = 0; i < n; ++i) sum[i] = 0.0f;
    for (int64_t task = 0; task < source.tasks; ++task) {
      delta(source, task, at, n, base, d);
      select(rule, task, source.index0 + at, n, mask, d);
      weigh(rule, task, n, d);
      for (int64_t i = 0; i < n; ++i) sum[i] += d[i];
    }
    int32_t block = 0;
    for (int64_t i = 0; i < n; ++i) block += (sum[i] > 0.0f) - (sum[i] < 0.0f);
    total += block;
  }
  return total;
}

#include "moments.inl"

int64_t cast(const float* x, void* y, Dtype dtype, int64_t n) {
  alignas(64) float scratch[kBlock];
  int64_t bad = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    bad += store(x + at, least(kBlock, n - at), dtype, static_cast<char*>(y) + at * item_size(dtype), false, scratch);
  }
  return bad;
}

}  // namespace

const Kernels& kernels() {
  static constexpr Kernels table = {merge, magnitudes, collect, count_equal, l1, gram, signs, moments, cast, count_bad};
  return table;
}

}  // namespace pymerge::PYMERGE_LEVEL
