// Packing and tile products of cov_kernels.h for one CPU level. The including file defines before this, in its
// namespace, sum + a * b of its vectors: multiply_add(a, b, sum).
// Templates of the standard library stay out of here: their instantiations would be shared between levels.

// Numbers of type T in vectors of `bytes`; rows x (vectors * kLanes) sums stay in registers, `segment` items make one
// sum.
template <class T, int bytes, int rows, int vectors, int segment>
struct Vectors {
  using Item = T;
  using Sum = T;
  typedef T Lanes __attribute__((vector_size(bytes)));
  typedef T LanesAt __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = bytes / sizeof(T), kRows = rows, kVectors = vectors, kSegment = segment;
  static Lanes spread(T x) { return x - Lanes{}; }
  static Lanes load(const T* p) { return *reinterpret_cast<const LanesAt*>(p); }
  static Lanes load_sums(const T* p) { return load(p); }
  static void store(T* p, Lanes x) { *reinterpret_cast<LanesAt*>(p) = x; }
  static Lanes add_product(Lanes a, Lanes b, Lanes sum) { return multiply_add(a, b, sum); }
};

typedef uint16_t u16_at __attribute__((aligned(1), may_alias));
typedef float f32_at __attribute__((aligned(1), may_alias));
typedef double f64_at __attribute__((aligned(1), may_alias));

struct FromBF16 {
  using Stored = u16_at;
  static float wide(Stored x) { return __builtin_bit_cast(float, uint32_t{x} << 16); }
};
struct FromF16 {
  using Stored = u16_at;
  static float wide(Stored x) { return f16_to_float(x); }
};
struct FromF32 {
  using Stored = f32_at;
  static float wide(Stored x) { return x; }
};
struct FromF64 {
  using Stored = f64_at;
  static double wide(Stored x) { return x; }
};

// One row of a panel: `columns` entries, then zeros.
template <class From, class Item>
inline void pack_row(const typename From::Stored* row, int64_t stride, int64_t columns, int64_t width, Item* out) {
  if (stride == 1) {
    for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<Item>(From::wide(row[c]));
  } else {
    for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<Item>(From::wide(row[c * stride]));
  }
  for (int64_t c = columns; c < width; ++c) out[c] = Item{};
}

// Columns that do not count become zeros, whatever they hold.
template <class Item>
inline void drop_columns(const CovSource& x, int64_t first, int64_t columns, int64_t depth, int64_t width, Item* out) {
  if (x.column_kept == nullptr) return;
  for (int64_t c = 0; c < columns; ++c) {
    if (x.column_kept[first + c]) continue;
    for (int64_t k = 0; k < depth; ++k) out[k * width + c] = Item{};
  }
}

template <class From, class Item, int64_t width>
void pack_from(const CovSource& x, int64_t begin, int64_t count, int64_t panel, Item* out) {
  const auto* data = reinterpret_cast<const typename From::Stored*>(x.data) + panel * width * x.column_stride;
  const int64_t left = x.columns - panel * width, columns = left < width ? left : width;
  for (int64_t k = 0; k < count; ++k) {
    pack_row<From>(data + x.kept[begin + k] * x.row_stride, x.column_stride, columns, width, out + k * width);
  }
  drop_columns(x, panel * width, columns, count, width, out);
}

template <class L>
void pack(const CovSource& x, int64_t begin, int64_t count, int64_t panel, void* out) {
  using Item = typename L::Item;
  constexpr int64_t width = kCovPanel / sizeof(Item);
  Item* items = static_cast<Item*>(out);
  if (x.dtype == Dtype::kBF16) pack_from<FromBF16, Item, width>(x, begin, count, panel, items);
  if (x.dtype == Dtype::kF16) pack_from<FromF16, Item, width>(x, begin, count, panel, items);
  if (x.dtype == Dtype::kF32) pack_from<FromF32, Item, width>(x, begin, count, panel, items);
  if (x.dtype == Dtype::kF64) pack_from<FromF64, Item, width>(x, begin, count, panel, items);
}

