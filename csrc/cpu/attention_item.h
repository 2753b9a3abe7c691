// One sequence of one head: what attention's forward and backward work on, and the parts they share.
#pragma once

#include "cpu/arena.h"
#include "cpu/attention_tile.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.693147180559945309417f;

struct Item {
  Rows q, k, v;                           // [length, width]
  Rows out;                               // forward alone
  Rows grad_out, grad_q, grad_k, grad_v;  // backward alone
  float* lse;                             // [length]
  int64_t length;                         // tokens, at least 1
  int64_t width;                          // d
  float scale;
};

// to = left right^T, [rows, keys] from [rows, depth] and the transpose [depth, keys] of right
template <class Number>
struct ScoreTile {
  float* to;
  const float *left, *right_transposed;
  int64_t height, depth;

  template <int R, int C>
  MASKDIFF_INLINE void run(int64_t row, int64_t panel) {
    Vector sums[R][C];
    multiply<Number, ALONG>(sums, left + row * PANEL, height, right_transposed + panel * depth * PANEL, depth);
    float* const at = to + (panel * height + row) * PANEL;
    each<R, C>([&](int r, int c) MASKDIFF_INLINED { store(at + r * PANEL + c * WIDTH, sums[r][c]); });
  }
};

// Both forms of a matrix that scores are made with.
struct Keys {
  const float *along, *transposed;  // [keys, words of width], [words of width, keys]
  int64_t count, height;            // keys, and with rows to spare
};

// to = left keys^T. One key beyond whole vectors is done by dot products: lengths one past a power of two are the rule
// here. (Two would gain nothing over a vector of their own.)
template <class Number>
void make_scores(float* to, const float* left, int64_t rows, const Keys& keys, int64_t depth) {
  const bool stray = keys.count > WIDTH && keys.count % WIDTH == 1;
  const int64_t vectors = stray ? keys.count / WIDTH : (keys.count + WIDTH - 1) / WIDTH;
  run_tiles(ScoreTile<Number>{to, left, keys.transposed, rows, depth}, rows, vectors);
  for (int64_t row = 0; stray && row < rows; row++) {
    Vector total = {};
    for (int64_t k = 0; k < depth; k += WIDTH) {
      const Vector key = load(keys.along + place(keys.height, keys.count - 1, k));
      total = Number::multiply_add(load(left + place(rows, row, k)), key, total);
    }
    to[place(rows, row, keys.count - 1)] = sum(total);
  }
}

static __attribute__((noinline)) void write_halves(const float* from, int count, char* to, int dtype) {
  store_floats(to, dtype, 0, count, from);
}

// Writes a tile to rows of memory, rounded to their type.
template <int R, int C>
MASKDIFF_INLINE void write(const Vector (&values)[R][C], const Rows& to, int64_t first_row, int64_t panel) {
  char* at = to.data + first_row * to.row_bytes + panel * PANEL * size_of(to.dtype);
  if (to.dtype == MASKDIFF_FLOAT32) {
    each<R, C>([&](int row, int column) MASKDIFF_INLINED {
      *(LooseVector*)(at + row * to.row_bytes + column * WIDTH * 4) = values[row][column];
    });
  } else if (to.dtype == MASKDIFF_BFLOAT16) {
    each<R, C>([&](int row, int column) MASKDIFF_INLINED {
      *(LooseHalves*)(at + row * to.row_bytes + column * WIDTH * 2) = bfloat16_halves(values[row][column]);
    });
  } else {
    alignas(64) float copy[R][C * WIDTH];
    each<R, C>([&](int row, int column) MASKDIFF_INLINED {
      store(&copy[row][column * WIDTH], values[row][column]);
    });
    for (int row = 0; row < R; row++) write_halves(copy[row], C * WIDTH, at + row * to.row_bytes, (int)to.dtype);
  }
}

MASKDIFF_INLINE Rows from_row(Rows rows, int64_t row) {
  rows.data += row * rows.row_bytes;
  return rows;
}

// One token attends to itself whatever its score: exactly no gradient for Q and K.
static void attend_backward_alone(const Item& item) {
  const size_t bytes = (size_t)(item.width * size_of(item.q.dtype));
  __builtin_memset(item.grad_q.data, 0, bytes);
  __builtin_memset(item.grad_k.data, 0, bytes);
  __builtin_memcpy(item.grad_v.data, item.grad_out.data, bytes);
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
