// The plain C interface of the compiled kernels: every exported function, with shapes, dtypes, units and error codes.
//
// All tensors are dense unless a stride is given. "[B]" and the like are shapes: B samples, K visible patches of each
// (or M in all, where lengths are ragged), n patches of an image, E = P*P*C elements of a patch in the order (row, column,
// channel), T timesteps. Nothing is allocated for the caller; nothing aborts: every function returns an error code.
// Randomness is counted: common/philox.h. Change MASKDIFF_ABI, and kernels/library.py, with anything in this file.
#ifndef MASKDIFF_KERNELS_H
#define MASKDIFF_KERNELS_H

#include <stdint.h>

#define MASKDIFF_ABI 11

#if defined(__GNUC__)
#define MASKDIFF_API __attribute__((visibility("default")))
#else
#define MASKDIFF_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum maskdiff_error {
  MASKDIFF_OK = 0,
  MASKDIFF_BAD_RANGE = 1,   // a number in a tensor (image, patch, slot, timestep, cu_patches) is out of range
  MASKDIFF_NO_MEMORY = 2,   // no scratch memory
  MASKDIFF_BAD_OPTION = 3,  // an enum below has no such value
};

enum maskdiff_dtype { MASKDIFF_FLOAT32 = 0, MASKDIFF_BFLOAT16 = 1, MASKDIFF_FLOAT16 = 2 };
enum maskdiff_target { MASKDIFF_EPS = 0, MASKDIFF_X0 = 1, MASKDIFF_V = 2 };
// How bfloat16 is multiplied: as the processor does it best; for tests also widened to float, by pairs, or by tiles (with
// vectors of 16 floats alone), both in steps where the processor has no instruction for it.
enum maskdiff_products { MASKDIFF_BEST = 0, MASKDIFF_WIDENED = 1, MASKDIFF_PAIRS = 2, MASKDIFF_TILES = 3 };
enum maskdiff_mask { MASKDIFF_DENSE = 0, MASKDIFF_PATCH = 1, MASKDIFF_BLOCK = 2, MASKDIFF_CROP = 3 };

// What draw_batch reads and writes. Lengths are ragged where group > 1: each `group` consecutive samples share `counts` out.
typedef struct {
  const int64_t* seed;      // [1]
  const int64_t* n;         // [B] sample numbers, at least 0
  const int64_t* ids;       // [images] image ids to choose from, or NULL: 0 .. images - 1
  const int64_t* counts;    // [group] visible patches
  int64_t batch;            // B
  int64_t images;           // at most 2^60
  int64_t grid_down;        // patches
  int64_t grid_across;      // patches
  int64_t kind;             // maskdiff_mask
  int64_t size;             // block: its side in patches
  int64_t group;            // G, divides B; 1: equal lengths
  int64_t timesteps;        // T, at most 2^31
  int64_t flip;             // floor(probability * 2^32)
  int64_t label_dropout;    // floor(probability * 2^32)
  int64_t* image_ids;       // out [B]
  int32_t* keep_ids;        // out [B, K] or [M] ascending
  int32_t* cu_patches;      // out [B + 1], written where group > 1
  uint8_t* mirrored;        // out [B] 0 or 1
  int64_t* timestep;        // out [B]
  uint8_t* drop_label;      // out [B] 0 or 1
} maskdiff_draw;

// The visible part of a batch of packed images.
typedef struct {
  const uint8_t* patches;      // [images, rows, E]
  const int32_t* slots;        // [M] row of a visible patch in its image, or NULL: its place in the picture before flipping
  const int64_t* n;            // [B]
  const int64_t* image_ids;    // [B] in [0, images)
  const int32_t* keep_ids;     // [B, K] or [M] in [0, grid_down * grid_across)
  const int32_t* cu_patches;   // [B + 1] from 0 to M, or NULL: equal lengths
  const uint8_t* flip;         // [B] 0 or 1
  const int64_t* timestep;     // [B] in [0, T)
  const float* alpha_sigma;    // [T, 2], or NULL: no noise
  const int64_t* seed;         // [1]
  int64_t images;
  int64_t rows;                // patches stored of an image
  int64_t stride;              // bytes from one image to the next
  int64_t grid_down;           // patches
  int64_t grid_across;         // patches
  int64_t patch;               // P, pixels
  int64_t channels;            // C; E = P*P*C is at most 65535
  int64_t batch;               // B
  int64_t visible;             // K; ignored where cu_patches is given
  int64_t total;               // M
  int64_t timesteps;           // T
} maskdiff_samples;

