// bfloat16 and float16 as uint16_t: conversions to and from float, rounding to nearest even, the same bits everywhere.
// Subnormal floats are never made on the way, so a process that flushes them to zero gets the same results.
#pragma once

#include "maskdiff_kernels.h"
#include "portable.h"

namespace maskdiff {
namespace ISA {

MASKDIFF_HD bool is_dtype(int64_t dtype) { return dtype >= MASKDIFF_FLOAT32 && dtype <= MASKDIFF_FLOAT16; }

MASKDIFF_HD float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

MASKDIFF_HD uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

MASKDIFF_HD float from_float16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, shifted = (uint32_t)(half & 0x7FFFu) << 13;
  const uint32_t exponent = shifted & 0x0F800000u;
  const uint32_t normal = shifted + 0x38000000u, special = shifted + 0x70000000u;  // special: infinity, NaN
  const uint32_t subnormal = bits_of(float_of(shifted + 0x38800000u) - float_of(0x38800000u));
  const uint32_t bits = exponent == 0 ? subnormal : exponent == 0x0F800000u ? special : normal;
  return float_of(sign | bits);
}

MASKDIFF_HD uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // the addition rounds at 2^-24
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u | (magnitude >> 13 & 0x3FFu) : 0x7C00u;
  const uint32_t small = magnitude < 0x38800000u ? subnormal : normal;
  return (uint16_t)(sign | (magnitude >= 0x47800000u ? special : small));
}

}  // namespace ISA
}  // namespace maskdiff
