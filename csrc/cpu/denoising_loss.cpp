// denoising_loss: the loss of a prediction and its gradient in one pass, the target recomputed.
#include <stdlib.h>

#include "cpu/convert.h"
#include "cpu/ops.h"
#include "cpu/visible.h"

namespace maskdiff {
namespace ISA {

// Sums in one order on every processor: 8 columns, whatever the width of its vectors. `values` has room for 7 more.
static inline double ordered_sum(float* values, int count) {
  while (count % 8) values[count++] = 0.0f;
  double columns[8] = {}, sum = 0.0;
  for (int i = 0; i < count; i += 8) {
    for (int j = 0; j < 8; j++) columns[j] += (double)values[i + j];
  }
  for (int i = 0; i < 8; i++) sum += columns[i];
  return sum;
}

// square[i] = difference[i]^2 with difference = prediction - target; scaled[i] = factor * difference[i].
static inline void score(const Run& run, int target, float alpha, float sigma, float factor, float* prediction,
                         float* square) {
  if (target == MASKDIFF_EPS) {
#pragma omp simd
    for (int i = 0; i < run.count; i++) prediction[i] -= run.noise[i];
  } else if (target == MASKDIFF_X0) {
#pragma omp simd
    for (int i = 0; i < run.count; i++) prediction[i] -= normalised(run.pixels[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < run.count; i++)
      prediction[i] -= velocity(alpha, sigma, normalised(run.pixels[i]), run.noise[i]);
  }
#pragma omp simd
  for (int i = 0; i < run.count; i++) {
    square[i] = prediction[i] * prediction[i];
    prediction[i] *= factor;
  }
}

int denoising_loss(const maskdiff_samples* s, const void* prediction, int64_t sample_stride, int64_t patch_stride,
                   int dtype, int target, const float* weight, float* mean, float* per_sample, void* error,
                   int threads) {
  if (!is_dtype(dtype) || target < MASKDIFF_EPS || target > MASKDIFF_V) return MASKDIFF_BAD_OPTION;
  if (!in_range(s)) return MASKDIFF_BAD_RANGE;
  const int64_t elements = patch_elements(s), tasks = tasks_per_sample(s);
  double* sums = (double*)malloc((size_t)(s->batch * tasks + 1) * sizeof(double));
  if (!sums) return MASKDIFF_NO_MEMORY;
  Mirror mirror;
  fill_mirror(&mirror, s);
#pragma omp parallel for collapse(2) schedule(static) num_threads(useful_threads(s->total * elements, threads))
  for (int64_t b = 0; b < s->batch; b++) {
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t t = s->timestep[b], begin = first_visible(s, b);
      const float alpha = s->alpha_sigma[2 * t], sigma = s->alpha_sigma[2 * t + 1];
      const float factor = weight ? 2.0f * weight[t] : 2.0f;
      double sum = 0.0;
      alignas(64) float values[WINDOW_ELEMENTS], squares[WINDOW_ELEMENTS];
      walk_task(s, &mirror, target != MASKDIFF_X0, b, task, [&](Run run) {
        const int64_t row = s->cu_patches ? run.patch * patch_stride
                                          : b * sample_stride + (run.patch - begin) * patch_stride;
        load_floats(prediction, dtype, row + run.first, run.count, values);
        score(run, target, alpha, sigma, factor, values, squares + run.offset);
        const int end = run.offset + run.count;
        for (int i = end; i < (end + 3) / 4 * 4; i++) squares[i] = 0.0f;
        if (error) store_floats(error, dtype, run.patch * elements + run.first, run.count, values);
        if (run.last) sum += ordered_sum(squares, end);
      });
      sums[b * tasks + task] = sum;
    }
  }
  double all = 0.0;
  for (int64_t b = 0; b < s->batch; b++) {
    const int64_t count = (first_visible(s, b + 1) - first_visible(s, b)) * elements;
    double sum = 0.0;
    for (int64_t task = 0; task < tasks; task++) sum += sums[b * tasks + task];
    if (count > 0) sum /= (double)count;
    if (weight) sum *= weight[s->timestep[b]];
    per_sample[b] = (float)sum;
    all += sum;
  }
  *mean = (float)(all / (double)s->batch);
  free(sums);
  return MASKDIFF_OK;
}

int denoising_loss_backward(const void* error, const int32_t* cu_patches, const float* factor, int64_t batch,
                            int64_t total, int64_t elements, int dtype, void* gradient, int threads) {
  if (!is_dtype(dtype)) return MASKDIFF_BAD_OPTION;
  if (cu_patches && !offsets_fit(cu_patches, batch, total)) return MASKDIFF_BAD_RANGE;
#pragma omp parallel for schedule(static) num_threads(useful_threads(total * elements, threads))
  for (int64_t b = 0; b < batch; b++) {
    const int64_t begin = (cu_patches ? cu_patches[b] : total / batch * b) * elements;
    const int64_t end = (cu_patches ? cu_patches[b + 1] : total / batch * (b + 1)) * elements;
    alignas(64) float values[WINDOW_ELEMENTS];
    for (int64_t first = begin; first < end; first += WINDOW_ELEMENTS) {
      const int count = (int)(end - first < WINDOW_ELEMENTS ? end - first : WINDOW_ELEMENTS);
      load_floats(error, dtype, first, count, values);
#pragma omp simd
      for (int i = 0; i < count; i++) values[i] *= factor[b];
      store_floats(gradient, dtype, first, count, values);
    }
  }
  return MASKDIFF_OK;
}

}  // namespace ISA
}  // namespace maskdiff
