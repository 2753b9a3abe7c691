// Vectors of floats, by GCC's vector extensions: one source for every instruction set.
#pragma once

#include <stdint.h>

#include "cpu/flags.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define MASKDIFF_INLINED __attribute__((always_inline))
#define MASKDIFF_INLINE MASKDIFF_INLINED inline

namespace maskdiff {
namespace ISA {
namespace {  // internal linkage for the templates too: copies for two processors must never be merged by the linker

#if !defined(MASKDIFF_WIDTH)  // else a test's: wider vectors than the processor has
#if defined(__AVX512F__)
#define MASKDIFF_WIDTH 16
#elif defined(__AVX__)
#define MASKDIFF_WIDTH 8
#else
#define MASKDIFF_WIDTH 4
#endif
#endif

constexpr int WIDTH = MASKDIFF_WIDTH;

typedef float Vector __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), may_alias));
typedef uint16_t WideHalves __attribute__((vector_size(4 * WIDTH), may_alias));
typedef Vector LooseVector __attribute__((aligned(4)));
typedef Halves LooseHalves __attribute__((aligned(2)));
typedef WideHalves LooseWideHalves __attribute__((aligned(2)));

typedef float Word __attribute__((may_alias));  // 32 bits of whatever

// Asks for memory that will be read soon, into the second cache. Any address may be asked for. Processors look ahead by
// themselves too, but not all of them far enough: measured on an Intel Xeon, in docs/notebook.md.
MASKDIFF_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch((const char*)from + offset, 0, 2);
}

MASKDIFF_INLINE Vector load(const float* from) { return *(const Vector*)from; }
MASKDIFF_INLINE void store(float* to, Vector x) { *(Vector*)to = x; }

MASKDIFF_INLINE Vector splat(Word x) {  // moves bits: they need not be a number
#if MASKDIFF_WIDTH == 16
  return Vector{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif MASKDIFF_WIDTH == 8
  return Vector{x, x, x, x, x, x, x, x};
#else
  return Vector{x, x, x, x};
#endif
}

MASKDIFF_INLINE Vector select(Integers where, Vector yes, Vector no) { return where ? yes : no; }

MASKDIFF_INLINE Vector larger(Vector x, Vector y) {  // y where one of them is NaN
#if MASKDIFF_WIDTH == 16 && defined(__AVX512F__)
  return (Vector)_mm512_maskz_max_ps(0xFFFF, (__m512)x, (__m512)y);  // unmasked, GCC 12's own header warns
#elif MASKDIFF_WIDTH == 8 && defined(__AVX__)
  return (Vector)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return select(x > y, x, y);
#endif
}

// 1 / x for normal numbers whose reciprocal is one too, to a rounding or two.
MASKDIFF_INLINE Vector reciprocal(Vector x) {
#if MASKDIFF_WIDTH == 16 && defined(__AVX512F__)
  const Vector y = (Vector)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);  // to 14 bits, in a fraction of a division's time
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// Rounded to bfloat16, to nearest even; NaN stays NaN. With AVX-512-BF16 subnormal numbers become 0.
MASKDIFF_INLINE Halves bfloat16_halves(Vector x) {
#if MASKDIFF_WIDTH == 16 && defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = Words(x), rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(Words(select(x == x, Vector(rounded), Vector(bits >> 16 | 0x40u))), Halves);
#endif
}

MASKDIFF_INLINE Vector of_bfloat16(Halves x) {
#if MASKDIFF_WIDTH == 16 && defined(__AVX512F__)
  return Vector(Words(_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)x)) << 16);  // convertvector goes by halves
#elif MASKDIFF_WIDTH == 8 && defined(__AVX2__)
  return Vector(Words(_mm256_cvtepu16_epi32((__m128i)x)) << 16);
#else
  return Vector(__builtin_convertvector(x, Words) << 16);
#endif
}

MASKDIFF_INLINE Integers lanes() {
  Integers lane = {};
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++) lane[i] = i;
  return lane;
}

// The same of two vectors, one after another.
MASKDIFF_INLINE WideHalves bfloat16_halves(Vector first, Vector second) {
#if MASKDIFF_WIDTH == 16 && defined(__AVX512BF16__)
  return (WideHalves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  union {
    Halves parts[2];
    WideHalves whole;
  } both = {{bfloat16_halves(first), bfloat16_halves(second)}};
  return both.whole;
#endif
}

// A line of memory, 64 bytes at a multiple of them, written without being read first and kept in no cache. Other threads
// see it after finish_stores_past_caches.
MASKDIFF_INLINE void store_past_caches(void* to, WideHalves x) {
#if MASKDIFF_WIDTH == 16 && defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)x);
#else
  *(WideHalves*)to = x;
#endif
}

MASKDIFF_INLINE void finish_stores_past_caches() {
#if MASKDIFF_WIDTH == 16 && defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <int DISTANCE>
MASKDIFF_INLINE Vector exchange(Vector x) {
  return __builtin_shuffle(x, lanes() ^ DISTANCE);
}

MASKDIFF_INLINE float sum(Vector x) {
  if (WIDTH > 8) x += exchange<8 % WIDTH>(x);
  if (WIDTH > 4) x += exchange<4 % WIDTH>(x);
  x += exchange<2>(x);
  return x[0] + x[1];
}

MASKDIFF_INLINE float maximum(Vector x) {
  if (WIDTH > 8) x = larger(x, exchange<8 % WIDTH>(x));
  if (WIDTH > 4) x = larger(x, exchange<4 % WIDTH>(x));
  x = larger(x, exchange<2>(x));
  return x[0] > x[1] ? x[0] : x[1];
}

// 2^x for x up to 127, at least 2^-126. NaN stays NaN. Polynomial: Cephes, exp2f; relative error below 2e-7.
MASKDIFF_INLINE Vector exp2(Vector x) {
  x = larger(splat(-126.0f), x);
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum holds x, rounded, in its low bits
  const Vector part = x - (shifted - 12582912.0f);
  Vector y = 1.535336188319500e-4f * part + 1.339887440266574e-3f;
  y = y * part + 9.618437357674640e-3f;
  y = y * part + 5.550332471162809e-2f;
  y = y * part + 2.402264791363012e-1f;
  y = y * part + 6.931472028550421e-1f;
  y = y * part + 1.0f;
  return Vector(Words(y) + (Words(shifted) << 23));
}

// The natural logarithm of normal positive numbers; NaN stays NaN. Polynomial: Cephes, logf.
MASKDIFF_INLINE Vector log(Vector x) {
  const Integers exponent = Integers(Words(x) - 0x3F3504F3u) >> 23;  // leaves a mantissa in [sqrt(1/2), sqrt(2))
  const Vector part = Vector(Words(x) - (Words(exponent) << 23)) - 1.0f, square = part * part;
  Vector y = 7.0376836292e-2f * part - 1.1514610310e-1f;
  y = y * part + 1.1676998740e-1f;
  y = y * part - 1.2420140846e-1f;
  y = y * part + 1.4249322787e-1f;
  y = y * part - 1.6668057665e-1f;
  y = y * part + 2.0000714765e-1f;
  y = y * part - 2.4999993993e-1f;
  y = y * part + 3.3333331174e-1f;
  const Vector count = __builtin_convertvector(exponent, Vector);
  y = part * square * y - 2.12194440e-4f * count - 0.5f * square;
  return select(x == x, (part + y) + 0.693359375f * count, x);
}

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
