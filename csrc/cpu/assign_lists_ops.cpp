// The search of assign_state.h on lists of the most promising columns of each row: Dijkstra with a heap.
#include <functional>

#include "assign_state.h"

namespace pymerge {
namespace {

constexpr int64_t kWanted = 24, kListed = 48;  // columns of a list: about, at most

}  // namespace

AssignLists::AssignLists(AssignState& state)
    : state_(state),
      prices_(static_cast<size_t>(state.columns)),
      costs_(static_cast<size_t>(state.rows * kListed)),
      columns_(costs_.size()),
      lengths_(static_cast<size_t>(state.rows)),
      cuts_(static_cast<size_t>(state.rows)),
      distance_(static_cast<size_t>(state.columns)),
      mark_(static_cast<size_t>(state.columns), -1) {}

// Where many columns are equally good, rows begin at different ones: lists of the same columns would match nobody.
void AssignLists::list(int64_t i) {
  const AssignScans& scans = state_.scans;
  const float* row = state_.row(i);
  const float sign = state_.problem.sign;
  int32_t* out = columns_.data() + i * kListed;
  const float limit = scans.threshold(row, state_.columns, sign, prices_.data(), kWanted);
  const int64_t first = i % state_.columns;
  int64_t count = scans.collect(row, first, state_.columns, sign, prices_.data(), limit, kListed, out);
  count += scans.collect(row, 0, first, sign, prices_.data(), limit, kListed - count, out + count);
  for (int64_t k = 0; k < count; ++k) costs_[static_cast<size_t>(i * kListed + k)] = sign * row[out[k]];
  lengths_[static_cast<size_t>(i)] = static_cast<int32_t>(count);
  cuts_[static_cast<size_t>(i)] = limit;
}

RowBest AssignLists::best(int64_t i) const {
  RowBest found = {kNever, kNever, -1, -1};
  const float* costs = costs_.data() + i * kListed;
  const int32_t* columns = columns_.data() + i * kListed;
  for (int32_t k = 0; k < lengths_[static_cast<size_t>(i)]; ++k) {
    const auto j = static_cast<size_t>(columns[k]);
    const double x = costs[k] - state_.prices[j];
    if (x < found.value) {
      found.second = found.value;
      found.value = x;
      found.index = columns[k];
      found.free_index = -1;
    } else if (x < found.second) {
      found.second = x;
    }
    if (x == found.value && found.free_index < 0 && state_.row_of[j] < 0) found.free_index = columns[k];
  }
  return found;
}

// A free column ends the search at its distance, so nothing at that distance or farther is worth a place in the queue.
void AssignLists::reach(int64_t i, double shift) {
  const float* costs = costs_.data() + i * kListed;
  const int32_t* columns = columns_.data() + i * kListed;
  const int32_t length = lengths_[static_cast<size_t>(i)];
  for (int32_t k = 0; k < length; ++k) {
    const int32_t column = columns[k];
    const auto j = static_cast<size_t>(column);
    const double x = costs[k] - state_.prices[j] - shift;
    if (x >= limit_ || mark_[j] == 2 * search_ + 1 || (mark_[j] == 2 * search_ && x >= distance_[j])) continue;
    mark_[j] = 2 * search_;
    distance_[j] = x;
    state_.before[j] = static_cast<int32_t>(i);
    if (state_.row_of[j] < 0) {
      limit_ = x;
      sink_ = column;
      continue;
    }
    queue_.push_back({x, column});
    std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
  }
  ends_.push_back({cuts_[static_cast<size_t>(i)] - shift, shift, static_cast<int32_t>(i)});
  std::push_heap(ends_.begin(), ends_.end(), std::greater<>());
}

// Makes a list anew, from the prices as they are now, whose end the search has come to: beyond it, columns that are not
// listed may be nearer. False where the new list ends no later.
bool AssignLists::extend() {
  const End end = ends_.front();
  std::pop_heap(ends_.begin(), ends_.end(), std::greater<>());
  ends_.pop_back();
  const float before = cuts_[static_cast<size_t>(end.row)];
  list(end.row);
  if (cuts_[static_cast<size_t>(end.row)] <= before) return false;
  reach(end.row, end.shift);
  return true;
}

void AssignLists::search(int64_t start) {
  ++search_;
  limit_ = kNever;
  sink_ = -1;
  queue_.clear();
  ends_.clear();
  settled_.clear();
  reach(start, 0.0);
  while (true) {
    const double nearest = queue_.empty() ? limit_ : std::min(limit_, queue_.front().distance);
    if (ends_.front().distance < nearest) {
      if (!extend()) return;
      continue;
    }
    if (nearest == limit_) break;
    const Reached next = queue_.front();
    std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
    queue_.pop_back();
    const auto j = static_cast<size_t>(next.column);
    if (mark_[j] == 2 * search_ + 1 || next.distance > distance_[j]) continue;
    mark_[j] = 2 * search_ + 1;
    settled_.push_back(next);
    reach(state_.row_of[j], state_.held[j] - state_.prices[j] - next.distance);
  }
  if (sink_ < 0) return;
  for (const Reached& one : settled_) {
    const auto j = static_cast<size_t>(one.column);
    state_.prices[j] += one.distance - limit_;
    prices_[j] = static_cast<float>(state_.prices[j]);
  }
  state_.augment(sink_, start);
}

void AssignLists::round_prices() {
  for (int64_t j = 0; j < state_.columns; ++j) {
    prices_[static_cast<size_t>(j)] = static_cast<float>(state_.prices[static_cast<size_t>(j)]);
  }
}

void AssignLists::solve(std::vector<int32_t> free) {
  round_prices();
  const bool first = search_ == 0;
  for (int64_t i = 0; first && i < state_.rows; ++i) list(i);
  for (size_t k = 0; !first && k < free.size(); ++k) list(free[k]);
  if (first) {
    reduce_rows(state_, free, [this](int64_t i) { return best(i); });
    round_prices();
  }
  for (const int32_t i : free) search(i);
}

}  // namespace pymerge
