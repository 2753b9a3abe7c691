// noisy_patches: gathers the visible patches of packed images, normalises them and adds noise.
#include "cpu/convert.h"
#include "cpu/ops.h"
#include "cpu/visible.h"

namespace maskdiff {
namespace ISA {

int noisy_patches(const maskdiff_samples* s, void* out, int dtype, int threads) {
  if (!is_dtype(dtype)) return MASKDIFF_BAD_OPTION;
  if (!in_range(s)) return MASKDIFF_BAD_RANGE;
  Mirror mirror;
  fill_mirror(&mirror, s);
  const int64_t elements = patch_elements(s), tasks = tasks_per_sample(s);
  const bool noisy = s->alpha_sigma != 0;
#pragma omp parallel for collapse(2) schedule(static) num_threads(useful_threads(s->total * elements, threads))
  for (int64_t b = 0; b < s->batch; b++) {
    for (int64_t task = 0; task < tasks; task++) {
      const float alpha = noisy ? s->alpha_sigma[2 * s->timestep[b]] : 1.0f;
      const float sigma = noisy ? s->alpha_sigma[2 * s->timestep[b] + 1] : 0.0f;
      walk_task(s, &mirror, noisy, b, task, [&](Run run) {
        alignas(64) float x[WINDOW_ELEMENTS];
        if (noisy) {
#pragma omp simd
          for (int i = 0; i < run.count; i++) x[i] = noised(alpha, sigma, normalised(run.pixels[i]), run.noise[i]);
        } else {
#pragma omp simd
          for (int i = 0; i < run.count; i++) x[i] = normalised(run.pixels[i]);
        }
        store_floats(out, dtype, run.patch * elements + run.first, run.count, x);
      });
    }
  }
  return MASKDIFF_OK;
}

}  // namespace ISA
}  // namespace maskdiff
