#include "gather.h"

#include <cstring>

namespace pymerge {
namespace {

// Blocks of one entry: a load and a store each. Two rows at once share the load of the index.
template <typename T>
void gather_entries(const T* s0, const T* s1, T* d0, T* d1, const int32_t* columns, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const int32_t c = columns[j];
    d0[j] = s0[c];
    d1[j] = s1[c];
  }
}

template <typename T>
void gather_typed(const Gather& g) {
  const int64_t length = g.row_bytes / static_cast<int64_t>(sizeof(T));
  const auto row = [&](int64_t i) { return reinterpret_cast<const T*>(g.source + g.rows[i] * g.row_bytes); };
  const auto place = [&](int64_t i) { return reinterpret_cast<T*>(g.out + g.places[i] * g.row_bytes); };
  for (int64_t i = 0; i < g.count; i += 2) {
    const int64_t other = i + 1 < g.count ? i + 1 : i;
    for (int64_t at = 0; at < length; at += g.n) {
      gather_entries(row(i) + at, row(other) + at, place(i) + at, place(other) + at, g.columns, g.n);
    }
  }
}

void gather_blocks(const Gather& g) {
  const auto unit = static_cast<size_t>(g.unit);
  for (int64_t i = 0; i < g.count; ++i) {
    const unsigned char* source = g.source + g.rows[i] * g.row_bytes;
    unsigned char* out = g.out + g.places[i] * g.row_bytes;
    for (int64_t at = 0; at < g.row_bytes; at += g.n * g.unit) {
      for (int64_t j = 0; j < g.n; ++j) {
        std::memcpy(out + at + j * g.unit, source + at + g.columns[j] * g.unit, unit);
      }
    }
  }
}

}  // namespace

void gather_rows(const Gather& g) {
  if (g.columns == nullptr) {
    for (int64_t i = 0; i < g.count; ++i) {
      std::memcpy(g.out + g.places[i] * g.row_bytes, g.source + g.rows[i] * g.row_bytes,
                  static_cast<size_t>(g.row_bytes));
    }
    return;
  }
  const auto aligned = [&](int64_t bytes) {
    return (reinterpret_cast<uintptr_t>(g.source) | reinterpret_cast<uintptr_t>(g.out)) %
               static_cast<uintptr_t>(bytes) ==
           0;
  };
  if (g.unit == 2 && aligned(2)) return gather_typed<uint16_t>(g);
  if (g.unit == 4 && aligned(4)) return gather_typed<uint32_t>(g);
  if (g.unit == 8 && aligned(8)) return gather_typed<uint64_t>(g);
  gather_blocks(g);
}

}  // namespace pymerge
