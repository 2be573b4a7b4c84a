// The AMX tiles of csrc/cpu with the instructions in plain C++, for ctypes: the layout is tested where no CPU has them.
#include <cstring>
#include <vector>

#include "../../csrc/cpu/cov_kernels.h"

namespace pymerge {
namespace {

struct Tile {
  uint32_t at[16][16];
};
Tile tiles[8];
bool configured = false;

void _tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  configured = bytes[0] == 1;
  for (int t = 0; t < 8; ++t) configured = configured && bytes[16 + 2 * t] == 64 && bytes[48 + t] == 16;
}
void _tile_release() { configured = false; }
void _tile_zero(int t) { std::memset(&tiles[t], 0, sizeof(Tile)); }
void _tile_loadd(int t, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tiles[t].at[r], static_cast<const char*>(base) + r * stride, 64);
}
void _tile_stored(int t, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(base) + r * stride, tiles[t].at[r], 64);
}
float upper(uint32_t x) { return bits_to_float(x & 0xFFFF0000u); }
float lower(uint32_t x) { return bits_to_float(x << 16); }
void _tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        const uint32_t x = tiles[a].at[m][k], y = tiles[b].at[k][n];
        float sum = bits_to_float(tiles[c].at[m][n]);
        sum += lower(x) * lower(y);
        sum += upper(x) * upper(y);
        tiles[c].at[m][n] = float_to_bits(sum);
      }
    }
  }
}

#include "../../csrc/cpu/cov_tile.inl"
#include "../../csrc/cpu/cov_pairs.inl"
#include "../../csrc/cpu/cov_amx.inl"

}  // namespace
}  // namespace pymerge

using namespace pymerge;

// x bfloat16, cov [columns, columns] float32, upper triangle += alpha * x^T x. Returns 0, or 1 where the tiles were not
// configured.
extern "C" int emulate_cov_amx(const void* x, const int64_t* kept, const bool* column_kept, int64_t rows,
                               int64_t columns, int64_t row_stride, int64_t column_stride, float alpha, float* cov) {
  const CovKernels& kernels = kTilePairs;
  const CovSource source = {
      static_cast<const char*>(x), Dtype::kBF16, row_stride, column_stride, columns, kept, column_kept};
  const CovTarget target = {reinterpret_cast<char*>(cov), false, columns, columns, alpha};
  const int64_t panels = (columns + kernels.width - 1) / kernels.width;
  kernels.enter();
  const bool ready = configured;
  for (int64_t begin = 0; begin < rows; begin += kCovRows) {
    const int64_t count = rows - begin < kCovRows ? rows - begin : kCovRows, depth = cov_depth(kernels, count);
    const size_t items = static_cast<size_t>(kernels.copies * depth * kernels.width);
    std::vector<std::vector<uint32_t>> packed(static_cast<size_t>(panels), std::vector<uint32_t>(items, 0x7FC07FC0u));
    for (int64_t p = 0; p < panels; ++p) kernels.pack(source, begin, count, p, packed[static_cast<size_t>(p)].data());
    for (int64_t i = 0; i < panels; ++i) {
      for (int64_t j = i; j < panels; ++j) {
        kernels.tile(packed[static_cast<size_t>(i)].data(), packed[static_cast<size_t>(j)].data(), i, j, depth, target);
      }
    }
  }
  kernels.leave();
  return ready && !configured ? 0 : 1;
}
