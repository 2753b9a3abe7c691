// attention: softmax attention over packed qkv, forward and backward, one task for each sequence and head.
#include <omp.h>
#include <stdlib.h>

#include "cpu/attention_amx.h"
#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/ops.h"

namespace maskdiff {
namespace ISA {
namespace {

#if defined(__AMX_BF16__)
constexpr maskdiff_products BEST = MASKDIFF_TILES;
#elif defined(__AVX512BF16__)
constexpr maskdiff_products BEST = MASKDIFF_PAIRS;
#else
constexpr maskdiff_products BEST = MASKDIFF_WIDENED;
#endif

// How the products are made: by vectors of words, or by tiles.
template <class Number>
struct ByVectors {
  static void attend(const Item& item, Arena arena) { ISA::attend<Number>(item, arena); }
  static void attend_backward(const Item& item, Arena arena) { ISA::attend_backward<Number>(item, arena); }
  static void lay_out(Arena* arena, int64_t length, int64_t width) { ForwardScratch(arena, length, width); }
  static void lay_out_backward(Arena* arena, int64_t length, int64_t width) {
    BackwardScratch::make<Number>(arena, length, width);
  }
};

struct ByTiles {
  static void attend(const Item& item, Arena arena) { attend_by_tiles(item, arena); }
  static void attend_backward(const Item& item, Arena arena) { attend_backward_by_tiles(item, arena); }
  static void lay_out(Arena* arena, int64_t length, int64_t width) { ForwardTiles(arena, length, width); }
  static void lay_out_backward(Arena* arena, int64_t length, int64_t width) { BackwardTiles(arena, length, width); }
};

// A call: its input, and where its outputs go.
struct Call {
  const maskdiff_attention_input* input;
  float scale;
  void* out;  // forward alone
  float* lse;
  const void* grad_out;  // backward alone, with what follows
  int64_t grad_sequence_stride;
  int64_t grad_token_stride;
  void* grad_qkv;
};

struct Sequence {
  int64_t start, length, number;
};

int longest_first(const void* x, const void* y) {
  const Sequence *a = (const Sequence*)x, *b = (const Sequence*)y;
  if (a->length != b->length) return a->length < b->length ? 1 : -1;
  return a->number < b->number ? -1 : 1;
}

Item item_of(const Call& call, const Sequence& sequence, int64_t head) {
  const maskdiff_attention_input& in = *call.input;
  const int64_t size = size_of(in.dtype), row = in.heads * in.width * size, offset = head * in.width * size;
  const bool ragged = in.cu_seqlens != nullptr;
  const auto rows = [&](const void* data, int64_t sequence_stride, int64_t token_stride) {
    const int64_t first = ragged ? sequence.start * token_stride : sequence.number * sequence_stride;
    return Rows{(char*)data + first * size, token_stride * size, in.dtype};
  };
  const auto later = [](Rows from, int64_t bytes) { return Rows{from.data + bytes, from.row_bytes, from.dtype}; };
  const int64_t part = in.part_stride * size;
  Item item = {};
  item.q = later(rows(in.qkv, in.sequence_stride, in.token_stride), head * in.head_stride * size);
  item.k = later(item.q, part);
  item.v = later(item.k, part);
  item.lse = call.lse + head * in.tokens + sequence.start;
  item.length = sequence.length;
  item.width = in.width;
  item.scale = call.scale;
  if (call.grad_qkv) {
    item.grad_out = later(rows(call.grad_out, call.grad_sequence_stride, call.grad_token_stride), offset);
    item.grad_q = Rows{(char*)call.grad_qkv + sequence.start * 3 * row + offset, 3 * row, in.dtype};
    item.grad_k = later(item.grad_q, row);
    item.grad_v = later(item.grad_k, row);
  } else {
    item.out = Rows{(char*)call.out + sequence.start * row + offset, row, in.dtype};
  }
  return item;
}

template <class Way>
int run_items(const Call& call, const Sequence* sequences, int threads) {
  const int64_t heads = call.input->heads, items = call.input->sequences * heads;
  int64_t floats = 0;  // the longest sequence need not want the most: blocks of queries are smaller then
  for (int64_t s = 0; s < call.input->sequences; s++) {
    const int64_t length = sequences[s].length;
    if (length == 0 || (s > 0 && length == sequences[s - 1].length)) continue;
    Arena wanted = {};
    (call.grad_qkv ? Way::lay_out_backward : Way::lay_out)(&wanted, length, call.input->width);
    floats = greater(floats, wanted.used);
  }
  threads = (int)smaller(threads, items);
  float* const scratch = (float*)aligned_alloc(64, (size_t)(threads * floats) * sizeof(float));
  if (!scratch) return MASKDIFF_NO_MEMORY;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < items; i++) {
    const Item item = item_of(call, sequences[i / heads], i % heads);
    const Arena arena = {scratch + omp_get_thread_num() * floats, 0};
    if (item.length == 0) continue;
    (call.grad_qkv ? Way::attend_backward : Way::attend)(item, arena);
  }
  free(scratch);
  return MASKDIFF_OK;
}

int run_call(const Call& call, int threads) {
  const maskdiff_attention_input& in = *call.input;
  const bool known_width = in.width == 32 || in.width == 64 || in.width == 128;
  if (!is_dtype((int)in.dtype) || !known_width || in.products < MASKDIFF_BEST || in.products > MASKDIFF_TILES) {
    return MASKDIFF_BAD_OPTION;
  }
  Sequence* const sequences = (Sequence*)malloc((size_t)(in.sequences + 1) * sizeof(Sequence));
  if (!sequences) return MASKDIFF_NO_MEMORY;
  int64_t end = 0;
  bool fits = true;
  for (int64_t s = 0; s < in.sequences; s++) {
    const int64_t start = in.cu_seqlens ? in.cu_seqlens[s] : end;
    const int64_t length = in.cu_seqlens ? in.cu_seqlens[s + 1] - start : in.length;
    sequences[s] = Sequence{start, length, s};
    fits = fits && start == end && length >= 0 && length <= in.length;
    end = start + length;
  }
  int code = fits && end == in.tokens ? MASKDIFF_OK : MASKDIFF_BAD_RANGE;
  if (code == MASKDIFF_OK && end > 0) {
    // Long ones first, so that no thread is left with one at the end.
    if (in.cu_seqlens) qsort(sequences, (size_t)in.sequences, sizeof(Sequence), longest_first);
    const int64_t products = in.products == MASKDIFF_BEST ? (int64_t)BEST : in.products;
    if (in.dtype != MASKDIFF_BFLOAT16 || products == MASKDIFF_WIDENED) {
      code = run_items<ByVectors<Singles>>(call, sequences, threads);
    } else if (products == MASKDIFF_PAIRS) {
      code = run_items<ByVectors<Pairs>>(call, sequences, threads);
    } else if constexpr (WIDTH == TILE) {
      code = run_items<ByTiles>(call, sequences, threads);
    } else {
      code = MASKDIFF_BAD_OPTION;
    }
  }
  free(sequences);
  return code;
}

}  // namespace

int attention(const maskdiff_attention_input* input, float scale, void* out, float* lse, int threads) {
  return run_call(Call{input, scale, out, lse, nullptr, 0, 0, nullptr}, threads);
}

int attention_backward(const maskdiff_attention_input* input, float scale, const float* lse, const void* grad_out,
                       int64_t grad_sequence_stride, int64_t grad_token_stride, void* grad_qkv, int threads) {
  const Call call{input, scale, nullptr, (float*)lse, grad_out, grad_sequence_stride, grad_token_stride, grad_qkv};
  return run_call(call, threads);
}

}  // namespace ISA
}  // namespace maskdiff
