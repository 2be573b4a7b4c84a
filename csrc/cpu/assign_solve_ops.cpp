// Shortest augmenting paths over whole rows, and the solver: prices to start from, a matching along them, repairs until
// every row's match is its best column.
#include "assign_state.h"

namespace pymerge {
namespace {

constexpr int64_t kListsFrom = 1536;  // columns from which lists of candidates pay (measured: 1024 not, 2048 twice)
constexpr size_t kFew = 4;            // free rows for which they do not
constexpr int kRounds = 12;
constexpr double kEps = 0x1p-52;

class Solver {
 public:
  explicit Solver(const AssignProblem& problem) : state_(problem), row_prices_(static_cast<size_t>(problem.rows)) {}

  bool run(const AssignResult& result) {
    if (!set_prices()) return false;
    std::vector<int32_t> free;
    for (int round = 0;; ++round) {
      free = settle(round < kRounds ? tolerance_ : kNever);
      if (free.empty() && settle_dummies(round < kRounds ? tolerance_ : kNever)) break;
      repair(std::move(free), round);
    }
    report(result);
    return true;
  }

 private:
  bool set_prices();
  std::vector<int32_t> settle(double tolerance);
  bool settle_dummies(double tolerance);
  void repair(std::vector<int32_t> free, int round);
  void search(int64_t start);
  void report(const AssignResult& result) const;

