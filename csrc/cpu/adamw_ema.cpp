// adamw_ema: AdamW, averages and the low-precision copy in one pass, after one over the gradients for their norm.
#include <stdlib.h>

#include "common/adamw.h"
#include "cpu/convert.h"
#include "cpu/ops.h"
#include "cpu/threads.h"

namespace maskdiff {
namespace ISA {

constexpr int64_t CHUNK = 16384;  // elements of the flat buffers whose squares make one partial sum
constexpr int WINDOW = 512;       // elements worked on at a time: their arrays stay in the first-level cache

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

// Calls body(segment, position in the flat buffers, count, gradients) for all elements of a chunk, window by window.
template <class Body>
static inline void walk(const maskdiff_adamw* a, int64_t chunk, Body body) {
  const int64_t begin = chunk * CHUNK, end = begin + CHUNK;
  int64_t s = 0, after = a->segments;
  while (s < after) {  // the first segment that ends behind `begin`
    const int64_t middle = (s + after) / 2;
    if (a->offsets[middle] + a->sizes[middle] > begin) after = middle;
    else s = middle + 1;
  }
  alignas(64) float buffer[WINDOW];
  for (; s < a->segments && a->offsets[s] < end; s++) {
    const int64_t offset = a->offsets[s], last = offset + a->sizes[s] < end ? offset + a->sizes[s] : end;
    for (int64_t at = offset > begin ? offset : begin; at < last; at += WINDOW) {
      const int count = (int)(last - at < WINDOW ? last - at : WINDOW);
      const float* gradients = (const float*)a->grads[s] + (at - offset);
      if (a->grad_dtypes[s] != MASKDIFF_FLOAT32) {
        load_floats(a->grads[s], (int)a->grad_dtypes[s], at - offset, count, buffer);
        gradients = buffer;
      }
      body(s, at, count, gradients);
    }
  }
}

// The sum of the squares of a chunk's gradients, in one order on every processor: 16 lanes whatever its vectors are.
static double squares(const maskdiff_adamw* a, int64_t chunk) {
  double sum = 0.0;
  walk(a, chunk, [&](int64_t, int64_t, int count, const float* gradients) {
    Lanes lanes = {};
    int i = 0;
    for (; i + 16 <= count; i += 16) {
      const Lanes x = *(const Lanes*)(gradients + i);
      lanes += x * x;
    }
    for (int lane = 0; i < count; i++, lane++) lanes[lane] += gradients[i] * gradients[i];
    for (int lane = 0; lane < 16; lane++) sum += (double)lanes[lane];
  });
  return sum;
}

static void update(const maskdiff_adamw* a, const AdamFactors& factors, int64_t chunk) {
  walk(a, chunk, [&](int64_t segment, int64_t at, int count, const float* gradients) {
    const AdamFactors f = factors;
    const float keep = f.keep[a->decays[segment]], to_ema = f.to_ema[0], to_ema2 = f.to_ema[1];
    float *master = a->master + at, *exp_avg = a->exp_avg + at, *exp_avg_sq = a->exp_avg_sq + at, *ema = a->ema + at;
#pragma omp simd
    for (int i = 0; i < count; i++) {
      const AdamElement x = adamw(f, keep, gradients[i], {master[i], exp_avg[i], exp_avg_sq[i]});
      master[i] = x.master, exp_avg[i] = x.exp_avg, exp_avg_sq[i] = x.exp_avg_sq;
      ema[i] += to_ema * (x.master - ema[i]);
    }
    if (a->ema2) {
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
  if (!is_dtype((int)a->low_dtype)) return MASKDIFF_BAD_OPTION;
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
#pragma omp parallel for schedule(static) num_threads(parts)
  for (int part = 0; part < parts; part++) {  // backwards: the gradients that were read last are still in a cache
    for (int64_t c = chunks * (part + 1) / parts - 1; c >= chunks * part / parts; c--) update(a, factors, c);
  }
  *a->adam_step += 1.0f;
  *a->ema_step += 1.0f;
  return MASKDIFF_OK;
}

}  // namespace ISA
}  // namespace maskdiff
