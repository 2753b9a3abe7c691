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

// Walks over the elements of a patch: where, before flipping, stands what a flip brings to each of them.
struct Mirrored {
  uint32_t element, channel;
  uint32_t column;  // elements of its row of pixels that stand before its pixel
};

// row: elements in a row of pixels, P*C
MASKDIFF_HD Mirrored mirrored_from(uint32_t element, uint32_t row, uint32_t channels) {
  const uint32_t in_row = element % row, channel = in_row % channels;
  return {element, channel, in_row - channel};
}

MASKDIFF_HD uint32_t next_mirrored(Mirrored* at, uint32_t row, uint32_t channels) {
  const uint32_t source = at->element + (row - channels) - 2 * at->column;
  at->element++;
  if (++at->channel == channels) {
    at->channel = 0;
    at->column = at->column + channels == row ? 0 : at->column + channels;
  }
  return source;
}

// A byte of a packed image in [-1, 1].
MASKDIFF_HD float normalised(uint8_t byte) { return (float)(int32_t)byte * (float)(2.0 / 255.0) - 1.0f; }

}  // namespace ISA
}  // namespace maskdiff
