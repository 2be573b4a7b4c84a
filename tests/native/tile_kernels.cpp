// A small matrix product on csrc/cuda/tile.cuh: the way a tensor-core kernel uses it, for tests.
#include "../../csrc/cuda/tile.cuh"

using namespace pymerge;
using namespace pymerge::cuda;

namespace {

constexpr int kBlockM = 32, kBlockN = 16, kBlockK = 32, kStages = 2, kPad = 8;  // 2 x 2 warps, a tile each

struct ProductArgs {
  const uint16_t *a, *b;  // [m, k], [k, n]
  float* c;               // [m, n]
  int m, n, k;            // multiples of 8
};

struct Stage {
  uint16_t a[kBlockM][kBlockK + kPad];
  uint16_t b[kBlockK][kBlockN + kPad];
};

__device__ void fetch(const ProductArgs& args, Stage& stage, int k0) {
  const int row0 = blockIdx.x * kBlockM, column0 = blockIdx.y * kBlockN;
  for (int i = threadIdx.x; i < kBlockM * kBlockK / 8; i += blockDim.x) {
    const int row = i / (kBlockK / 8), k = i % (kBlockK / 8) * 8;
    const bool valid = row0 + row < args.m && k0 + k < args.k;
    copy_async<16>(&stage.a[row][k], args.a + (valid ? (row0 + row) * args.k + k0 + k : 0), valid);
  }
  for (int i = threadIdx.x; i < kBlockK * kBlockN / 8; i += blockDim.x) {
    const int k = i / (kBlockN / 8), column = i % (kBlockN / 8) * 8;
    const bool valid = k0 + k < args.k && column0 + column < args.n;
    copy_async<16>(&stage.b[k][column], args.b + (valid ? (k0 + k) * args.n + column0 + column : 0), valid);
  }
  copy_async_commit();
}

// C [16, 8] of a warp += A B of one stage; operands by ldmatrix.
template <int kOperand>
__device__ void multiply(const Stage& stage, int row, int column, FragmentC& c) {
  const int lane = threadIdx.x % kWarp;
  for (int k = 0; k < kBlockK; k += kTileK<kOperand>) {
    FragmentA a;
    FragmentB b;
    load_matrix<4, false>(a.at, &stage.a[row + lane % 16][k + 8 * (lane / 16)]);
    load_matrix<2, true>(b.at, &stage.b[k + lane % 16][column]);
    mma<kOperand>(c, a, b);
  }
}

// The same product with operands widened to float32 and rounded to tf32, lane by lane.
template <>
__device__ void multiply<kOperandTF32>(const Stage& stage, int row, int column, FragmentC& c) {
  const int lane = threadIdx.x % kWarp;
  for (int k = 0; k < kBlockK; k += kTileK<kOperandTF32>) {
    FragmentA a;
    FragmentB b;
    for (int i = 0; i < 4; ++i) {
      a.at[i] = to_tf32(from_bf16(stage.a[row + a_row(lane, i)][k + a_k<kOperandTF32>(lane, i)]));
    }
    for (int i = 0; i < 2; ++i) {
      b.at[i] = to_tf32(from_bf16(stage.b[k + b_k<kOperandTF32>(lane, i)][column + b_column(lane)]));
    }
    mma<kOperandTF32>(c, a, b);
  }
}

template <int kOperand, bool kBarrier, bool kWait>
__global__ void product_kernel(const __grid_constant__ ProductArgs args) {
  DYNAMIC_SHARED(Stage, stages);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = warp / 2 * kTileM, column = warp % 2 * kTileN;
  FragmentC c = {};
  fetch(args, stages[0], 0);
  for (int k0 = 0, step = 0; k0 < args.k; k0 += kBlockK, ++step) {
    if (k0 + kBlockK < args.k) {
      fetch(args, stages[(step + 1) % kStages], k0 + kBlockK);
      if (kWait) copy_async_wait<1>();
    } else if (kWait) {
      copy_async_wait<0>();
    }
    __syncthreads();
    multiply<kOperand>(stages[step % kStages], row, column, c);
    if (kBarrier) __syncthreads();  // before the next fetch overwrites this stage
  }
  for (int i = 0; i < 4; ++i) {
    const int m = blockIdx.x * kBlockM + row + c_row(lane, i), n = blockIdx.y * kBlockN + column + c_column(lane, i);
    if (m < args.m && n < args.n) args.c[m * args.n + n] = c.at[i];
  }
}

}  // namespace

extern "C" void emulate_product(const ProductArgs* args, int operand, int barrier, int wait) {
  const auto plain = operand == kOperandBF16  ? product_kernel<kOperandBF16, true, true>
                     : operand == kOperandF16 ? product_kernel<kOperandF16, true, true>
                                              : product_kernel<kOperandTF32, true, true>;
  const auto kernel = barrier == 0 ? product_kernel<kOperandBF16, false, true>
                      : wait == 0  ? product_kernel<kOperandBF16, true, false>
                                   : plain;
  const dim3 grid((args->m + kBlockM - 1) / kBlockM, (args->n + kBlockN - 1) / kBlockN);
  LAUNCH(kernel, grid, 128, kStages * sizeof(Stage), nullptr, *args);
}
