// Linear assignment, exactly: shortest augmenting paths with float32 costs and float64 prices, one block a problem.
// Thread t works on columns t, t + blockDim.x, ...; one step of a path is one row of costs and one minimum over the
// block, with one barrier. Everything of a problem that fits lies in shared memory, its costs too where there is room.
// Rows beyond the given ones are dummies that cost 0 and take the columns left over.
#pragma once

#include "common.cuh"

namespace pymerge::cuda {

constexpr int kAssignThreads = 1024;

struct AssignArgs {
  const float* score;  // [B, rows, columns], rows <= columns
  int rows, columns;
  float sign;            // -1: maximise; cost = sign * score
  int started;           // prices hold values to start from
  double* prices;        // [B, columns] of costs
  int64_t* match;        // [B, rows]
  double* row_prices;    // [B, rows]
  double* value;         // [B, 3] primal, dual, gap
  unsigned char* space;  // [B, state bytes]: null where the state fits shared memory
  int costs_shared;      // the scores, too, are copied to shared memory
};

PYMERGE_HD int64_t assign_state_bytes(int64_t columns) { return columns * (8 + 8 + 4 + 4 + 4 + 4); }

inline int assign_threads(int columns) {
  const int whole = (columns + kWarp - 1) / kWarp * kWarp;
  return whole < kAssignThreads ? whole : kAssignThreads;
}

// Of one problem, in shared or global memory.
struct AssignPlace {
  double *price, *distance;
  int *row_of, *before, *column_of, *done;
  const float* score;
};

struct Candidate {
  double value;
  int key;  // column, plus kTaken where it is matched: of equal values the lowest free column comes first
};
constexpr int kTaken = 1 << 21;

__device__ __forceinline__ bool comes_before(const Candidate& a, const Candidate& b) {
  return a.value < b.value || (a.value == b.value && a.key < b.key);
}

// The first candidate of the block, known to all threads after one barrier. slots: kWarp of them, not those of the
// last call.
__device__ __forceinline__ Candidate block_first(Candidate mine, Candidate* slots) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Candidate other = {__shfl_down_sync(0xFFFFFFFFu, mine.value, step),
                             __shfl_down_sync(0xFFFFFFFFu, mine.key, step)};
    if (comes_before(other, mine)) mine = other;
  }
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = mine;
  __syncthreads();
  Candidate first = slots[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; ++w) {
    if (comes_before(slots[w], first)) first = slots[w];
  }
  return first;
}

__device__ __forceinline__ double infinity() { return static_cast<double>(__uint_as_float(kInfinityBits)); }

__device__ __forceinline__ double assign_cost(const AssignArgs& args, const AssignPlace& p, int i, int j) {
  if (i >= args.rows) return 0.0;
  return static_cast<double>(args.sign * p.score[static_cast<int64_t>(i) * args.columns + j]);
}

// Dijkstra from a free row; the matching grows by one. All of a column's state but its match has one thread.
__device__ __forceinline__ void assign_search(const AssignArgs& args, const AssignPlace& p, int start,
                                              Candidate* slots) {
  for (int j = threadIdx.x; j < args.columns; j += blockDim.x) {
    p.distance[j] = infinity();
    p.done[j] = 0;
  }
  int i = start, turn = 0;
  double shift = 0.0;
  Candidate near;
  while (true) {
    Candidate mine = {infinity(), 2 * kTaken};
    for (int j = threadIdx.x; j < args.columns; j += blockDim.x) {
      if (p.done[j]) continue;
      const double x = assign_cost(args, p, i, j) - p.price[j] - shift;
      if (x < p.distance[j]) {
        p.distance[j] = x;
        p.before[j] = i;
      }
      const Candidate one = {p.distance[j], p.row_of[j] < 0 ? j : j + kTaken};
      if (comes_before(one, mine)) mine = one;
    }
    near = block_first(mine, slots + (turn++ & 1) * kWarp);
    if (near.key < kTaken) break;
    const int j = near.key - kTaken;
    if (threadIdx.x == j % blockDim.x) p.done[j] = 1;
    i = p.row_of[j];
    shift = assign_cost(args, p, i, j) - p.price[j] - near.value;
  }
  __syncthreads();  // the last prices and matches have been read
  for (int j = threadIdx.x; j < args.columns; j += blockDim.x) {
    if (p.done[j]) p.price[j] += p.distance[j] - near.value;
  }
  if (threadIdx.x == 0) {
    for (int j = near.key, row = -1; row != start;) {
      row = p.before[j];
      const int next = p.column_of[row];
      p.column_of[row] = j;
      p.row_of[j] = row;
      j = next;
    }
  }
  __syncthreads();
}

