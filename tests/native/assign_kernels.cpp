// The assignment kernels of csrc/cuda run by the emulator of csrc/emu, for ctypes: launches and workspaces as on a
// device.
#include <vector>

#include "../../csrc/cuda/auction.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

extern "C" {

struct AssignFields {
  const float* score;
  double *prices, *row_prices, *value;
  int64_t* match;
  int64_t shared_limit;
  double tolerance;  // of the auction; below 0: none, paths only
  int32_t batch, rows, columns, maximize, started, exact;
};

void emulate_assign(const AssignFields* f) {
  AssignArgs args = {};
  args.score = f->score, args.rows = f->rows, args.columns = f->columns, args.sign = f->maximize ? -1.0f : 1.0f;
  args.prices = f->prices, args.match = f->match, args.row_prices = f->row_prices, args.value = f->value;
  args.started = f->started;
  const int64_t prices = int64_t{f->batch} * f->columns;
  if (args.started && f->maximize) LAUNCH(assign_sign_kernel, 2, kThreads, 0, nullptr, args.prices, prices);
  bool paths = true;
  if (f->tolerance >= 0.0) {
    std::vector<uint64_t> space(static_cast<size_t>(auction_bytes(f->columns)) / 8 + 1);
    const AuctionArgs bids = auction_args(args, space.data());
    const auto read = [](const unsigned* p) { return *p; };
    const bool done = run_auction(bids, {args.started != 0, f->tolerance, false, 1, 2}, nullptr, read);
    paths = !done || f->exact != 0;
    if (!paths) launch_auction_match(bids, f->match, 1, nullptr);
    args.started = 1;
  }
  if (paths) {
    const AssignShared shared = assign_shared(f->rows, f->columns, f->shared_limit);
    std::vector<double> space(static_cast<size_t>(f->batch * assign_state_bytes(f->columns)) / 8);
    args.space = reinterpret_cast<unsigned char*>(space.data());
    launch_assign(args, f->batch, shared, nullptr);
  }
  launch_assign_value(args, f->batch, nullptr);
}

void emulate_turn(const int64_t* found, int64_t batch, int32_t rows, int32_t columns, int64_t* match) {
  AssignArgs args = {};
  args.rows = rows, args.columns = columns, args.match = const_cast<int64_t*>(found);
  LAUNCH(assign_turn_kernel, 2, kThreads, 0, nullptr, args, batch * rows, match);
}
}
