// attention: softmax attention over packed qkv, whole sequences in shared memory; one launch forward, one backward.
//
// An item is a sequence and a head. Its rows are copied to shared memory once; then nothing there changes, and each warp
// takes tiles of 16 rows on its own: no atomics, no workspace, the same bits every time. Backward a warp goes twice over
// the scores, by 16 keys for dK and dV and by 16 queries for dQ: seven products where five would do, but dQ needs no sum
// over warps. Source: FlashAttention-2, arXiv 2307.08691, section 3.1.
#include "cuda/attention_tile.cuh"
#include "maskdiff_kernels.h"

namespace maskdiff {
namespace attention {
namespace {

constexpr int kMostRows = 288, kMostWarps = 9; // 9 warps of 168 registers fit a multiprocessor
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f, kInfinity = __builtin_inff();

struct Shape { // of a block
  int warps; // of an item
  int items;
  int rows; // of an item in shared memory: the most that a sequence needs, whole tiles

  unsigned threads() const { return static_cast<unsigned>(32 * warps * items); }
};

// Short items: a warp each, so that one loads while another computes. Longer: two tiles a warp, so that several blocks fit
// a multiprocessor at once (9 tiles, 129 tokens: three a warp, three blocks).
Shape shape_for(int64_t length) {
  const int tiles = static_cast<int>((length + kTile - 1) / kTile);
  if (tiles <= 2) return {1, 4, tiles * kTile};
  return {tiles <= 4 ? tiles : tiles == 9 ? 3 : (tiles + 1) / 2, 1, tiles * kTile};
}

size_t pool_bytes(const Shape& shape, int64_t width, bool backward) {
  const size_t row = static_cast<size_t>(2 * width * (backward ? 4 : 3)) + (backward ? 2 * sizeof(float) : 0);
  return row * static_cast<size_t>(shape.rows * shape.items);
}

struct Item { // of this warp
  bool exists;
  int number; // in its block
  int warp;   // of the item's
  int64_t sequence, head, start;
  int length, tiles;
};

// The sequence's part of [T] tokens. A cu_seqlens that breaks its promise cannot be told: its sequences are cut short.
DEVICE Item my_item(const maskdiff_attention_input& in, const Shape& shape) {
  Item item;
  const int warp = static_cast<int>(ptx::thread_x() / 32);
  item.number = warp / shape.warps, item.warp = warp % shape.warps;
  const int64_t index = int64_t{ptx::block_x()} * shape.items + item.number;
  item.exists = index < in.sequences * in.heads;
  item.sequence = item.exists ? index / in.heads : 0, item.head = item.exists ? index % in.heads : 0;
  int64_t length = in.length;
  item.start = item.sequence * length;
  if (in.cu_seqlens) {
    item.start = in.cu_seqlens[item.sequence];
    const int64_t end = in.cu_seqlens[item.sequence + 1];
    if (end - item.start < length) length = end - item.start;
    if (item.start < 0 || end > in.tokens || length < 0) length = 0;
  }
  item.length = item.exists ? static_cast<int>(length) : 0;
  item.tiles = (item.length + kTile - 1) / kTile;
  return item;
}

DEVICE int64_t offset(const Item& item, const maskdiff_attention_input& in, int64_t sequence_stride,
                      int64_t token_stride) { // of the item's first token
  return in.cu_seqlens ? item.start * token_stride : item.sequence * sequence_stride;
}

// Starts copying the item's rows to shared memory, all lanes of its warps together; zeros fill the last tile.
template <int D>
DEVICE void copy_rows(uint16_t* to, const uint16_t* from, int64_t stride, const Item& item, const Shape& shape) {
  for (int i = item.warp * 32 + lane(); i < item.tiles * kTile * (D / 8); i += shape.warps * 32) {
    const int row = i / (D / 8), vector = i % (D / 8);
    ptx::copy_async16(place<D>(to, row, vector), from + row * stride + vector * 8, row < item.length);
  }
}

DEVICE void meet(const Shape& shape) { // the warps of an item
  if (shape.warps == 1) ptx::sync_warp();
  else ptx::sync_block();
}

DEVICE float over_quad(float x, bool most) { // the sum, or the largest, of the four lanes that share a row
#pragma unroll
  for (unsigned bits = 1; bits <= 2; bits *= 2) {
    const float other = ptx::shuffle_xor(x, bits);
    x = most ? fmaxf(x, other) : x + other;
  }
  return x;
}

template <class T, int D>
KERNEL(512) // so 128 registers: 16 warps on a multiprocessor
forward(maskdiff_attention_input in, Shape shape, float scale,
        uint16_t* out, // [T, H * D]
        float* lse) {  // [H, T]
  SHARED_POOL(pool);
  const Item item = my_item(in, shape);
  const int all_rows = shape.items * shape.rows, first_row = item.number * shape.rows;
  uint16_t* q = pool.take<uint16_t>(all_rows * D) + first_row * D;
  uint16_t* k = pool.take<uint16_t>(all_rows * D) + first_row * D;
  uint16_t* v = pool.take<uint16_t>(all_rows * D) + first_row * D;
  const uint16_t* from = static_cast<const uint16_t*>(in.qkv) + item.head * in.head_stride +
                         offset(item, in, in.sequence_stride, in.token_stride);
  copy_rows<D>(q, from, in.token_stride, item, shape);
  copy_rows<D>(k, from + in.part_stride, in.token_stride, item, shape);
  copy_rows<D>(v, from + 2 * in.part_stride, in.token_stride, item, shape);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  meet(shape);

  constexpr int kAtOnce = 2; // tiles of keys between two corrections of the maximum: what 128 registers hold
  const int row = lane() / 4, column = 2 * (lane() % 4);
  for (int tile = item.warp; tile < item.tiles; tile += shape.warps) {
    uint32_t queries[D / 16][4];
    load_left<D>(queries, q, tile * kTile);
    float sum[D / 8][4] = {}, most[2] = {-kInfinity, -kInfinity}, total[2] = {0, 0}; // of rows g and g + 8
    for (int first = 0; first < item.length; first += kAtOnce * kTile) {
      float s[kAtOnce][2][4], before[2] = {most[0], most[1]};
#pragma unroll
      for (int t = 0; t < kAtOnce; t++) {
        const int key = first + t * kTile;
        if (key >= item.length) break;
        dot_products<T, D>(s[t], queries, k, key);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float& x = s[t][i / 4][i % 4];
          x = key + i / 4 * 8 + column + i % 2 < item.length ? x * scale : -kInfinity;
          most[i % 4 / 2] = fmaxf(most[i % 4 / 2], x);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        most[h] = over_quad(most[h], true);
        const float factor = ptx::exp2_fast(before[h] - most[h]);
        total[h] *= factor;
#pragma unroll
        for (int j = 0; j < D / 8; j++) sum[j][2 * h] *= factor, sum[j][2 * h + 1] *= factor;
      }
#pragma unroll
      for (int t = 0; t < kAtOnce; t++) {
        const int key = first + t * kTile;
        if (key >= item.length) break;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float& x = s[t][i / 4][i % 4];
          x = ptx::exp2_fast(x - most[i % 4 / 2]);
          total[i % 4 / 2] += x;
        }
        add_weighted<T, D>(sum, s[t], v, key);
      }
    }
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      total[h] = over_quad(total[h], false);
      factor[h] = 1 / total[h];
      const int query = tile * kTile + row + 8 * h;
      if (column == 0 && query < item.length)
        lse[item.head * in.tokens + item.start + query] = most[h] * kLn2 + logf(total[h]);
    }
    const int64_t stride = in.heads * D;
    store_tile<T, D>(out + (item.start + tile * kTile) * stride + item.head * D, stride, item.length - tile * kTile, sum,
                     factor);
  }
}

// Rows of the gradient to shared memory, and for each the sum of its products with the output, and the log-sum-exp to
// base 2; infinity, so no weight, for what fills the last tile.
template <class T, int D>
DEVICE void load_gradient(uint16_t* gradient, float* dot, float* lse2, const uint16_t* from, int64_t from_stride,
                          const uint16_t* out, int64_t out_stride, const float* lse, const Item& item,
                          const Shape& shape) {
  constexpr int kTurns = D / 16, kRows = kTile / kTurns; // a turn: a vector a lane
  const int vector = lane() % (D / 8);
  for (int tile = item.warp; tile < item.tiles; tile += shape.warps) {
    Vector g[kTurns], o[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; i++) {
      const int row = tile * kTile + i * kRows + lane() / (D / 8);
      g[i] = o[i] = {};
      if (row >= item.length) continue;
      g[i] = *reinterpret_cast<const Vector*>(from + row * from_stride + vector * 8);
      o[i] = *reinterpret_cast<const Vector*>(out + row * out_stride + vector * 8);
    }
#pragma unroll
    for (int i = 0; i < kTurns; i++) {
      const int row = tile * kTile + i * kRows + lane() / (D / 8);
      *reinterpret_cast<Vector*>(place<D>(gradient, row, vector)) = g[i];
      float sum = 0;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        sum += T::widen(g[i].word[w] & 0xFFFF) * T::widen(o[i].word[w] & 0xFFFF);
        sum += T::widen(g[i].word[w] >> 16) * T::widen(o[i].word[w] >> 16);
      }
#pragma unroll
      for (unsigned bits = 1; bits < D / 8; bits *= 2) sum += ptx::shuffle_xor(sum, bits);
      if (vector == 0) dot[row] = sum, lse2[row] = row < item.length ? lse[row] * kLog2E : kInfinity;
    }
  }
}