// Square: every column's least cost, so that each is some row's best. Otherwise 0: free columns must have the highest.
// Returns whether a score (or a given price) is not finite, the same in all threads.
__device__ __forceinline__ bool assign_begin(const AssignArgs& args, const AssignPlace& p, const double* prices,
                                             Candidate* slots) {
  int bad = 0;
  for (int j = threadIdx.x; j < args.columns; j += blockDim.x) {
    double low = infinity();
    for (int i = 0; i < args.rows; ++i) {
      const float x = p.score[static_cast<int64_t>(i) * args.columns + j];
      bad |= is_bad(x);
      const double cost = static_cast<double>(args.sign * x);
      low = cost < low ? cost : low;
    }
    if (args.started) low = prices[j];
    if (!args.started && args.rows < args.columns) low = 0.0;
    bad |= !(low - low == 0.0);
    p.price[j] = low;
    p.row_of[j] = p.column_of[j] = -1;
  }
  return block_first({bad ? 0.0 : 1.0, 0}, slots).value == 0.0;
}

// Grid B.
static __global__ void __launch_bounds__(kAssignThreads) assign_kernel(const __grid_constant__ AssignArgs args) {
  DYNAMIC_SHARED(unsigned char, shared);
  __shared__ Candidate slots[3 * kWarp];
  const int64_t columns = args.columns, b = blockIdx.x, scores = args.rows * columns;
  const bool local = args.space == nullptr;
  unsigned char* state = local ? shared : args.space + b * assign_state_bytes(columns);
  AssignPlace p;
  p.price = reinterpret_cast<double*>(state);
  p.distance = p.price + columns;
  p.row_of = reinterpret_cast<int*>(p.distance + columns);
  p.before = p.row_of + columns;
  p.column_of = p.before + columns;
  p.done = p.column_of + columns;
  p.score = args.score + b * scores;
  if (args.costs_shared) {
    float* copy = reinterpret_cast<float*>(shared + assign_state_bytes(columns));
    for (int64_t k = threadIdx.x; k < scores; k += blockDim.x) copy[k] = p.score[k];
    p.score = copy;
    __syncthreads();
  }
  double* prices = args.prices + b * columns;
  if (assign_begin(args, p, prices, slots + 2 * kWarp)) {
    for (int j = threadIdx.x; j < args.columns; j += blockDim.x) prices[j] = __uint_as_float(kNanF32);
    for (int i = threadIdx.x; i < args.rows; i += blockDim.x) args.match[b * args.rows + i] = -1;
    return;
  }
  for (int i = 0; i < args.columns; ++i) assign_search(args, p, i, slots);
  for (int j = threadIdx.x; j < args.columns; j += blockDim.x) prices[j] = p.price[j];
  for (int i = threadIdx.x; i < args.rows; i += blockDim.x) args.match[b * args.rows + i] = p.column_of[i];
}

// What of a problem lies in shared memory, within `limit` bytes.
struct AssignShared {
  bool state, costs;
  int64_t bytes;
};

inline AssignShared assign_shared(int64_t rows, int64_t columns, int64_t limit) {
  const int64_t state = assign_state_bytes(columns), costs = rows * columns * 4;
  if (state > limit) return {false, false, 0};
  return {true, state + costs <= limit, state + (state + costs <= limit ? costs : 0)};
}

// prices become those of the optimum, of costs; match the columns.
inline void launch_assign(AssignArgs args, int batch, const AssignShared& shared, Stream stream) {
  args.costs_shared = shared.costs;
  if (shared.state) args.space = nullptr;
  LAUNCH(assign_kernel, batch, assign_threads(args.columns), shared.bytes, stream, args);
}

