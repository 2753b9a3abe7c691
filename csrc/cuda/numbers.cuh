// Numbers of any dtype by ones and fours, and the sum of a block: what the kernels that go through tensors element by
// element share.
#pragma once
#include "common/floats.h"
#include "cuda/launch.cuh"

namespace maskdiff {

// N numbers that a thread reads or writes at once.
template <int N>
struct alignas(4 * N) Floats {
  float x[N];
};
template <int N>
struct alignas(2 * N) Halves {
  uint16_t x[N];
};

template <int N>
DEVICE Floats<N> load(const float* from) {
  return *reinterpret_cast<const Floats<N>*>(from);
}
template <int N>
DEVICE void store(float* to, const Floats<N>& x) {
  *reinterpret_cast<Floats<N>*>(to) = x;
}

// Numbers i, i + 1, ... of a tensor of any dtype; with N = 4 they are aligned to 16 bytes (floats) or 8 (halves).
template <int N>
DEVICE Floats<N> load_numbers(const void* from, int dtype, int64_t i) {
  if (dtype == MASKDIFF_FLOAT32) return load<N>(static_cast<const float*>(from) + i);
  const auto halves = *reinterpret_cast<const Halves<N>*>(static_cast<const uint16_t*>(from) + i);
  Floats<N> x;
  for (int k = 0; k < N; k++)
    x.x[k] = dtype == MASKDIFF_BFLOAT16 ? ISA::from_bfloat16(halves.x[k]) : ptx::widen_fp16(halves.x[k]);
  return x;
}

DEVICE uint32_t pack(int dtype, float low, float high) {
  return dtype == MASKDIFF_BFLOAT16 ? ptx::pack_bf16(low, high) : ptx::pack_fp16(low, high);
}

struct alignas(8) TwoWords {
  uint32_t x, y;
};

// Four numbers to i, i + 1, ..., rounded to nearest even; aligned as load_numbers wants it.
DEVICE void store_four(void* to, int dtype, int64_t i, const Floats<4>& x) {
  if (dtype == MASKDIFF_FLOAT32) return store(static_cast<float*>(to) + i, x);
  *reinterpret_cast<TwoWords*>(static_cast<uint16_t*>(to) + i) = {pack(dtype, x.x[0], x.x[1]), pack(dtype, x.x[2], x.x[3])};
}

// Up to four numbers from i on, wherever they stand; those that are not there are 0.
DEVICE Floats<4> load_few(const void* from, int dtype, int64_t i, int count) {
  Floats<4> x = {};
  for (int k = 0; k < 4; k++)
    if (k < count) x.x[k] = load_numbers<1>(from, dtype, i + k).x[0];
  return x;
}
DEVICE void store_few(void* to, int dtype, int64_t i, int count, const Floats<4>& x) {
  for (int k = 0; k < 4; k++) {
    if (k >= count) break;
    if (dtype == MASKDIFF_FLOAT32) static_cast<float*>(to)[i + k] = x.x[k];
    else static_cast<uint16_t*>(to)[i + k] = static_cast<uint16_t>(pack(dtype, x.x[k], 0));
  }
}

DEVICE bool aligned(const void* pointer, unsigned bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether numbers of `dtype` can be taken by fours from where each of `steps` elements leads.
DEVICE bool by_fours(const void* pointer, int dtype, int64_t steps) {
  return aligned(pointer, dtype == MASKDIFF_FLOAT32 ? 16 : 8) && steps % 4 == 0;
}

// The sum of every thread's x, in one order; to all threads. A barrier must stand between two of them.
template <unsigned threads>
DEVICE double sum_of_block(double x) {
  SHARED(double, sums, threads);
  const unsigned thread = ptx::thread_x();
  sums[thread] = x;
  ptx::sync_block();
  for (unsigned other = threads / 2; other > 0; other /= 2) {
    if (thread < other) sums[thread] += sums[thread + other];
    ptx::sync_block();
  }
  return sums[0];
}

} // namespace maskdiff
