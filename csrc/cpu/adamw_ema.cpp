// adamw_ema: AdamW, averages and the low-precision copy in one pass, after one over the gradients for their norm.
#include <stdlib.h>

#include "common/adamw.h"
#include "cpu/convert.h"
#include "cpu/ops.h"
#include "cpu/threads.h"
#include "cpu/vector.h"

namespace maskdiff {
namespace ISA {

constexpr int64_t CHUNK = 16384;  // elements of the flat buffers whose squares make one partial sum
constexpr int WINDOW = 128;       // elements updated at a time, so that reading and writing mix: docs/notebook.md, AMX
constexpr int STREAMS = 4;        // read side by side: one alone does not keep a core's memory port busy
constexpr int SPAN = 4096;        // elements whose squares are summed at a time

// Calls body(segment, position in the flat buffers, count, gradients) for all elements of a chunk, at most MOST at a time.
template <int MOST, class Body>
static inline void walk(const maskdiff_adamw* a, int64_t chunk, Body body) {
  const int64_t begin = chunk * CHUNK, end = begin + CHUNK;
  int64_t s = 0, after = a->segments;
  while (s < after) {  // the first segment that ends behind `begin`
    const int64_t middle = (s + after) / 2;
    if (a->offsets[middle] + a->sizes[middle] > begin) after = middle;
    else s = middle + 1;
  }
  alignas(64) float buffer[MOST];
  for (; s < a->segments && a->offsets[s] < end; s++) {
    const int64_t offset = a->offsets[s], last = offset + a->sizes[s] < end ? offset + a->sizes[s] : end;
    for (int64_t at = offset > begin ? offset : begin; at < last; at += MOST) {
      const int count = (int)(last - at < MOST ? last - at : MOST);
      const float* gradients = (const float*)a->grads[s] + (at - offset);
      if (a->grad_dtypes[s] != MASKDIFF_FLOAT32) {
        load_floats(a->grads[s], (int)a->grad_dtypes[s], at - offset, count, buffer);
        gradients = buffer;
      }
      body(s, at, count, gradients);
    }
  }
}

// The sum of the squares of SPAN numbers, in one order on every processor: 16 lanes a stream, then halves of them.
static inline double sum_of_squares(const float* x) {
  constexpr int LANES = 16, VECTORS = LANES / WIDTH;
  Vector sums[STREAMS * VECTORS] = {};
  for (int i = 0; i < SPAN / STREAMS; i += LANES) {
#pragma GCC unroll 16
    for (int v = 0; v < STREAMS * VECTORS; v++) {
      const Vector y = *(const LooseVector*)(x + v / VECTORS * (SPAN / STREAMS) + i + v % VECTORS * WIDTH);
      sums[v] += y * y;
    }
  }
  alignas(64) float lanes[STREAMS * LANES];
#pragma GCC unroll 16
  for (int v = 0; v < STREAMS * VECTORS; v++) store(lanes + v * WIDTH, sums[v]);
  for (int left = STREAMS * LANES / 2; left >= 8; left /= 2) {
    for (int i = 0; i < left; i++) lanes[i] += lanes[i + left];
  }
  double sum = 0.0;
  for (int i = 0; i < 8; i++) sum += (double)lanes[i];
  return sum;
}

static double squares(const maskdiff_adamw* a, int64_t chunk) {
  double sum = 0.0;
  walk<SPAN>(a, chunk, [&](int64_t, int64_t, int count, const float* gradients) {
    if (count == SPAN) {
      sum += sum_of_squares(gradients);
      return;
    }
    alignas(64) float padded[SPAN] = {};
    for (int i = 0; i < count; i++) padded[i] = gradients[i];
    sum += sum_of_squares(padded);
  });
  return sum;
}

// Averages that are not due are neither read nor written.
template <bool DUE>
static void update(const maskdiff_adamw* a, const AdamFactors& factors, int64_t chunk) {
  walk<WINDOW>(a, chunk, [&](int64_t segment, int64_t at, int count, const float* gradients) {
    const AdamFactors f = factors;
    const float keep = f.keep[a->decays[segment]], to_ema = f.to_ema[0], to_ema2 = f.to_ema[1];
    float *master = a->master + at, *exp_avg = a->exp_avg + at, *exp_avg_sq = a->exp_avg_sq + at, *ema = a->ema + at;
#pragma omp simd
    for (int i = 0; i < count; i++) {
      const AdamElement x = adamw(f, keep, gradients[i], {master[i], exp_avg[i], exp_avg_sq[i]});
      master[i] = x.master, exp_avg[i] = x.exp_avg, exp_avg_sq[i] = x.exp_avg_sq;
      if (DUE) ema[i] += to_ema * (x.master - ema[i]);
    }
    if (DUE && a->ema2) {
      float* ema2 = a->ema2 + at;
#pragma omp simd
      for (int i = 0; i < count; i++) ema2[i] += to_ema2 * (master[i] - ema2[i]);
    }
    const int64_t low = a->low_size - at;
    if (low > 0) store_floats(a->low, (int)a->low_dtype, at, (int)(low < count ? low : count), master);
  });
}

int adamw_ema(const maskdiff_adamw* a, const maskdiff_adamw_numbers* numbers, float* norm, float* skipped,
              int threads) {
  int64_t size = 0;
  for (int64_t s = 0; s < a->segments; s++) {
    if (!is_dtype((int)a->grad_dtypes[s])) return MASKDIFF_BAD_OPTION;
    size = a->offsets[s] + a->sizes[s];
  }
  if (!is_dtype((int)a->low_dtype) || numbers->ema_every < 1) return MASKDIFF_BAD_OPTION;
  const int64_t chunks = (size + CHUNK - 1) / CHUNK;
  const int parts = useful_threads(size, threads);
  double* sums = (double*)malloc((size_t)(chunks + 1) * sizeof(double));
  if (!sums) return MASKDIFF_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int part = 0; part < parts; part++) {
    for (int64_t c = chunks * part / parts; c < chunks * (part + 1) / parts; c++) sums[c] = squares(a, c);
  }
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; c++) sum += sums[c];
  free(sums);
  const bool finite = finite_norm(sum, norm);
  *skipped = finite ? 0.0f : 1.0f;
  if (!finite) return MASKDIFF_OK;
  const AdamFactors factors = adam_factors(*numbers, a->hyper[0], a->hyper[1], *norm, *a->adam_step, *a->ema_step);
  const auto update_chunk = factors.to_ema[0] != 0.0f ? update<true> : update<false>;
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int part = 0; part < parts; part++) {  // backwards: the gradients that were read last are still in a cache
    for (int64_t c = chunks * (part + 1) / parts - 1; c >= chunks * part / parts; c--) update_chunk(a, factors, c);
  }
  *a->adam_step += 1.0f;
  *a->ema_step += 1.0f;
  return MASKDIFF_OK;
}

}  // namespace ISA
}  // namespace maskdiff