  AssignState state_;
  double tolerance_ = 0.0;
  std::vector<double> row_prices_, open_, distance_;
  struct Settled {
    int64_t column;
    double distance;
  };
  std::vector<Settled> settled_;
  std::unique_ptr<AssignLists> lists_;
  size_t listed_ = SIZE_MAX;  // free rows that were last left to the lists: they go on while these halve
};

// Square: each column's least cost, so that every column is some row's best. Otherwise 0, which free columns must have.
bool Solver::set_prices() {
  const AssignProblem& p = state_.problem;
  std::vector<float> low(static_cast<size_t>(p.columns), std::numeric_limits<float>::infinity());
  uint32_t largest = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    largest = std::max(largest, state_.scans.column_minima(state_.row(i), p.columns, p.sign, low.data()));
  }
  if (largest >= kInfinityBits) return false;
  double scale = bits_to_float(largest);
  for (int64_t j = 0; j < p.columns; ++j) {
    double price = p.rows == p.columns ? low[static_cast<size_t>(j)] : 0.0;
    if (p.start != nullptr) price = p.sign * p.start[j];
    if (!std::isfinite(price)) return false;
    state_.prices[static_cast<size_t>(j)] = price;
    scale = std::max(scale, std::abs(price));
  }
  tolerance_ = 64.0 * kEps * scale;
  return true;
}

// Rows whose match is not their best column lose it; free rows take a free column among their best. Returns the free.
std::vector<int32_t> Solver::settle(double tolerance) {
  std::vector<int32_t> free;
  for (int64_t i = 0; i < state_.rows; ++i) {
    const RowBest found = state_.best(i);
    row_prices_[static_cast<size_t>(i)] = found.value;
    const int32_t j = state_.column_of[static_cast<size_t>(i)];
    if (j >= 0) {
      const auto at = static_cast<size_t>(j);
      if (state_.held[at] - state_.prices[at] <= found.value + tolerance) continue;
      state_.release(i);
    }
    if (found.free_index >= 0) {
      state_.match(i, found.free_index);
    } else {
      free.push_back(static_cast<int32_t>(i));
    }
  }
  return free;
}

// Dummies may hold the columns of the highest price only. True where all columns are taken.
bool Solver::settle_dummies(double tolerance) {
  const double top = *std::max_element(state_.prices.begin(), state_.prices.begin() + state_.columns);
  bool complete = true;
  int64_t next = state_.rows;
  for (int64_t j = 0; j < state_.columns; ++j) {
    const auto at = static_cast<size_t>(j);
    const bool best = state_.prices[at] >= top - tolerance;
    if (!best && state_.row_of[at] >= state_.rows) state_.release(state_.row_of[at]);
    if (state_.row_of[at] < 0 && best) {
      while (state_.column_of[static_cast<size_t>(next)] >= 0) ++next;
      state_.match(next, j);
    }
    complete = complete && state_.row_of[at] >= 0;
  }
  return complete;
}

void Solver::repair(std::vector<int32_t> free, int round) {
  const bool square = state_.rows == state_.columns;
  if (square && state_.columns >= kListsFrom && free.size() > kFew && free.size() <= listed_ / 2) {
    listed_ = free.size();
    if (lists_ == nullptr) lists_ = std::make_unique<AssignLists>(state_);
    return lists_->solve(std::move(free));
  }
  if (round == 0) reduce_rows(state_, free, [this](int64_t i) { return state_.best(i); });
  const bool dummies = free.empty();
  for (int64_t i = state_.rows; dummies && i < state_.columns; ++i) {
    if (state_.column_of[static_cast<size_t>(i)] < 0) free.push_back(static_cast<int32_t>(i));
  }
  open_ = state_.prices;
  distance_.resize(open_.size());
  for (const int32_t i : free) search(i);
}

// Dijkstra over columns. A settled column leaves the scans: its price becomes -inf there and its distance +inf.
void Solver::search(int64_t start) {
  const AssignState& s = state_;
  std::fill(distance_.begin(), distance_.end(), kNever);
  settled_.clear();
  int64_t i = start;
  double shift = 0.0;
  while (true) {
    const Nearest near = s.scans.relax(s.row(i), s.width, s.problem.sign, open_.data(), s.taken.data(), shift,
                                       static_cast<int32_t>(i), distance_.data(), state_.before.data());
    if (near.free_value <= near.value) {
      for (const Settled& one : settled_) {
        const auto j = static_cast<size_t>(one.column);
        open_[j] = state_.prices[j] += one.distance - near.value;
      }
      return state_.augment(near.free_index, start);
    }
    const auto j = static_cast<size_t>(near.index);
    settled_.push_back({near.index, near.value});
    open_[j] = -kNever;
    distance_[j] = kNever;
    shift = s.held[j] - s.prices[j] - near.value;
    i = s.row_of[j];
  }
}

void Solver::report(const AssignResult& result) const {
  const bool square = state_.rows == state_.columns;
  const double sign = state_.problem.sign, *prices = state_.prices.data();
  const double top = square ? 0.0 : *std::max_element(prices, prices + state_.columns);
  double primal = 0.0, dual = 0.0, gap = 0.0;
  for (int64_t i = 0; i < state_.rows; ++i) {
    const int64_t j = state_.column_of[static_cast<size_t>(i)];
    const double cost = state_.held[static_cast<size_t>(j)], price = row_prices_[static_cast<size_t>(i)];
    result.columns[i] = j;
    result.row_prices[i] = sign * (price + top);
    primal += cost;
    dual += price + top;
    gap += cost - prices[j] - price;
  }
  for (int64_t j = 0; j < state_.columns; ++j) {
    result.col_prices[j] = sign * (prices[j] - top);
    dual += prices[j] - top;
    if (state_.row_of[static_cast<size_t>(j)] >= state_.rows) gap += top - prices[j];
  }
  result.value[0] = sign * primal;
  result.value[1] = sign * dual;
  result.value[2] = gap;
}

}  // namespace

AssignState::AssignState(const AssignProblem& p)
    : problem(p),
      scans(assign_scans()),
      rows(p.rows),
      columns(p.columns),
      width((p.columns + kScanPad - 1) / kScanPad * kScanPad),
      prices(static_cast<size_t>(width), -kNever),
      taken(static_cast<size_t>(width), 0.0),
      held(static_cast<size_t>(columns)),
      column_of(static_cast<size_t>(columns), -1),
      row_of(static_cast<size_t>(columns), -1),
      before(static_cast<size_t>(width), -1),
      first_copied_(std::max<int64_t>(0, (rows * columns - width) / columns + (rows * columns >= width))),
      zeros_(rows < columns ? static_cast<size_t>(width) : 0) {
  if (width == columns) first_copied_ = rows;
  const int64_t from = first_copied_ * columns, count = rows * columns - from;
  copied_.resize(static_cast<size_t>(count > 0 ? count + width : 0));
  if (count > 0) std::memcpy(copied_.data(), p.score + from, static_cast<size_t>(count) * sizeof(float));
}

bool assign_solve(const AssignProblem& problem, const AssignResult& result) { return Solver(problem).run(result); }

}  // namespace pymerge