template <class T, int D>
KERNEL(kMostWarps * 32)
backward(maskdiff_attention_input in, Shape shape, float scale, const uint16_t* out, const float* lse,
         const uint16_t* grad_out, int64_t grad_sequence_stride, int64_t grad_token_stride,
         uint16_t* grad_qkv) { // [T, 3, H, D]
  SHARED_POOL(pool);
  const Item item = my_item(in, shape);
  const int all_rows = shape.items * shape.rows, first_row = item.number * shape.rows;
  uint16_t* q = pool.take<uint16_t>(all_rows * D) + first_row * D;
  uint16_t* k = pool.take<uint16_t>(all_rows * D) + first_row * D;
  uint16_t* v = pool.take<uint16_t>(all_rows * D) + first_row * D;
  uint16_t* gradient = pool.take<uint16_t>(all_rows * D) + first_row * D;
  float* dot = pool.take<float>(all_rows) + first_row;
  float* lse2 = pool.take<float>(all_rows) + first_row;
  const uint16_t* from = static_cast<const uint16_t*>(in.qkv) + item.head * in.head_stride +
                         offset(item, in, in.sequence_stride, in.token_stride);
  copy_rows<D>(q, from, in.token_stride, item, shape);
  copy_rows<D>(k, from + in.part_stride, in.token_stride, item, shape);
  copy_rows<D>(v, from + 2 * in.part_stride, in.token_stride, item, shape);
  ptx::copy_commit();
  load_gradient<T, D>(gradient, dot, lse2,
                      grad_out + item.head * D + offset(item, in, grad_sequence_stride, grad_token_stride),
                      grad_token_stride, out + (item.start * in.heads + item.head) * D, in.heads * D,
                      lse + item.head * in.tokens + item.start, item, shape);
  ptx::copy_wait<0>();
  meet(shape);

  const float scale2 = scale * kLog2E;
  const int row = lane() / 4, column = 2 * (lane() % 4);
  const int64_t stride = 3 * in.heads * D, part = in.heads * D;
  uint16_t* to = grad_qkv + item.start * stride + item.head * D;

  for (int tile = item.warp; tile < item.tiles; tile += shape.warps) { // of keys
    uint32_t keys[D / 16][4], values[D / 16][4];
    load_left<D>(keys, k, tile * kTile);
    load_left<D>(values, v, tile * kTile);
    float grad_k[D / 8][4] = {}, grad_v[D / 8][4] = {};
    for (int first = 0; first < item.length; first += kTile) { // of queries
      float s[2][4], p[2][4];
      dot_products<T, D>(p, keys, q, first);
      dot_products<T, D>(s, values, gradient, first);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const Pair l = *reinterpret_cast<const Pair*>(lse2 + first + 8 * n + column);
        const Pair d = *reinterpret_cast<const Pair*>(dot + first + 8 * n + column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          p[n][i] = ptx::exp2_fast(p[n][i] * scale2 - (i % 2 ? l.y : l.x));
          s[n][i] = p[n][i] * (s[n][i] - (i % 2 ? d.y : d.x));
        }
      }
      add_weighted<T, D>(grad_v, p, gradient, first);
      add_weighted<T, D>(grad_k, s, q, first);
    }
    const int count = item.length - tile * kTile;
    store_tile<T, D>(to + tile * kTile * stride + part, stride, count, grad_k, {scale, scale});
    store_tile<T, D>(to + tile * kTile * stride + 2 * part, stride, count, grad_v, {1, 1});
  }

  for (int tile = item.warp; tile < item.tiles; tile += shape.warps) { // of queries
    uint32_t queries[D / 16][4], gradients[D / 16][4];
    load_left<D>(queries, q, tile * kTile);
    load_left<D>(gradients, gradient, tile * kTile);
    const int top = tile * kTile + row;
    const float l[2] = {lse2[top], lse2[top + 8]}, d[2] = {dot[top], dot[top + 8]};
    float grad_q[D / 8][4] = {};
    for (int first = 0; first < item.length; first += kTile) { // of keys
      float s[2][4], p[2][4];
      dot_products<T, D>(p, queries, k, first);
      dot_products<T, D>(s, gradients, v, first);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float score = p[i / 4][i % 4] * scale2 - l[i % 4 / 2];
        const bool real = first + i / 4 * 8 + column + i % 2 < item.length; // else it may be infinite, times zero
        s[i / 4][i % 4] = real ? ptx::exp2_fast(score) * (s[i / 4][i % 4] - d[i % 4 / 2]) : 0;
      }
      add_weighted<T, D>(grad_q, s, k, first);
    }
    store_tile<T, D>(to + tile * kTile * stride, stride, item.length - tile * kTile, grad_q, {scale, scale});
  }
}

