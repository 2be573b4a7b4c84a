// Auction with epsilon scaling for one large square problem (Bertsekas, Annals of Operations Research 14, 1988; Jacobi
// form): every free row bids for its best column, at which its second best would be as good, and epsilon more. The
// highest bid gets the column, of equal ones the lowest row's. Prices are float64 and of costs, so bids lower them.
// A round is three kernels; the result does not depend on the order in which free rows are listed.
#pragma once

#include "assign.cuh"

namespace pymerge::cuda {

constexpr double kAuctionStep = 5.0, kAuctionFinest = 0x1p-46;

struct AuctionArgs {
  const float* score;  // [n, n]
  int n;
  float sign;
  double epsilon;
  double *prices, *bid;     // [n] of columns, of rows
  Count *best, *winner;     // [n] of columns: ordered bits of the highest bid; round and row that it came from
  int *column_of, *row_of;  // [n]
  int *bid_column, *free;   // [n], [2, n]
  int* count;               // [2] free rows of this and the next round
  unsigned* largest;        // bits of the largest |score|; infinity where a score or price is not finite
  int round;
};

PYMERGE_HD int64_t auction_bytes(int64_t n) { return n * (8 + 8 + 8 + 4 + 4 + 4 + 8) + 16; }

inline AuctionArgs auction_args(const AssignArgs& problem, void* space) {
  const int64_t n = problem.columns;
  AuctionArgs args = {};
  args.score = problem.score, args.n = problem.columns, args.sign = problem.sign, args.prices = problem.prices;
  args.bid = static_cast<double*>(space);
  args.best = reinterpret_cast<Count*>(args.bid + n);
  args.winner = args.best + n;
  args.column_of = reinterpret_cast<int*>(args.winner + n);
  args.row_of = args.column_of + n;
  args.bid_column = args.row_of + n;
  args.free = args.bid_column + n;
  args.count = args.free + 2 * n;
  args.largest = reinterpret_cast<unsigned*>(args.count + 2);
  return args;
}

// largest is zero.
static __global__ void __launch_bounds__(kThreads) auction_range_kernel(const __grid_constant__ AuctionArgs args) {
  const int64_t all = static_cast<int64_t>(args.n) * args.n, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned most = 0;
  for (int64_t k = first; k < all; k += stride) {
    const unsigned bits = magnitude_bits(args.score[k]);
    most = bits > most ? bits : most;
  }
  for (int64_t j = first; j < args.n; j += stride) {
    if (!(args.prices[j] - args.prices[j] == 0.0)) most = kInfinityBits;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const unsigned other = __shfl_down_sync(0xFFFFFFFFu, most, step);
    most = other > most ? other : most;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(args.largest, most);
}

// All rows free, all columns without an owner; prices stay.
static __global__ void __launch_bounds__(kThreads) auction_open_kernel(const __grid_constant__ AuctionArgs args) {
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < args.n; i += stride) {
    args.best[i] = args.winner[i] = ~Count{0};
    args.column_of[i] = args.row_of[i] = -1;
    args.free[i] = i;
    if (i == 0) args.count[0] = args.n;
  }
}

struct TopTwo {
  Candidate first;
  double second;
};

__device__ __forceinline__ TopTwo merged(const TopTwo& a, const TopTwo& b) {
  const bool b_first = comes_before(b.first, a.first);
  const double loser = b_first ? a.first.value : b.first.value, second = b_first ? b.second : a.second;
  return {{b_first ? b.first.value : a.first.value, b_first ? b.first.key : a.first.key},
          loser < second ? loser : second};
}

__device__ __forceinline__ TopTwo best_two(const AuctionArgs& args, int i, TopTwo* slots) {
  const float* row = args.score + static_cast<int64_t>(i) * args.n;
  TopTwo mine = {{infinity(), kTaken}, infinity()};
  for (int j = threadIdx.x; j < args.n; j += blockDim.x) {
    mine = merged(mine, {{static_cast<double>(args.sign * row[j]) - args.prices[j], j}, infinity()});
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const TopTwo other = {
        {__shfl_down_sync(0xFFFFFFFFu, mine.first.value, step), __shfl_down_sync(0xFFFFFFFFu, mine.first.key, step)},
        __shfl_down_sync(0xFFFFFFFFu, mine.second, step)};
    if (threadIdx.x % kWarp + step < kWarp) mine = merged(mine, other);
  }
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = mine;
  __syncthreads();
  TopTwo found = slots[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; ++w) found = merged(found, slots[w]);
  return found;
}

// Unsigned integers in the order of the numbers.
__device__ __forceinline__ Count ordered_bits(double x) {
  const long long bits = __double_as_longlong(x);
  return static_cast<Count>(bits) ^ (bits < 0 ? ~Count{0} : Count{1} << 63);
}

// One block a free row.
static __global__ void __launch_bounds__(kThreads) auction_bid_kernel(const __grid_constant__ AuctionArgs args) {
  __shared__ TopTwo slots[2 * kThreads / kWarp];
  const int now = args.round & 1, count = args.count[now];
  if (blockIdx.x == 0 && threadIdx.x == 0) args.count[1 - now] = 0;
  int turn = 0;
  for (int k = blockIdx.x; k < count; k += gridDim.x) {
    const int i = args.free[now * args.n + k];
    const TopTwo two = best_two(args, i, slots + (turn++ & 1) * (kThreads / kWarp));
    if (threadIdx.x != 0) continue;
    const int j = two.first.key;
    const double margin = args.n > 1 ? two.second - two.first.value : 0.0;
    const double bid = args.prices[j] - margin - args.epsilon;
    args.bid[i] = bid;
    args.bid_column[i] = j;
    atomicMin(args.best + j, ordered_bits(bid));
  }
}

// A later round's mark is less than any of an earlier one's, so marks are never reset.
__device__ __forceinline__ Count auction_mark(int round, int row) {
  return static_cast<Count>(~static_cast<unsigned>(round)) << 32 | static_cast<unsigned>(row);
}

static __global__ void __launch_bounds__(kThreads) auction_award_kernel(const __grid_constant__ AuctionArgs args) {
  const int now = args.round & 1, count = args.count[now];
  const int stride = gridDim.x * blockDim.x;
  for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < count; k += stride) {
    const int i = args.free[now * args.n + k], j = args.bid_column[i];
    if (ordered_bits(args.bid[i]) == args.best[j]) atomicMin(args.winner + j, auction_mark(args.round, i));
  }
}

