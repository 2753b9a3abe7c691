// How products keep matrices in scratch memory: as panels, each a column of PANEL words, which tiles read in a line.
//
// A word is 32 bits wide: a float, or a pair of bfloat16 numbers that one instruction multiplies and adds up.
// A matrix of `height` rows stands as [ceil(columns / PANEL)][height][PANEL].
#pragma once

#include "cpu/arena.h"
#include "cpu/convert.h"
#include "cpu/vector.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr int PANEL = 2 * WIDTH;  // words in a row of a panel

MASKDIFF_INLINE int64_t size_of(int64_t dtype) { return dtype == MASKDIFF_FLOAT32 ? 4 : 2; }

MASKDIFF_INLINE int64_t place(int64_t height, int64_t row, int64_t column) {
  return (column / PANEL * height + row) * PANEL + column % PANEL;
}

// Rows in memory, `row_bytes` apart.
struct Rows {
  char* data;
  int64_t row_bytes;
  int64_t dtype;
};

constexpr int64_t MOST_COLUMNS = 128;
constexpr int64_t AHEAD = 24;  // rows: they stand on pages of their own, where no processor looks ahead by itself

MASKDIFF_INLINE Vector loose(const char* row, int64_t column) { return *(const LooseVector*)(row + column * 4); }

// A row as floats: where it stands, or in `copy`. (Whole rows, out of line: the conversion is then vector code.)
static __attribute__((noinline)) const char* widen(const char* row, int dtype, int columns, float* copy) {
  load_floats(row, dtype, 0, columns, copy);
  return (const char*)copy;
}

MASKDIFF_INLINE const char* floats_of(const Rows& rows, int64_t columns, float* copy) {
  return rows.dtype == MASKDIFF_FLOAT32 ? rows.data : widen(rows.data, (int)rows.dtype, (int)columns, copy);
}

// Rows of numbers to panels of floats; rows from `rows` to `height` become 0.
static void pack_floats(float* to, int64_t height, Rows from, int64_t rows, int64_t columns) {
  alignas(64) float copy[MOST_COLUMNS];
  for (int64_t row = 0; row < height; row++, to += PANEL, from.data += from.row_bytes) {
    if (row + AHEAD < rows) prefetch(from.data + AHEAD * from.row_bytes, columns * size_of(from.dtype));
    const char* numbers = row < rows ? floats_of(from, columns, copy) : nullptr;
    float* panel = to;
    for (int64_t column = 0; column < columns; column += PANEL, panel += height * PANEL) {
      store(panel, numbers ? loose(numbers, column) : Vector{});
      if (column + WIDTH < columns) store(panel + WIDTH, numbers ? loose(numbers, column + WIDTH) : Vector{});
    }
  }
}

// PANEL words of `low` (low half) and `high`.
MASKDIFF_INLINE void store_interleaved(float* to, WideHalves low, WideHalves high) {
  WideHalves first = {}, second = {};
#pragma GCC unroll 32
  for (int i = 0; i < PANEL; i++) {
    first[i] = (uint16_t)(i / 2 + i % 2 * PANEL);
    second[i] = (uint16_t)(first[i] + WIDTH);
  }
  *(WideHalves*)to = __builtin_shuffle(low, high, first);
  *(WideHalves*)(to + WIDTH) = __builtin_shuffle(low, high, second);
}

// Rows of bfloat16 to panels of `height` rows: a word holds rows 2i (low half) and 2i + 1, 0 beyond `rows`.
static void pack_row_pairs(float* to, int64_t height, Rows from, int64_t rows, int64_t columns) {
  for (int64_t pair = 0; pair < height; pair++, from.data += 2 * from.row_bytes) {
    const uint16_t* first = (const uint16_t*)from.data;
    const uint16_t* second = (const uint16_t*)(from.data + from.row_bytes);
    if (2 * pair + 1 + AHEAD < rows) {
      prefetch(from.data + AHEAD * from.row_bytes, columns * 2);
      prefetch(from.data + (AHEAD + 1) * from.row_bytes, columns * 2);
    }
    for (int64_t column = 0; column < columns; column += PANEL) {
      WideHalves one = {}, other = {};
      if (2 * pair < rows) one = *(const LooseWideHalves*)(first + column);
      if (2 * pair + 1 < rows) other = *(const LooseWideHalves*)(second + column);
      store_interleaved(to + place(height, pair, column), one, other);
    }
  }
}

