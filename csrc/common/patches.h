// Where the pixels and the noise of a patch are. Indices are those of the picture after flipping.
#pragma once

#include "portable.h"

namespace maskdiff {
namespace ISA {

// Blocks of four elements in the noise of a patch; patch p owns those from p times this.
MASKDIFF_HD uint32_t noise_blocks(uint32_t elements) { return (elements + 3) / 4; }

// The place, before flipping, of the patch that stands at `place` in the picture.
MASKDIFF_HD uint32_t source_patch(uint32_t place, uint32_t across, bool flip) {
  const uint32_t column = place % across;
  return flip ? place - column + (across - 1 - column) : place;
}

// The element (row, column, channel), before flipping, that a flip brings to element e of its patch.
MASKDIFF_HD uint32_t mirrored_element(uint32_t e, uint32_t patch, uint32_t channels) {
  const uint32_t pixel = e / channels, column = pixel % patch;
  return (pixel - column + (patch - 1 - column)) * channels + e % channels;
}

// A byte of a packed image in [-1, 1].
MASKDIFF_HD float normalised(uint8_t byte) { return (float)(int32_t)byte * (float)(2.0 / 255.0) - 1.0f; }

}  // namespace ISA
}  // namespace maskdiff
