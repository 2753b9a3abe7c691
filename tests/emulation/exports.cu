// What every library of the tests exports beside its kernels: the text of an error, the emulator's order of threads.
#include "cuda/launch.cuh"

#define ENTRY extern "C" __attribute__((visibility("default")))

ENTRY const char* wrapper_error(int code) { return maskdiff::cuda_error_text(code); }
#if MASKDIFF_EMULATED
ENTRY void emulator_seed(uint64_t seed) { maskdiff::emulator::seed = seed; }
#endif
