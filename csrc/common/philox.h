// Counted randomness: Philox4x32-10 (Salmon et al., SC 2011) with key = (seed low, seed high) and
// counter = (block, purpose, n low, n high). Element e of a purpose is word e % 4 of block e / 4.
#pragma once

#include "portable.h"

namespace maskdiff {
namespace ISA {

// What a word is drawn for. The numbers are part of every saved run: never renumber.
enum Purpose {
  ORDER = 0,  // the epoch stands for n
  MASK = 1,
  FLIP = 2,
  TIMESTEP = 3,
  NOISE = 4,
  LABEL_DROPOUT = 5,
  IMAGE_GENERATOR = 6,
  RAGGED = 7,
  MIXTURE = 8,
};

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

struct Words {
  uint32_t a, b, c, d;
};

MASKDIFF_HD Words philox(uint64_t seed, uint64_t n, uint32_t purpose, uint32_t block) {
  uint32_t c0 = block, c1 = purpose, c2 = (uint32_t)n, c3 = (uint32_t)(n >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)c0 * PHILOX_M0, p1 = (uint64_t)c2 * PHILOX_M1;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  return {c0, c1, c2, c3};
}

MASKDIFF_HD uint32_t word_of(Words words, uint32_t lane) {
  return lane == 0 ? words.a : lane == 1 ? words.b : lane == 2 ? words.c : words.d;
}

// Maps a word to 0 .. bound - 1. bound is at most 2^32.
MASKDIFF_HD uint64_t high_word(uint32_t word, uint64_t bound) { return (word * bound) >> 32; }

}  // namespace ISA
}  // namespace maskdiff
