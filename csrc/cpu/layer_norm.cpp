// layer_norm: rows brought to mean 0 and variance 1, then scaled and moved; in the backward pass all gradients at once.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/numbers.h"
#include "cpu/ops.h"
#include "cpu/threads.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr int64_t CHUNK = 64;  // at most so many rows are summed one after another, whatever the number of threads
constexpr int64_t ROWS_AHEAD = 2;  // of the one that is read, memory is asked for

typedef Numbers<MASKDIFF_FLOAT32> Floats;

// One row at a time, though sums of several side by side would wait less: then memory is read and written in few streams.
template <int DTYPE>
void forward_row(const maskdiff_layer_norm_input* n, float eps, int64_t row, void* out, void* summed,
                 float* statistics) {
  typedef Numbers<DTYPE> Of;
  typedef typename Of::Number Number;
  const Number *x = (const Number*)n->x + row * n->stride, *shift = (const Number*)n->shift;
  Number *y = (Number*)out + row * n->width, *total = (Number*)summed + row * n->width;
  prefetch(x + ROWS_AHEAD * n->stride, n->width * (int64_t)sizeof(Number));
  Vector totals[STREAMS] = {}, squares[STREAMS] = {};
  const Vector first = splat(Rest{1}.load<Of>(x)[0]);  // numbers alike have their mean to the bit, however large they are
  by_vectors(n->width, [&](int64_t i, auto part, int stream) MASKDIFF_INLINED {
    totals[stream] += part.keep(part.template load<Of>(x + i) - first);
  });
  const Vector mean = first + splat(sum(totals) / (float)n->width);
  by_vectors(n->width, [&](int64_t i, auto part, int stream) MASKDIFF_INLINED {
    const Vector centred = part.keep(part.template load<Of>(x + i) - mean);
    squares[stream] += centred * centred;
  });
  const Vector rstd = splat(1.0f / sqrtf(sum(squares) / (float)n->width + eps));
  by_vectors(n->width, [&](int64_t i, auto part, int) MASKDIFF_INLINED {
    const Vector weight = part.template load<Floats>(n->weight + i), bias = part.template load<Floats>(n->bias + i);
    const Vector values = part.template load<Of>(x + i);
    part.template store<Of>(y + i, (values - mean) * rstd * weight + bias);
    if (summed) part.template store<Of>(total + i, values + part.template load<Of>(shift + i));
  });
  if (statistics) statistics[row] = mean[0], statistics[n->rows + row] = rstd[0];
}

template <int DTYPE>
int forward(const maskdiff_layer_norm_input* n, float eps, void* out, void* summed, float* statistics, int threads) {
#pragma omp parallel for schedule(static) num_threads(useful_threads(n->rows * n->width, threads))
  for (int64_t row = 0; row < n->rows; row++) forward_row<DTYPE>(n, eps, row, out, summed, statistics);
  return MASKDIFF_OK;
}

// Adds the row's part of the gradients of weight, bias and shift to `sums`: three rows of `room` numbers.
template <int DTYPE, bool SUMMED>
void backward_row(const maskdiff_layer_norm_input* n, const maskdiff_layer_norm_gradients* g, int64_t row, float* sums,
                  int64_t room) {
  typedef Numbers<DTYPE> Of;
  typedef typename Of::Number Number;
  const Number* x = (const Number*)n->x + row * n->stride;
  const Number* grad_out = (const Number*)g->grad_out + row * g->grad_out_stride;
  const Number* grad_sum = (const Number*)g->grad_sum + row * g->grad_sum_stride;
  Number* grad_x = (Number*)g->grad_x + row * n->width;
  const Vector mean = splat(g->statistics[row]), rstd = splat(g->statistics[n->rows + row]);
  const int64_t bytes = n->width * (int64_t)sizeof(Number);
  prefetch(x + ROWS_AHEAD * n->stride, bytes);
  prefetch(grad_out + ROWS_AHEAD * g->grad_out_stride, bytes);
  if (SUMMED) prefetch(grad_sum + ROWS_AHEAD * g->grad_sum_stride, bytes);
  Vector plain[STREAMS] = {}, along[STREAMS] = {};
  by_vectors(n->width, [&](int64_t i, auto part, int stream) MASKDIFF_INLINED {
    const Vector weight = part.template load<Floats>(n->weight + i);
    const Vector scaled = part.template load<Of>(grad_out + i) * weight;
    plain[stream] += scaled;
    along[stream] += part.keep(scaled * ((part.template load<Of>(x + i) - mean) * rstd));
  });
  // what is taken from the gradient: its mean, and its part along the normalised row
  const Vector constant = splat(sum(plain) / (float)n->width), slope = splat(sum(along) / (float)n->width);
  by_vectors(n->width, [&](int64_t i, auto part, int) MASKDIFF_INLINED {
    const Vector normal = (part.template load<Of>(x + i) - mean) * rstd;
    const Vector incoming = part.template load<Of>(grad_out + i);
    const Vector scaled = incoming * part.template load<Floats>(n->weight + i);
    store(sums + i, load(sums + i) + incoming * normal);
    store(sums + room + i, load(sums + room + i) + incoming);
    Vector gradient = (scaled - (normal * slope + constant)) * rstd;
    if (SUMMED) {
      const Vector beside = part.template load<Of>(grad_sum + i);
      store(sums + 2 * room + i, load(sums + 2 * room + i) + beside);
      gradient += beside;
    }
    part.template store<Of>(grad_x + i, gradient);
  });
}

