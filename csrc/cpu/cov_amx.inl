// bfloat16 products in AMX tiles. A packed panel has 48 columns and two forms: pairs [depth][48] as the right operand
// takes them, and their 16 x 16 transposes [depth / 16][3][16][16] as the left one does. Needs cov_tile.inl and
// cov_pairs.inl; the including file provides the intrinsics (a test gives emulated ones).

constexpr int64_t kEdge = 16, kBlocks = kPairs / kEdge;  // rows of a hardware tile; blocks of them in a panel

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void enter_tiles() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}
void leave_tiles() { _tile_release(); }

inline int64_t whole_depth(int64_t rows) { return (rows + 2 * kEdge - 1) / (2 * kEdge) * kEdge; }

void transpose_blocks(const uint32_t* pairs, int64_t depth, uint32_t* out) {
  for (int64_t k = 0; k < depth; k += kEdge) {
    for (int64_t block = 0; block < kBlocks; ++block, out += kEdge * kEdge) {
      for (int64_t r = 0; r < kEdge; ++r) {
        for (int64_t i = 0; i < kEdge; ++i) out[r * kEdge + i] = pairs[(k + i) * kPairs + block * kEdge + r];
      }
    }
  }
}

void pack_tiles(const CovSource& x, int64_t begin, int64_t count, int64_t panel, void* out) {
  const int64_t depth = whole_depth(count);
  uint32_t* pairs = static_cast<uint32_t*>(out);
  pack_pairs(x, begin, count, panel, pairs);
  for (int64_t i = (count + 1) / 2 * kPairs; i < depth * kPairs; ++i) pairs[i] = 0;
  transpose_blocks(pairs, depth, pairs + depth * kPairs);
}

// Tiles 0..2 += one row block of the left operand times the three column blocks of the right one.
inline void multiply_blocks(const uint32_t* left, const uint32_t* right, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kEdge, left += kBlocks * kEdge * kEdge, right += kEdge * kPairs) {
    _tile_loadd(6, left, 64);
    _tile_loadd(3, right, kCovPanel);
    _tile_dpbf16ps(0, 6, 3);
    _tile_loadd(4, right + kEdge, kCovPanel);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(5, right + 2 * kEdge, kCovPanel);
    _tile_dpbf16ps(2, 6, 5);
  }
}

inline void add_blocks(const float* part, float* out, bool first) {
  for (int64_t r = 0; r < kEdge; ++r) {
    for (int64_t c = 0; c < kPairs; ++c)
      out[r * kPairs + c] = (first ? 0.0f : out[r * kPairs + c]) + part[r * kPairs + c];
  }
}

// Tiles on the diagonal take short segments (cov_tile.inl says why); the others only sums of mixed signs.
void tile_of_blocks(const void* a, const void* b, int64_t i, int64_t j, int64_t depth, const CovTarget& target) {
  alignas(64) float sums[kPairs * kPairs], part[kEdge * kPairs];
  const int64_t segment = i == j ? 8 * kEdge : depth;
  const uint32_t* pairs = static_cast<const uint32_t*>(b);
  const uint32_t* transposed = static_cast<const uint32_t*>(a) + depth * kPairs;
  for (int64_t block = 0; block < kBlocks; ++block) {
    for (int64_t k = 0; k < depth; k += segment) {
      const uint32_t* left = transposed + (k * kBlocks + block * kEdge) * kEdge;
      const int64_t length = depth - k < segment ? depth - k : segment;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      multiply_blocks(left, pairs + k * kPairs, length);
      _tile_stored(0, part, kCovPanel);
      _tile_stored(1, part + kEdge, kCovPanel);
      _tile_stored(2, part + 2 * kEdge, kCovPanel);
      add_blocks(part, sums + block * kEdge * kPairs, k == 0);
    }
  }
  add_tile<float, kPairs>(sums, i, j, target);
}

const CovKernels kTilePairs = {kPairs, 2, kEdge, 2, pack_tiles, tile_of_blocks, enter_tiles, leave_tiles};
