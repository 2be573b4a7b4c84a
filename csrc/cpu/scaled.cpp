#include "scaled.h"

#include <algorithm>

namespace pymerge {

void decode_scaled(const Scaled& s) {
  const int64_t end = s.first + s.count;
  for (int64_t at = s.first; at < end;) {
    const int64_t row = at / s.columns, column = at % s.columns;
    const int64_t scale_row = row / s.rows * s.scale_rows + row % s.rows / s.block_rows;
    const int64_t block = column / s.block_columns;
    const int64_t stop = std::min({end, at - column + s.columns, at - column + (block + 1) * s.block_columns});
    const float scale = s.scales[scale_row * s.scale_columns + block];
    const unsigned char* in = s.source + (at - s.first);
    float* out = s.out + (at - s.first);
    for (int64_t i = 0; i < stop - at; ++i) out[i] = s.table[in[i]] * scale;
    at = stop;
  }
}

}  // namespace pymerge
