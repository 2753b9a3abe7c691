// A dtype's numbers in memory, as vectors of floats; whole vectors, and what is left of a row behind the last whole one.
#pragma once

#include <string.h>

#include "common/floats.h"
#include "cpu/vector.h"

namespace maskdiff {
namespace ISA {
namespace {

template <int DTYPE>
struct Numbers {
  typedef uint16_t Number;
  static MASKDIFF_INLINE Vector load(const Number* from) {
    if (DTYPE == MASKDIFF_BFLOAT16) return of_bfloat16(*(const LooseHalves*)from);
    alignas(64) float x[WIDTH];
#pragma omp simd
    for (int i = 0; i < WIDTH; i++) x[i] = from_float16(from[i]);
    return maskdiff::ISA::load(x);
  }
  static MASKDIFF_INLINE void store(Number* to, Vector y) {
    if (DTYPE == MASKDIFF_BFLOAT16) {
      *(LooseHalves*)to = bfloat16_halves(y);
      return;
    }
    alignas(64) float x[WIDTH];
    maskdiff::ISA::store(x, y);
#pragma omp simd
    for (int i = 0; i < WIDTH; i++) to[i] = to_float16(x[i]);
  }
};

template <>
struct Numbers<MASKDIFF_FLOAT32> {
  typedef float Number;
  static MASKDIFF_INLINE Vector load(const Number* from) { return *(const LooseVector*)from; }
  static MASKDIFF_INLINE void store(Number* to, Vector y) { *(LooseVector*)to = y; }
};

template <int DTYPE>
using NumberOf = typename Numbers<DTYPE>::Number;

// WIDTH columns of a row.
struct Whole {
  template <class Of>
  MASKDIFF_INLINE Vector load(const typename Of::Number* from) const {
    return Of::load(from);
  }
  template <class Of>
  MASKDIFF_INLINE void store(typename Of::Number* to, Vector y) const {
    Of::store(to, y);
  }
  MASKDIFF_INLINE Vector keep(Vector x) const { return x; }
};

// The last `count` columns of a row, fewer than WIDTH: what stands behind them is neither read nor written.
struct Rest {
  int count;
  template <class Of>
  MASKDIFF_INLINE Vector load(const typename Of::Number* from) const {
    typename Of::Number part[WIDTH] = {};
    memcpy(part, from, (size_t)count * sizeof part[0]);
    return Of::load(part);
  }
  template <class Of>
  MASKDIFF_INLINE void store(typename Of::Number* to, Vector y) const {
    typename Of::Number part[WIDTH];
    Of::store(part, y);
    memcpy(to, part, (size_t)count * sizeof part[0]);
  }
  MASKDIFF_INLINE Vector keep(Vector x) const { return Vector(Integers(x) & (lanes() < count)); }
};

constexpr int STREAMS = 4;

// Calls body(i, part, stream) for i = 0, WIDTH, .. of a row: part is Whole, and Rest for the columns left behind the last
// whole vector, if any. Sums kept by stream, of which there are STREAMS, do not wait for one another.
template <class Body>
MASKDIFF_INLINE void by_vectors(int64_t columns, Body body) {
  int64_t i = 0;
  for (; i + STREAMS * WIDTH <= columns; i += STREAMS * WIDTH) {
#pragma GCC unroll 4
    for (int stream = 0; stream < STREAMS; stream++) body(i + stream * WIDTH, Whole{}, stream);
  }
  for (; i + WIDTH <= columns; i += WIDTH) body(i, Whole{}, 0);
  if (i < columns) body(i, Rest{(int)(columns - i)}, 0);
}

MASKDIFF_INLINE float sum(const Vector (&streams)[STREAMS]) {
  return sum((streams[0] + streams[1]) + (streams[2] + streams[3]));
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