// What attention reads: S sequences one after another, T tokens in all, H heads of width d. Strides are in elements.
typedef struct {
  const void* qkv;            // [S, L, 3, H, d], or [T, 3, H, d] with cu_seqlens, of `dtype`; d numbers stand together
  const int32_t* cu_seqlens;  // [S + 1] from 0 to T, or NULL: equal lengths
  int64_t sequences;          // S
  int64_t length;             // L; with cu_seqlens the most tokens that a sequence may have
  int64_t tokens;             // T
  int64_t heads;              // H
  int64_t width;              // d: 32, 64 or 128
  int64_t sequence_stride;    // equal lengths alone
  int64_t token_stride;
  int64_t part_stride;        // from q to k to v
  int64_t head_stride;
  int64_t dtype;              // maskdiff_dtype
  int64_t products;           // maskdiff_products
} maskdiff_attention_input;

// What product reads and writes: matrices of bfloat16. Strides are in elements, from row to row.
typedef struct {
  const void* left;          // [M, K], or [K, M] where it is transposed
  const void* right;         // [K, N], or [N, K] where it is transposed
  void* out;                 // [M, N], its rows at multiples of 64 bytes unless it is added to
  int64_t rows;              // M, a multiple of 32 where left is transposed
  int64_t columns;           // N, a multiple of 32
  int64_t depth;             // K, at least 32 and a multiple of it but where left is transposed and right is not
  int64_t left_stride;
  int64_t right_stride;      // even where right is transposed
  int64_t out_stride;
  int64_t left_transposed;   // 0 or 1
  int64_t right_transposed;  // 0 or 1
  int64_t add;               // 0 or 1: to what stands in out
} maskdiff_product;

// What adamw_ema updates: flat buffers of N floats, in which S segments (the parameters) lie one after another, with gaps
// or without. The five tables of the segments are in the host's memory, on every device.
typedef struct {
  float* master;               // in, out [N]
  float* exp_avg;              // in, out [N] first moments
  float* exp_avg_sq;           // in, out [N] second moments
  float* ema;                  // in, out [N] averages of the masters
  float* ema2;                 // in, out [N], or NULL: a second average
  void* low;                   // out [low_size] of low_dtype: the first masters, rounded to nearest even
  float* adam_step;            // in, out [1] updates made
  float* ema_step;             // in, out [1] updates that the averages have seen
  const float* hyper;          // [2] learning rate, bound on the gradient norm (infinity: none)
  const void* const* grads;    // [S] dense gradients
  const int64_t* grad_dtypes;  // [S] maskdiff_dtype
  const int64_t* offsets;      // [S] where a segment starts, ascending
  const int64_t* sizes;        // [S] elements; offset + size is at most the next offset, and at last N
  const int64_t* decays;       // [S] 1 where the weights decay, else 0
  int64_t segments;            // S
  int64_t low_size;            // at most N
  int64_t low_dtype;           // maskdiff_dtype
} maskdiff_adamw;

// The numbers of adamw_ema that a run does not change.
typedef struct {
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double ema_decay;   // the final ones: decays rise as (1 + k) / (10 + k), k the updates that the averages have seen
  double ema2_decay;
  double ema_gamma;   // of 0 or more: decays are (1 - 1/k)^(gamma + 1) instead; below 0: as above
  double ema2_gamma;
  int64_t ema_every;  // 1 or more: averages are read and written where k is a multiple of it, and then once for so many
                      // updates, by the product of their decays
} maskdiff_adamw_numbers;

