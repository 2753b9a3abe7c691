// What the CUDA library says about itself, and its smallest real kernel: counted random words, whose values every other
// implementation gives too. The first thing to run on a new GPU.
#include "common/philox.h"
#include "cuda/launch.cuh"
#include "maskdiff_kernels.h"

namespace maskdiff {
namespace {

constexpr unsigned kThreads = 128;

// One block a sample: its words, and their sum through shuffles and shared memory.
KERNEL(kThreads)
count_words(const int64_t* seed,  // [1]
            const int64_t* n,     // [B]
            uint32_t purpose,
            int64_t blocks,       // of Philox
            uint32_t* words,      // out [B, blocks, 4]
            uint32_t* sums) {     // out [B]
  SHARED(uint32_t, partial, kThreads / 32);
  const int64_t sample = ptx::block_x();
  const uint64_t key = static_cast<uint64_t>(*seed), number = static_cast<uint64_t>(n[sample]);
  uint32_t sum = 0;
  for (int64_t b = ptx::thread_x(); b < blocks; b += kThreads) {
    const ISA::Words w = ISA::philox(key, number, purpose, static_cast<uint32_t>(b));
    uint32_t* to = words + (sample * blocks + b) * 4;
    to[0] = w.a, to[1] = w.b, to[2] = w.c, to[3] = w.d;
    sum += w.a + w.b + w.c + w.d;
  }
  for (unsigned step = 16; step > 0; step /= 2) sum += ptx::shuffle_xor(sum, step);
  if (ptx::thread_x() % 32 == 0) partial[ptx::thread_x() / 32] = sum;
  ptx::sync_block();
  if (ptx::thread_x() == 0) sums[sample] = partial[0] + partial[1] + partial[2] + partial[3];
}

} // namespace
} // namespace maskdiff

const char* maskdiff_cuda_source_version(void) { return MASKDIFF_SOURCE_VERSION; }
int maskdiff_cuda_abi(void) { return MASKDIFF_ABI; }
const char* maskdiff_cuda_archs(void) { return MASKDIFF_CUDA_ARCHS; }
const char* maskdiff_cuda_error_text(int code) { return maskdiff::cuda_error_text(code); }

int maskdiff_cuda_count_words(const int64_t* seed, const int64_t* n, int64_t batch, int purpose, int64_t blocks,
                              uint32_t* words, uint32_t* sums, int device, void* stream) {
  if (batch < 0 || batch >= int64_t{1} << 31 || blocks < 0 || blocks > int64_t{1} << 32) return MASKDIFF_BAD_RANGE;
  if (batch == 0) return MASKDIFF_OK;
  maskdiff::OnDevice here(device);
  return maskdiff::launch(maskdiff::count_words, {static_cast<unsigned>(batch)}, maskdiff::kThreads, 0, stream, seed, n,
                          static_cast<uint32_t>(purpose), blocks, words, sums);
}
