// What lets g++ and nvcc compile the same functions: how they are declared, and bits of floats.
//
// Everything in common/ lives in namespace maskdiff::ISA, where the build gives ISA a name for each instruction set, and is
// inlined: two copies of a function compiled for two processors must never be merged by the linker.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define MASKDIFF_HD __host__ __device__ __forceinline__ static
#else
#define MASKDIFF_HD __attribute__((always_inline)) static inline
#endif

namespace maskdiff {
namespace ISA {

MASKDIFF_HD uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

MASKDIFF_HD float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace ISA
}  // namespace maskdiff