// What layer_norm reads. Strides are in elements.
typedef struct {
  const void* x;        // [rows, width] of `dtype`
  const float* weight;  // [width]
  const float* bias;    // [width]
  const void* shift;    // [width] of `dtype`, or NULL
  int64_t rows;
  int64_t width;
  int64_t stride;       // of the rows of x
  int64_t dtype;        // maskdiff_dtype
} maskdiff_layer_norm_input;

// What its gradient reads and writes besides.
typedef struct {
  const float* statistics;   // [2, rows] as the forward pass made them
  const void* grad_out;      // [rows, width] of `dtype`
  const void* grad_sum;      // [rows, width] of `dtype`; read where grad_shift is given
  void* grad_x;              // out [rows, width] of `dtype`
  float* grad_weight;        // out [width]
  float* grad_bias;          // out [width]
  void* grad_shift;          // out [width] of `dtype`, or NULL
  int64_t grad_out_stride;   // of rows
  int64_t grad_sum_stride;
} maskdiff_layer_norm_gradients;

// ---- the CPU library. `threads` is the number of OpenMP threads to use; results do not depend on it ----

MASKDIFF_API const char* maskdiff_source_version(void);  // of the sources this library was built from
MASKDIFF_API int maskdiff_abi(void);                      // MASKDIFF_ABI

// Instruction sets: 0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16, 4 AMX with bf16 besides. Every set gives the same
// bits; in attention, gelu, layer_norm and product the same to rounding.
MASKDIFF_API int maskdiff_cpu_best_level(void);  // the highest that this processor and this library have
MASKDIFF_API int maskdiff_cpu_level(void);       // the one in use; the best until set
MASKDIFF_API int maskdiff_cpu_set_level(int level);  // BAD_OPTION above the best. Not while another call runs

// What samples n use. Errors: NO_MEMORY, BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_draw_batch(const maskdiff_draw* draw, int threads);

// out [M, E]: the visible patches as they are stored; those of a mirrored picture are not mirrored yet. The system is told
// of all before the first is read: of a mapped file they come from the disk at once. Runs on the calling thread alone.
// Errors: BAD_RANGE (nothing is written then).
MASKDIFF_API int maskdiff_cpu_gather_patches(const maskdiff_samples* samples, uint8_t* out);

// out [B, K, E] or [M, E] of `dtype`: x_t = alpha_t x_0 + sigma_t eps, or x_0 without alpha_sigma.
// Errors: BAD_RANGE (nothing is written then), BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_noisy_patches(const maskdiff_samples* samples, void* out, int dtype, int threads);

// The loss of a prediction [B, K, E] (or [M, E]) of `dtype`, and its gradient but for incoming factors.
//   sample_stride, patch_stride: elements between samples (equal lengths alone) and between patches of the prediction
//   weight: [T] or NULL (1)
//   mean [1], per_sample [B]: weight_t times the mean over the sample's elements of (prediction - target)^2, and its mean
//   error [B, K, E] or [M, E] of `dtype`, or NULL: 2 weight_t (prediction - target)
// Errors: BAD_RANGE (nothing is written then), NO_MEMORY, BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_denoising_loss(const maskdiff_samples* samples, const void* prediction,
                                             int64_t sample_stride, int64_t patch_stride, int dtype, int target,
                                             const float* weight, float* mean, float* per_sample, void* error,
                                             int threads);

// gradient = factor_b * error, sample by sample. error, gradient: [M, E] of `dtype` (dense, M = B * K where cu_patches
// [B + 1] is NULL); factor [B]. Errors: BAD_RANGE (cu_patches; nothing is written then), BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_denoising_loss_backward(const void* error, const int32_t* cu_patches, const float* factor,
                                                      int64_t batch, int64_t total, int64_t elements, int dtype,
                                                      void* gradient, int threads);

