// Attention in bfloat16 by AMX's tiles, for one sequence of one head, in panels of PANEL queries.
//
// Scores stand transposed, keys down and queries across, so that softmax goes down the columns, lane by lane: no sums
// across a vector, no ends of rows to mask. Its results are the right factor of the product to come as they leave the
// registers, and the left one of the gradients of K and V. Outputs by query come out transposed, and are
// transposed back as they are written.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_item.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr int64_t PANEL_WORDS = PANEL / 2;  // what PANEL numbers take as pairs

// Lengths as the products see them.
struct Sides {
  int64_t tall;    // tokens as rows: a multiple of TILE
  int64_t pairs;   // tokens in pairs, as depth: a multiple of TILE words
  int64_t panels;  // of tokens
  int64_t depth;   // width, in words

  Sides(int64_t tokens, int64_t width)
      : tall(round_up(tokens, TILE)),
        pairs(round_up(tokens, PANEL) / 2),
        panels(round_up(tokens, PANEL) / PANEL),
        depth(width / 2) {}
};

// Rows [tokens, width] as a left factor: words along a row.
static void pack_left(float* to, const Sides& sides, Rows from, int64_t tokens, int64_t width) {
  Pairs::pack_along(to, sides.tall, from, tokens, width);
}

// The transpose [words of width, tokens] as a right factor. along: scratch, [tokens, words of width].
static void pack_transposed(float* to, float* along, Rows from, int64_t tokens, int64_t width) {
  const int64_t tall = round_up(tokens, PANEL);
  Pairs::pack_along(along, tall, from, tokens, width);
  transpose(to, along, tall, width / 2);
}

// The transpose [width, words of tokens] as a left factor. down: scratch, [words of tokens, width].
static void pack_left_transposed(float* to, float* down, const Sides& sides, Rows from, int64_t tokens, int64_t width) {
  pack_row_pairs(down, sides.pairs, from, tokens, width);
  transpose(to, down, sides.pairs, width);
}

// Writes PANEL or fewer columns of a panel [width, PANEL] as rows, each times its factor. scratch: [PANEL, width].
static void write_transposed(Rows to, int64_t rows, int64_t width, const float* from, const float* factors,
                             float* scratch) {
  transpose(scratch, from, width, PANEL);
  for (int64_t row = 0; row < rows; row++, to.data += to.row_bytes) {
    for (int64_t column = 0; column < width; column += PANEL) {
      const float* const at = scratch + place(PANEL, row, column);
      const Vector factor = splat(factors[row]);
      *(LooseWideHalves*)(to.data + column * 2) = bfloat16_halves(load(at) * factor, load(at + WIDTH) * factor);
    }
  }
}

// Writes panels [height, width] of floats as rows of bfloat16.
static void write_rows(Rows to, int64_t rows, int64_t width, const float* from, int64_t height) {
  for (int64_t row = 0; row < rows; row++, to.data += to.row_bytes) {
    for (int64_t column = 0; column < width; column += PANEL) {
      const float* const at = from + place(height, row, column);
      *(LooseWideHalves*)(to.data + column * 2) = bfloat16_halves(load(at), load(at + WIDTH));
    }
  }
}

struct ForwardTiles {
  float* k;               // left [keys, words of width]
  float* v_transposed;    // left [width, words of keys]
  float* q_transposed;    // right [words of width, queries]
  float* scores;          // [keys, PANEL]
  float* p;               // right [words of keys, PANEL]
  float* out_transposed;  // [width, PANEL]
  float* scratch;

  ForwardTiles(Arena* arena, int64_t length, int64_t width) {
    const int64_t tall = round_up(length, PANEL), panels = round_up(width / 2, PANEL);
    k = arena->take(tall * panels);
    v_transposed = arena->take(width * round_up(tall / 2, PANEL));
    q_transposed = arena->take(width / 2 * tall);
    scores = arena->take(tall * PANEL);
    p = arena->take(tall / 2 * PANEL);
    out_transposed = arena->take(width * PANEL);
    scratch = arena->take(greater(tall * greater(panels, width / 2), width * PANEL));
  }
};

