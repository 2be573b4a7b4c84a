// Three independent streams hide the latency of the CPU's crc32 instruction (3 cycles, 8 bytes); their sums are joined
// by multiplication with x^(8 * bytes) modulo the polynomial, through tables made once.
#include "crc32c.h"

#include <array>
#include <cstring>

#include "cpu_level.h"
#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace pymerge {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;  // bit-reversed
constexpr int64_t kStream = 4096;              // bytes of one of the three streams

// a * b modulo the polynomial, bit-reversed: bit 31 is x^0.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = b & 1 ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

// x^(8 * bytes)
constexpr uint32_t power(int64_t bytes) {
  uint32_t result = 1u << 31, square = 1u << 23;  // x^0, x^8
  for (; bytes > 0; bytes >>= 1) {
    if (bytes & 1) result = multiply(square, result);
    square = multiply(square, square);
  }
  return result;
}

using Table = std::array<std::array<uint32_t, 256>, 8>;

// Slicing by eight: table[k][byte] is the sum of `byte` followed by k zero bytes.
constexpr Table make_slices() {
  Table table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? (crc >> 1) ^ kPolynomial : crc >> 1;
    table[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      table[k][byte] = (table[k - 1][byte] >> 8) ^ table[0][table[k - 1][byte] & 0xFF];
    }
  }
  return table;
}

uint32_t crc_by_tables(const unsigned char* p, int64_t n, uint32_t crc) {
  static constexpr Table table = make_slices();
  for (; n >= 8; n -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    word ^= crc;  // little-endian
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= table[7 - k][word >> (8 * k) & 0xFF];
  }
  for (; n > 0; --n, ++p) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 0xFF];
  return crc;
}

#if defined(__x86_64__)
using ShiftTable = std::array<std::array<uint32_t, 256>, 4>;

// table[k][byte]: (byte << 8k) * x^(8 * kStream), so that a sum moves past one stream by four look-ups.
ShiftTable make_shift() {
  ShiftTable table{};
  constexpr uint32_t shift = power(kStream);
  for (uint32_t k = 0; k < 4; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) table[k][byte] = multiply(shift, byte << (8 * k));
  }
  return table;
}

uint32_t past_stream(const ShiftTable& table, uint32_t crc) {
  return table[0][crc & 0xFF] ^ table[1][crc >> 8 & 0xFF] ^ table[2][crc >> 16 & 0xFF] ^ table[3][crc >> 24];
}

uint64_t word_at(const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}

__attribute__((target("sse4.2"))) uint32_t crc_by_instruction(const unsigned char* p, int64_t n, uint32_t start) {
  static const ShiftTable table = make_shift();
  uint64_t crc = start;
  for (; n >= 3 * kStream; n -= 3 * kStream, p += 3 * kStream) {
    uint64_t second = 0, third = 0;
    for (int64_t i = 0; i < kStream; i += 8) {
      crc = _mm_crc32_u64(crc, word_at(p + i));
      second = _mm_crc32_u64(second, word_at(p + kStream + i));
      third = _mm_crc32_u64(third, word_at(p + 2 * kStream + i));
    }
    crc = past_stream(table, static_cast<uint32_t>(crc)) ^ second;
    crc = past_stream(table, static_cast<uint32_t>(crc)) ^ third;
  }
  for (; n >= 8; n -= 8, p += 8) crc = _mm_crc32_u64(crc, word_at(p));
  for (; n > 0; --n, ++p) crc = _mm_crc32_u8(static_cast<uint32_t>(crc), *p);
  return static_cast<uint32_t>(crc);
}
#endif

}  // namespace

uint32_t crc32c(const void* data, int64_t bytes, uint32_t crc) {
  const unsigned char* p = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
  if (cpu_features().sse42 && cpu_level() != "baseline") return ~crc_by_instruction(p, bytes, ~crc);
#endif
  return ~crc_by_tables(p, bytes, ~crc);
}

uint32_t crc32c_combine(uint32_t first, uint32_t second, int64_t second_bytes) {
  return multiply(power(second_bytes), first) ^ second;
}

}  // namespace pymerge