// out [T, H * d] = softmax(scale Q K^T) V, per sequence and head, and lse [H, T], the natural logarithm of the sums of
// exponentials. T = S * L for equal lengths. Errors: BAD_RANGE (cu_seqlens; nothing is written then), NO_MEMORY, BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_attention(const maskdiff_attention_input* input, float scale, void* out, float* lse,
                                        int threads);

// grad_qkv [T, 3, H, d]. lse: the forward's. grad_out: [S, L, H * d] or [T, H * d] of `dtype`, sequences (equal lengths
// alone) and tokens the given numbers of elements apart. Errors: as the forward.
MASKDIFF_API int maskdiff_cpu_attention_backward(const maskdiff_attention_input* input, float scale, const float* lse,
                                                 const void* grad_out, int64_t grad_sequence_stride,
                                                 int64_t grad_token_stride, void* grad_qkv, int threads);

// out = left right, or out += left right: summed in float32 and rounded once. Made for AMX, and in steps where there are
// vectors of 16 floats. Errors: NO_MEMORY; BAD_OPTION elsewhere, or where the numbers above do not hold.
MASKDIFF_API int maskdiff_cpu_product(const maskdiff_product* call, int threads);

// out = x Phi(x), Phi the standard normal distribution; dense tensors of `elements` numbers. Errors: BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_gelu(const void* x, int64_t elements, int dtype, void* out, int threads);

// grad_x [rows, columns] = grad_out (Phi(x) + x Phi'(x)), and the sums of each of its columns before it is rounded.
// x, grad_out: dense, like it; sums [columns] or NULL. Errors: NO_MEMORY, BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_gelu_backward(const void* x, const void* grad_out, int64_t rows, int64_t columns,
                                            int dtype, void* grad_x, float* sums, int threads);

// out [rows, width] of `dtype`: rows of mean 0 and variance 1, times weight, plus bias.
//   eps: added to the variance
//   sum [rows, width] of `dtype`, or NULL: x + shift
//   statistics [2, rows], or NULL: the mean of each row, then 1 / sqrt(variance + eps)
// Errors: BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_layer_norm(const maskdiff_layer_norm_input* input, float eps, void* out, void* sum,
                                         float* statistics, int threads);

// All gradients in one pass: of x from both outputs, of weight and bias, of shift from the sum. The input's bias and shift
// are not read. Errors: NO_MEMORY, BAD_OPTION.
MASKDIFF_API int maskdiff_cpu_layer_norm_backward(const maskdiff_layer_norm_input* input,
                                                  const maskdiff_layer_norm_gradients* gradients, int threads);

// Clips the gradients to the bound, updates the masters by AdamW, then the averages and the low-precision copy; counts.
// norm [1]: of all gradients, before clipping. Where it is not finite (a sum of squares beyond the floats is not)
// nothing else is changed. skipped [1]: 1 where that happened, else 0. Errors: NO_MEMORY, BAD_OPTION (ema_every too).
MASKDIFF_API int maskdiff_cpu_adamw_ema(const maskdiff_adamw* update, const maskdiff_adamw_numbers* numbers, float* norm,
                                        float* skipped, int threads);

// ---- the CUDA library. Pointers are to memory that `device` can read; an entry queues its work on `stream`, waits for
// nothing, and returns one of the codes above or one that maskdiff_cuda_error_text explains ----

MASKDIFF_API const char* maskdiff_cuda_source_version(void);
MASKDIFF_API int maskdiff_cuda_abi(void);
MASKDIFF_API const char* maskdiff_cuda_archs(void);  // compute capabilities it was built for: "80,90,100,120"
MASKDIFF_API const char* maskdiff_cuda_error_text(int code);

// Counted random words, common/philox.h: words [B, blocks, 4] of samples n [B] for a purpose, and sums [B] of each sample's
// words modulo 2^32. Errors: BAD_RANGE.
MASKDIFF_API int maskdiff_cuda_count_words(const int64_t* seed, const int64_t* n, int64_t batch, int purpose,
                                           int64_t blocks, uint32_t* words, uint32_t* sums, int device, void* stream);

