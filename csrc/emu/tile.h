// What csrc/cuda/tile.cuh means on the CPU: mma.sync with the hardware's fragments and its cutting sums, ldmatrix, and
// cp.async that arrives no earlier than its wait.
#pragma once

#include <cmath>

#include "../common/dtype.h"
#include "device.h"

namespace pymerge::emu {

constexpr int kSumBits = 25;  // of the addends of one step, counted from the leading bit of the largest: 24 and one

struct Entries {
  double at[16];
  int count;
};

// Products and c aligned to the largest of them and cut there, the sum cut to float32: what tensor cores of sm_80 were
// found to do (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021); later ones keep a bit or two more.
inline float cut_sum(const Entries& products, float c) {
  double largest = std::fabs(static_cast<double>(c)), plain = c;
  for (int k = 0; k < products.count; ++k) {
    largest = std::fmax(largest, std::fabs(products.at[k]));
    plain += products.at[k];
  }
  if (largest == 0.0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const int shift = kSumBits - 1 - std::ilogb(largest);
  int64_t sum = static_cast<int64_t>(std::ldexp(static_cast<double>(c), shift));
  for (int k = 0; k < products.count; ++k) sum += static_cast<int64_t>(std::ldexp(products.at[k], shift));
  const double exact = std::ldexp(static_cast<double>(sum), -shift);
  const float near = static_cast<float>(exact);
  return std::fabs(static_cast<double>(near)) > std::fabs(exact) ? std::nextafterf(near, 0.0f) : near;
}

template <bool kBF16>
double half_entry(uint32_t word, int high) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * high));
  return kBF16 ? bf16_to_float(bits) : f16_to_float(bits);
}

inline double tf32_entry(uint32_t word) { return bits_to_float(word & 0xFFFFE000u); }  // the hardware ignores the rest

struct Operands {
  uint32_t a[4], b[2];
};

// c [4] += A B from the fragments of all lanes; sm_80 adds 8 products (tf32: 4) at a time.
template <bool kBF16, bool kTF32>
void mma(float* c, const uint32_t* a, const uint32_t* b, Place place = Place::current()) {
  const Collected<Operands> all(kAllLanes, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, place);
  const int lane = lane_id(), group = lane / 4, member = lane % 4;
  constexpr int kStep = kTF32 ? 4 : 8;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * member + i % 2;
    for (int step = 0; step < 2; ++step) {
      Entries products = {{}, kStep};
      for (int k = 0; k < kStep; ++k) {
        const int holder = kTF32 ? k : k / 2;
        const uint32_t x = all.from(row % 8 * 4 + holder).a[row / 8 + 2 * step];
        const uint32_t y = all.from(column * 4 + holder).b[step];
        products.at[k] =
            kTF32 ? tf32_entry(x) * tf32_entry(y) : half_entry<kBF16>(x, k % 2) * half_entry<kBF16>(y, k % 2);
      }
      c[i] = cut_sum(products, c[i]);
    }
  }
}

template <int kMatrices, bool kTransposed>
void load_matrix(uint32_t* out, const void* row, Place place = Place::current()) {
  const int lane = lane_id(), group = lane / 4, member = lane % 4;
  if (lane < 8 * kMatrices) check_shared(row, 16, 16, "ldmatrix", place);
  const Collected<const uint16_t*> rows(kAllLanes, static_cast<const uint16_t*>(row), place);
  for (int j = 0; j < kMatrices; ++j) {
    const int one = 8 * j + (kTransposed ? 2 * member : group), other = kTransposed ? one + 1 : one;
    const int at = kTransposed ? group : 2 * member;
    const uint32_t low = rows.from(one)[at], high = rows.from(other)[kTransposed ? at : at + 1];
    out[j] = low | high << 16;
  }
}

inline void copy_async(void* shared, const void* global, int bytes, bool valid, Place place = Place::current()) {
  check_shared(shared, bytes, bytes, "cp.async", place);
  if (valid) check_aligned(global, bytes, "cp.async", place);
  write_shared(shared, nullptr, bytes);  // until the wait nobody may count on what is there
  self().copies.push_back({shared, valid ? global : nullptr, bytes, self().copy_groups});
}

inline void copy_async_commit() { ++self().copy_groups; }

inline void copy_async_wait(int left) {
  Thread& thread = self();
  size_t kept = 0;
  for (const Copy& copy : thread.copies) {
    if (copy.group >= thread.copy_groups - left) {
      thread.copies[kept++] = copy;
      continue;
    }
    static constexpr unsigned char kZeros[16] = {};
    write_shared(copy.to, copy.from != nullptr ? copy.from : kZeros, copy.bytes);
  }
  thread.copies.resize(kept);
}

}  // namespace pymerge::emu
