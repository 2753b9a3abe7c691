// noisy_patches: gathers the visible patches of packed images, normalises them and adds noise. One launch.
//
// Built without contraction to fused products and sums, so that a GPU gives the bits that a CPU gives.
#include "cuda/visible.cuh"

namespace maskdiff {
namespace visible {
namespace {

constexpr int64_t kBlocks = 2048; // twice what an H100 holds at a time, with 256 threads each
constexpr int64_t kMostParts = 65535;

KERNEL(kThreads)
gather_and_add_noise(const maskdiff_samples samples, uint32_t parts, void* out, int dtype) {
  const Sample sample = sample_of(samples, ptx::block_x());
  const int64_t elements = patch_elements(&samples);
  const bool noisy = samples.alpha_sigma != nullptr, fours = by_fours(out, dtype, elements);
  walk(samples, sample, ptx::block_y(), parts, true, noisy, [&](const Quad& quad) {
    Floats<4> x;
    for (int k = 0; k < 4; k++)
      x.x[k] = noisy ? noised(sample.alpha, sample.sigma, quad.x0[k], quad.eps[k]) : quad.x0[k];
    const int64_t to = quad.patch * elements + quad.element;
    if (fours) store_four(out, dtype, to, x);
    else store_few(out, dtype, to, quad.count, x);
  });
}

} // namespace
} // namespace visible
} // namespace maskdiff

using namespace maskdiff;
using namespace maskdiff::visible;

int maskdiff_cuda_noisy_patches(const maskdiff_samples* samples, void* out, int dtype, int device, void* stream) {
  if (!is_dtype(dtype)) return MASKDIFF_BAD_OPTION;
  if (!countable(*samples)) return MASKDIFF_BAD_RANGE;
  if (samples->total == 0) return MASKDIFF_OK;
  OnDevice here(device);
  const uint32_t parts = parts_of(*samples, kBlocks, kMostParts);
  return launch(gather_and_add_noise, {static_cast<unsigned>(samples->batch), parts}, kThreads, 0, stream, *samples,
                parts, out, dtype);
}