template <int DTYPE, bool SUMMED>
int backward(const maskdiff_layer_norm_input* n, const maskdiff_layer_norm_gradients* g, int threads) {
  constexpr int KINDS = SUMMED ? 3 : 2;
  const int64_t chunks = (n->rows + CHUNK - 1) / CHUNK, room = (n->width + 15) / 16 * 16;
  float* const partial = (float*)aligned_alloc(64, (size_t)(chunks * 3 * room + 16) * sizeof(float));
  if (!partial) return MASKDIFF_NO_MEMORY;
#pragma omp parallel num_threads(useful_threads(n->rows * n->width, threads))
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      float* const sums = partial + chunk * 3 * room;
      memset(sums, 0, (size_t)(3 * room) * sizeof(float));
      for (int64_t row = n->rows * chunk / chunks; row < n->rows * (chunk + 1) / chunks; row++) {
        backward_row<DTYPE, SUMMED>(n, g, row, sums, room);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < KINDS * room; i += WIDTH) {
      Vector total = {};
      for (int64_t chunk = 0; chunk < chunks; chunk++) total += load(partial + chunk * 3 * room + i);
      const int64_t kind = i / room, column = i % room, left = n->width - column;
      if (left <= 0) continue;
      const Rest rest = {(int)(left < WIDTH ? left : WIDTH)};
      if (kind == 2) rest.store<Numbers<DTYPE>>((typename Numbers<DTYPE>::Number*)g->grad_shift + column, total);
      else rest.store<Floats>((kind ? g->grad_bias : g->grad_weight) + column, total);
    }
  }
  free(partial);
  return MASKDIFF_OK;
}

template <int DTYPE>
int backward(const maskdiff_layer_norm_input* n, const maskdiff_layer_norm_gradients* g, int threads) {
  return g->grad_shift ? backward<DTYPE, true>(n, g, threads) : backward<DTYPE, false>(n, g, threads);
}

}  // namespace

int layer_norm(const maskdiff_layer_norm_input* n, float eps, void* out, void* summed, float* statistics, int threads) {
  switch (n->dtype) {
    case MASKDIFF_FLOAT32:
      return forward<MASKDIFF_FLOAT32>(n, eps, out, summed, statistics, threads);
    case MASKDIFF_BFLOAT16:
      return forward<MASKDIFF_BFLOAT16>(n, eps, out, summed, statistics, threads);
    case MASKDIFF_FLOAT16:
      return forward<MASKDIFF_FLOAT16>(n, eps, out, summed, statistics, threads);
    default:
      return MASKDIFF_BAD_OPTION;
  }
}

int layer_norm_backward(const maskdiff_layer_norm_input* n, const maskdiff_layer_norm_gradients* g, int threads) {
  switch (n->dtype) {
    case MASKDIFF_FLOAT32:
      return backward<MASKDIFF_FLOAT32>(n, g, threads);
    case MASKDIFF_BFLOAT16:
      return backward<MASKDIFF_BFLOAT16>(n, g, threads);
    case MASKDIFF_FLOAT16:
      return backward<MASKDIFF_FLOAT16>(n, g, threads);
    default:
      return MASKDIFF_BAD_OPTION;
  }
}

}  // namespace ISA
}  // namespace maskdiff
