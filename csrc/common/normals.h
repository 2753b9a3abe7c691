// Standard normals from words, by Box-Muller with the angle reduced by exact quadrants. No branch and no call: the
// functions vectorise. Only additions, products and square roots that IEEE 754 fixes are used (build without contraction),
// so that every processor gives the same bits. Error against exact arithmetic: |dz| <= 4 * 2^-23 * max(1, |z|).
#pragma once

#include "portable.h"

namespace maskdiff {
namespace ISA {

struct Pair {
  float x, y;
};

// -ln(m * 2^-24) for a whole number m in [1, 2^24]. Polynomial: Cephes logf (Moshier, 1989).
MASKDIFF_HD float minus_log_fraction(uint32_t m) {
  const uint32_t bits = bits_of((float)(int32_t)m);
  const int32_t exponent = (int32_t)(bits - 0x3F3504F3u) >> 23;  // so that the mantissa lies in [sqrt 1/2, sqrt 2)
  const float t = float_of(bits - ((uint32_t)exponent << 23)) - 1.0f;
  const float e = (float)(exponent - 24), square = t * t;
  float p = 7.0376836292e-2f;
  p = p * t - 1.1514610310e-1f;
  p = p * t + 1.1676998740e-1f;
  p = p * t - 1.2420140846e-1f;
  p = p * t + 1.4249322787e-1f;
  p = p * t - 1.6668057665e-1f;
  p = p * t + 2.0000714765e-1f;
  p = p * t - 2.4999993993e-1f;
  p = p * t + 3.3333331174e-1f;
  p = p * t * square;
  // ln 2 in two parts, the first with so few bits that its product with e is exact
  p = (p - 2.12194440e-4f * e) - 0.5f * square;
  return -(t + p) - 0.693359375f * e;
}

// Words (a, b): u1 = ((a >> 8) + 1) 2^-24, u2 = (b >> 8) 2^-24, r = sqrt(-2 ln u1); (r cos 2 pi u2, r sin 2 pi u2).
MASKDIFF_HD Pair normal_pair(uint32_t a, uint32_t b) {
  const float radius = __builtin_sqrtf(2.0f * minus_log_fraction((a >> 8) + 1));
  const uint32_t quadrant = b >> 30, part = (b >> 8) & 0x3FFFFFu;  // 22 bits of a quarter turn
  const uint32_t folded = part > 0x200000u;                        // past an eighth: mirror, swap sine and cosine
  const uint32_t eighth = folded ? 0x400000u - part : part;
  const float angle = (float)(int32_t)eighth * 3.7450702829238e-7f;  // pi / 2 * 2^-22
  const float square = angle * angle;
  float sine = (-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f;
  sine = sine * square * angle + angle;
  float cosine = (2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
  cosine = cosine * square * square - 0.5f * square + 1.0f;
  const uint32_t swap = folded ^ (quadrant & 1);
  const float x = swap ? sine : cosine, y = swap ? cosine : sine;
  const uint32_t x_sign = ((quadrant + 1) >> 1 & 1) << 31, y_sign = (quadrant >> 1) << 31;
  return {radius * float_of(bits_of(x) ^ x_sign), radius * float_of(bits_of(y) ^ y_sign)};
}

}  // namespace ISA
}  // namespace maskdiff
