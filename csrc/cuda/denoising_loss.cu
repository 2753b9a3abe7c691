// denoising_loss: the loss of a prediction and its gradient in one pass, the target recomputed. One launch each way.
//
// Blocks share a sample and add up its squares in double precision; whichever block comes last adds up those sums, always in
// the same order: the same bits every time and on every GPU. How it knows that it is the last: a counter for each launch
// that may run beside others, zero from the start and left so. A counter in the workspace would have to be zeroed
// by a launch of its own.
//
// Built without contraction to fused products and sums, so that the target has the bits that a CPU gives.
#include "cuda/visible.cuh"

namespace maskdiff {
namespace visible {
namespace {

constexpr int64_t kScoringBlocks = 1024; // twice what an H100 holds at a time, with 256 threads each
constexpr int64_t kMostSums = 64;        // of a sample: one thread adds them up
constexpr int64_t kMostScaled = 65535;

ZEROED(uint32_t, counters, MASKDIFF_CUDA_COUNTERS);

struct Scored {
  const void* prediction;
  int64_t sample_stride, patch_stride;
  int dtype, target;
  const float* weight;
  void* error;     // or null
  double* sums;    // [B, parts]
  float *mean, *per_sample;
  int counter;
};

DEVICE float target_of(int target, const Sample& sample, const Quad& quad, int k) {
  if (target == MASKDIFF_EPS) return quad.eps[k];
  return target == MASKDIFF_X0 ? quad.x0[k] : velocity(sample.alpha, sample.sigma, quad.x0[k], quad.eps[k]);
}

// The losses of samples `thread`, `thread` + kThreads, ... from the sums of their parts; returns the losses' sum.
DEVICE double finish_samples(const maskdiff_samples& samples, uint32_t parts, const Scored& scored) {
  double all = 0;
  for (int64_t b = ptx::thread_x(); b < samples.batch; b += kThreads) {
    const Sample sample = sample_of(samples, b);
    double sum = 0;
    for (uint32_t part = 0; part < parts; part++) sum += scored.sums[b * parts + part];
    if (sample.patches) sum /= static_cast<double>(sample.patches * patch_elements(&samples));
    if (scored.weight && sample.image) sum *= scored.weight[sample.timestep];
    scored.per_sample[b] = static_cast<float>(sum);
    all += sum;
  }
  return all;
}

KERNEL(kThreads)
score(const maskdiff_samples samples, uint32_t parts, const Scored scored) {
  SHARED(uint32_t, last, 1);
  const int64_t b = ptx::block_x(), elements = patch_elements(&samples);
  const Sample sample = sample_of(samples, b);
  const float weight = scored.weight && sample.image ? scored.weight[sample.timestep] : 1.0f;
  const int64_t steps = elements | scored.patch_stride | (samples.cu_patches ? 0 : scored.sample_stride);
  const bool fours = by_fours(scored.prediction, scored.dtype, steps);
  const bool error_by_fours = by_fours(scored.error, scored.dtype, elements);
  double sum = 0;
  walk(samples, sample, ptx::block_y(), parts, scored.target != MASKDIFF_EPS, scored.target != MASKDIFF_X0,
       [&](const Quad& quad) {
         const int64_t row = samples.cu_patches ? quad.patch * scored.patch_stride
                                                : b * scored.sample_stride + (quad.patch - sample.begin) * scored.patch_stride;
         const int64_t from = row + quad.element, to = quad.patch * elements + quad.element;
         Floats<4> x = fours ? load_numbers<4>(scored.prediction, scored.dtype, from)
                             : load_few(scored.prediction, scored.dtype, from, quad.count);
         float squares[4];
         for (int k = 0; k < 4; k++) {
           const float difference = k < quad.count ? x.x[k] - target_of(scored.target, sample, quad, k) : 0.0f;
           squares[k] = difference * difference;
           x.x[k] = 2.0f * weight * difference;
         }
         sum += (squares[0] + squares[1]) + (squares[2] + squares[3]);
         if (!scored.error) return;
         if (error_by_fours) store_four(scored.error, scored.dtype, to, x);
         else store_few(scored.error, scored.dtype, to, quad.count, x);
       });
  sum = sum_of_block<kThreads>(sum);
  if (ptx::thread_x() == 0) {
    const uint32_t blocks = static_cast<uint32_t>(samples.batch) * parts;
    scored.sums[b * parts + ptx::block_y()] = sum;
    *last = ptx::last_to_arrive(counters + scored.counter, blocks);
  }
  ptx::sync_block();
  if (!*last) return;
  const double all = sum_of_block<kThreads>(finish_samples(samples, parts, scored));
  if (ptx::thread_x() == 0) *scored.mean = static_cast<float>(all / static_cast<double>(samples.batch));
}

struct Scaled {
  const void* error;
  const int32_t* cu_patches;
  const float *grad_mean, *grad_per_sample;
  int64_t grad_stride, batch, total, elements;
  int dtype;
  void* gradient;
};

KERNEL(kThreads)
scale(const Scaled s, uint32_t parts) {
  const int64_t b = ptx::block_x(), each = s.total / s.batch;
  const int64_t begin = clamp(s.cu_patches ? s.cu_patches[b] : each * b, 0, s.total);
  const int64_t end = clamp(s.cu_patches ? s.cu_patches[b + 1] : each * (b + 1), begin, s.total);
  const int64_t first = begin * s.elements, count = (end - begin) * s.elements;
  const float factor = (*s.grad_mean / static_cast<float>(s.batch) + s.grad_per_sample[b * s.grad_stride]) /
                       static_cast<float>(count);
  const bool fours = by_fours(s.error, s.dtype, s.elements) && by_fours(s.gradient, s.dtype, s.elements);
  const int64_t start = int64_t{ptx::block_y()} * kThreads + ptx::thread_x(), step = int64_t{parts} * kThreads;
  if (fours) {
    for (int64_t i = first + 4 * start; i < first + count; i += 4 * step) {
      Floats<4> x = load_numbers<4>(s.error, s.dtype, i);
      for (int k = 0; k < 4; k++) x.x[k] *= factor;
      store_four(s.gradient, s.dtype, i, x);
    }
  } else {
    for (int64_t i = first + start; i < first + count; i += step)
      store_few(s.gradient, s.dtype, i, 1, {{factor * load_numbers<1>(s.error, s.dtype, i).x[0]}});
  }
}

} // namespace
} // namespace visible
} // namespace maskdiff

