// product: out = left right in bfloat16, by AMX's tiles.
//
// Each thread has a part of the output's rows or columns. For a chunk of depth it packs the right factor's columns, then
// goes over its rows in blocks.
#include <omp.h>
#include <stdlib.h>

#include "cpu/amx.h"
#include "cpu/ops.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr int64_t BLOCK_WORDS = 262144;  // of the left factor: they stay in the second cache
constexpr int64_t MOST_WORDS = 2048;     // of depth at a time

// A thread's part of the output. First row, first column and columns are multiples of PANEL.
struct Part {
  const maskdiff_product* call;
  int64_t first_row, rows, first_column, columns;

  int64_t depth() const { return round_up(greater(call->depth, 1), PANEL) / 2; }  // in words
  int64_t chunk() const { return round_up(share(depth(), (depth() + MOST_WORDS - 1) / MOST_WORDS), TILE); }
  bool whole() const { return chunk() >= depth(); }
  int64_t block() const {
    return smaller(greater(BLOCK_WORDS / chunk() / PANEL, 1) * PANEL, round_up(rows, PANEL));
  }
};

struct Panels {
  float* right;  // [words of a chunk, columns]
  float* left;   // [rows of a block, words of a chunk]
  float* down;   // the same before it is transposed, if it is
  float* sums;   // [rows, columns]; where one chunk is all, two squares that are used in turns

  Panels(Arena* arena, const Part& part) {
    right = arena->take(part.chunk() * part.columns);
    left = arena->take(part.block() * round_up(part.chunk(), PANEL));
    down = arena->take(part.call->left_transposed ? part.block() * part.chunk() : 0);
    sums = arena->take(part.whole() ? 2 * PANEL * PANEL : round_up(part.rows, PANEL) * part.columns);
  }
};

Rows rows_at(const void* data, int64_t stride, int64_t row, int64_t column) {
  return Rows{(char*)data + (row * stride + column) * 2, stride * 2, MASKDIFF_BFLOAT16};
}

// The part's columns, `words` of depth from `at` on.
void pack_right(float* to, const Part& part, int64_t at, int64_t words) {
  const maskdiff_product& call = *part.call;
  if (!call.right_transposed) {
    const Rows from = rows_at(call.right, call.right_stride, 2 * at, part.first_column);
    return pack_row_pairs(to, words, from, smaller(call.depth - 2 * at, 2 * words), part.columns);
  }
  const Rows from = rows_at(call.right, call.right_stride, part.first_column, 2 * at);
  for (int64_t column = 0; column < part.columns; column += TILE) {
    for (int64_t word = 0; word < words; word += TILE) {
      const char* const square = from.data + column * from.row_bytes + word * 4;
      transpose_square(to + place(words, word, column), (const float*)square, from.row_bytes / 4);
    }
  }
}

// `words` of depth from `at` on, of some rows; beyond these the panels' rows are 0.
void pack_left(const Panels& s, const Part& part, int64_t row, int64_t rows, int64_t at, int64_t words) {
  const maskdiff_product& call = *part.call;
  if (!call.left_transposed) {
    const Rows from = rows_at(call.left, call.left_stride, part.first_row + row, 2 * at);
    return Pairs::pack_along(s.left, round_up(rows, PANEL), from, rows, 2 * words);
  }
  const Rows from = rows_at(call.left, call.left_stride, 2 * at, part.first_row + row);
  pack_row_pairs(s.down, words, from, smaller(call.depth - 2 * at, 2 * words), rows);
  transpose(s.left, s.down, words, rows);
}

// A square of sums, and where it belongs.
struct Square {
  const float* sums;
  Rows out;
  int64_t rows;
};

void write(const Square& square, bool add) {
  Rows to = square.out;
  const float* sums = square.sums;
  for (int64_t row = 0; row < square.rows; row++, to.data += to.row_bytes, sums += PANEL) {
    Vector first = load(sums), second = load(sums + WIDTH);
    if (!add) {
      store_past_caches(to.data, bfloat16_halves(first, second));
      continue;
    }
    first += of_bfloat16(*(const LooseHalves*)to.data);
    second += of_bfloat16(*(const LooseHalves*)(to.data + 2 * WIDTH));
    *(LooseWideHalves*)to.data = bfloat16_halves(first, second);
  }
}

void run_part(const Part& part, Arena arena) {
  const TilesInUse use;
  const Panels s(&arena, part);
  const maskdiff_product& call = *part.call;
  const int64_t depth = part.depth(), block = part.block(), chunk = part.chunk();
  Square done = {};  // is written while the next one is made, as tiles take a while to arrive
  int64_t turn = 0;
  for (int64_t at = 0; at < depth; at += chunk) {
    const int64_t words = smaller(depth - at, chunk);
    pack_right(s.right, part, at, words);
    for (int64_t row = 0; row < part.rows; row += block) {
      const int64_t rows = smaller(part.rows - row, block), tall = round_up(rows, PANEL);
      pack_left(s, part, row, rows, at, words);
      for (int64_t column = 0; column < part.columns; column += PANEL) {
        for (int64_t i = 0; i < rows; i += PANEL) {
          const int64_t place = column / PANEL * round_up(part.rows, PANEL) + row + i;
          float* const sums = s.sums + (part.whole() ? turn++ % 2 * PANEL : place) * PANEL;
          multiply_panel(sums, PANEL, s.left + i * PANEL, tall, s.right + column * words, words, at > 0);
          write(done, call.add);
          const Rows out = rows_at(call.out, call.out_stride, part.first_row + row + i, part.first_column + column);
          done = Square{sums, out, at + words == depth ? smaller(rows - i, PANEL) : 0};
        }
      }
    }
  }
  write(done, call.add);
  finish_stores_past_caches();
}

}  // namespace

int product(const maskdiff_product* call, int threads) {
  const bool by_rows = !call->left_transposed || call->right_transposed;  // a factor's rows are of `depth` numbers
  const bool whole_lines = call->add || ((uintptr_t)call->out % 64 == 0 && call->out_stride % PANEL == 0);
  if (WIDTH != TILE || !whole_lines || call->columns % PANEL || (call->left_transposed && call->rows % PANEL) ||
      (by_rows && (call->depth % PANEL || call->depth == 0)) || (call->right_transposed && call->right_stride % 2)) {
    return MASKDIFF_BAD_OPTION;
  }
  // The smaller factor is the one that every thread packs for itself.
  const bool down = call->rows > call->columns;
  const int64_t squares = round_up(down ? call->rows : call->columns, PANEL) / PANEL, parts = smaller(squares, threads);
  if (parts == 0) return MASKDIFF_OK;
  const auto part_of = [&](int64_t i) {
    const int64_t first = squares * i / parts * PANEL, end = squares * (i + 1) / parts * PANEL;
    return down ? Part{call, first, smaller(end, call->rows) - first, 0, call->columns}
                : Part{call, 0, call->rows, first, end - first};
  };
  Arena wanted = {};
  for (int64_t i = 0; i < parts; i++) {
    Arena part = {};
    Panels(&part, part_of(i));
    wanted.used = greater(wanted.used, part.used);
  }
  float* const scratch = (float*)aligned_alloc(64, (size_t)(parts * wanted.used) * sizeof(float));
  if (!scratch) return MASKDIFF_NO_MEMORY;
#pragma omp parallel for schedule(static, 1) num_threads((int)parts)
  for (int64_t i = 0; i < parts; i++) run_part(part_of(i), Arena{scratch + i * wanted.used, 0});
  free(scratch);
  return MASKDIFF_OK;
}

}  // namespace ISA
}  // namespace maskdiff