// WIDTH rows, `stride` words apart, of WIDTH words, transposed into a panel: first within fours of lanes, then the fours
// among each other.
MASKDIFF_INLINE void transpose_square(float* to, const float* from, int64_t stride) {
  Vector x[WIDTH];
  Integers low = {}, high = {}, even = {}, odd = {};
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++) {
    const int four = i / 4 * 4, other = i % 2 * WIDTH, half = i % 4 / 2;
    low[i] = four + half + other;
    high[i] = low[i] + 2;
    even[i] = four + i % 2 + half * WIDTH;
    odd[i] = even[i] + 2;
  }
#pragma GCC unroll 4
  for (int i = 0; i < WIDTH; i += 4, from += 4 * stride) {
    const Vector first = *(const LooseVector*)from, second = *(const LooseVector*)(from + stride);
    const Vector third = *(const LooseVector*)(from + 2 * stride), last = *(const LooseVector*)(from + 3 * stride);
    const Vector a = __builtin_shuffle(first, second, low), b = __builtin_shuffle(third, last, low);
    const Vector c = __builtin_shuffle(first, second, high), d = __builtin_shuffle(third, last, high);
    x[i] = __builtin_shuffle(a, b, even);
    x[i + 1] = __builtin_shuffle(a, b, odd);
    x[i + 2] = __builtin_shuffle(c, d, even);
    x[i + 3] = __builtin_shuffle(c, d, odd);
  }
#pragma GCC unroll 2
  for (int distance = 4; distance < WIDTH; distance *= 2) {
    Integers lower = {}, upper = {};
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
      lower[i] = i & distance ? i - distance + WIDTH : i;
      upper[i] = i & distance ? i + WIDTH : i + distance;
    }
#pragma GCC unroll 8
    for (int pair = 0; pair < WIDTH / 2; pair++) {
      const int i = pair / distance * 2 * distance + pair % distance;
      const Vector a = x[i], b = x[i + distance];
      x[i] = __builtin_shuffle(a, b, lower);
      x[i + distance] = __builtin_shuffle(a, b, upper);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++) store(to + i * PANEL, x[i]);
}

// Panels of `height` rows (a multiple of WIDTH) of `columns` words to those of the transpose, of `columns` rows.
static void transpose(float* to, const float* from, int64_t height, int64_t columns) {
  for (int64_t row = 0; row < height; row += WIDTH) {
    for (int64_t column = 0; column < columns; column += WIDTH) {
      transpose_square(to + place(columns, column, row), from + place(height, row, column), PANEL);
    }
  }
}

// Words are floats.
struct Singles {
  static constexpr int NUMBERS = 1;  // in a word

  MASKDIFF_INLINE static Vector multiply_add(Vector x, Vector y, Vector sum) { return x * y + sum; }

  // Rows in memory to panels: `along` the words run along a row, `down` a pair would hold two rows.
  MASKDIFF_INLINE static void pack_along(float* to, int64_t height, Rows from, int64_t rows, int64_t columns) {
    pack_floats(to, height, from, rows, columns);
  }
  MASKDIFF_INLINE static void pack_down(float* to, Rows from, int64_t rows, int64_t columns) {
    pack_floats(to, rows, from, rows, columns);
  }
};

// Words are pairs of bfloat16, whose two products are added to a float: one instruction, or the same in steps.
struct Pairs {
  static constexpr int NUMBERS = 2;

  MASKDIFF_INLINE static Vector multiply_add(Vector x, Vector y, Vector sum) {
#if defined(__AVX512BF16__)
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
    sum += Vector(Words(x) & 0xFFFF0000u) * Vector(Words(y) & 0xFFFF0000u);
    return sum + Vector(Words(x) << 16) * Vector(Words(y) << 16);
#endif
  }

  MASKDIFF_INLINE static void pack_along(float* to, int64_t height, Rows from, int64_t rows, int64_t columns) {
    from.dtype = MASKDIFF_FLOAT32;  // moves pairs as they are
    pack_floats(to, height, from, rows, columns / 2);
  }
  MASKDIFF_INLINE static void pack_down(float* to, Rows from, int64_t rows, int64_t columns) {
    pack_row_pairs(to, (rows + 1) / 2, from, rows, columns);
  }
};

template <class Number>
MASKDIFF_INLINE int64_t words(int64_t numbers) {
  return (numbers + Number::NUMBERS - 1) / Number::NUMBERS;
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
