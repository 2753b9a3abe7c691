// The functions of csrc/cuda/ptx.cuh on the emulator: what the instructions mean. Included by emulator.h alone.
#pragma once
#include "common/floats.h"
#include "emulator.h"

namespace maskdiff {
namespace emulator {

struct Exchange { // a lane's part in a shuffle or vote
  uint32_t in, from, out;
};
EMULATOR void run_shuffle(void** slots) {
  for (unsigned l = 0; l < kWarp; l++) {
    Exchange* lane = static_cast<Exchange*>(slots[l]);
    lane->out = static_cast<Exchange*>(slots[lane->from])->in;
  }
}
EMULATOR void run_vote(void** slots) {
  uint32_t votes = 0;
  for (unsigned l = 0; l < kWarp; l++) votes |= static_cast<Exchange*>(slots[l])->in << l;
  for (unsigned l = 0; l < kWarp; l++) static_cast<Exchange*>(slots[l])->out = votes;
}
template <class T>
EMULATOR T shuffle_from(T value, unsigned lane, const char* what, int line) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  Exchange slot{0, lane, 0};
  __builtin_memcpy(&slot.in, &value, 4);
  meet(my_warp(), kWarp, what, line, &slot, run_shuffle);
  __builtin_memcpy(&value, &slot.out, 4);
  return value;
}

struct MatrixRow {
  uint16_t row[8];
  uint32_t out[4];
};
template <bool transposed>
EMULATOR void run_load_matrix(void** slots) {
  for (unsigned l = 0; l < kWarp; l++)
    for (unsigned i = 0; i < 4; i++) {
      uint32_t both = 0;
      for (unsigned h = 0; h < 2; h++) {
        unsigned r = transposed ? 2 * (l % 4) + h : l / 4, c = transposed ? l / 4 : 2 * (l % 4) + h;
        both |= static_cast<uint32_t>(static_cast<MatrixRow*>(slots[8 * i + r])->row[c]) << 16 * h;
      }
      static_cast<MatrixRow*>(slots[l])->out[i] = both;
    }
}
template <bool transposed>
EMULATOR void load_matrix(uint32_t (&r)[4], const void* row, const char* what, int line) {
  check_shared(row, what, line);
  IF_TSAN(__tsan_read_range(row, 16);)
  MatrixRow slot;
  __builtin_memcpy(slot.row, row, 16); // when this lane comes: nothing orders it after what other lanes do
  meet(my_warp(), kWarp, what, line, &slot, run_load_matrix<transposed>);
  for (unsigned i = 0; i < 4; i++) r[i] = slot.out[i];
}

struct Product {
  const uint32_t *a, *b;
  float* d;
};
template <bool bf16>
EMULATOR void run_mma(void** slots) {
  float a[16][16], b[16][8];
  auto half = [](uint32_t both, unsigned h) {
    uint16_t bits = static_cast<uint16_t>(both >> 16 * h);
    return bf16 ? ISA::from_bfloat16(bits) : ISA::from_float16(bits);
  };
  for (unsigned l = 0; l < kWarp; l++) {
    const Product& p = *static_cast<Product*>(slots[l]);
    unsigned g = l / 4, c = 2 * (l % 4);
    for (unsigned h = 0; h < 2; h++) {
      for (unsigned i = 0; i < 4; i++) a[g + 8 * (i % 2)][c + h + 8 * (i / 2)] = half(p.a[i], h);
      for (unsigned i = 0; i < 2; i++) b[c + h + 8 * i][g] = half(p.b[i], h);
    }
  }
  for (unsigned l = 0; l < kWarp; l++) {
    float* d = static_cast<Product*>(slots[l])->d;
    for (unsigned i = 0; i < 4; i++)
      for (unsigned k = 0; k < 16; k++) d[i] += a[l / 4 + 8 * (i / 2)][k] * b[k][2 * (l % 4) + i % 2];
  }
}

EMULATOR void issue_copy(void* to, const void* from, int line) {
  Fiber& f = *self;
  check_shared(to, "copy_async16", line);
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("copy_async16, line %d: source not 16-byte aligned", line);
  if (f.copies == kMaxCopies) fail("copy_async16, line %d: %u copies open", line, kMaxCopies);
  const uint64_t nan[2] = {~0ull, ~0ull}; // until the wait, nobody can count on the old bytes or on the new
  IF_TSAN(__tsan_write_range(to, 16);)
  __builtin_memcpy(to, nan, 16);
  f.copy[f.copies++] = {to, from, f.group};
}
EMULATOR void finish_copies(unsigned open_groups) {
  Fiber& f = *self;
  unsigned kept = 0;
  for (unsigned i = 0; i < f.copies; i++) {
    Copy copy = f.copy[i];
    if (copy.group + open_groups >= f.group) {
      f.copy[kept++] = copy;
      continue;
    }
    IF_TSAN(if (copy.from) __tsan_read_range(copy.from, 16); __tsan_write_range(copy.to, 16);)
    uint64_t bytes[2] = {0, 0};
    if (copy.from) __builtin_memcpy(bytes, copy.from, 16);
    __builtin_memcpy(copy.to, bytes, 16);
  }
  f.copies = kept;
}

EMULATOR void check_aligned(const void* at, size_t bytes, const char* what, int line) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("%s, line %d: not %zu-byte aligned", what, line, bytes);
}

} // namespace emulator

