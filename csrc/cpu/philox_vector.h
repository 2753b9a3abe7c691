// Philox for many blocks at once. The scalar form in common/philox.h vectorises too, but GCC 12 widens its products by
// permutations that cost more than the products; here every 64-bit lane holds one word in its low half, and a product of
// low halves is one instruction.
#pragma once

#include "common/philox.h"
#include "cpu/flags.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace maskdiff {
namespace ISA {

#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
MASKDIFF_HD Lanes low_product(Lanes a, Lanes b) { return (Lanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
MASKDIFF_HD Lanes low_product(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
#if defined(__SSE2__)
MASKDIFF_HD Lanes low_product(Lanes a, Lanes b) { return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
MASKDIFF_HD Lanes low_product(Lanes a, Lanes b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
#endif
#endif

constexpr int BLOCKS_AT_ONCE = sizeof(Lanes) / sizeof(uint64_t);

// The words of blocks[0 .. count): even[2 i], odd[2 i], even[2 i + 1], odd[2 i + 1] are words a, b, c, d of block i: the
// pairs that make normals stand in the same place of both arrays. count is a multiple of BLOCKS_AT_ONCE; arrays are
// aligned to 64 bytes.
MASKDIFF_HD void philox_blocks(uint64_t seed, uint64_t n, uint32_t purpose, const uint32_t* blocks, int count,
                               uint32_t* even, uint32_t* odd) {
  const Lanes zero = {};
  const Lanes m0 = zero + PHILOX_M0, m1 = zero + PHILOX_M1, low = zero + 0xFFFFFFFFu;
  for (int i = 0; i < count; i += BLOCKS_AT_ONCE) {
    Lanes c0 = zero, c1 = zero + purpose, c2 = zero + (n & 0xFFFFFFFFu), c3 = zero + (n >> 32);
    for (int lane = 0; lane < BLOCKS_AT_ONCE; lane++) c0[lane] = blocks[i + lane];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      const Lanes p0 = low_product(c0, m0), p1 = low_product(c2, m1);
      c0 = (p1 >> 32) ^ c1 ^ (zero + k0);  // high halves hold rubbish from here on: products do not read them
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ (zero + k1);
      c3 = p0;
      k0 += PHILOX_W0;
      k1 += PHILOX_W1;
    }
    *(Lanes*)(even + 2 * i) = (c0 & low) | c2 << 32;
    *(Lanes*)(odd + 2 * i) = (c1 & low) | c3 << 32;
  }
}

}  // namespace ISA
}  // namespace maskdiff
