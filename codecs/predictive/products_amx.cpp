// Products of bytes by AMX: tiles of 16 rows of 64 bytes.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

static_assert(kUnitOutputs == 32 && kUnitGroups == 16);
constexpr std::size_t kRow = 64;     // bytes of a tile's row
constexpr std::size_t kTokens = 16;  // of a tile

// Palette 1; all eight tiles are full. GCC's `_tile_loadconfig` tells the compiler of the first
// eight bytes alone, so the others must not be on a stack, where nobody seems to read them.
struct alignas(64) Config {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {kRow, kRow, kRow, kRow, kRow, kRow, kRow, kRow};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr Config kConfig;
static_assert(sizeof(Config) == 64);

void begin() { _tile_loadconfig(&kConfig); }
void end() { _tile_release(); }

// Four groups of four outputs, four times, as four outputs' sixteen groups.
void arrange_step(const __m512i from[4], std::int8_t* to) {
  // Each half: eight groups of the one output, then of the other.
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29),
                second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512i a = _mm512_permutex2var_epi32(from[0], first, from[1]),
                b = _mm512_permutex2var_epi32(from[2], first, from[3]),
                c = _mm512_permutex2var_epi32(from[0], second, from[1]),
                d = _mm512_permutex2var_epi32(from[2], second, from[3]);
  _mm512_storeu_si512(to, _mm512_shuffle_i64x2(a, b, 0x44));
  _mm512_storeu_si512(to + kRow, _mm512_shuffle_i64x2(a, b, 0xEE));
  _mm512_storeu_si512(to + 2 * kRow, _mm512_shuffle_i64x2(c, d, 0x44));
  _mm512_storeu_si512(to + 3 * kRow, _mm512_shuffle_i64x2(c, d, 0xEE));
}

void arrange(const std::int8_t* w, std::size_t blocks, std::size_t groups,
             const std::uint16_t* reads, std::size_t steps, std::size_t rows, std::int8_t* to) {
  for (std::size_t b = 0; b < blocks; ++b) {
    const std::size_t bytes = 16 * (reads ? reads[b] : groups);
    for (std::size_t step = 0; step < steps; ++step) {
      __m512i from[4];
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t at = (step * 4 + i) * kRow;
        const std::size_t there = at < bytes ? std::min(bytes - at, kRow) : 0;
        const auto mask = __mmask16((1u << there / 4) - 1);
        from[i] = _mm512_maskz_loadu_epi32(mask, w + b * groups * 16 + at);
      }
      arrange_step(from, to + (step * rows + 4 * b) * kRow);
    }
  }
}

// Tiles are named by constants: 0 to 3 sums, 4 and 5 outputs' weights, 6 and 7 tokens' inputs.
constexpr std::size_t kInputStride = kTile * 4, kSumStride = kTile * 4;

// GCC's intrinsics do not tell it that tiles are loaded from memory, which must be written by then.
void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Of 32 outputs and 32 tokens; with `more`, added to what is there.
void products_32(const std::uint32_t* x, const std::int8_t* w, std::size_t steps, std::size_t rows,
                 bool more, std::int32_t* sums) {
  std::int32_t* const lower = sums + 16 * kTile;
  if (more) {
    _tile_loadd(0, sums, kSumStride);
    _tile_loadd(1, sums + kTokens, kSumStride);
    _tile_loadd(2, lower, kSumStride);
    _tile_loadd(3, lower + kTokens, kSumStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::size_t step = 0; step < steps; ++step) {
    _tile_loadd(4, w, kRow);
    _tile_loadd(6, x, kInputStride);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, x + kTokens, kInputStride);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, w + 16 * kRow, kRow);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
    w += rows * kRow;
    x += kUnitGroups * kTile;
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTokens, kSumStride);
  _tile_stored(2, lower, kSumStride);
  _tile_stored(3, lower + kTokens, kSumStride);
}

void products_of_tiles(const std::uint32_t* x, std::size_t groups, const std::int8_t* w,
                       std::size_t rows, std::size_t outputs, const Tile* tile, std::size_t tiles,
                       std::int32_t (*sums)[kTile]) {
  finish_stores();
  // The weights of so many steps and 32 outputs stay in the first-level cache, the inputs of these
  // steps in the second-level one.
  constexpr std::size_t kMostSteps = 24;
  // One turn where there are no inputs, too: sums of nothing are 0.
  const std::size_t steps = unit_steps(groups),
                    turns = std::max<std::size_t>((steps + kMostSteps - 1) / kMostSteps, 1);
  for (std::size_t turn = 0, step = 0, next; turn < turns; ++turn, step = next) {
    next = steps * (turn + 1) / turns;
    for (std::size_t o = 0; o < outputs; o += kUnitOutputs)
      for (std::size_t i = 0; i < tiles; ++i)
        for (std::size_t t = 0; t < tile[i].count; t += 2 * kTokens)
          products_32(x + (i * groups + step * kUnitGroups) * kTile + t,
                      w + (step * rows + o) * kRow, next - step, rows, turn > 0,
                      sums[i * rows + o] + t);
  }
}

// Of 16 outputs and N times 16 tokens.
template <int N>
void products_16(const std::uint32_t* x, const std::int8_t* w, std::size_t steps, std::size_t rows,
                 std::int32_t* sums) {
  _tile_zero(0);
  if (N > 1) _tile_zero(1);
  if (N > 2) _tile_zero(2);
  if (N > 3) _tile_zero(3);
  for (std::size_t step = 0; step < steps; ++step) {
    _tile_loadd(4, w, kRow);
    _tile_loadd(5, x, kInputStride);
    _tile_dpbsud(0, 4, 5);
    if (N > 1) {
      _tile_loadd(6, x + kTokens, kInputStride);
      _tile_dpbsud(1, 4, 6);
    }
    if (N > 2) {
      _tile_loadd(7, x + 2 * kTokens, kInputStride);
      _tile_dpbsud(2, 4, 7);
    }
    if (N > 3) {
      _tile_loadd(5, x + 3 * kTokens, kInputStride);
      _tile_dpbsud(3, 4, 5);
    }
    w += rows * kRow;
    x += kUnitGroups * kTile;
  }
  _tile_stored(0, sums, kSumStride);
  if (N > 1) _tile_stored(1, sums + kTokens, kSumStride);
  if (N > 2) _tile_stored(2, sums + 2 * kTokens, kSumStride);
  if (N > 3) _tile_stored(3, sums + 3 * kTokens, kSumStride);
}

void products(const std::uint32_t* x, const std::int8_t* w, std::size_t steps, std::size_t rows,
              std::size_t outputs, std::size_t tokens, std::int32_t (*sums)[kTile]) {
  finish_stores();
  const std::size_t vectors = (tokens + kTokens - 1) / kTokens;
  for (std::size_t o = 0; o < outputs; o += 16) {
    const auto of = [&](auto some) { some(x, w + o * kRow, steps, rows, sums[o]); };
    if (vectors == 1) of(products_16<1>);
    else if (vectors == 2) of(products_16<2>);
    else if (vectors == 3) of(products_16<3>);
    else of(products_16<4>);
  }
}

}  // namespace

const MatrixUnit amx_unit = {begin, end, arrange, products, products_of_tiles};

}  // namespace kvzip::predictive