namespace ptx {
#define HERE int line = __builtin_LINE()

struct Pool {
  unsigned taken = 0;
  template <class T>
  EMULATOR T* take(int n) {
    return static_cast<T*>(emulator::pool_array(taken++, sizeof(T) * static_cast<size_t>(n)));
  }
};
EMULATOR unsigned thread_x() { return emulator::self->thread; }
EMULATOR unsigned threads() { return emulator::block->threads; }
EMULATOR unsigned block_x() { return emulator::block->x; }
EMULATOR unsigned block_y() { return emulator::block->y; }
EMULATOR unsigned blocks_x() { return emulator::block->grid_x; }
EMULATOR void sync_block(HERE) { emulator::barrier(emulator::block->meeting, emulator::block->threads, "sync_block", line); }
EMULATOR void sync_warp(HERE) { emulator::barrier(emulator::my_warp(), emulator::kWarp, "sync_warp", line); }
template <class T>
EMULATOR T shuffle(T value, unsigned lane, HERE) {
  return emulator::shuffle_from(value, lane % emulator::kWarp, "shuffle", line);
}
template <class T>
EMULATOR T shuffle_xor(T value, unsigned bits, HERE) {
  return emulator::shuffle_from(value, (emulator::self->thread ^ bits) % emulator::kWarp, "shuffle_xor", line);
}
template <class T>
EMULATOR T shuffle_up(T value, unsigned distance, HERE) {
  unsigned lane = emulator::self->thread % emulator::kWarp;
  return emulator::shuffle_from(value, lane < distance ? lane : lane - distance, "shuffle_up", line);
}
template <class T>
EMULATOR T shuffle_down(T value, unsigned distance, HERE) {
  unsigned lane = emulator::self->thread % emulator::kWarp;
  return emulator::shuffle_from(value, lane + distance >= emulator::kWarp ? lane : lane + distance, "shuffle_down", line);
}
EMULATOR uint32_t vote(bool yes, HERE) {
  emulator::Exchange slot{yes, 0, 0};
  emulator::meet(emulator::my_warp(), emulator::kWarp, "vote", line, &slot, emulator::run_vote);
  return slot.out;
}
EMULATOR bool last_to_arrive(uint32_t* counter, uint32_t blocks) {
  IF_TSAN(__tsan_release(counter);)
  uint32_t before = __atomic_load_n(counter, __ATOMIC_RELAXED), after;
  do after = before >= blocks - 1 ? 0 : before + 1;
  while (!__atomic_compare_exchange_n(counter, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  IF_TSAN(__tsan_acquire(counter);)
  return before == blocks - 1;
}
EMULATOR void load_matrix_x4(uint32_t (&r)[4], const void* row, HERE) {
  emulator::load_matrix<false>(r, row, "load_matrix_x4", line);
}
EMULATOR void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row, HERE) {
  emulator::load_matrix<true>(r, row, "load_matrix_x4_transposed", line);
}
EMULATOR void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HERE) {
  emulator::Product slot{a, b, d};
  emulator::meet(emulator::my_warp(), emulator::kWarp, "mma_bf16", line, &slot, emulator::run_mma<true>);
}
EMULATOR void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HERE) {
  emulator::Product slot{a, b, d};
  emulator::meet(emulator::my_warp(), emulator::kWarp, "mma_fp16", line, &slot, emulator::run_mma<false>);
}
EMULATOR void copy_async16(void* shared, const void* global, bool valid = true, HERE) {
  emulator::issue_copy(shared, valid ? global : nullptr, line);
}
EMULATOR void copy_commit() { emulator::self->group++; }
template <int N>
EMULATOR void copy_wait() {
  emulator::finish_copies(N);
}
template <class T>
EMULATOR const T& whole(const void* at, HERE) {
  emulator::check_aligned(at, sizeof(T), "whole", line);
  return *static_cast<const T*>(at);
}
template <int N>
EMULATOR void store_words(void* to, const uint32_t (&x)[N], HERE) {
  emulator::check_aligned(to, sizeof x, "store_words", line);
  IF_TSAN(__tsan_write_range(to, sizeof x);)
  __builtin_memcpy(to, x, sizeof x);
}
EMULATOR float exp2_fast(float x) {
  float y = std::exp2(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  return y < 0x1p-126f ? 0.0f : y;
}
EMULATOR uint32_t pack_bf16(float low, float high) { // a GPU has one NaN
  uint32_t l = low != low ? 0x7FFF : ISA::to_bfloat16(low), h = high != high ? 0x7FFF : ISA::to_bfloat16(high);
  return l | h << 16;
}
EMULATOR uint32_t pack_fp16(float low, float high) {
  uint32_t l = low != low ? 0x7FFF : ISA::to_float16(low), h = high != high ? 0x7FFF : ISA::to_float16(high);
  return l | h << 16;
}
EMULATOR float widen_fp16(uint16_t half) { return ISA::from_float16(half); }
#undef HERE

} // namespace ptx
} // namespace maskdiff
