// Linear assignment on host memory: min over matchings of sum_i cost(i, column of i), cost = sign * score. Raw pointers
// only. A row of scores may be read up to kScanPad entries past its end (the solver copies the last ones).
#pragma once

#include <cstdint>
#include <vector>

namespace pymerge {

constexpr int64_t kScanPad = 16;  // columns are scanned in groups of this many; arrays over columns are padded to it

inline int64_t padded(int64_t columns) { return (columns + kScanPad - 1) / kScanPad * kScanPad; }

// The least value of a scanned row, the lowest index that has it, and the lowest index of a free column that has it
// (-1: none); `second` is the least value at any other index.
struct RowBest {
  double value, second;
  int64_t index, free_index;
};

// The least of the distances after a relaxation, over all columns and over free ones, each with its lowest index.
struct Nearest {
  double value, free_value;
  int64_t index, free_index;
};

// Loops over one row, one set per CPU level. Values are sign * row[j] - prices[j] in float64; `padded_columns` is a
// multiple of kScanPad; pads hold prices of -inf, which no minimum takes. taken[j] is 0 for free columns, else +inf.
struct AssignScans {
  // low[j] = min(low[j], sign * row[j]); returns the largest bits of |row[j]| among the first `columns`.
  uint32_t (*column_minima)(const float* row, int64_t columns, float sign, float* low);
  RowBest (*row_best)(const float* row, int64_t padded_columns, float sign, const double* prices, const double* taken);
  // distance[j] = min(distance[j], sign * row[j] - prices[j] - shift), before[j] = from where that was less.
  Nearest (*relax)(const float* row, int64_t padded_columns, float sign, const double* prices, const double* taken,
                   double shift, int32_t from, double* distance, int32_t* before);
  // In float32: a limit that about `wanted` (<= 64) or a few more values do not exceed; then up to `room` columns of
  // [begin, end) whose value does not exceed it, in order.
  float (*threshold)(const float* row, int64_t columns, float sign, const float* prices, int64_t wanted);
  int64_t (*collect)(const float* row, int64_t begin, int64_t end, float sign, const float* prices, float limit,
                     int64_t room, int32_t* out);
};

const AssignScans& assign_scans();  // of the CPU level in use

struct AssignProblem {
  const float* score = nullptr;  // [rows, columns], rows <= columns
  int64_t rows = 0, columns = 0;
  float sign = 1.0f;              // -1: maximise
  const double* start = nullptr;  // [columns] prices of `score` to start from
};

struct AssignResult {
  int64_t* columns;    // [rows]
  double* row_prices;  // [rows]
  double* col_prices;  // [columns]
  double* value;       // primal, dual, gap
};

// False where a score (or a starting price) is not finite: nothing is written then.
bool assign_solve(const AssignProblem& problem, const AssignResult& result);

}  // namespace pymerge
