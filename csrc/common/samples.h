// What the samples of a batch are made of, and the formulas that bring pixels and noise together; the same on CPU and GPU.
#pragma once

#include "maskdiff_kernels.h"
#include "patches.h"

namespace maskdiff {
namespace ISA {

MASKDIFF_HD int64_t patch_elements(const maskdiff_samples* s) { return s->patch * s->patch * s->channels; }

// The first visible patch of sample b, 0 .. M.
MASKDIFF_HD int64_t first_visible(const maskdiff_samples* s, int64_t b) {
  return s->cu_patches ? s->cu_patches[b] : b * s->visible;
}

// The row, of its sample's image, that holds visible patch j; it stands at `place` in the picture.
MASKDIFF_HD int64_t pixel_row(const maskdiff_samples* s, int64_t j, int32_t place, bool flip) {
  return s->slots ? s->slots[j] : source_patch((uint32_t)place, (uint32_t)s->grid_across, flip);
}

// x_t. Source: Ho et al., arXiv 2006.11239, equation 4.
MASKDIFF_HD float noised(float alpha, float sigma, float x0, float eps) { return alpha * x0 + sigma * eps; }

// Source: Salimans and Ho, arXiv 2202.00512.
MASKDIFF_HD float velocity(float alpha, float sigma, float x0, float eps) { return alpha * eps - sigma * x0; }

}  // namespace ISA
}  // namespace maskdiff
