// A matching that grows row by row, and the prices that prove it: of a row, the columns whose cost - price is least are
// the ones it may be matched to. Rows beyond the given ones are dummies that cost 0: they take the columns left over.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "../common/dtype.h"

#include "assign.h"

namespace pymerge {

constexpr double kNever = std::numeric_limits<double>::infinity();

class AssignState {
 public:
  explicit AssignState(const AssignProblem& problem);

  // Costs of a row; dummies are rows of zeros.
  const float* row(int64_t i) const {
    if (i < first_copied_) return problem.score + i * columns;
    return i < rows ? copied_.data() + (i - first_copied_) * columns : zeros_.data();
  }
  float cost(int64_t i, int64_t j) const { return i < rows ? problem.sign * problem.score[i * columns + j] : 0.0f; }

  RowBest best(int64_t i) const { return scans.row_best(row(i), width, problem.sign, prices.data(), taken.data()); }

  void match(int64_t i, int64_t j) {
    column_of[static_cast<size_t>(i)] = static_cast<int32_t>(j);
    row_of[static_cast<size_t>(j)] = static_cast<int32_t>(i);
    held[static_cast<size_t>(j)] = cost(i, j);
    taken[static_cast<size_t>(j)] = kNever;
  }

  void release(int64_t i) {
    const auto j = static_cast<size_t>(column_of[static_cast<size_t>(i)]);
    column_of[static_cast<size_t>(i)] = row_of[j] = -1;
    taken[j] = 0.0;
  }

  // Along `before`, from a free column back to the free row where the path began.
  void augment(int64_t column, int64_t start) {
    for (int64_t j = column, i = -1; i != start;) {
      i = before[static_cast<size_t>(j)];
      const int64_t next = column_of[static_cast<size_t>(i)];
      match(i, j);
      j = next;
    }
  }

  const AssignProblem problem;
  const AssignScans& scans;
  const int64_t rows, columns, width;  // width: columns padded for the scans
  std::vector<double> prices, taken;   // [width]; taken: 0 for free columns, else +inf
  std::vector<float> held;             // [columns] cost of the column's match
  std::vector<int32_t> column_of;      // [columns] of rows and dummies; -1: free
  std::vector<int32_t> row_of, before;

 private:
  int64_t first_copied_;
  std::vector<float> copied_, zeros_;
};

// Gives free rows their best column and lowers its price to where the row's second choice starts; who held the column
// is free then and goes next (Jonker and Volgenant 1987, augmenting row reduction). Leaves what is still free.
template <typename Best>
void reduce_rows(AssignState& state, std::vector<int32_t>& free, Best best) {
  for (int pass = 0; pass < 2; ++pass) {
    std::vector<int32_t> left;
    int64_t steps = 4 * static_cast<int64_t>(free.size());
    for (int64_t i : free) {
      while (true) {
        const RowBest found = best(i);
        if (found.index < 0 || (found.free_index < 0 && (found.second <= found.value || --steps < 0))) {
          left.push_back(static_cast<int32_t>(i));
          break;
        }
        const int64_t j = found.free_index >= 0 ? found.free_index : found.index;
        const int64_t loser = state.row_of[static_cast<size_t>(j)];
        if (found.second < kNever) state.prices[static_cast<size_t>(j)] -= found.second - found.value;
        if (loser >= 0) state.column_of[static_cast<size_t>(loser)] = -1;
        state.match(i, j);
        if (loser < 0) break;
        i = loser;
      }
    }
    free.swap(left);
  }
}

// The same search on a few columns of each row, at a fraction of the cost. A list is made anew where a search goes
// beyond what it vouches for. Prices are right but for rounding and for ties that a list has no room for; whoever looks
// at whole rows afterwards finds out.
class AssignLists {
 public:
  explicit AssignLists(AssignState& state);

  // Matches rows of `free` (all others keep a match) as far as the lists reach; lists of these rows are made anew.
  void solve(std::vector<int32_t> free);

 private:
  struct Reached {
    double distance;
    int32_t column;
    bool operator>(const Reached& other) const {
      return distance > other.distance || (distance == other.distance && column > other.column);
    }
  };

  // Columns that are not on the list of a row that the search has come to are no nearer than this.
  struct End {
    double distance, shift;
    int32_t row;
    bool operator>(const End& other) const {
      return distance > other.distance || (distance == other.distance && row > other.row);
    }
  };

  void round_prices();
  void list(int64_t i);
  RowBest best(int64_t i) const;
  void reach(int64_t i, double shift);
  bool extend();
  void search(int64_t i);

  AssignState& state_;
  std::vector<float> prices_, costs_;  // float32 prices; [rows, kListed]
  std::vector<int32_t> columns_, lengths_;
  std::vector<float> cuts_;  // [rows] cost - price of columns that a list leaves out: at least this
  std::vector<double> distance_;
  std::vector<int64_t> mark_;  // 2 * search: reached; 2 * search + 1: settled
  std::vector<Reached> queue_, settled_;
  std::vector<End> ends_;
  int64_t search_ = 0, sink_ = -1;
  double limit_ = kNever;
};

}  // namespace pymerge
