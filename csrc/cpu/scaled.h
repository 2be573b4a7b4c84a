// Entries of eight bits times the scale of their block, as float32.
#pragma once

#include <cstdint>

namespace pymerge {

// Entries first .. first + count of matrices [rows, columns], one behind the other. Entry (r, c) of matrix e is
// table[its byte] * scales[e, r / block_rows, c / block_columns]; scales: [scale_rows, scale_columns] for each matrix.
struct Scaled {
  const unsigned char* source;  // of `first`
  float* out;
  const float* table;   // [256]
  const float* scales;  // of all matrices
  int64_t first;
  int64_t count;
  int64_t rows;
  int64_t columns;
  int64_t block_rows;
  int64_t block_columns;
  int64_t scale_rows;
  int64_t scale_columns;
};

void decode_scaled(const Scaled& scaled);

}  // namespace pymerge
