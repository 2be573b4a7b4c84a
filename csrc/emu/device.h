// Runs the kernels of ../cuda on the CPU, for tests: one block after another, every CUDA thread a fiber that gives way
// at barriers and warp collectives. Single-threaded, so atomics are plain additions and every run is the same. Dynamic
// shared memory is poisoned before each block; `emu::reversed` runs the threads in the opposite order, which changes
// the result where a barrier is missing.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define COLD
#define LAUNCH(kernel, grid, block, shmem, stream, ...) \
  pymerge::emu::launch((grid), (block), (shmem), (stream), [&] { (kernel)(__VA_ARGS__); })
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(pymerge::emu::shared.data())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pymerge::emu {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 64 << 10;

enum class State { kReady, kBarrier, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  State state = State::kDone;
  alignas(16) unsigned char lane[16];  // what this thread offers to its warp
};

inline bool reversed = false;
inline std::vector<uint64_t> shared;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running = 0;
inline std::function<void()> body;

inline void give_way(State state) {
  Fiber& fiber = fibers[running];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

inline void enter() {
  body();
  give_way(State::kDone);
}

inline void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.state = State::kReady;
}

inline void run_ready(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    running = reversed ? threads - 1 - i : i;
    if (fibers[running].state != State::kReady) continue;
    threadIdx = dim3(running);
    swapcontext(&scheduler, &fibers[running].context);
  }
}

inline bool all_in(unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state != state) return false;
  }
  return true;
}

inline void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

// Lets waiting threads go on; false once all are done. A barrier that some threads left out by returning is an error.
inline bool advance(unsigned threads) {
  bool moved = false;
  for (unsigned warp = 0; warp < threads; warp += kLanes) {
    if (!all_in(warp, warp + kLanes, State::kWarp)) continue;
    release(warp, warp + kLanes);
    moved = true;
  }
  if (moved) return true;
  if (all_in(0, threads, State::kDone)) return false;
  if (!all_in(0, threads, State::kBarrier)) throw std::logic_error("emulated block: threads wait at different places");
  release(0, threads);
  return true;
}

template <typename Body>
void launch(dim3 grid, dim3 block, size_t shmem, void*, Body kernel) {
  if (block.x % kLanes != 0) throw std::logic_error("emulated block: whole warps only");
  body = kernel;
  gridDim = grid;
  blockDim = block;
  if (fibers.size() < block.x) fibers = std::vector<Fiber>(block.x);
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    blockIdx = dim3(b % grid.x, b / grid.x);
    shared.assign(shmem / 8 + 1, UINT64_MAX);
    for (unsigned i = 0; i < block.x; ++i) start(fibers[i]);
    do run_ready(block.x);
    while (advance(block.x));
  }
}

template <typename T>
T from_lane(T x, unsigned lane, bool valid) {
  std::memcpy(fibers[running].lane, &x, sizeof(T));
  give_way(State::kWarp);
  T other = x;
  if (valid) std::memcpy(&other, fibers[running / kLanes * kLanes + lane].lane, sizeof(T));
  give_way(State::kWarp);
  return other;
}

}  // namespace pymerge::emu

inline void __syncthreads() { pymerge::emu::give_way(pymerge::emu::State::kBarrier); }

template <typename T>
T __shfl_down_sync(unsigned, T x, unsigned step) {
  const unsigned lane = threadIdx.x % pymerge::emu::kLanes + step;
  return pymerge::emu::from_lane(x, lane, lane < pymerge::emu::kLanes);
}

template <typename T>
T __shfl_up_sync(unsigned, T x, unsigned step) {
  const unsigned lane = threadIdx.x % pymerge::emu::kLanes;
  return pymerge::emu::from_lane(x, lane - step, lane >= step);
}

template <typename T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p = old + x;
  return old;
}

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
