// The exported C functions: they call the op of the instruction set in use. Compiled once, for the oldest processor.
#include "cpu/cpuid.h"
#include "cpu/ops.h"

MASKDIFF_DECLARE_OPS(baseline)
#if defined(__x86_64__)
MASKDIFF_DECLARE_OPS(avx2)
MASKDIFF_DECLARE_OPS(avx512)
MASKDIFF_DECLARE_OPS(avx512_bf16)
#if defined(MASKDIFF_AMX)
namespace maskdiff {
namespace amx_bf16 {
using namespace avx512_bf16;
MASKDIFF_DECLARE_TILED_OPS
}  // namespace amx_bf16
}  // namespace maskdiff
#else
namespace maskdiff {
namespace amx_bf16 = avx512_bf16;
}
#endif
#define DISPATCH(CALL)                          \
  switch (level) {                              \
    case maskdiff::AMX_BF16:                    \
      return maskdiff::amx_bf16::CALL;          \
    case maskdiff::AVX512_BF16:                 \
      return maskdiff::avx512_bf16::CALL;       \
    case maskdiff::AVX512:                      \
      return maskdiff::avx512::CALL;            \
    case maskdiff::AVX2:                        \
      return maskdiff::avx2::CALL;              \
    default:                                    \
      return maskdiff::baseline::CALL;          \
  }
#else
#define DISPATCH(CALL) return maskdiff::baseline::CALL;
#endif

#ifndef MASKDIFF_SOURCE_VERSION
#error "build with -DMASKDIFF_SOURCE_VERSION: the hash that kernels/source_version.py prints"
#endif

static int level = maskdiff::best_level();

extern "C" {

const char* maskdiff_source_version(void) { return MASKDIFF_SOURCE_VERSION; }

int maskdiff_abi(void) { return MASKDIFF_ABI; }

int maskdiff_cpu_best_level(void) { return maskdiff::best_level(); }

int maskdiff_cpu_level(void) { return level; }

int maskdiff_cpu_set_level(int wanted) {
  if (wanted < maskdiff::BASELINE || wanted > maskdiff::best_level()) return MASKDIFF_BAD_OPTION;
  level = wanted;
  return MASKDIFF_OK;
}

int maskdiff_cpu_draw_batch(const maskdiff_draw* draw, int threads) { DISPATCH(draw_batch(draw, threads)) }

int maskdiff_cpu_product(const maskdiff_product* call, int threads) { DISPATCH(product(call, threads)) }

int maskdiff_cpu_gather_patches(const maskdiff_samples* samples, uint8_t* out) {
  DISPATCH(gather_patches(samples, out))
}

int maskdiff_cpu_noisy_patches(const maskdiff_samples* samples, void* out, int dtype, int threads) {
  DISPATCH(noisy_patches(samples, out, dtype, threads))
}

int maskdiff_cpu_denoising_loss(const maskdiff_samples* samples, const void* prediction, int64_t sample_stride,
                                int64_t patch_stride, int dtype, int target, const float* weight, float* mean,
                                float* per_sample, void* error, int threads) {
  DISPATCH(denoising_loss(samples, prediction, sample_stride, patch_stride, dtype, target, weight, mean, per_sample,
                          error, threads))
}

int maskdiff_cpu_denoising_loss_backward(const void* error, const int32_t* cu_patches, const float* factor,
                                         int64_t batch, int64_t total, int64_t elements, int dtype, void* gradient,
                                         int threads) {
  DISPATCH(denoising_loss_backward(error, cu_patches, factor, batch, total, elements, dtype, gradient, threads))
}

int maskdiff_cpu_adamw_ema(const maskdiff_adamw* update, const maskdiff_adamw_numbers* numbers, float* norm,
                           float* skipped, int threads) {
  DISPATCH(adamw_ema(update, numbers, norm, skipped, threads))
}

int maskdiff_cpu_attention(const maskdiff_attention_input* input, float scale, void* out, float* lse, int threads) {
  DISPATCH(attention(input, scale, out, lse, threads))
}

int maskdiff_cpu_attention_backward(const maskdiff_attention_input* input, float scale, const float* lse,
                                    const void* grad_out, int64_t grad_sequence_stride, int64_t grad_token_stride,
                                    void* grad_qkv, int threads) {
  DISPATCH(attention_backward(input, scale, lse, grad_out, grad_sequence_stride, grad_token_stride, grad_qkv, threads))
}

int maskdiff_cpu_gelu(const void* x, int64_t elements, int dtype, void* out, int threads) {
  DISPATCH(gelu(x, elements, dtype, out, threads))
}

int maskdiff_cpu_gelu_backward(const void* x, const void* grad_out, int64_t rows, int64_t columns, int dtype,
                               void* grad_x, float* sums, int threads) {
  DISPATCH(gelu_backward(x, grad_out, rows, columns, dtype, grad_x, sums, threads))
}

int maskdiff_cpu_layer_norm(const maskdiff_layer_norm_input* input, float eps, void* out, void* sum, float* statistics,
                            int threads) {
  DISPATCH(layer_norm(input, eps, out, sum, statistics, threads))
}

int maskdiff_cpu_layer_norm_backward(const maskdiff_layer_norm_input* input,
                                     const maskdiff_layer_norm_gradients* gradients, int threads) {
  DISPATCH(layer_norm_backward(input, gradients, threads))
}

}  // extern "C"
