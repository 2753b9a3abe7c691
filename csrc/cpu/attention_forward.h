// Attention forward for one sequence of one head: whole rows of scores, so one pass of softmax, over blocks of queries.
#pragma once

#include "cpu/attention_item.h"

namespace maskdiff {
namespace ISA {
namespace {

// out = P V, each row times a factor
template <class Number>
struct OutTile {
  Rows out;
  const float *p, *v, *factors;
  int64_t height, depth;

  template <int R, int C>
  MASKDIFF_INLINE void run(int64_t row, int64_t panel) {
    Vector sums[R][C];
    multiply<Number, ALONG>(sums, p + row * PANEL, height, v + panel * depth * PANEL, depth);
    each<R, C>([&](int r, int c) MASKDIFF_INLINED { sums[r][c] *= factors[row + r]; });
    write(sums, out, row, panel);
  }
};

// Panels of scores [rows, keys] become exp(scale * (score - the row's largest)), as the words of the product to come:
// pairs are written where scores have been read. tops: scale * largest, in units of ln 2; sums: of the row.
template <class Number>
void exponentials(float* scores, int64_t rows, int64_t keys, float scale, float* tops, float* sums) {
  const int64_t whole = keys / WIDTH * WIDTH;
  const Integers live = lanes() < (int32_t)(keys - whole);
  const float factor = scale * LOG2E;
  const auto score = [&](const float* from, int64_t key) MASKDIFF_INLINED {
    const Vector x = load(from) * factor;
    return key == whole ? select(live, x, splat(-__builtin_inff())) : x;
  };
  for (int64_t row = 0; row < rows; row++) {
    Vector top = splat(-__builtin_inff()), total = {};
    const float* from = scores + row * PANEL;
    for (int64_t key = 0; key < keys; key += PANEL, from += rows * PANEL) {
      top = larger(score(from, key), top);
      if (key + WIDTH < keys) top = larger(score(from + WIDTH, key + WIDTH), top);
    }
    const float largest = maximum(top);
    float* at = scores + row * PANEL;
    for (int64_t key = 0; key < keys; key += PANEL, at += rows * PANEL) {
      const bool both = key + WIDTH < keys;
      Vector first = exp2(score(at, key) - largest), second = {};
      if (key == whole) first = select(live, first, Vector{});
      if (both) second = exp2(score(at + WIDTH, key + WIDTH) - largest);
      if (both && key + WIDTH == whole) second = select(live, second, Vector{});
      total += first + second;
      if (Number::NUMBERS == 1) {
        store(at, first);
        if (both) store(at + WIDTH, second);
      } else {
        *(WideHalves*)(scores + place(rows, row, key / 2)) = bfloat16_halves(first, second);
      }
    }
    tops[row] = largest;
    sums[row] = sum(total);
  }
}

MASKDIFF_INLINE int64_t query_block(int64_t length) {  // queries whose scores stay in the first cache, or close to it
  return smaller(greater(16384 / length / MOST_ROWS * MOST_ROWS, 12), 48);
}

struct ForwardScratch {
  float *q;                       // [block, words of width]
  float *k, *k_transposed;        // [length, words of width] and its transpose
  float *v;                       // [words of length, width]
  float *scores;                  // [block, length]
  float *tops, *sums, *factors;   // [block]

  ForwardScratch(Arena* arena, int64_t length, int64_t width) {
    const int64_t height = round_up(length, PANEL), panels = round_up(width, PANEL);
    q = arena->take(48 * panels);
    k = arena->take(height * panels);
    k_transposed = arena->take(height * panels);
    v = arena->take(height * panels);
    scores = arena->take(greater(12 * height, 16384 + 48 * PANEL));
    tops = arena->take(48);
    sums = arena->take(48);
    factors = arena->take(48);
  }
};

template <class Number>
void attend(const Item& item, Arena arena) {
  const int64_t length = item.length, width = item.width, depth = words<Number>(width);
  const int64_t block = query_block(length), tall = round_up(length, WIDTH);
  const ForwardScratch s(&arena, length, width);
  Number::pack_along(s.k, tall, item.k, length, width);
  transpose(s.k_transposed, s.k, tall, depth);
  Number::pack_down(s.v, item.v, length, width);
  for (int64_t first = 0, parts = (length + block - 1) / block; parts > 0; parts--) {
    const int64_t rows = share(length - first, parts);
    Number::pack_along(s.q, rows, from_row(item.q, first), rows, width);
    make_scores<Number>(s.scores, s.q, rows, Keys{s.k, s.k_transposed, length, tall}, depth);
    exponentials<Number>(s.scores, rows, length, item.scale, s.tops, s.sums);
    for (int64_t row = 0; row < rows; row += WIDTH) {
      store(s.factors + row, 1.0f / load(s.sums + row));
      store(s.sums + row, LN2 * load(s.tops + row) + log(load(s.sums + row)));
    }
    __builtin_memcpy(item.lse + first, s.sums, (size_t)rows * sizeof(float));
    const OutTile<Number> out{from_row(item.out, first), s.scores, s.v, s.factors, rows, words<Number>(length)};
    run_tiles(out, rows, width / WIDTH);
    first += rows;
  }
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
