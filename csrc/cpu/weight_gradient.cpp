// weight_gradient: the gradient of a Linear layer's weight in bfloat16, by AMX's tiles.
//
// Both factors stand the wrong way round for tiles, tokens down: words are to hold two tokens. Each thread has a part of
// the rows or columns. It packs what x has for its columns, then goes over its rows in blocks, a chunk of tokens at a time.
#include <omp.h>
#include <stdlib.h>

#include "cpu/amx.h"
#include "cpu/ops.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr int64_t BLOCK_WORDS = 262144;  // of grad_out: they stay in the second cache
constexpr int64_t MOST_PAIRS = 2048;     // of tokens at a time

// A thread's part: rows and columns of the gradient, multiples of PANEL.
struct Part {
  const maskdiff_weight_gradient* call;
  int64_t first_row, rows, first_column, columns;

  int64_t pairs() const { return round_up(greater(call->tokens, 1), PANEL) / 2; }
  int64_t chunk() const {
    const int64_t chunks = (pairs() + MOST_PAIRS - 1) / MOST_PAIRS;
    return round_up(share(pairs(), chunks), TILE);
  }
  bool whole() const { return chunk() >= pairs(); }
  int64_t block() const { return smaller(greater(BLOCK_WORDS / chunk() / PANEL, 1) * PANEL, rows); }
};

struct Panels {
  float* x;      // right [pairs of tokens, columns]
  float* grad;   // left [rows of a block, pairs of a chunk]
  float* down;   // the same before it is turned
  float* sums;   // [rows of a block, columns]; whole: two squares in turns

  Panels(Arena* arena, const Part& part) {
    x = arena->take(part.pairs() * part.columns);
    grad = arena->take(part.block() * round_up(part.chunk(), PANEL));
    down = arena->take(part.block() * part.chunk());
    sums = arena->take(part.whole() ? 2 * PANEL * PANEL : part.block() * part.columns);
  }
};

Rows rows_at(const void* data, int64_t stride, int64_t row, int64_t column) {
  return Rows{(char*)data + (row * stride + column) * 2, stride * 2, MASKDIFF_BFLOAT16};
}

// A square of PANEL by PANEL sums to where it belongs: past the caches, since the optimizer reads it much later.
void write_square(Rows to, const float* sums) {
  for (int64_t row = 0; row < PANEL; row++, to.data += to.row_bytes, sums += PANEL) {
    store_past_caches(to.data, bfloat16_halves(load(sums), load(sums + WIDTH)));
  }
}

void run_part(const Part& part, Arena arena) {
  const TilesInUse use;
  const Panels s(&arena, part);
  const maskdiff_weight_gradient& call = *part.call;
  const int64_t pairs = part.pairs(), block = part.block(), chunk = part.chunk();
  pack_row_pairs(s.x, pairs, rows_at(call.x, call.x_stride, 0, part.first_column), call.tokens, part.columns);
  Rows to = {};  // of the square before: it is written while the next one is made, as tiles take a while to arrive
  const float* done = nullptr;
  int64_t turn = 0;
  for (int64_t row = 0; row < part.rows; row += block) {
    const int64_t rows = smaller(part.rows - row, block);
    for (int64_t at = 0; at < pairs; at += chunk) {
      const int64_t words = smaller(pairs - at, chunk), tokens = smaller(call.tokens - 2 * at, 2 * words);
      const Rows grad = rows_at(call.grad_out, call.grad_stride, 2 * at, part.first_row + row);
      pack_row_pairs(s.down, words, grad, tokens, rows);
      transpose(s.grad, s.down, words, rows);
      for (int64_t column = 0; column < part.columns; column += PANEL) {
        const float* const x = s.x + column * pairs + at * PANEL;
        for (int64_t i = 0; i < rows; i += PANEL) {
          float* const sums = s.sums + (part.whole() ? turn++ % 2 * PANEL * PANEL : column * block + i * PANEL);
          multiply_panel(sums, PANEL, s.grad + i * PANEL, rows, x, words, at > 0);
          if (done) write_square(to, done);
          done = at + words == pairs ? sums : nullptr;
          to = rows_at(call.out, call.out_stride, part.first_row + row + i, part.first_column + column);
        }
      }
    }
  }
  if (done) write_square(to, done);
  finish_stores_past_caches();
}

}  // namespace

int weight_gradient(const maskdiff_weight_gradient* call, int threads) {
  if (WIDTH != TILE || call->rows % PANEL || call->columns % PANEL) return MASKDIFF_BAD_OPTION;
  // The smaller factor is the one that every thread packs for itself.
  const bool down = call->rows > call->columns;
  const int64_t squares = (down ? call->rows : call->columns) / PANEL, parts = smaller(squares, threads);
  if (parts == 0) return MASKDIFF_OK;
  const auto part_of = [&](int64_t i) {
    const int64_t first = squares * i / parts * PANEL, count = squares * (i + 1) / parts * PANEL - first;
    return down ? Part{call, first, count, 0, call->columns} : Part{call, 0, call->rows, first, count};
  };
  Arena wanted = {};
  Panels(&wanted, part_of(parts - 1));  // the last is the largest
  float* const scratch = (float*)aligned_alloc(64, (size_t)(parts * wanted.used) * sizeof(float));
  if (!scratch) return MASKDIFF_NO_MEMORY;
#pragma omp parallel for schedule(static, 1) num_threads((int)parts)
  for (int64_t i = 0; i < parts; i++) run_part(part_of(i), Arena{scratch + i * wanted.used, 0});
  free(scratch);
  return MASKDIFF_OK;
}

}  // namespace ISA
}  // namespace maskdiff
