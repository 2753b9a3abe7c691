// Asks the processor for exactly the features that CMakeLists.txt compiles each instruction set with.
#include "cpu/cpuid.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace maskdiff {
namespace {

// Whether the system lets this process use AMX's tiles: it saves them for those alone that ask (Linux, Documentation/
// arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
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
  const bool tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  return tiles && may_use_tiles() ? AMX_BF16 : AVX512_BF16;
#else
  return BASELINE;
#endif
}

}  // namespace maskdiff