using namespace maskdiff;
using namespace maskdiff::visible;

int64_t maskdiff_cuda_denoising_loss_workspace(const maskdiff_samples* samples) {
  return countable(*samples) ? samples->batch * parts_of(*samples, kScoringBlocks, kMostSums) : 0;
}

int maskdiff_cuda_denoising_loss(const maskdiff_samples* samples, const void* prediction, int64_t sample_stride,
                                 int64_t patch_stride, int dtype, int target, const float* weight, float* mean,
                                 float* per_sample, void* error, double* workspace, int counter, int device, void* stream) {
  if (!is_dtype(dtype) || target < MASKDIFF_EPS || target > MASKDIFF_V) return MASKDIFF_BAD_OPTION;
  if (!countable(*samples) || !samples->alpha_sigma || counter < 0 || counter >= MASKDIFF_CUDA_COUNTERS)
    return MASKDIFF_BAD_RANGE;
  OnDevice here(device);
  const uint32_t parts = parts_of(*samples, kScoringBlocks, kMostSums);
  const Scored scored{prediction, sample_stride, patch_stride, dtype,      target, weight,
                      error,      workspace,     mean,         per_sample, counter};
  return launch(score, {static_cast<unsigned>(samples->batch), parts}, kThreads, 0, stream, *samples, parts, scored);
}

int maskdiff_cuda_denoising_loss_backward(const void* error, const int32_t* cu_patches, const float* grad_mean,
                                          const float* grad_per_sample, int64_t grad_stride, int64_t batch,
                                          int64_t total, int64_t elements, int dtype, void* gradient, int device,
                                          void* stream) {
  if (!is_dtype(dtype)) return MASKDIFF_BAD_OPTION;
  if (batch < 1 || batch >= int64_t{1} << 31 || total < 0 || elements < 1) return MASKDIFF_BAD_RANGE;
  if (total == 0) return MASKDIFF_OK;
  OnDevice here(device);
  int64_t parts = over(over(total * elements, batch), 4 * kThreads);
  if (parts > kMostScaled) parts = kMostScaled;
  const Scaled scaled{error, cu_patches, grad_mean, grad_per_sample, grad_stride, batch, total, elements, dtype, gradient};
  return launch(scale, {static_cast<unsigned>(batch), static_cast<unsigned>(parts)}, kThreads, 0, stream, scaled,
                static_cast<uint32_t>(parts));
}