int check(const maskdiff_attention_input& in, bool whole_vectors) {
  if (in.dtype != MASKDIFF_BFLOAT16 && in.dtype != MASKDIFF_FLOAT16) return MASKDIFF_BAD_OPTION;
  if (in.width != 32 && in.width != 64) return MASKDIFF_BAD_OPTION;
  if (in.length < 0 || in.length > kMostRows || in.sequences < 0 || in.heads < 0) return MASKDIFF_BAD_RANGE;
  if (in.heads && in.sequences >= (int64_t{1} << 31) / in.heads) return MASKDIFF_BAD_RANGE;
  const int64_t strides = in.token_stride | in.part_stride | in.head_stride | (in.cu_seqlens ? 0 : in.sequence_stride);
  return whole_vectors && strides % 8 == 0 ? MASKDIFF_OK : MASKDIFF_BAD_RANGE;
}

bool whole(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector) == 0; }

bool nothing(const maskdiff_attention_input& in) { return in.tokens == 0 || in.sequences == 0 || in.heads == 0; }

template <class Kernel>
Kernel* choose(const maskdiff_attention_input& in, Kernel* bf16_64, Kernel* bf16_32, Kernel* fp16_64, Kernel* fp16_32) {
  if (in.dtype == MASKDIFF_BFLOAT16) return in.width == 64 ? bf16_64 : bf16_32;
  return in.width == 64 ? fp16_64 : fp16_32;
}

