// The ops of one instruction set, as the exported functions of maskdiff_kernels.h call them.
#pragma once

#include "maskdiff_kernels.h"

#define MASKDIFF_DECLARE_TILED_OPS                                                                                     \
  int attention(const maskdiff_attention_input* input, float scale, void* out, float* lse, int threads);               \
  int attention_backward(const maskdiff_attention_input* input, float scale, const float* lse, const void* grad_out,   \
                         int64_t grad_sequence_stride, int64_t grad_token_stride, void* grad_qkv, int threads);        \
  int product(const maskdiff_product* call, int threads);

#define MASKDIFF_DECLARE_OPS(NAME)                                                                                     \
  namespace maskdiff {                                                                                                 \
  namespace NAME {                                                                                                     \
  int adamw_ema(const maskdiff_adamw* update, const maskdiff_adamw_numbers* numbers, float* norm, float* skipped,      \
                int threads);                                                                                          \
  MASKDIFF_DECLARE_TILED_OPS                                                                                           \
  int draw_batch(const maskdiff_draw* draw, int threads);                                                              \
  int gather_patches(const maskdiff_samples* samples, uint8_t* out);                                                   \
  int gelu(const void* x, int64_t elements, int dtype, void* out, int threads);                                        \
  int gelu_backward(const void* x, const void* grad_out, int64_t rows, int64_t columns, int dtype, void* grad_x,       \
                    float* sums, int threads);                                                                         \
  int layer_norm(const maskdiff_layer_norm_input* input, float eps, void* out, void* sum, float* statistics,           \
                 int threads);                                                                                         \
  int layer_norm_backward(const maskdiff_layer_norm_input* input, const maskdiff_layer_norm_gradients* gradients,      \
                          int threads);                                                                                \
  int noisy_patches(const maskdiff_samples* samples, void* out, int dtype, int threads);                               \
  int denoising_loss(const maskdiff_samples* samples, const void* prediction, int64_t sample_stride,                   \
                     int64_t patch_stride, int dtype, int target, const float* weight, float* mean, float* per_sample, \
                     void* error, int threads);                                                                        \
  int denoising_loss_backward(const void* error, const int32_t* cu_patches, const float* factor, int64_t batch,        \
                              int64_t total, int64_t elements, int dtype, void* gradient, int threads);                \
  }                                                                                                                    \
  }

#ifdef ISA
MASKDIFF_DECLARE_OPS(ISA)
#endif