// prices [B, columns] between costs and scores, which differ in sign.
static __global__ void __launch_bounds__(kThreads) assign_sign_kernel(double* prices, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += stride) {
    prices[k] = -prices[k];
  }
}

// The matching of the transposed problem: match [B, columns], which is all -1, gets the row's index at its column.
static __global__ void __launch_bounds__(kThreads)
    assign_turn_kernel(const __grid_constant__ AssignArgs args, int64_t rows, int64_t* turned) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < rows; k += stride) {
    const int64_t j = args.match[k];
    if (j >= 0) turned[k / args.rows * args.columns + j] = k % args.rows;
  }
}

// Row prices, one warp a row: the least cost - price.
static __global__ void __launch_bounds__(kThreads)
    assign_rows_kernel(const __grid_constant__ AssignArgs args, int64_t rows) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const float* score = args.score + row * args.columns;
  const double* prices = args.prices + row / args.rows * args.columns;
  double low = infinity();
  for (int j = lane; j < args.columns; j += kWarp) {
    const double x = static_cast<double>(args.sign * score[j]) - prices[j];
    low = x < low ? x : low;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other = __shfl_down_sync(0xFFFFFFFFu, low, step);
    low = other < low ? other : low;
  }
  if (lane == 0) args.row_prices[row] = low;
}

// Primal, dual and gap in a fixed order, and prices as the caller sees them: of scores, and, where columns are left
// over, at most 0 in costs. A problem whose prices are NaN gets NaN throughout. Grid B.
static __global__ void __launch_bounds__(kThreads) assign_value_kernel(const __grid_constant__ AssignArgs args) {
  __shared__ double scratch[kThreads / kWarp];
  __shared__ Candidate slots[kWarp];
  const int64_t b = blockIdx.x, columns = args.columns;
  double* prices = args.prices + b * columns;
  const double nothing = prices[0] - prices[0];  // 0 or NaN
  const bool bad = !(nothing == 0.0), square = args.rows == args.columns;
  Candidate top = {infinity(), 0};
  for (int j = threadIdx.x; j < args.columns; j += blockDim.x) {
    if (comes_before({-prices[j], 0}, top)) top = {-prices[j], 0};
  }
  const double shift = square ? 0.0 : -block_first(top, slots).value;
  double primal = nothing, dual = nothing, gap = nothing;
  for (int i = threadIdx.x; i < args.rows; i += blockDim.x) {
    const int64_t row = b * args.rows + i, j = bad ? 0 : args.match[row];
    const double cost = static_cast<double>(args.sign * args.score[row * columns + j]) + nothing;
    const double price = args.row_prices[row] + nothing;
    primal += cost;
    dual += price + shift;
    gap += cost - prices[j] - price - (square ? 0.0 : shift - prices[j]);
    args.row_prices[row] = args.sign * (price + shift);
  }
  for (int j = threadIdx.x; j < args.columns; j += blockDim.x) {
    dual += prices[j] - shift;
    gap += square ? 0.0 : shift - prices[j];
  }
  __syncthreads();  // prices have been read as they were
  for (int j = threadIdx.x; j < args.columns; j += blockDim.x) prices[j] = args.sign * (prices[j] - shift);
  primal = block_sum(primal, scratch);
  dual = block_sum(dual, scratch);
  gap = block_sum(gap, scratch);
  if (threadIdx.x != 0) return;
  args.value[3 * b] = args.sign * primal;
  args.value[3 * b + 1] = args.sign * dual;
  args.value[3 * b + 2] = gap;
}

inline void launch_assign_value(const AssignArgs& args, int batch, Stream stream) {
  const int64_t rows = static_cast<int64_t>(args.rows) * batch;
  const unsigned grid = static_cast<unsigned>((rows + kThreads / kWarp - 1) / (kThreads / kWarp));
  LAUNCH(assign_rows_kernel, grid, kThreads, 0, stream, args, rows);
  LAUNCH(assign_value_kernel, batch, kThreads, 0, stream, args);
}

}  // namespace pymerge::cuda
