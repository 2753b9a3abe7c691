// Attention backward for one sequence of one head: blocks of queries against all keys, the scores computed again.
// The gradient of Q is finished block by block; those of K and V add up over the blocks.
#pragma once

#include "cpu/attention_item.h"

namespace maskdiff {
namespace ISA {
namespace {

// A matrix product written out, or added up over blocks of queries and written out with the last of them.
// dQ = dS K (ALONG); dK = dS^T Q and dV = P^T dO (DOWN, the keys of one panel).
template <class Number, Side SIDE>
struct GradientTile {
  Rows grad;
  const float *left, *right;
  int64_t height, right_height, depth;
  float* partial;  // [partial_height, width]
  int64_t partial_height;
  bool first, last;

  template <int R, int C>
  MASKDIFF_INLINE void run(int64_t row, int64_t panel) {
    Vector sums[R][C];
    const float* const from = left + (SIDE == ALONG ? row * PANEL : row);
    multiply<Number, SIDE>(sums, from, height, right + panel * right_height * PANEL, depth);
    float* const at = partial + (panel * partial_height + row) * PANEL;
    if (!first) {
      each<R, C>([&](int r, int c) MASKDIFF_INLINED { sums[r][c] += load(at + r * PANEL + c * WIDTH); });
    }
    if (last) return write(sums, grad, row, panel);
    each<R, C>([&](int r, int c) MASKDIFF_INLINED { store(at + r * PANEL + c * WIDTH, sums[r][c]); });
  }
};

constexpr int64_t BLOCK_SCORES = 24576, FEWEST_QUERIES = 24, MOST_QUERIES = 144;

MASKDIFF_INLINE int64_t gradient_block(int64_t length) {  // queries whose P and dS stay in the second cache
  return smaller(greater(BLOCK_SCORES / length / MOST_ROWS * MOST_ROWS, FEWEST_QUERIES), MOST_QUERIES);
}

struct BackwardScratch {
  float *q, *grad_out;               // [block, words of width]
  float *q_down, *grad_down;         // [words of block, width]; floats: the same as the above
  float *k, *v;                      // [keys, words of width]
  float *k_transposed, *v_transposed;
  float *k_down;                     // [words of keys, width]
  float *p, *ds;                     // [block, keys]: scores and dP at first
  float *p_down, *ds_down;           // [words of block, keys]; floats: the same
  float* ds_along;                   // [block, words of keys]; floats: the same
  float *partial_k, *partial_v;      // [keys, width]

