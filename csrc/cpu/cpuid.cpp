// Asks the processor for exactly the features that CMakeLists.txt compiles each instruction set with.
#include "cpu/cpuid.h"

#if defined(MASKDIFF_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace maskdiff {
namespace {

// Whether there are AMX's tiles and the system lets this process use them: it saves them only for those that ask (Linux,
// Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(MASKDIFF_AMX) && defined(__linux__)
  constexpr long REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
#else
  return false;
#endif
}

}  // namespace

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
  if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
  return may_use_tiles() ? AMX_BF16 : AVX512_BF16;
#else
  return BASELINE;
#endif
}

}  // namespace maskdiff
