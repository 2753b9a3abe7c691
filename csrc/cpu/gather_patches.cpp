// gather_patches: copies the visible patches of packed images as they are stored, for a step that is still to come.
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cpu/ops.h"
#include "cpu/visible.h"

namespace maskdiff {
namespace ISA {

// Has the system read what sample b shows, where it lies in a mapped file and not yet in memory. Waits for nothing.
static void announce(const maskdiff_samples* s, int64_t b, uintptr_t page) {
  int64_t first = s->rows, last = -1;
  for (int64_t j = first_visible(s, b); j < first_visible(s, b + 1); j++) {
    const int64_t row = pixel_row(s, j, s->keep_ids[j], s->flip[b] != 0);
    first = row < first ? row : first;
    last = row > last ? row : last;
  }
  if (last < 0) return;
  const uintptr_t image = (uintptr_t)(s->patches + s->image_ids[b] * s->stride);
  const uintptr_t begin = (image + first * patch_elements(s)) / page * page;
  madvise((void*)begin, image + (last + 1) * patch_elements(s) - begin, MADV_WILLNEED);  // advice: may be refused
}

// On one thread: a page that is not there stalls it alone, and what there is to copy is less than waking others costs.
int gather_patches(const maskdiff_samples* s, uint8_t* out) {
  if (!in_range(s)) return MASKDIFF_BAD_RANGE;
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  for (int64_t b = 0; b < s->batch; b++) announce(s, b, page);  // all reads are under way before the first is needed
  const int64_t elements = patch_elements(s);
  for (int64_t b = 0; b < s->batch; b++) {
    const uint8_t* image = s->patches + s->image_ids[b] * s->stride;
    for (int64_t j = first_visible(s, b); j < first_visible(s, b + 1); j++) {
      const int64_t row = pixel_row(s, j, s->keep_ids[j], s->flip[b] != 0);
      memcpy(out + j * elements, image + row * elements, (size_t)elements);
    }
  }
  return MASKDIFF_OK;
}

}  // namespace ISA
}  // namespace maskdiff