// P = exp(scale * score - the column's largest) as words of two keys; keys beyond `keys` get 0.
// factors, lse [PANEL]: one over a column's sum; the log-sum-exp of the scaled scores.
static void softmax_down(float* p, const float* scores, int64_t keys, int64_t pairs, float scale, float* factors,
                         float* lse) {
  const float factor = scale * LOG2E;
  Vector top[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())}, total[2] = {};
  for (int64_t key = 0; key < keys; key++) {
    top[0] = larger(load(scores + key * PANEL) * factor, top[0]);
    top[1] = larger(load(scores + key * PANEL + WIDTH) * factor, top[1]);
  }
  const auto exponential = [&](int64_t key, int half) MASKDIFF_INLINED {
    const Vector x = exp2(load(scores + key * PANEL + half * WIDTH) * factor - top[half]);
    total[half] += x;
    return x;
  };
  const auto halves = [&](int64_t key) MASKDIFF_INLINED {
    const Vector first = exponential(key, 0), second = exponential(key, 1);
    return bfloat16_halves(first, second);
  };
  int64_t pair = 0;
  for (; 2 * pair + 1 < keys; pair++) store_interleaved(p + pair * PANEL, halves(2 * pair), halves(2 * pair + 1));
  if (keys % 2) store_interleaved(p + pair++ * PANEL, halves(keys - 1), WideHalves{});
  for (; pair < pairs; pair++) store_interleaved(p + pair * PANEL, WideHalves{}, WideHalves{});
  for (int half = 0; half < 2; half++) {
    store(factors + half * WIDTH, 1.0f / total[half]);
    store(lse + half * WIDTH, LN2 * top[half] + log(total[half]));
  }
}

static void attend_by_tiles(const Item& item, Arena arena) {
  const TilesInUse use;
  const int64_t length = item.length, width = item.width;
  const Sides sides(length, width);
  const ForwardTiles s(&arena, length, width);
  alignas(64) float factors[PANEL], lse[PANEL];
  pack_left(s.k, sides, item.k, length, width);
  pack_left_transposed(s.v_transposed, s.scratch, sides, item.v, length, width);
  pack_transposed(s.q_transposed, s.scratch, item.q, length, width);
  for (int64_t panel = 0; panel < sides.panels; panel++) {
    const int64_t first = panel * PANEL, queries = smaller(length - first, PANEL);
    multiply_panel(s.scores, sides.tall, s.k, sides.tall, s.q_transposed + first * sides.depth, sides.depth, false);
    softmax_down(s.p, s.scores, length, sides.pairs, item.scale, factors, lse);
    multiply_panel(s.out_transposed, width, s.v_transposed, width, s.p, sides.pairs, false);
    write_transposed(from_row(item.out, first), queries, width, s.out_transposed, factors, s.scratch);
    __builtin_memcpy(item.lse + first, lse, (size_t)queries * sizeof(float));
  }
}

constexpr int64_t MOST_PAIRS = 65536;  // words of P and dS each: both stay in the second cache

MASKDIFF_INLINE int64_t query_panels(int64_t length) {  // whose gradients are made together
  return greater(MOST_PAIRS / (round_up(length, TILE) * PANEL_WORDS), 1);
}

struct BackwardTiles {
  float *k, *v;                           // left [keys, words of width]
  float* k_transposed;                    // left [width, words of keys]
  float *q_transposed, *grad_transposed;  // right [words of width, queries of the block]
  float *q_down, *grad_down;              // right [words of queries, width]
  float *scores, *slopes;                 // [keys, PANEL]: scores, then P; dP
  float *p, *ds;                          // left [keys, words of queries]
  float* ds_down;                         // right [words of keys, PANEL]
  float* q_gradient;                      // [width, PANEL]
  float *k_gradient, *v_gradient;         // [keys, width]
  float* scratch;

  BackwardTiles(Arena* arena, int64_t length, int64_t width) {
    const int64_t tall = round_up(length, PANEL), panels = round_up(width / 2, PANEL);
    const int64_t block = smaller(query_panels(length) * PANEL, tall);
    k = arena->take(tall * panels);
    v = arena->take(tall * panels);
    k_transposed = arena->take(width * round_up(tall / 2, PANEL));
    q_transposed = arena->take(width / 2 * block);
    grad_transposed = arena->take(width / 2 * block);
    q_down = arena->take(block / 2 * width);
    grad_down = arena->take(block / 2 * width);
    scores = arena->take(tall * PANEL);
    slopes = arena->take(tall * PANEL);
    p = arena->take(tall * round_up(block / 2, PANEL));
    ds = arena->take(tall * round_up(block / 2, PANEL));
    ds_down = arena->take(tall / 2 * PANEL);
    q_gradient = arena->take(width * PANEL);
    k_gradient = arena->take(tall * width);
    v_gradient = arena->take(tall * width);
    scratch = arena->take(greater(tall * greater(panels, width / 2), width * PANEL));
  }
};

