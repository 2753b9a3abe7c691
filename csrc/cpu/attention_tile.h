// Products of matrices in panels, by tiles whose sums stay in registers: MOST_ROWS rows by two vectors, or fewer.
#pragma once

#include "cpu/panels.h"

namespace maskdiff {
namespace ISA {
namespace {

// 6 x 2 sums, 2 vectors, 1 broadcast: 15 of the 16 registers of AVX2. AVX-512 has 32; 12 rows would gain nothing more.
constexpr int MOST_ROWS = WIDTH == 16 ? 8 : 6;

// Calls body(row, column) for all of a tile, unrolled.
template <int R, int C, class Body>
MASKDIFF_INLINE void each(Body body) {
#pragma GCC unroll 8
  for (int row = 0; row < R; row++) {
#pragma GCC unroll 2
    for (int column = 0; column < C; column++) body(row, column);
  }
}

enum Side { ALONG, DOWN };  // the left matrix is read along its rows, or is the transpose of what stands in memory

template <class Number, Side SIDE, int R, int C>
MASKDIFF_INLINE void accumulate(Vector (&sums)[R][C], const float* left, const float* right, int64_t depth) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    Vector line[C];
#pragma GCC unroll 2
    for (int column = 0; column < C; column++) line[column] = load(right + k * PANEL + column * WIDTH);
#pragma GCC unroll 8
    for (int row = 0; row < R; row++) {
      const Vector factor = splat(*(const Word*)(left + (SIDE == ALONG ? row * PANEL + k : k * PANEL + row)));
#pragma GCC unroll 2
      for (int column = 0; column < C; column++) {
        sums[row][column] = Number::multiply_add(factor, line[column], sums[row][column]);
      }
    }
  }
}

// sums = left * right over `depth` words. left: ALONG, R rows of panels of `height` rows; DOWN, R columns of one panel.
// right: one panel of `depth` rows, its first C vectors.
template <class Number, Side SIDE, int R, int C>
MASKDIFF_INLINE void multiply(Vector (&sums)[R][C], const float* left, int64_t height, const float* right,
                              int64_t depth) {
  each<R, C>([&](int row, int column) MASKDIFF_INLINED { sums[row][column] = Vector{}; });
  if (SIDE == ALONG) {
    for (; depth > PANEL; depth -= PANEL, left += height * PANEL, right += PANEL * PANEL) {
      accumulate<Number, SIDE>(sums, left, right, PANEL);
    }
  }
  accumulate<Number, SIDE>(sums, left, right, depth);
}

// Tiles of about equal numbers of rows: few sums in registers would wait for each other.
template <int C, class Tile>
MASKDIFF_INLINE void run_column(Tile& tile, int64_t rows, int64_t panel) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, tiles = (left + MOST_ROWS - 1) / MOST_ROWS, height = (left + tiles - 1) / tiles;
    switch (height) {
      case 1: tile.template run<1, C>(row, panel); break;
      case 2: tile.template run<2, C>(row, panel); break;
      case 3: tile.template run<3, C>(row, panel); break;
      case 4: tile.template run<4, C>(row, panel); break;
      case 5: tile.template run<5, C>(row, panel); break;
      case 6: tile.template run<6, C>(row, panel); break;
      case 7:
        if constexpr (MOST_ROWS > 6) tile.template run<7, C>(row, panel);
        break;
      default:
        if constexpr (MOST_ROWS > 6) tile.template run<8, C>(row, panel);
    }
    row += height;
  }
}

// Calls tile.run<R, C>(row, panel) to cover `rows` by `vectors`.
template <class Tile>
__attribute__((noinline)) void run_tiles(Tile tile, int64_t rows, int64_t vectors) {
  for (int64_t panel = 0; panel < vectors / 2; panel++) run_column<2>(tile, rows, panel);
  if (vectors % 2) run_column<1>(tile, rows, vectors / 2);
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
