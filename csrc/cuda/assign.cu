#include "assign.cuh"

#include "auction.cuh"
#include "call.h"

namespace pymerge::cuda {
namespace {

constexpr int kSmall = 1024;          // columns up to which one block a problem is all there is to do
constexpr double kExactStart = 1e-7;  // epsilon, of the largest score, whose prices exact paths start from
constexpr int kRounds = 64;           // of an auction for one look of the host

Tensor bytes_like(const Tensor& like, int64_t bytes) { return new_tensor(like, {(bytes + 7) / 8}, ScalarType::Long); }

int shared_limit(const Tensor& like) {
  int limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, like.get_device_index()));
  return limit - 4096;  // what the kernels use besides
}

void paths(AssignArgs args, int batch, const Tensor& like, Stream stream) {
  const AssignShared shared = assign_shared(args.rows, args.columns, shared_limit(like));
  const int64_t bytes = shared.state ? 0 : batch * assign_state_bytes(args.columns);
  Tensor space = bytes_like(like, bytes);
  args.space = static_cast<unsigned char*>(space.mutable_data_ptr());
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(assign_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared.bytes)));
  launch_assign(args, batch, shared, stream);
}

// One problem. The host looks at how many rows are free now and then: how long an auction takes depends on the scores.
void auction(AssignArgs args, std::optional<double> tolerance, const Tensor& like, Stream stream) {
  const int64_t bytes = auction_bytes(args.columns);
  Tensor space = bytes_like(like, bytes);
  STD_CUDA_CHECK(cudaMemsetAsync(space.mutable_data_ptr(), 0, static_cast<size_t>(bytes), stream));
  if (!args.started) {
    STD_CUDA_CHECK(cudaMemsetAsync(args.prices, 0, static_cast<size_t>(args.columns) * sizeof(double), stream));
  }
  const AuctionArgs bids = auction_args(args, space.mutable_data_ptr());
  const auto read = [stream](const unsigned* p) {
    unsigned value = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&value, p, sizeof(value), cudaMemcpyDeviceToHost, stream));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream));
    return value;
  };
  const int sms = multiprocessors(like);
  const AuctionPlan plan = {args.started != 0, tolerance ? *tolerance : kExactStart, !tolerance, sms, kRounds};
  const bool done = run_auction(bids, plan, stream, read);
  if (done && tolerance) return launch_auction_match(bids, args.match, sms, stream);
  args.started = 1;
  paths(args, 1, like, stream);
}

void solve(AssignArgs args, int batch, std::optional<double> tolerance, const Tensor& like) {
  const Stream stream = current_stream(like);
  const bool large = args.columns > kSmall && args.rows == args.columns;
  if (!large) paths(args, batch, like, stream);
  for (int b = 0; large && b < batch; ++b) {
    AssignArgs one = args;
    one.score += static_cast<int64_t>(b) * args.rows * args.columns;
    one.prices += static_cast<int64_t>(b) * args.columns;
    one.match += static_cast<int64_t>(b) * args.rows;
    auction(one, tolerance, like, stream);
  }
  launch_assign_value(args, batch, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> assign(Tensor score, bool maximize, std::optional<Tensor> prices,
                                                  std::optional<double> tolerance) {
  check_assign(score, prices, tolerance);
  const DeviceGuard guard(score.get_device_index());
  const int64_t batch = score.size(0), rows = score.size(1), columns = score.size(2);
  const bool tall = rows > columns;
  const int64_t few = tall ? columns : rows, many = tall ? rows : columns;
  const Tensor turned = tall ? torch::stable::transpose(score, 1, 2) : score;
  const Tensor source = torch::stable::contiguous(torch::stable::to(turned, ScalarType::Float));
  Tensor match = new_tensor(score, {batch, rows}, ScalarType::Long),
         value = new_zeros(score, {batch, 3}, ScalarType::Double);
  Tensor few_prices = new_zeros(score, {batch, few}, ScalarType::Double);
  Tensor many_prices = new_zeros(score, {batch, many}, ScalarType::Double);
  Tensor found = tall ? new_tensor(score, {batch, few}, ScalarType::Long) : match;
  if (batch * rows > 0 && few == 0) {
    const auto bytes = static_cast<size_t>(batch * rows) * sizeof(int64_t);
    STD_CUDA_CHECK(cudaMemsetAsync(match.mutable_data_ptr(), 0xFF, bytes, current_stream(score)));
  }
  if (batch * few > 0) {
    const Stream stream = current_stream(score);
    AssignArgs args = {};
    args.score = static_cast<const float*>(source.const_data_ptr());
    args.rows = static_cast<int>(few), args.columns = static_cast<int>(many), args.sign = maximize ? -1.0f : 1.0f;
    args.started = prices && !tall;
    args.prices = data_of<double>(many_prices), args.row_prices = data_of<double>(few_prices);
    args.match = data_of<int64_t>(found), args.value = data_of<double>(value);
    if (args.started) torch::stable::copy_(many_prices, *prices);
    const unsigned grid = grid_size(batch * many, kThreads, multiprocessors(score), 8);
    if (args.started && maximize) LAUNCH(assign_sign_kernel, grid, kThreads, 0, stream, args.prices, batch * many);
    solve(args, static_cast<int>(batch), tolerance, score);
    if (tall) {  // all bits 1: -1
      const auto bytes = static_cast<size_t>(batch * rows) * sizeof(int64_t);
      STD_CUDA_CHECK(cudaMemsetAsync(match.mutable_data_ptr(), 0xFF, bytes, stream));
    }
    if (tall) LAUNCH(assign_turn_kernel, grid, kThreads, 0, stream, args, batch * few, data_of<int64_t>(match));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {match, tall ? many_prices : few_prices, tall ? few_prices : many_prices, value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymerge, CUDA, m) { m.impl("assign", TORCH_BOX(&assign)); }

}  // namespace pymerge::cuda
