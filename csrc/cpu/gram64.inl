// The loops of gram64.h, compiled once per CPU level into namespace PYMERGE_LEVEL. A level gives kLanes (float64 of one
// register), kVectors and kRows (the tile of sums: kRows x (kVectors * kLanes)) and kFused (it has fused multiply-add).
// Products of two float32 are exact in float64, so that fused and separate additions give the same bits.

namespace pymerge::PYMERGE_LEVEL {
namespace {

constexpr int64_t kPanel = int64_t{kVectors} * kLanes;
static_assert(kPanel % kRows == 0);
typedef double Lanes __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));

inline Lanes add_product(double a, Lanes b, Lanes sum) {
  const Lanes all = a - Lanes{};
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(all, b, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(all, b, sum);
#else
  return all * b + sum;
#endif
}

// sums = a^T b of packed rows: a [depth][kPanel], its first kRows columns; b [depth][kPanel].
inline void multiply(const double* a, const double* b, int64_t depth, Lanes (&sums)[kRows][kVectors]) {
  for (int i = 0; i < kRows; ++i) {  // not by reference: deduction loses that 8 bytes of alignment are enough
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Lanes{};
  }
  for (int64_t k = 0; k < depth; ++k, a += kPanel, b += kPanel) {
    Lanes right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Lanes*>(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[i][v] = add_product(a[i], right[v], sums[i][v]);
    }
  }
}

void add(const double* packed, int64_t depth, int64_t width, int64_t p, double* gram) {
  const int64_t first = p * kPanel, columns = width - first < kPanel ? width - first : kPanel;
  const double* b = packed + p * kGramDepth * kPanel;
  for (int64_t i0 = 0; i0 < first + columns; i0 += kRows) {
    const double* a = packed + i0 / kPanel * kGramDepth * kPanel + i0 % kPanel;
    Lanes sums[kRows][kVectors];
    multiply(a, b, depth, sums);
    const int64_t rows = width - i0 < kRows ? width - i0 : kRows;
    for (int64_t i = 0; i < rows; ++i) {
      double* out = gram + (i0 + i) * width + first;
      if (columns == kPanel) {
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Lanes*>(out + v * kLanes) += sums[i][v];
      } else {
        for (int64_t j = 0; j < columns; ++j) out[j] += sums[i][j / kLanes][j % kLanes];
      }
    }
  }
}

inline double widen(const uint16_t* x, int64_t at, bool half) {
  return half ? f16_to_float(x[at]) : bf16_to_float(x[at]);
}

// The inner loop runs along the smaller stride: rows of x, or columns where x is a transposed view.
template <typename Entry>
void pack_entries(const GramInput& x, int64_t first, int64_t begin, int64_t depth, double* out, Entry entry) {
  const int64_t columns = x.width - first < kPanel ? x.width - first : kPanel;
  const int64_t down = x.depth_stride, across = x.width_stride, origin = begin * down + first * across;
  if (columns < kPanel) {
    for (int64_t i = 0; i < depth * kPanel; ++i) out[i] = 0.0;
  }
  if (across == 1 && columns == kPanel) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < kPanel; ++j) out[k * kPanel + j] = entry(origin + k * down + j);
    }
  } else if (down < across) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t k = 0; k < depth; ++k) out[k * kPanel + j] = entry(origin + k * down + j * across);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < columns; ++j) out[k * kPanel + j] = entry(origin + k * down + j * across);
    }
  }
}

void pack(const GramInput& x, int64_t p, int64_t begin, int64_t depth, double* out) {
  const int64_t first = p * kPanel;
  switch (x.dtype) {
    case Dtype::kBF16: {
      const auto* data = static_cast<const uint16_t*>(x.data);
      return pack_entries(x, first, begin, depth, out, [data](int64_t at) { return widen(data, at, false); });
    }
    case Dtype::kF16: {
      const auto* data = static_cast<const uint16_t*>(x.data);
      return pack_entries(x, first, begin, depth, out, [data](int64_t at) { return widen(data, at, true); });
    }
    case Dtype::kF32: {
      const auto* data = static_cast<const float*>(x.data);
      return pack_entries(x, first, begin, depth, out, [data](int64_t at) { return double{data[at]}; });
    }
    case Dtype::kF64: {
      const auto* data = static_cast<const double*>(x.data);
      return pack_entries(x, first, begin, depth, out, [data](int64_t at) { return data[at]; });
    }
  }
}

}  // namespace

const GramKernels gram64 = {kPanel, pack, add};

}  // namespace pymerge::PYMERGE_LEVEL