  template <class Number>
  static BackwardScratch make(Arena* arena, int64_t length, int64_t width) {
    const bool pairs = Number::NUMBERS == 2;
    const int64_t tall = round_up(length, PANEL), panels = round_up(width, PANEL);
    const int64_t all = tall * panels, block = MOST_QUERIES * panels;
    const int64_t square = greater(FEWEST_QUERIES * tall, BLOCK_SCORES + MOST_QUERIES * PANEL);
    BackwardScratch s;
    s.q = arena->take(block);
    s.grad_out = arena->take(block);
    s.q_down = pairs ? arena->take(block) : s.q;
    s.grad_down = pairs ? arena->take(block) : s.grad_out;
    s.k = arena->take(all);
    s.v = arena->take(all);
    s.k_transposed = arena->take(all);
    s.v_transposed = arena->take(all);
    s.k_down = pairs ? arena->take(all) : s.k;
    s.p = arena->take(square);
    s.ds = arena->take(square);
    s.p_down = pairs ? arena->take(square) : s.p;
    s.ds_down = pairs ? arena->take(square) : s.ds;
    s.ds_along = pairs ? arena->take(square) : s.ds;
    s.partial_k = arena->take(all);
    s.partial_v = arena->take(all);
    return s;
  }
};

// One row of scores and dP become P = exp(scale score - lse) and dS = scale P (dP - delta), 0 beyond `keys`; of pairs
// dS also as words of neighbouring keys.
// delta = sum P dP / sum P, and not dO . O: rounding errors of dP and lse cancel, as they must where one key has all.
template <class Number>
MASKDIFF_INLINE void finish_row(const BackwardScratch& s, int64_t rows, int64_t row, int64_t keys, float scale,
                                float lse) {
  const int64_t whole = keys / WIDTH * WIDTH, step = rows * PANEL;
  const Integers live = lanes() < (int32_t)(keys - whole);
  const float factor = scale * LOG2E, shift = lse * LOG2E;
  float *p = s.p + row * PANEL, *ds = s.ds + row * PANEL;
  Vector total = {}, weighted = {};
  const auto exponential = [&](float* p, float* ds, int64_t key) MASKDIFF_INLINED {
    Vector value = exp2(load(p) * factor - shift), slope = load(ds);
    if (key == whole) {
      value = select(live, value, Vector{});
      slope = select(live, slope, Vector{});
      store(ds, slope);
    }
    store(p, value);
    total += value;
    weighted += value * slope;
  };
  for (int64_t key = 0; key < keys; key += PANEL, p += step, ds += step) {
    exponential(p, ds, key);
    if (key + WIDTH < keys) exponential(p + WIDTH, ds + WIDTH, key + WIDTH);
  }
  const float delta = sum(weighted) / sum(total);
  const auto gradient = [&](const float* p, float* ds) MASKDIFF_INLINED {
    const Vector value = load(p) * (load(ds) - delta) * scale;
    store(ds, value);
    return value;
  };
  p = s.p + row * PANEL, ds = s.ds + row * PANEL;
  for (int64_t key = 0; key < keys; key += PANEL, p += step, ds += step) {
    const Vector first = gradient(p, ds), second = key + WIDTH < keys ? gradient(p + WIDTH, ds + WIDTH) : Vector{};
    if (Number::NUMBERS == 2) *(WideHalves*)(s.ds_along + place(rows, row, key / 2)) = bfloat16_halves(first, second);
  }
}

// Rows 2i and 2i + 1 of P or dS to words that hold both; beyond `rows` 0.
static void pair_rows(float* down, const float* from, int64_t rows, int64_t keys) {
  const int64_t height = words<Pairs>(rows);
  for (int64_t key = 0; key < keys; key += PANEL, from += rows * PANEL, down += height * PANEL) {
    const float* line = from;
    float* to = down;
    for (int64_t pair = 0; pair < height; pair++, line += 2 * PANEL, to += PANEL) {
      WideHalves other = {};
      if (2 * pair + 1 < rows) other = bfloat16_halves(load(line + PANEL), load(line + PANEL + WIDTH));
      store_interleaved(to, bfloat16_halves(load(line), load(line + WIDTH)), other);
    }
  }
}

template <class Number>
void attend_backward(const Item& item, Arena arena) {
  if (item.length == 1) return attend_backward_alone(item);
  const int64_t length = item.length, width = item.width, depth = words<Number>(width), block = gradient_block(length);
  const int64_t tall = round_up(length, WIDTH), vectors = width / WIDTH;
  const BackwardScratch s = BackwardScratch::make<Number>(&arena, length, width);
  const bool pairs = Number::NUMBERS == 2;
  Number::pack_along(s.k, tall, item.k, length, width);
  Number::pack_along(s.v, tall, item.v, length, width);
  transpose(s.k_transposed, s.k, tall, depth);
  transpose(s.v_transposed, s.v, tall, depth);
  const Keys k{s.k, s.k_transposed, length, tall}, v{s.v, s.v_transposed, length, tall};
  if (pairs) Number::pack_down(s.k_down, item.k, length, width);

  int64_t parts = (length + block - 1) / block;
  for (int64_t start = 0; start < length; parts--) {
    const int64_t rows = share(length - start, parts), queries = words<Number>(rows);
    const Rows q = from_row(item.q, start), grad_out = from_row(item.grad_out, start);
    Number::pack_along(s.q, rows, q, rows, width);
    Number::pack_along(s.grad_out, rows, grad_out, rows, width);
    make_scores<Number>(s.p, s.q, rows, k, depth);
    make_scores<Number>(s.ds, s.grad_out, rows, v, depth);
    for (int64_t row = 0; row < rows; row++) {
      finish_row<Number>(s, rows, row, length, item.scale, item.lse[start + row]);
    }
    if (pairs) {
      Number::pack_down(s.q_down, q, rows, width);
      Number::pack_down(s.grad_down, grad_out, rows, width);
      pair_rows(s.p_down, s.p, rows, length);
      pair_rows(s.ds_down, s.ds, rows, length);
    }
    const bool first = start == 0, last = start + rows == length;
    for (int64_t key = 0; key < length; key += PANEL) {
      const int64_t keys = smaller(length - key, PANEL);
      const GradientTile<Number, DOWN> k_tile{
          from_row(item.grad_k, key), s.ds_down + key * queries, s.q_down, 0,    queries, queries,
          s.partial_k + key * PANEL,  length,                    first,    last};
      const GradientTile<Number, DOWN> v_tile{
          from_row(item.grad_v, key), s.p_down + key * queries, s.grad_down, 0,    queries, queries,
          s.partial_v + key * PANEL,  length,                   first,       last};
      run_tiles(k_tile, keys, vectors);
      run_tiles(v_tile, keys, vectors);
    }
    const GradientTile<Number, ALONG> q_tile{from_row(item.grad_q, start), s.ds_along,
                                             s.k_down, rows, pairs ? words<Number>(length) : tall,
                                             words<Number>(length), nullptr, 0, true, true};
    run_tiles(q_tile, rows, vectors);
    start += rows;
  }
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