unsigned blocks(const maskdiff_attention_input& in, const Shape& shape) {
  return static_cast<unsigned>((in.sequences * in.heads + shape.items - 1) / shape.items);
}

} // namespace
} // namespace attention
} // namespace maskdiff

using namespace maskdiff;
using namespace maskdiff::attention;

int64_t maskdiff_cuda_attention_shared_bytes(int64_t width, int64_t length, int backward) {
  return static_cast<int64_t>(pool_bytes(shape_for(length), width, backward != 0));
}

int maskdiff_cuda_attention(const maskdiff_attention_input* input, float scale, void* out, float* lse, int device,
                            void* stream) {
  if (const int code = check(*input, whole(input->qkv) && whole(out))) return code;
  if (nothing(*input)) return MASKDIFF_OK;
  OnDevice here(device);
  const Shape shape = shape_for(input->length);
  const auto kernel = choose(*input, forward<Bf16, 64>, forward<Bf16, 32>, forward<Fp16, 64>, forward<Fp16, 32>);
  return launch(kernel, {blocks(*input, shape)}, shape.threads(), pool_bytes(shape, input->width, false), stream, *input,
                shape, scale * kLog2E, static_cast<uint16_t*>(out), lse);
}

int maskdiff_cuda_attention_backward(const maskdiff_attention_input* input, float scale, const void* out,
                                     const float* lse, const void* grad_out, int64_t grad_sequence_stride,
                                     int64_t grad_token_stride, void* grad_qkv, int device, void* stream) {
  const int64_t strides = grad_token_stride | (input->cu_seqlens ? 0 : grad_sequence_stride);
  const bool vectors = whole(input->qkv) && whole(out) && whole(grad_out) && whole(grad_qkv) && strides % 8 == 0;
  if (const int code = check(*input, vectors)) return code;
  if (nothing(*input)) return MASKDIFF_OK;
  OnDevice here(device);
  const Shape shape = shape_for(input->length);
  const auto kernel = choose(*input, backward<Bf16, 64>, backward<Bf16, 32>, backward<Fp16, 64>, backward<Fp16, 32>);
  return launch(kernel, {blocks(*input, shape)}, shape.threads(), pool_bytes(shape, input->width, true), stream, *input,
                shape, scale, static_cast<const uint16_t*>(out), lse, static_cast<const uint16_t*>(grad_out),
                grad_sequence_stride, grad_token_stride, static_cast<uint16_t*>(grad_qkv));
}
