// The device language of all kernels: launches, shared memory, loads and stores of eight entries, block reductions.
// Neither torch nor the CUDA runtime here: nvcc compiles this for a GPU, NVRTC the kernels alone, g++ the launchers of
// kernels that NVRTC compiles (../nvrtc/launch.h) and everything for the emulator (../emu/device.h).
#pragma once

#ifdef __CUDACC__
#define COLD __noinline__
#ifdef __CUDACC_RTC__
#define LAUNCH(...) static_cast<void>(0)  // host code: parsed, never run
#else
#define LAUNCH(kernel, grid, block, shmem, stream, ...) (kernel)<<<(grid), (block), (shmem), (stream)>>>(__VA_ARGS__)
#endif
#define DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared)
#else
#include "../emu/device.h"
#endif
#ifdef PYMERGE_NVRTC
#include "../nvrtc/launch.h"
#endif

#include "../common/delta_math.h"
#include "../common/dtype.h"

namespace pymerge::cuda {

constexpr int kWidth = 8;      // entries of one vector: one Philox group, 16 bytes of bf16
constexpr int kThreads = 256;  // of every block that streams
constexpr int kWarp = 32;

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
using Stream = cudaStream_t;
#else
using Stream = void*;
#endif
using Count = unsigned long long;  // what atomicAdd calls an int64; negative numbers wrap as they should

struct Vec {
  float at[kWidth];
};

struct Stored {
  const void* data;  // null: absent
  Dtype dtype;
};

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & kMagnitudeBits; }
__device__ __forceinline__ bool is_bad(float x) { return magnitude_bits(x) >= kInfinityBits; }
__device__ __forceinline__ bool is_nan(float x) { return magnitude_bits(x) > kInfinityBits; }

__device__ __forceinline__ float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float from_f16(uint16_t bits) {
#ifdef __CUDACC__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  return f16_to_float(bits);
#endif
}

__device__ __forceinline__ uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(is_nan(x) ? kNanBF16 : rounded);
}

__device__ __forceinline__ uint16_t to_f16(float x) {
#ifdef __CUDACC__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return is_nan(x) ? kNanF16 : half;
#else
  return float_to_f16(x);
#endif
}

__device__ __forceinline__ float quiet(float x) { return is_nan(x) ? __uint_as_float(kNanF32) : x; }

__device__ __forceinline__ uint4 load16(const void* p, int64_t at) { return static_cast<const uint4*>(p)[at]; }

template <typename T>
__device__ __forceinline__ T entry(const void* p, int64_t at) {
  return static_cast<const T*>(p)[at];
}

__device__ __forceinline__ float load1(Stored x, int64_t i) {
  switch (x.dtype) {
    case Dtype::kBF16:
      return from_bf16(entry<uint16_t>(x.data, i));
    case Dtype::kF16:
      return from_f16(entry<uint16_t>(x.data, i));
    case Dtype::kF32:
      return entry<float>(x.data, i);
    default:
      return static_cast<float>(entry<double>(x.data, i));
  }
}

// Vectors of one dtype whose pointers are multiples of 16 bytes: fetched raw, so that several loads are under way
// before the first is widened. Raw<kAny> takes any dtype and place and the tail of a tensor; it loads when widened.
constexpr int kAny = -1, kBF16 = static_cast<int>(Dtype::kBF16), kF16 = static_cast<int>(Dtype::kF16),
              kF32 =
                  static_cast<int>(Dtype::kF32);  // integers: nvcc 13.0 cannot name an enumeration in a kernel's stub

template <int kDtype>
struct Raw {
  uint4 word;
  __device__ __forceinline__ void fetch(Stored x, int64_t v, int) { word = load16(x.data, v); }
  __device__ __forceinline__ Vec widen() const {
    const uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
    Vec out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const uint32_t half = (pairs[j / 2] >> (16 * (j & 1))) & 0xFFFFu;
      out.at[j] = kDtype == kBF16 ? from_bf16(half) : from_f16(static_cast<uint16_t>(half));
    }
    return out;
  }
};

template <>
struct Raw<kF32> {
  uint4 low, high;
  __device__ __forceinline__ void fetch(Stored x, int64_t v, int) {
    low = load16(x.data, 2 * v);
    high = load16(x.data, 2 * v + 1);
  }
  __device__ __forceinline__ Vec widen() const {
    const uint32_t bits[kWidth] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    Vec out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out.at[j] = __uint_as_float(bits[j]);
    return out;
  }
};

__device__ __forceinline__ bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }

