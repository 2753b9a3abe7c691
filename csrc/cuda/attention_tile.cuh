// What attention's kernels are made of: rows of D elements in shared memory, and products of tiles of 16 x 16 by a warp.
//
// A lane's place in a fragment, everywhere: row g = lane / 4 (and g + 8), columns c = 2 (lane % 4) and c + 1 (ptx.cuh).
#pragma once
#include "common/floats.h"
#include "cuda/launch.cuh"

namespace maskdiff {
namespace attention {

constexpr int kTile = 16;

struct Bf16 {
  static DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_bf16(d, a, b); }
  static DEVICE uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }
  static DEVICE float widen(uint32_t half) { return ISA::from_bfloat16(static_cast<uint16_t>(half)); }
};
struct Fp16 {
  static DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_fp16(d, a, b); }
  static DEVICE uint32_t pack(float low, float high) { return ptx::pack_fp16(low, high); }
  static DEVICE float widen(uint32_t half) { return ptx::widen_fp16(static_cast<uint16_t>(half)); }
};

struct alignas(16) Vector { // what a lane reads or writes at once: 8 elements
  uint32_t word[4];
};
struct alignas(8) Pair {
  float x, y;
};

DEVICE int lane() { return static_cast<int>(ptx::thread_x() % 32); }

// Where 8 elements of a row stand: rows are dense, but the vectors within 128 bytes trade places by the row's number, so
// that the same column of 8 rows lies in 8 different groups of banks.
template <int D>
DEVICE uint16_t* place(uint16_t* rows, int row, int vector) {
  return rows + row * D + (vector ^ (row / (64 / D) % (D / 8))) * 8;
}

// The address that this lane gives to load a 16 x 16 tile as four matrices: [0] rows 0-7, [1] rows 8-15 of the first eight
// columns, [2] and [3] of the others.
template <int D>
DEVICE const uint16_t* tile_row(const uint16_t* rows, int first_row, int column_tile) {
  return place<D>(const_cast<uint16_t*>(rows), first_row + lane() % 16, 2 * column_tile + lane() / 16);
}

// 16 rows as left factors.
template <int D>
DEVICE void load_left(uint32_t (&a)[D / 16][4], const uint16_t* rows, int first_row) {
  for (int k = 0; k < D / 16; k++) ptx::load_matrix_x4(a[k], tile_row<D>(rows, first_row, k));
}

// s [16, 16] = a times the transpose of 16 rows: every dot product of a row of a with one of those.
template <class T, int D>
DEVICE void dot_products(float (&s)[2][4], const uint32_t (&a)[D / 16][4], const uint16_t* rows, int first_row) {
  for (int i = 0; i < 4; i++) s[0][i] = s[1][i] = 0;
  for (int k = 0; k < D / 16; k++) {
    uint32_t r[4];
    ptx::load_matrix_x4(r, tile_row<D>(rows, first_row, k));
    T::multiply(s[0], a[k], {r[0], r[2]});
    T::multiply(s[1], a[k], {r[1], r[3]});
  }
}

// sum [16, D] += weights [16, 16], rounded, times 16 rows.
template <class T, int D>
DEVICE void add_weighted(float (&sum)[D / 8][4], const float (&weights)[2][4], const uint16_t* rows, int first_row) {
  uint32_t a[4];
  for (int i = 0; i < 4; i++) a[i] = T::pack(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
  for (int j = 0; j < D / 16; j++) {
    uint32_t r[4];
    ptx::load_matrix_x4_transposed(r, tile_row<D>(rows, first_row, j));
    T::multiply(sum[2 * j], a, {r[0], r[1]});
    T::multiply(sum[2 * j + 1], a, {r[2], r[3]});
  }
}

// Writes factor[h] times row g + 8 h of sum, for the first `count` of the 16 rows. A lane has two columns of every eight:
// four lanes trade them, so that each writes 16 bytes.
template <class T, int D>
DEVICE void store_tile(uint16_t* to, int64_t stride, int count, const float (&sum)[D / 8][4], const float (&factor)[2]) {
  const int row = lane() / 4, q = lane() % 4;
  for (int h = 0; h < 2; h++)
    for (int j = 0; j < D / 8; j += 4) {
      Vector v;
      for (int i = 0; i < 4; i++) v.word[i] = T::pack(sum[j + i][2 * h] * factor[h], sum[j + i][2 * h + 1] * factor[h]);
      for (int bit = 1; bit <= 2; bit *= 2) // transposes the words of four lanes
        for (int i = 0; i < 4; i++) {
          if (i & bit) continue;
          const uint32_t got = ptx::shuffle_xor(q & bit ? v.word[i] : v.word[i + bit], static_cast<unsigned>(bit));
          (q & bit ? v.word[i] : v.word[i + bit]) = got;
        }
      if (row + 8 * h < count) *reinterpret_cast<Vector*>(to + (row + 8 * h) * stride + (j + q) * 8) = v;
    }
}


} // namespace attention
} // namespace maskdiff
