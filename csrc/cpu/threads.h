// How many threads a piece of work is worth.
#pragma once

#include <stdint.h>

namespace maskdiff {
namespace ISA {

// Fewer threads where waking them costs more than they save.
static inline int useful_threads(int64_t elements, int threads) {
  const int64_t useful = elements / 8192 + 1;
  return useful < threads ? (int)useful : threads;
}

}  // namespace ISA
}  // namespace maskdiff