// Entries 8 v .. 8 v + n - 1 (n <= 8; the rest is 0).
__device__ __forceinline__ Vec load8(Stored x, int64_t v, int n) {
  if (n == kWidth && x.dtype != Dtype::kF64 && is_aligned(x.data)) {
    if (x.dtype == Dtype::kF32) {
      Raw<kF32> raw;
      raw.fetch(x, v, n);
      return raw.widen();
    }
    Raw<kBF16> raw;
    raw.fetch(x, v, n);
    if (x.dtype == Dtype::kBF16) return raw.widen();
    return Raw<kF16>{raw.word}.widen();
  }
  Vec out;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) out.at[j] = j < n ? load1(x, kWidth * v + j) : 0.0f;
  return out;
}

template <>
struct Raw<kAny> {
  Stored x;
  int64_t v;
  int n;
  __device__ __forceinline__ void fetch(Stored stored, int64_t vector, int width) {
    x = stored;
    v = vector;
    n = width;
  }
  __device__ __forceinline__ Vec widen() const { return load8(x, v, n); }
};

__device__ __forceinline__ uint32_t pair(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

// x as 16-bit entries 8 v .. 8 v + n - 1 of y; counts those whose exponent is all ones.
__device__ __forceinline__ int store_half(const uint16_t (&x)[kWidth], uint16_t infinity, void* y, int64_t v, int n) {
  int bad = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) bad += j < n && (x[j] & infinity) == infinity;
  if (n == kWidth && is_aligned(y)) {
    static_cast<uint4*>(y)[v] = {pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
    return bad;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (j < n) static_cast<uint16_t*>(y)[kWidth * v + j] = x[j];
  }
  return bad;
}

__device__ __forceinline__ int store_float(const Vec& x, float* y, int64_t v, int n) {
  int bad = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) bad += j < n && is_bad(x.at[j]);
  if (n == kWidth && is_aligned(y)) {
    uint4* out = reinterpret_cast<uint4*>(y) + 2 * v;
    out[0] = {bits_of(quiet(x.at[0])), bits_of(quiet(x.at[1])), bits_of(quiet(x.at[2])), bits_of(quiet(x.at[3]))};
    out[1] = {bits_of(quiet(x.at[4])), bits_of(quiet(x.at[5])), bits_of(quiet(x.at[6])), bits_of(quiet(x.at[7]))};
    return bad;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (j < n) y[kWidth * v + j] = quiet(x.at[j]);
  }
  return bad;
}

// Rounds to nearest even and stores entries 8 v .. 8 v + n - 1; returns how many of the stored ones are not finite.
__device__ __forceinline__ int store8(const Vec& x, void* y, Dtype dtype, int64_t v, int n) {
  if (dtype == Dtype::kF32) return store_float(x, static_cast<float*>(y), v, n);
  if (dtype == Dtype::kF64) {
    int bad = 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      bad += j < n && is_bad(x.at[j]);
      if (j < n) static_cast<double*>(y)[kWidth * v + j] = static_cast<double>(quiet(x.at[j]));
    }
    return bad;
  }
  uint16_t half[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) half[j] = dtype == Dtype::kBF16 ? to_bf16(x.at[j]) : to_f16(x.at[j]);
  return store_half(half, dtype == Dtype::kBF16 ? 0x7F80 : 0x7C00, y, v, n);
}

// Sum over the block in a fixed order; thread 0 has it. scratch: one T per warp. All threads of the block call it.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, step);
  __syncthreads();  // an earlier use of scratch is over
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) x += scratch[warp];
  }
  return x;
}

// Blocks of a grid-stride kernel: enough to fill the device, `per_sm` of them at a time on each multiprocessor.
inline unsigned grid_size(int64_t items, int threads, int sms, int per_sm) {
  const int64_t wanted = (items + threads - 1) / threads, most = int64_t{sms} * per_sm;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

struct Scan {
  long long before;  // sum of x over threads of lower index
  long long total;   // over the whole block
};

// scratch: one long long per warp. The first barrier is for two scans in a row on one scratch: today's callers have a
// barrier of their own behind each scan, so they would be right without it.
__device__ __forceinline__ Scan block_scan(long long x, long long* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  long long sum = x;
  for (int step = 1; step < kWarp; step *= 2) {
    const long long lower = __shfl_up_sync(0xFFFFFFFFu, sum, step);
    if (lane >= step) sum += lower;
  }
  __syncthreads();
  if (lane == kWarp - 1) scratch[warp] = sum;
  __syncthreads();
  Scan scan = {sum - x, 0};
  for (int w = 0; w < warps; ++w) {
    if (w < warp) scan.before += scratch[w];
    scan.total += scratch[w];
  }
  return scan;
}

}  // namespace pymerge::cuda