static __global__ void __launch_bounds__(kThreads) auction_take_kernel(const __grid_constant__ AuctionArgs args) {
  const int now = args.round & 1, count = args.count[now];
  const int stride = gridDim.x * blockDim.x;
  for (int k = blockIdx.x * blockDim.x + threadIdx.x; k < count; k += stride) {
    const int i = args.free[now * args.n + k], j = args.bid_column[i];
    int left = i;
    if (args.winner[j] == auction_mark(args.round, i)) {
      left = args.row_of[j];
      args.row_of[j] = i;
      args.column_of[i] = j;
      args.prices[j] = args.bid[i];
      args.best[j] = ~Count{0};
    }
    if (left >= 0) args.free[(1 - now) * args.n + atomicAdd(args.count + (1 - now), 1)] = left;
  }
}

static __global__ void __launch_bounds__(kThreads)
    auction_match_kernel(const __grid_constant__ AuctionArgs args, int64_t* match) {
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < args.n; i += stride) match[i] = args.column_of[i];
}

struct AuctionPlan {
  bool started;   // prices hold values to start from
  double last;    // what a row may gain by another column in the end
  bool relative;  // `last` is in units of the largest |score|
  int sms;
  int rounds;  // between two looks at how many rows are free; even
};

// Prices and a matching. read(p) waits for the device and returns what is at p. False: a score or price is not finite.
template <typename Read>
bool run_auction(AuctionArgs args, const AuctionPlan& plan, Stream stream, Read read) {
  const int sms = plan.sms;
  LAUNCH(auction_range_kernel, sms * 4, kThreads, 0, stream, args);
  const unsigned bits = read(args.largest);
  if (bits >= kInfinityBits) return false;
  const float largest = bits != 0 ? __builtin_bit_cast(float, bits) : 1.0f;
  const double wanted = plan.relative ? plan.last * largest : plan.last, finest = kAuctionFinest * largest;
  const double last = wanted > finest ? wanted : finest;
  double epsilon = static_cast<double>(largest) * (plan.started ? 1e-3 : 0.5);
  const unsigned few = grid_size(args.n, kThreads, sms, 4), many = static_cast<unsigned>(sms * 8);
  while (true) {
    args.epsilon = epsilon > last ? epsilon : last;
    args.round = 0;
    LAUNCH(auction_open_kernel, few, kThreads, 0, stream, args);
    do {
      for (int k = 0; k < plan.rounds; ++k, ++args.round) {
        LAUNCH(auction_bid_kernel, many, kThreads, 0, stream, args);
        LAUNCH(auction_award_kernel, few, kThreads, 0, stream, args);
        LAUNCH(auction_take_kernel, few, kThreads, 0, stream, args);
      }
    } while (read(reinterpret_cast<unsigned*>(args.count)) != 0);
    if (args.epsilon <= last) return true;
    epsilon = args.epsilon / kAuctionStep;
  }
}

inline void launch_auction_match(const AuctionArgs& args, int64_t* match, int sms, Stream stream) {
  LAUNCH(auction_match_kernel, grid_size(args.n, kThreads, sms, 4), kThreads, 0, stream, args, match);
}

}  // namespace pymerge::cuda
