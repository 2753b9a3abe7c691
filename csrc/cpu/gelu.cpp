// gelu: x times the normal distribution's Phi(x), and its gradient together with the gradient's sums by column.
#include <stdlib.h>
#include <string.h>

#include "cpu/numbers.h"
#include "cpu/ops.h"
#include "cpu/threads.h"

namespace maskdiff {
namespace ISA {
namespace {

constexpr int64_t PIECE = 8192;  // elements that a thread takes at a time
constexpr int64_t ROWS = 64;     // at most so many are summed one after another, whatever the number of threads
constexpr int64_t BYTES_AHEAD = 2048;  // of what is read, memory is asked for
constexpr int GROUP = 4;         // vectors side by side: one alone would wait for each of its own results

// The normal distribution at a = |x|: its density is 0.39894228 exponential, what lies beyond a is exponential * tail.
struct Normal {
  Vector a, exponential, tail;
};

// The form of Zelen and Severo, Abramowitz and Stegun 26.2.17: a polynomial of t = 1 / (1 + p a) times the density. Their
// five terms leave an absolute error of 7.5e-8; these eight, of the least relative error, one of 1e-7 up to a = 8.
MASKDIFF_INLINE Normal normal(Vector x) {
  const Vector a = Vector(Words(x) & 0x7FFFFFFFu), t = reciprocal(1.0f + 0.3f * a);
  Vector y = 0.0374093354f * t - 0.16442439f;
  y = y * t + 0.218794167f;
  y = y * t - 0.0651380271f;
  y = y * t + 0.134624317f;
  y = y * t + 0.0980768949f;
  y = y * t + 0.121047392f;
  y = y * t + 0.119610325f;
  // exp2 ends at 2^-126: less that, it ends at 0
  return Normal{a, exp2(-0.72134752f * (a * a)) - 0x1p-126f, y * t};
}

// x Phi(x) = max(x, 0) - |x| (1 - Phi(|x|)): exact to a few roundings far out on both sides
MASKDIFF_INLINE Vector value(Vector x) {
  const Normal n = normal(x);
  return larger(splat(0.0f), x) - n.a * (n.exponential * n.tail);
}

// Phi(x) + x density(x), which at -x is 1 less what it is at x
MASKDIFF_INLINE Vector slope(Vector x) {
  const Normal n = normal(x);
  const Vector beyond = n.exponential * (0.39894228f * n.a - n.tail);  // of |x|: slope - 1
  const Integers negative = Integers(x) >> 31;
  return Vector(Integers(splat(1.0f)) & ~negative) + Vector(Words(beyond) ^ (Words(x) & 0x80000000u));
}

// What a group of vectors will be read from some groups later.
template <class Number>
MASKDIFF_INLINE void expect(const Number* x) {
  prefetch((const char*)x + BYTES_AHEAD, GROUP * WIDTH * sizeof(Number));
}

// y = gelu(x), COUNT vectors.
template <int DTYPE, int COUNT>
MASKDIFF_INLINE void forward_vectors(const NumberOf<DTYPE>* x, NumberOf<DTYPE>* y) {
  Vector values[COUNT];
#pragma GCC unroll 16
  for (int v = 0; v < COUNT; v++) values[v] = value(Numbers<DTYPE>::load(x + v * WIDTH));
#pragma GCC unroll 16
  for (int v = 0; v < COUNT; v++) Numbers<DTYPE>::store(y + v * WIDTH, values[v]);
}

template <int DTYPE>
void forward_piece(const NumberOf<DTYPE>* x, int64_t count, NumberOf<DTYPE>* y) {
  int64_t i = 0;
  for (; i + GROUP * WIDTH <= count; i += GROUP * WIDTH) {
    expect(x + i);
    forward_vectors<DTYPE, GROUP>(x + i, y + i);
  }
  for (; i + WIDTH <= count; i += WIDTH) forward_vectors<DTYPE, 1>(x + i, y + i);
  if (i == count) return;
  const size_t bytes = (size_t)(count - i) * sizeof(*x);
  NumberOf<DTYPE> part[WIDTH] = {};
  memcpy(part, x + i, bytes);
  forward_vectors<DTYPE, 1>(part, part);
  memcpy(y + i, part, bytes);
}

// out = grad times the slope at x, COUNT vectors; unrounded, it is added to sums where there are any.
template <int DTYPE, int COUNT>
MASKDIFF_INLINE void backward_vectors(const NumberOf<DTYPE>* x, const NumberOf<DTYPE>* grad, NumberOf<DTYPE>* out,
                                      float* sums) {
  Vector values[COUNT];
#pragma GCC unroll 16
  for (int v = 0; v < COUNT; v++) {
    values[v] = Numbers<DTYPE>::load(grad + v * WIDTH) * slope(Numbers<DTYPE>::load(x + v * WIDTH));
  }
#pragma GCC unroll 16
  for (int v = 0; v < COUNT; v++) {
    Numbers<DTYPE>::store(out + v * WIDTH, values[v]);
    if (sums) *(LooseVector*)(sums + v * WIDTH) += values[v];
  }
}

// sums: NULL, or room for `count` numbers, the last vector of them whole
template <int DTYPE>
MASKDIFF_INLINE void backward_piece(const NumberOf<DTYPE>* x, const NumberOf<DTYPE>* grad, int64_t count,
                                    NumberOf<DTYPE>* out, float* sums) {
  int64_t i = 0;
  for (; i + GROUP * WIDTH <= count; i += GROUP * WIDTH) {
    expect(x + i);
    expect(grad + i);
    backward_vectors<DTYPE, GROUP>(x + i, grad + i, out + i, sums ? sums + i : nullptr);
  }
  for (; i + WIDTH <= count; i += WIDTH) {
    backward_vectors<DTYPE, 1>(x + i, grad + i, out + i, sums ? sums + i : nullptr);
  }
  if (i == count) return;
  const size_t bytes = (size_t)(count - i) * sizeof(*x);
  NumberOf<DTYPE> part[WIDTH] = {}, gradients[WIDTH] = {};
  memcpy(part, x + i, bytes);
  memcpy(gradients, grad + i, bytes);
  backward_vectors<DTYPE, 1>(part, gradients, part, sums ? sums + i : nullptr);
  memcpy(out + i, part, bytes);
}

template <int DTYPE>
int forward(const void* x, int64_t count, void* out, int threads) {
  const NumberOf<DTYPE>* const from = (const NumberOf<DTYPE>*)x;
  NumberOf<DTYPE>* const to = (NumberOf<DTYPE>*)out;
#pragma omp parallel for schedule(static) num_threads(useful_threads(count, threads))
  for (int64_t first = 0; first < count; first += PIECE) {
    forward_piece<DTYPE>(from + first, count - first < PIECE ? count - first : PIECE, to + first);
  }
  return MASKDIFF_OK;
}

template <int DTYPE>
int backward(const void* x, const void* grad, int64_t count, void* out, int threads) {
  const NumberOf<DTYPE>*const from = (const NumberOf<DTYPE>*)x, *const incoming = (const NumberOf<DTYPE>*)grad;
  NumberOf<DTYPE>* const to = (NumberOf<DTYPE>*)out;
#pragma omp parallel for schedule(static) num_threads(useful_threads(count, threads))
  for (int64_t first = 0; first < count; first += PIECE) {
    const int64_t some = count - first < PIECE ? count - first : PIECE;
    backward_piece<DTYPE>(from + first, incoming + first, some, to + first, nullptr);
  }
  return MASKDIFF_OK;
}

// The same row by row, with the sums of the columns: of parts of at most ROWS rows, then of these, in order.
template <int DTYPE>
int backward_sums(const void* x, const void* grad, int64_t rows, int64_t columns, void* out, float* sums, int threads) {
  const NumberOf<DTYPE>*const from = (const NumberOf<DTYPE>*)x, *const incoming = (const NumberOf<DTYPE>*)grad;
  NumberOf<DTYPE>* const to = (NumberOf<DTYPE>*)out;
  const int64_t parts = (rows + ROWS - 1) / ROWS, stride = (columns + WIDTH - 1) / WIDTH * WIDTH;
  float* const partial = (float*)aligned_alloc(64, (size_t)(parts * stride + 16) * sizeof(float) / 64 * 64);
  if (!partial) return MASKDIFF_NO_MEMORY;
#pragma omp parallel num_threads(useful_threads(rows * columns, threads))
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
      float* const own = partial + part * stride;
      memset(own, 0, (size_t)stride * sizeof(float));
      for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
        const int64_t first = row * columns;
        backward_piece<DTYPE>(from + first, incoming + first, columns, to + first, own);
      }
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < columns; first += WIDTH) {
      Vector sum = {};
      for (int64_t part = 0; part < parts; part++) sum += load(partial + part * stride + first);
      memcpy(sums + first, &sum, (size_t)(columns - first < WIDTH ? columns - first : WIDTH) * sizeof(float));
    }
  }
  free(partial);
  return MASKDIFF_OK;
}

