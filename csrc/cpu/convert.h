// Rows of numbers of any dtype, to and from float.
#pragma once

#include "common/floats.h"
#include "cpu/flags.h"
#include "maskdiff_kernels.h"

namespace maskdiff {
namespace ISA {

// to[i] = from[first + i]
static inline void load_floats(const void* from, int dtype, int64_t first, int count, float* to) {
  const float* floats = (const float*)from + first;
  const uint16_t* halves = (const uint16_t*)from + first;
  if (dtype == MASKDIFF_FLOAT32) {
    for (int i = 0; i < count; i++) to[i] = floats[i];
  } else if (dtype == MASKDIFF_BFLOAT16) {
#pragma omp simd
    for (int i = 0; i < count; i++) to[i] = from_bfloat16(halves[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < count; i++) to[i] = from_float16(halves[i]);
  }
}

// to[first + i] = from[i], rounded once
static inline void store_floats(void* to, int dtype, int64_t first, int count, const float* from) {
  float* floats = (float*)to + first;
  uint16_t* halves = (uint16_t*)to + first;
  if (dtype == MASKDIFF_FLOAT32) {
    for (int i = 0; i < count; i++) floats[i] = from[i];
  } else if (dtype == MASKDIFF_BFLOAT16) {
#pragma omp simd
    for (int i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < count; i++) halves[i] = to_float16(from[i]);
  }
}

}  // namespace ISA
}  // namespace maskdiff