// noisy_patches and denoising_loss as the CPU library's; the patches may also lie in pinned memory of the host, and then
// have to stay there, unchanged, until the stream has passed the call. Numbers in tensors are not checked: the elements of
// a patch whose image, place or timestep is out of range are NaN, so are those of a bad slot where pixels are read; a
// ragged sample's offsets are cut to 0 .. M, and nothing else is read or written. At most 2^31 - 1 groups of four
// elements. noisy_patches gives the bits of the CPU library. Errors: BAD_RANGE (more than that), BAD_OPTION.
MASKDIFF_API int maskdiff_cuda_noisy_patches(const maskdiff_samples* samples, void* out, int dtype, int device,
                                             void* stream);

// One launch; error has the bits of the CPU library, the losses are the same on every GPU. workspace: as many doubles as
// maskdiff_cuda_denoising_loss_workspace says. counter, from 0 to below MASKDIFF_CUDA_COUNTERS: calls that may run side by
// side on a GPU (on two streams, or in a captured graph and beside it) must not have the same. Errors as noisy_patches;
// BAD_RANGE also for another counter, or without alpha_sigma.
#define MASKDIFF_CUDA_COUNTERS 16384
MASKDIFF_API int maskdiff_cuda_denoising_loss(const maskdiff_samples* samples, const void* prediction,
                                              int64_t sample_stride, int64_t patch_stride, int dtype, int target,
                                              const float* weight, float* mean, float* per_sample, void* error,
                                              double* workspace, int counter, int device, void* stream);
MASKDIFF_API int64_t maskdiff_cuda_denoising_loss_workspace(const maskdiff_samples* samples);

// gradient = error times (grad_mean / B + grad_per_sample_b) / (elements that sample b shows), rounded once. Tensors as the
// CPU library's; grad_mean [1], grad_per_sample [B], grad_stride elements apart. Errors: BAD_RANGE, BAD_OPTION.
MASKDIFF_API int maskdiff_cuda_denoising_loss_backward(const void* error, const int32_t* cu_patches,
                                                       const float* grad_mean, const float* grad_per_sample,
                                                       int64_t grad_stride, int64_t batch, int64_t total,
                                                       int64_t elements, int dtype, void* gradient, int device,
                                                       void* stream);

// attention as the CPU library's, bf16 and fp16, d = 32 or 64, at most 288 tokens a sequence. Pointers are 16-byte aligned,
// strides multiples of 8. cu_seqlens is not checked: a sequence that breaks its promise is cut short.
// Errors: BAD_RANGE, BAD_OPTION, CUDA's own where a block's shared memory exceeds the GPU's.
MASKDIFF_API int maskdiff_cuda_attention(const maskdiff_attention_input* input, float scale, void* out, float* lse,
                                         int device, void* stream);
MASKDIFF_API int maskdiff_cuda_attention_backward(const maskdiff_attention_input* input, float scale, const void* out,
                                                  const float* lse, const void* grad_out, int64_t grad_sequence_stride,
                                                  int64_t grad_token_stride, void* grad_qkv, int device, void* stream);

// adamw_ema as the CPU library's; tables of segments in the host's memory, all else in the device's. The same bits every
// time and on every GPU. workspace: as many doubles as maskdiff_cuda_adamw_ema_workspace says.
// Errors: BAD_RANGE (no segment), BAD_OPTION.
MASKDIFF_API int maskdiff_cuda_adamw_ema(const maskdiff_adamw* update, const maskdiff_adamw_numbers* numbers, float* norm,
                                         float* skipped, double* workspace, int device, void* stream);
MASKDIFF_API int maskdiff_cuda_adamw_ema_workspace(void);

// Shared memory of a block for sequences of at most `length` tokens.
MASKDIFF_API int64_t maskdiff_cuda_attention_shared_bytes(int64_t width, int64_t length, int backward);

#ifdef __cplusplus
}
#endif
#endif