template <int DTYPE>
int any_backward(const void* x, const void* grad, int64_t rows, int64_t columns, void* out, float* sums, int threads) {
  return sums ? backward_sums<DTYPE>(x, grad, rows, columns, out, sums, threads)
              : backward<DTYPE>(x, grad, rows * columns, out, threads);
}

}  // namespace

int gelu(const void* x, int64_t count, int dtype, void* y, int threads) {
  switch (dtype) {
    case MASKDIFF_FLOAT32:
      return forward<MASKDIFF_FLOAT32>(x, count, y, threads);
    case MASKDIFF_BFLOAT16:
      return forward<MASKDIFF_BFLOAT16>(x, count, y, threads);
    case MASKDIFF_FLOAT16:
      return forward<MASKDIFF_FLOAT16>(x, count, y, threads);
    default:
      return MASKDIFF_BAD_OPTION;
  }
}

int gelu_backward(const void* x, const void* grad, int64_t rows, int64_t columns, int dtype, void* out, float* sums,
                  int threads) {
  switch (dtype) {
    case MASKDIFF_FLOAT32:
      return any_backward<MASKDIFF_FLOAT32>(x, grad, rows, columns, out, sums, threads);
    case MASKDIFF_BFLOAT16:
      return any_backward<MASKDIFF_BFLOAT16>(x, grad, rows, columns, out, sums, threads);
    case MASKDIFF_FLOAT16:
      return any_backward<MASKDIFF_FLOAT16>(x, grad, rows, columns, out, sums, threads);
    default:
      return MASKDIFF_BAD_OPTION;
  }
}

}  // namespace ISA
}  // namespace maskdiff
