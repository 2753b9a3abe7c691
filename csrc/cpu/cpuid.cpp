// Asks the processor for exactly the features that CMakeLists.txt compiles each instruction set with.
#include "cpu/cpuid.h"

namespace maskdiff {

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // also asks whether the system saves the wide registers
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) {
    return BASELINE;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) {
    return AVX2;
  }
  return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
#else
  return BASELINE;
#endif
}

}  // namespace maskdiff