// One panel of scores and dP becomes P = exp(scale score - lse) and dS = scale P (dP - delta): words of two queries in
// p and ds, rows PANEL apart, and dS as words of two keys in ds_down, where keys beyond `keys` get 0.
// delta = sum P dP / sum P, as finish_row has it.
static void finish_panel(const BackwardTiles& s, float* p, float* ds, int64_t keys, int64_t pairs, float scale,
                         const float* lse) {
  const float factor = scale * LOG2E;
  Vector shift[2], total[2] = {}, weighted[2] = {}, delta[2];
  for (int half = 0; half < 2; half++) shift[half] = load(lse + half * WIDTH) * LOG2E;
  for (int64_t key = 0; key < keys; key++) {
    for (int half = 0; half < 2; half++) {
      float* const at = s.scores + key * PANEL + half * WIDTH;
      const Vector value = exp2(load(at) * factor - shift[half]);
      store(at, value);
      total[half] += value;
      weighted[half] += value * load(s.slopes + key * PANEL + half * WIDTH);
    }
  }
  for (int half = 0; half < 2; half++) delta[half] = weighted[half] / total[half];
  const auto gradient = [&](int64_t key) MASKDIFF_INLINED {
    const float *const values = s.scores + key * PANEL, *const slopes = s.slopes + key * PANEL;
    const Vector first = load(values), second = load(values + WIDTH);
    *(WideHalves*)(p + key * PANEL) = bfloat16_halves(first, second);
    const WideHalves halves = bfloat16_halves(first * (load(slopes) - delta[0]) * scale,
                                              second * (load(slopes + WIDTH) - delta[1]) * scale);
    *(WideHalves*)(ds + key * PANEL) = halves;
    return halves;
  };
  int64_t pair = 0;
  for (; 2 * pair + 1 < keys; pair++) {
    const WideHalves first = gradient(2 * pair), second = gradient(2 * pair + 1);
    store_interleaved(s.ds_down + pair * PANEL, first, second);
  }
  if (keys % 2) store_interleaved(s.ds_down + pair++ * PANEL, gradient(keys - 1), WideHalves{});
  for (; pair < pairs; pair++) store_interleaved(s.ds_down + pair * PANEL, WideHalves{}, WideHalves{});
}

static void attend_backward_by_tiles(const Item& item, Arena arena) {
  if (item.length == 1) return attend_backward_alone(item);
  const TilesInUse use;
  const int64_t length = item.length, width = item.width, block = query_panels(length) * PANEL;
  const Sides keys(length, width);
  const BackwardTiles s(&arena, length, width);
  alignas(64) float ones[PANEL];
  for (float& one : ones) one = 1.0f;
  pack_left(s.k, keys, item.k, length, width);
  pack_left(s.v, keys, item.v, length, width);
  pack_left_transposed(s.k_transposed, s.scratch, keys, item.k, length, width);
  for (int64_t start = 0; start < length; start += block) {
    const int64_t rows = smaller(length - start, block);
    const Rows q = from_row(item.q, start), grad_out = from_row(item.grad_out, start);
    const Sides queries(rows, width);
    pack_transposed(s.q_transposed, s.scratch, q, rows, width);
    pack_transposed(s.grad_transposed, s.scratch, grad_out, rows, width);
    pack_row_pairs(s.q_down, queries.pairs, q, rows, width);
    pack_row_pairs(s.grad_down, queries.pairs, grad_out, rows, width);
    for (int64_t panel = 0; panel < queries.panels; panel++) {
      const int64_t first = panel * PANEL, count = smaller(rows - first, PANEL), at = first * keys.depth;
      const int64_t to = place(keys.tall, 0, panel * PANEL_WORDS);
      alignas(64) float lse[PANEL] = {};
      __builtin_memcpy(lse, item.lse + start + first, (size_t)count * sizeof(float));
      multiply_panel(s.scores, keys.tall, s.k, keys.tall, s.q_transposed + at, keys.depth, false);
      multiply_panel(s.slopes, keys.tall, s.v, keys.tall, s.grad_transposed + at, keys.depth, false);
      finish_panel(s, s.p + to, s.ds + to, length, keys.pairs, item.scale, lse);
      multiply_panel(s.q_gradient, width, s.k_transposed, width, s.ds_down, keys.pairs, false);
      write_transposed(from_row(item.grad_q, start + first), count, width, s.q_gradient, ones, s.scratch);
    }
    for (int64_t column = 0; column < width; column += PANEL) {
      const int64_t right = column * queries.pairs, to = column * keys.tall;
      multiply_panel(s.v_gradient + to, keys.tall, s.p, keys.tall, s.grad_down + right, queries.pairs, start > 0);
      multiply_panel(s.k_gradient + to, keys.tall, s.ds, keys.tall, s.q_down + right, queries.pairs, start > 0);
    }
  }
  write_rows(item.grad_k, length, width, s.k_gradient, keys.tall);
  write_rows(item.grad_v, length, width, s.v_gradient, keys.tall);
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
