// Scratch memory in parts, and the whole numbers that sizes are made of.
#pragma once

#include "cpu/vector.h"

namespace maskdiff {
namespace ISA {
namespace {

MASKDIFF_INLINE int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Scratch memory, dealt out in parts; without memory it counts.
struct Arena {
  float* base;
  int64_t used;

  float* take(int64_t floats) {
    float* const part = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return part;
  }
};

MASKDIFF_INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
MASKDIFF_INLINE int64_t greater(int64_t x, int64_t y) { return x > y ? x : y; }

// The n-th of `parts` nearly equal shares of what is left.
MASKDIFF_INLINE int64_t share(int64_t left, int64_t parts) { return (left + parts - 1) / parts; }

}  // namespace
}  // namespace ISA
}  // namespace maskdiff
