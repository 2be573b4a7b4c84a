// The loops of assign.h, compiled once per CPU level into namespace PYMERGE_LEVEL; PYMERGE_WIDE float64 lanes a vector.
// Every level gives the same numbers: minima do not depend on the order, and equal ones go to the lowest index.

namespace pymerge::PYMERGE_LEVEL {
namespace {

typedef double vd __attribute__((vector_size(8 * PYMERGE_WIDE)));
typedef int64_t vl __attribute__((vector_size(8 * PYMERGE_WIDE)));
typedef float vf __attribute__((vector_size(4 * PYMERGE_WIDE)));
typedef int32_t vi __attribute__((vector_size(4 * PYMERGE_WIDE)));
typedef float vwide __attribute__((vector_size(64)));
typedef uint32_t vbits __attribute__((vector_size(64)));

constexpr int64_t kGroups = 64;  // of columns j % 64: their minima bracket the least values of a row
constexpr double kInfinity = __builtin_inf();

template <typename V, typename T>
inline __attribute__((always_inline)) V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
inline __attribute__((always_inline)) void store(const V& v, T* p) {
  __builtin_memcpy(p, &v, sizeof(V));
}

inline __attribute__((always_inline)) vl lanes_from(int64_t first) {
  vl v;
  for (int i = 0; i < PYMERGE_WIDE; ++i) v[i] = first + i;
  return v;
}

// sign * row[0..] in float64
inline __attribute__((always_inline)) vd costs(const float* row, float sign) {
#if PYMERGE_WIDE == 8
  return _mm512_cvtps_pd(load<vf>(row) * sign);
#else
  return __builtin_convertvector(load<vf>(row) * sign, vd);
#endif
}

// One instruction: a comparison and a choice are a chain of two.
inline __attribute__((always_inline)) vd lesser(vd a, vd b) {
#if PYMERGE_WIDE == 8
  return _mm512_min_pd(a, b);
#elif PYMERGE_WIDE == 4
  return _mm256_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}

// The least value of the lanes and the lowest index that has it.
inline __attribute__((always_inline)) void reduce(vd value, vl index, double* least, int64_t* at) {
#if PYMERGE_WIDE == 8
  const double v = _mm512_reduce_min_pd(value);
  *at = _mm512_mask_reduce_min_epi64(_mm512_cmp_pd_mask(value, _mm512_set1_pd(v), _CMP_EQ_OQ), (__m512i)index);
#else
  double v = value[0];
  for (int i = 1; i < PYMERGE_WIDE; ++i) v = value[i] < v ? value[i] : v;
  const vl among = value == v ? index : INT64_MAX - (vl){};
  int64_t k = among[0];
  for (int i = 1; i < PYMERGE_WIDE; ++i) k = among[i] < k ? among[i] : k;
  *at = k;
#endif
  *least = v;
}

uint32_t column_minima(const float* row, int64_t columns, float sign, float* low) {
  vbits largest = {};
  int64_t j = 0;
  for (; j + 16 <= columns; j += 16) {
    const vwide x = load<vwide>(row + j), c = x * sign, old = load<vwide>(low + j);
    const vbits bits = load<vbits>(row + j) & kMagnitudeBits;
    largest = bits > largest ? bits : largest;
    store(c < old ? c : old, low + j);
  }
  uint32_t most = 0;
  for (int i = 0; i < 16; ++i) most = largest[i] > most ? largest[i] : most;
  for (; j < columns; ++j) {
    const float c = row[j] * sign;
    const uint32_t bits = __builtin_bit_cast(uint32_t, row[j]) & kMagnitudeBits;
    most = bits > most ? bits : most;
    low[j] = c < low[j] ? c : low[j];
  }
  return most;
}

RowBest row_best(const float* row, int64_t padded_columns, float sign, const double* prices, const double* taken) {
  const vl none = INT64_MAX - (vl){};
  vd best = kInfinity - (vd){}, second = best, free_best = best;
  vl at = none, free_at = none, lane = lanes_from(0);
  for (int64_t j = 0; j < padded_columns; j += PYMERGE_WIDE) {
    const vd x = costs(row + j, sign) - load<vd>(prices + j), open = x + load<vd>(taken + j);
    const vd loser = x < best ? best : x;
    second = lesser(loser, second);
    at = x < best ? lane : at;
    best = lesser(x, best);
    free_at = open < free_best ? lane : free_at;
    free_best = lesser(open, free_best);
    lane += PYMERGE_WIDE;
  }
  RowBest found;
  double free_value = 0.0;
  reduce(best, at, &found.value, &found.index);
  reduce(free_best, free_at, &free_value, &found.free_index);
  if (free_value != found.value) found.free_index = -1;
  int64_t ignored = 0;  // of the best value's own lane, the second best counts
  reduce(at == found.index ? second : best, lane, &found.second, &ignored);
  return found;
}

Nearest relax(const float* row, int64_t padded_columns, float sign, const double* prices, const double* taken,
              double shift, int32_t from, double* distance, int32_t* before) {
  vd best = kInfinity - (vd){}, free_best = best;
  vl at = {}, free_at = {}, lane = lanes_from(0);
  for (int64_t j = 0; j < padded_columns; j += PYMERGE_WIDE) {
    const vd x = costs(row + j, sign) - load<vd>(prices + j) - shift, old = load<vd>(distance + j);
    const vd d = lesser(x, old);
#if PYMERGE_WIDE == 8
    const __mmask8 less = _mm512_cmp_pd_mask(x, old, _CMP_LT_OQ);
    _mm256_mask_storeu_epi32(before + j, less, _mm256_set1_epi32(from));
#else
    const vi less = __builtin_convertvector(x < old, vi);
    store(less ? from - (vi){} : load<vi>(before + j), before + j);
#endif
    store(d, distance + j);
    const vd open = d + load<vd>(taken + j);
    at = d < best ? lane : at;
    best = lesser(d, best);
    free_at = open < free_best ? lane : free_at;
    free_best = lesser(open, free_best);
    lane += PYMERGE_WIDE;
  }
  Nearest found;
  reduce(best, at, &found.value, &found.index);
  reduce(free_best, free_at, &found.free_value, &found.free_index);
  return found;
}

// The `wanted`-th least of the minima over columns j % 64: few entries but `wanted` at least do not exceed it.
float threshold(const float* row, int64_t columns, float sign, const float* prices, int64_t wanted) {
  float least[kGroups];
  vwide low[4];
  for (int g = 0; g < 4; ++g) low[g] = static_cast<float>(kInfinity) - (vwide){};
  int64_t j = 0;
  for (; j + kGroups <= columns; j += kGroups) {
    for (int g = 0; g < 4; ++g) {
      const vwide x = load<vwide>(row + j + 16 * g) * sign - load<vwide>(prices + j + 16 * g);
      low[g] = x < low[g] ? x : low[g];
    }
  }
  for (int g = 0; g < 4; ++g) store(low[g], least + 16 * g);
  for (; j < columns; ++j) {
    const float x = row[j] * sign - prices[j];
    least[j % kGroups] = x < least[j % kGroups] ? x : least[j % kGroups];
  }
  for (int64_t k = 0; k < wanted; ++k) {  // selection sort of the first `wanted`
    int64_t m = k;
    for (int64_t i = k + 1; i < kGroups; ++i) m = least[i] < least[m] ? i : m;
    const float x = least[m];
    least[m] = least[k];
    least[k] = x;
  }
  return least[wanted - 1];
}

int64_t collect(const float* row, int64_t begin, int64_t end, float sign, const float* prices, float limit,
                int64_t room, int32_t* out) {
  int64_t count = 0, j = begin;
#if PYMERGE_WIDE == 8
  for (; j + 16 <= end && count + 16 <= room; j += 16) {
    const __m512 x = load<vwide>(row + j) * sign - load<vwide>(prices + j);
    const __mmask16 pass = _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LE_OQ);
    if (pass == 0) continue;
    const __m512i lane = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(j)),
                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_mask_compressstoreu_epi32(out + count, pass, lane);
    count += __builtin_popcount(pass);
  }
#endif
  for (; j < end && count < room; ++j) {
    out[count] = static_cast<int32_t>(j);
    count += row[j] * sign - prices[j] <= limit;
  }
  return count;
}

}  // namespace

const AssignScans& assign_scans() {
  static constexpr AssignScans table = {column_minima, row_best, relax, threshold, collect};
  return table;
}

}  // namespace pymerge::PYMERGE_LEVEL
