// Products by AMX's registers, eight tiles of 16 rows of 16 words: pairs of bfloat16, or floats. Elsewhere in steps.
#pragma once

#include "cpu/panels.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr int TILE = 16;  // rows, and words in a row

#if defined(__AMX_BF16__)

// While one lives the thread's tiles have these shapes; then those of before, which others may count on.
struct TilesInUse {
  struct alignas(64) Shapes {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
  } before;
  static_assert(sizeof(Shapes) == 64, "as the processor reads it");

  TilesInUse() {
    const Shapes shapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE}};
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TilesInUse() {
    if (before.palette) asm volatile("ldtilecfg %0" ::"m"(before));
    else asm volatile("tilerelease");
  }
};

template <int T>
MASKDIFF_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
MASKDIFF_INLINE void load_tile(const float* from) {  // rows are PANEL words apart
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"((int64_t)PANEL * 4), "i"(T) : "memory");
}

template <int T>
MASKDIFF_INLINE void store_tile(float* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"((int64_t)PANEL * 4), "i"(T) : "memory");
}

// sum[row][column] += the sum over words of left[row][word] . right[word][column]
template <int SUM, int LEFT, int RIGHT>
MASKDIFF_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

#else

struct TilesInUse {
  ~TilesInUse() {}
};

alignas(64) static thread_local float tiles[8][TILE][TILE];

template <int T>
MASKDIFF_INLINE void clear_tile() {
  __builtin_memset(tiles[T], 0, sizeof tiles[T]);
}

template <int T>
MASKDIFF_INLINE void load_tile(const float* from) {
  for (int row = 0; row < TILE; row++) __builtin_memcpy(tiles[T][row], from + row * PANEL, sizeof tiles[T][row]);
}

template <int T>
MASKDIFF_INLINE void store_tile(float* to) {
  for (int row = 0; row < TILE; row++) __builtin_memcpy(to + row * PANEL, tiles[T][row], sizeof tiles[T][row]);
}

template <int SUM, int LEFT, int RIGHT>
MASKDIFF_INLINE void multiply_tiles() {
  for (int row = 0; row < TILE; row++) {
    Vector sum = load(tiles[SUM][row]);
    for (int word = 0; word < TILE; word++) {
      sum = Pairs::multiply_add(splat(*(const Word*)&tiles[LEFT][row][word]), load(tiles[RIGHT][word]), sum);
    }
    store(tiles[SUM][row], sum);
  }
}

#endif

// Rows of two tiles side by side, DOWN of them below one another: sums over `depth` words.
template <int DOWN>
MASKDIFF_INLINE void multiply_rows(float* to, const float* left, int64_t left_height, const float* right, int64_t depth,
                                   bool add) {
  constexpr int64_t BELOW = TILE * PANEL;
  if (add) {
    load_tile<0>(to);
    load_tile<1>(to + TILE);
    if (DOWN > 1) load_tile<2>(to + BELOW);
    if (DOWN > 1) load_tile<3>(to + BELOW + TILE);
  } else {
    clear_tile<0>();
    clear_tile<1>();
    if (DOWN > 1) clear_tile<2>();
    if (DOWN > 1) clear_tile<3>();
  }
  for (int64_t word = 0; word < depth; word += TILE, right += BELOW) {
    load_tile<6>(right);
    load_tile<4>(left);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(right + TILE);
    multiply_tiles<1, 4, 7>();
    if (DOWN > 1) load_tile<5>(left + BELOW);
    if (DOWN > 1) multiply_tiles<2, 5, 6>();
    if (DOWN > 1) multiply_tiles<3, 5, 7>();
    left += word % PANEL == 0 ? TILE : left_height * PANEL - TILE;
  }
  store_tile<0>(to);
  store_tile<1>(to + TILE);
  if (DOWN > 1) store_tile<2>(to + BELOW);
  if (DOWN > 1) store_tile<3>(to + BELOW + TILE);
}

// One panel of sums [rows, PANEL]: to = left right, or to += left right. rows, depth (in words): multiples of TILE.
// left: panels [left_height][PANEL] of words along its rows; right: one panel [depth][PANEL].
static void multiply_panel(float* to, int64_t rows, const float* left, int64_t left_height, const float* right,
                           int64_t depth, bool add) {
  int64_t row = 0;
  for (; row + 2 * TILE <= rows; row += 2 * TILE) {
    multiply_rows<2>(to + row * PANEL, left + row * PANEL, left_height, right, depth, add);
  }
  if (row < rows) multiply_rows<1>(to + row * PANEL, left + row * PANEL, left_height, right, depth, add);
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