// kRows x kColumns sums over one segment, put into out or added to it; a and b are panels, moved to the first row and
// column of the block and to the segment. Not inlined: its sums need nearly all vector registers.
template <class L, bool first>
__attribute__((noinline)) void segment_sums(const typename L::Item* a, const typename L::Item* b, int64_t depth,
                                            typename L::Sum* out) {
  constexpr int64_t width = kCovPanel / sizeof(typename L::Item);
  typename L::Lanes sums[L::kRows][L::kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < L::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < L::kVectors; ++v) sums[r][v] = typename L::Lanes{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename L::Lanes right[L::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < L::kVectors; ++v) right[v] = L::load(b + k * width + v * L::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < L::kRows; ++r) {
      const typename L::Lanes left = L::spread(a[k * width + r]);
#pragma GCC unroll 4
      for (int v = 0; v < L::kVectors; ++v) sums[r][v] = L::add_product(left, right[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < L::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < L::kVectors; ++v) {
      typename L::Sum* at = out + r * width + v * L::kLanes;
      L::store(at, first ? sums[r][v] : L::load_sums(at) + sums[r][v]);
    }
  }
}

// cov[first_row + r][first_column + c] += alpha * sums[r][c] above and on the diagonal
template <class Sum, class Total, int64_t width>
void add_sums(const Sum* sums, int64_t first_row, int64_t first_column, const CovTarget& target) {
  using Wide = decltype(Sum{} + Total{});
  const Wide alpha = static_cast<Wide>(target.alpha);
  const int64_t left = target.columns - first_column, columns = left < width ? left : width;
  for (int64_t r = 0; r < width && first_row + r < target.columns; ++r) {
    Total* row = reinterpret_cast<Total*>(target.cov) + (first_row + r) * target.row_stride + first_column;
    const int64_t from = first_row == first_column ? r : 0;
    for (int64_t c = from; c < columns; ++c) {
      row[c] = static_cast<Total>(static_cast<Wide>(row[c]) + alpha * static_cast<Wide>(sums[r * width + c]));
    }
  }
}

template <class Sum, int64_t width>
void add_tile(const Sum* sums, int64_t i, int64_t j, const CovTarget& target) {
  if (target.wide) {
    add_sums<Sum, double, width>(sums, i * width, j * width, target);
  } else {
    add_sums<Sum, float, width>(sums, i * width, j * width, target);
  }
}

// The sums of one segment, block by block; those below the diagonal of the product are left out.
template <class L, bool first>
inline void add_segment(const typename L::Item* left, const typename L::Item* right, int64_t depth, bool diagonal,
                        typename L::Sum* sums) {
  constexpr int64_t width = kCovPanel / sizeof(typename L::Item), columns = L::kVectors * L::kLanes;
  static_assert(width % columns == 0 && width % L::kRows == 0);
  for (int64_t c = 0; c < width; c += columns) {
    for (int64_t r = 0; r < width && !(diagonal && r >= c + columns); r += L::kRows) {
      segment_sums<L, first>(left + r, right + c, depth, sums + r * width + c);
    }
  }
}

// A segment of the right panel stays in the first-level cache. Segments are short for another reason too: squares of
// bfloat16 numbers round down more often than up (those of odd significands end in binary 001), so one float sum of
// 1024 of them is off by 1.4e-6, sums of 256 by a quarter of it.
template <class L>
void tile(const void* a, const void* b, int64_t i, int64_t j, int64_t depth, const CovTarget& target) {
  using Item = typename L::Item;
  constexpr int64_t width = kCovPanel / sizeof(Item), segment = L::kSegment;
  alignas(64) typename L::Sum sums[width * width];
  const Item *left = static_cast<const Item*>(a), *right = static_cast<const Item*>(b);
  add_segment<L, true>(left, right, depth < segment ? depth : segment, i == j, sums);
  for (int64_t k = segment; k < depth; k += segment) {
    const int64_t rest = depth - k;
    add_segment<L, false>(left + k * width, right + k * width, rest < segment ? rest : segment, i == j, sums);
  }
  add_tile<typename L::Sum, width>(sums, i, j, target);
}

template <class L>
const CovKernels& kernels_of(int64_t rows_a_item, void (*packed)(const CovSource&, int64_t, int64_t, int64_t, void*)) {
  static const CovKernels kernels = {
      kCovPanel / static_cast<int64_t>(sizeof(typename L::Item)), rows_a_item, 1, 1, packed, tile<L>, nullptr, nullptr};
  return kernels;
}
