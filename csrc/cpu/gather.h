// Rows put in another order, and the entries within them: how a tensor is read as a permutation says.
#pragma once

#include <cstdint>

namespace pymerge {

// Row i of the source goes to row places[i] of out. A row is `repeats` times n blocks of `unit` bytes; block j of the
// result is block columns[j] of the source. No columns: rows are copied as they are.
struct Gather {
  const unsigned char* source;
  unsigned char* out;
  const int64_t* rows;
  const int64_t* places;
  int64_t count;
  int64_t row_bytes;
  const int32_t* columns;
  int64_t n;
  int64_t unit;
};

void gather_rows(const Gather& gather);

}  // namespace pymerge
