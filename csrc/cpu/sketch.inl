// The loops of sketch.h, compiled once per CPU level (sketch_levels_ops.cpp): kLanes rows of A at a time, side by side
// in the lanes of a vector, so that an entry of Omega is one vector addition.

// Entries of rows [0, count) and columns [0, width) of a block of A as x[column][plain, negated][row]. Row by row where
// rows are contiguous: 16 rows a power of two apart would throw each other out of the cache.
template <typename Stored, typename T>
void load_block(const Stored* __restrict__ a, int64_t row_stride, int64_t column_stride, int64_t count, int64_t width,
                T* __restrict__ x) {
  if (count == kLanes && row_stride == 1) {
    for (int64_t j = 0; j < width; ++j) {
      for (int i = 0; i < kLanes; ++i) x[j * 2 * kLanes + i] = widen(a[j * column_stride + i]);
    }
  } else {
    for (int64_t i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        x[j * 2 * kLanes + i] = i < count ? widen(a[i * row_stride + j * column_stride]) : T{0};
      }
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    for (int i = 0; i < kLanes; ++i) x[(2 * j + 1) * kLanes + i] = -x[2 * j * kLanes + i];
  }
}

// sum += x. Vectors by name: of a plain loop the compiler makes sixteen scalar additions.
void add_lanes(const float* x, float* sum) { *reinterpret_cast<Floats*>(sum) += *reinterpret_cast<const Floats*>(x); }

void add_lanes(const double* x, double* sum) {
  for (int half = 0; half < 2; ++half) {
    reinterpret_cast<Doubles*>(sum)[half] += reinterpret_cast<const Doubles*>(x)[half];
  }
}

// y [count, width] = rows of A times the sparse Omega: sums over the columns of A in ascending order, scaled at the
// end. panel: width * kLanes, block: kColumns * 2 * kLanes entries.
template <typename Stored, typename T>
void sparse_rows(const Source& source, const Stored* a, int64_t count, const Picks& picks, T* panel, T* block, T* y) {
  for (int64_t i = 0; i < picks.width * kLanes; ++i) panel[i] = T{0};
  for (int64_t begin = 0; begin < source.columns; begin += kColumns) {
    const int64_t n = source.columns - begin < kColumns ? source.columns - begin : kColumns;
    load_block(a + begin * source.column_stride, source.row_stride, source.column_stride, count, n, block);
    const uint32_t* pick = picks.at + begin * picks.segments;
    for (int64_t j = 0; j < n; ++j) {
      for (int s = 0; s < picks.segments; ++s, ++pick) {
        add_lanes(block + (2 * j + (*pick & 1u)) * kLanes, panel + int64_t{*pick >> 1} * kLanes);
      }
    }
  }
  const T scale = static_cast<T>(picks.scale);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < picks.width; ++c) y[i * picks.width + c] = panel[c * kLanes + i] * scale;
  }
}

// Rows [begin, end) of the Gaussian Omega.
__attribute__((optimize("no-math-errno"))) void gaussian_rows(uint64_t seed, int64_t begin, int64_t end, int64_t width,
                                                              float* omega) {
  for (int64_t row = begin; row < end; ++row) {
    float* to = omega + row * width;
    const int64_t whole = width / 4;
    for (int64_t group = 0; group < whole; ++group) {
      const Normal4 x = gaussian4(seed, row, group);
      for (int i = 0; i < 4; ++i) to[4 * group + i] = x.at[i];
    }
    if (width % 4 == 0) continue;
    const Normal4 x = gaussian4(seed, row, whole);
    for (int64_t i = 4 * whole; i < width; ++i) to[i] = x.at[i - 4 * whole];
  }
}
