// Packing of bfloat16 pairs: item k of a column holds rows 2 k (low half) and 2 k + 1. Needs cov_tile.inl.

constexpr int64_t kPairs = kCovPanel / sizeof(uint32_t);  // columns of a panel of pairs

inline void pack_pair(const u16_at* even, const u16_at* odd, int64_t stride, int64_t columns, uint32_t* out) {
  if (stride == 1) {
    for (int64_t c = 0; c < columns; ++c) out[c] = uint32_t{even[c]} | uint32_t{odd[c]} << 16;
  } else {
    for (int64_t c = 0; c < columns; ++c) out[c] = uint32_t{even[c * stride]} | uint32_t{odd[c * stride]} << 16;
  }
}

void pack_pairs(const CovSource& x, int64_t begin, int64_t count, int64_t panel, void* out) {
  const auto* data = reinterpret_cast<const u16_at*>(x.data) + panel * kPairs * x.column_stride;
  const int64_t left = x.columns - panel * kPairs, columns = left < kPairs ? left : kPairs;
  const int64_t depth = (count + 1) / 2;
  uint32_t* items = static_cast<uint32_t*>(out);
  for (int64_t k = 0; k < depth; ++k) {
    uint32_t* row = items + k * kPairs;
    const u16_at* even = data + x.kept[begin + 2 * k] * x.row_stride;
    if (2 * k + 1 < count) {
      pack_pair(even, data + x.kept[begin + 2 * k + 1] * x.row_stride, x.column_stride, columns, row);
    } else {
      for (int64_t c = 0; c < columns; ++c) row[c] = even[c * x.column_stride];
    }
    for (int64_t c = columns; c < kPairs; ++c) row[c] = 0;
  }
  drop_columns(x, panel * kPairs, columns, depth, kPairs, items);
}
