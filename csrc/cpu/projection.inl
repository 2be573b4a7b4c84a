// The loops of projection.h, compiled once per CPU level into namespace PYMERGE_LEVEL. The level's section defines
// Lanes (a register of float32), kLanes, kTileRows, kTileLanes, spread and multiply_add.
//
// Each entry is one chain of multiply-adds over the rows of a slab, and the slabs' sums are added in order: tiling and
// thread count do not change it. Levels with fused multiply-add agree bit for bit.

typedef uint16_t u16_at __attribute__((aligned(1), may_alias));
typedef uint32_t u32_at __attribute__((aligned(1), may_alias));
typedef float f32_at __attribute__((aligned(1), may_alias));
typedef double f64_at __attribute__((aligned(1), may_alias));

#include "convert.inl"

constexpr int64_t kTileColumns = kLanes * kTileLanes;
static_assert(kTileColumns <= kStripStride - kStripColumns && kDirections % kTileRows == 0);

// Rows [k0, k0 + depth) and columns [c0, c0 + width) of a matrix.
struct Part {
  int64_t k0, depth, c0, width;
};

Buffer buffer_at(const Matrix& x, int64_t row, int64_t column) {
  return Buffer{x.data, x.dtype}.at(row * x.row_stride + column * x.column_stride);
}

// out = x - y (y absent: x), n consecutive entries.
void subtract(Buffer x, Buffer y, int64_t n, float* other, float* out) {
  load(x, n, out);
  if (y.data == nullptr) return;
  load(y, n, other);
  for (int64_t i = 0; i < n; ++i) out[i] -= other[i];
}

// Both bfloat16: without the way through memory that other types take.
void subtract_bf16(const u16_at* x, const u16_at* y, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = __builtin_bit_cast(float, uint32_t{x[i]} << 16) - __builtin_bit_cast(float, uint32_t{y[i]} << 16);
  }
}

// One row, `n` entries, into panels of kPanel entries that lie `step` floats apart; the last panel is padded with 0.
template <int64_t kPanel>
void pack_row(Buffer x, Buffer y, int64_t n, int64_t step, float* line, float* out) {
  const bool direct = x.dtype == Dtype::kBF16 && y.dtype == Dtype::kBF16 && y.data != nullptr;
  const u16_at* xs = static_cast<const u16_at*>(x.data);
  const u16_at* ys = static_cast<const u16_at*>(y.data);
  if (!direct) subtract(x, y, n, line + kStripStride, line);
  for (int64_t i = 0; i < n; i += kPanel, out += step) {
    const int64_t count = n - i < kPanel ? n - i : kPanel;
    if (direct && count == kPanel) {
      subtract_bf16(xs + i, ys + i, kPanel, out);
    } else if (direct) {
      subtract_bf16(xs + i, ys + i, count, out);
    } else {
      __builtin_memcpy(out, line + i, static_cast<size_t>(count) * sizeof(float));
    }
    for (int64_t j = count; j < kPanel; ++j) out[j] = 0.0f;
  }
}

// A part of x - y as panels [depth][kPanel] of columns.
template <int64_t kPanel>
void pack(const Matrix& x, const Matrix& y, const Part& part, float* line, float* out) {
  const int64_t step = part.depth * kPanel;
  if (x.column_stride == 1 && (y.data == nullptr || y.column_stride == 1)) {
    for (int64_t k = 0; k < part.depth; ++k) {
      pack_row<kPanel>(buffer_at(x, part.k0 + k, part.c0), buffer_at(y, part.k0 + k, part.c0), part.width, step, line,
                       out + k * kPanel);
    }
    return;
  }
  for (int64_t c = 0; c < part.width; ++c) {
    float* to = out + c / kPanel * step + c % kPanel;
    subtract(buffer_at(x, part.k0, part.c0 + c), buffer_at(y, part.k0, part.c0 + c), part.depth, line + kStripStride,
             line);
    for (int64_t k = 0; k < part.depth; ++k) to[k * kPanel] = line[k];
  }
  for (int64_t c = part.width; c % kPanel != 0; ++c) {
    float* to = out + c / kPanel * step + c % kPanel;
    for (int64_t k = 0; k < part.depth; ++k) to[k * kPanel] = 0.0f;
  }
}

// c [kTileRows, kTileColumns] (+)= a^T b, for panels a [depth][kTileRows] and b [depth][kTileColumns]. The loops over
// the tile unroll, so that its sums stay in registers.
void multiply_tile(int64_t depth, const float* a, const float* b, float* c, bool first) {
  Lanes sum[kTileRows][kTileLanes] = {};
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileColumns) {
    Lanes line[kTileLanes];
#pragma GCC unroll 8
    for (int v = 0; v < kTileLanes; ++v) line[v] = reinterpret_cast<const Lanes*>(b)[v];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Lanes factor = spread(a[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileLanes; ++v) sum[i][v] = multiply_add(factor, line[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    Lanes* out = reinterpret_cast<Lanes*>(c + i * kStripStride);
#pragma GCC unroll 8
    for (int v = 0; v < kTileLanes; ++v) out[v] = first ? sum[i][v] : out[v] + sum[i][v];
  }
}

void project_strip(const Projection& p, int64_t begin, int64_t width, float* scratch, float* strip) {
  float *d = scratch, *q = d + kSlabRows * kStripStride, *line = q + kSlabRows * kDirections;
  for (int64_t k0 = 0; k0 < p.m; k0 += kSlabRows) {
    const int64_t depth = p.m - k0 < kSlabRows ? p.m - k0 : kSlabRows;
    pack<kTileColumns>(p.tuned, p.base, {k0, depth, begin, width}, line, d);
    pack<kTileRows>(p.basis, {}, {k0, depth, 0, p.r}, line, q);
    for (int64_t c = 0; c < width; c += kTileColumns) {
      for (int64_t i = 0; i < p.r; i += kTileRows) {
        multiply_tile(depth, q + i * depth, d + c * depth, strip + i * kStripStride + c, k0 == 0);
      }
    }
  }
}

void row_sums(Buffer p, const float* a, int64_t n, double* sums) {
  float line[kStripColumns];
  double inner[16] = {}, square[16] = {};
  load(p, n, line);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) {
      const double x = static_cast<double>(a[i + j]);
      inner[j] += static_cast<double>(line[i + j]) * x;
      square[j] += x * x;
    }
  }
  for (; i < n; ++i) {
    const double x = static_cast<double>(a[i]);
    inner[i % 16] += static_cast<double>(line[i]) * x;
    square[i % 16] += x * x;
  }
  for (int j = 0; j < 16; ++j) sums[0] += inner[j], sums[1] += square[j];
}
