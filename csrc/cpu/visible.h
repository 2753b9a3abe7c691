// Walks over the visible elements of a batch, with their pixels and noise at hand: what noisy_patches and denoising_loss
// share. Work is cut into windows whose size depends on nothing but the shape of a patch, so that sums made window by
// window are the same for every instruction set and thread count.
#pragma once

#include "common/normals.h"
#include "common/samples.h"
#include "cpu/philox_vector.h"
#include "cpu/threads.h"
#include "maskdiff_kernels.h"

namespace maskdiff {
namespace ISA {

constexpr int WINDOW_BLOCKS = 192;  // of four elements: what one window holds, 3 KB of noise
constexpr int WINDOW_ELEMENTS = 4 * WINDOW_BLOCKS;
constexpr int TASK_BLOCKS = 4 * WINDOW_BLOCKS;  // about what one thread takes at a time
constexpr int MAX_ELEMENTS = 65535;             // of a patch

// The element that stands at e of a flipped patch, for all e: a table, made once a call.
struct Mirror {
  uint16_t element[MAX_ELEMENTS];
};

static inline void fill_mirror(Mirror* mirror, const maskdiff_samples* s) {
  const uint32_t elements = (uint32_t)patch_elements(s), channels = (uint32_t)s->channels;
  const uint32_t row = (uint32_t)s->patch * channels;
  Mirrored at = mirrored_from(0, row, channels);
  for (uint32_t e = 0; e < elements; e++) mirror->element[e] = (uint16_t)next_mirrored(&at, row, channels);
}

// Patches of a sample that make one task, and how many tasks the longest sample has.
static inline int64_t task_patches(const maskdiff_samples* s) {
  const int64_t patches = TASK_BLOCKS / noise_blocks((uint32_t)patch_elements(s));
  return patches > 0 ? patches : 1;
}

static inline int64_t tasks_per_sample(const maskdiff_samples* s) {
  int64_t most = 0;
  for (int64_t b = 0; b < s->batch; b++) {
    const int64_t count = first_visible(s, b + 1) - first_visible(s, b);
    if (count > most) most = count;
  }
  const int64_t patches = task_patches(s);
  return (most + patches - 1) / patches;
}

static inline bool all_within(const int64_t* values, int64_t count, int64_t bound) {
  int bad = 0;
  for (int64_t i = 0; i < count; i++) bad |= values[i] < 0 || values[i] >= bound;
  return !bad;
}

static inline bool all_within(const int32_t* values, int64_t count, int64_t bound) {
  int bad = 0;
  for (int64_t i = 0; i < count; i++) bad |= values[i] < 0 || values[i] >= bound;
  return !bad;
}

// Whether offsets run from 0 to total and never fall.
static inline bool offsets_fit(const int32_t* offsets, int64_t batch, int64_t total) {
  int bad = offsets[0] != 0 || offsets[batch] != total;
  for (int64_t b = 0; b < batch; b++) bad |= offsets[b + 1] < offsets[b];
  return !bad;
}

static inline bool in_range(const maskdiff_samples* s) {
  return all_within(s->image_ids, s->batch, s->images) &&
         all_within(s->keep_ids, s->total, s->grid_down * s->grid_across) &&
         (!s->slots || all_within(s->slots, s->total, s->rows)) &&
         (!s->alpha_sigma || all_within(s->timestep, s->batch, s->timesteps)) &&
         (!s->cu_patches || offsets_fit(s->cu_patches, s->batch, s->total));
}

// Normals of the blocks blocks[0 .. count), in order. Room for a window in all of them.
static inline void fill_noise(uint64_t seed, uint64_t n, uint32_t* blocks, int count, float* normals) {
  alignas(64) uint32_t even[2 * WINDOW_BLOCKS], odd[2 * WINDOW_BLOCKS];
  while (count % BLOCKS_AT_ONCE) blocks[count++] = 0;
  philox_blocks(seed, n, NOISE, blocks, count, even, odd);
#pragma omp simd
  for (int i = 0; i < 2 * count; i++) {
    const Pair pair = normal_pair(even[i], odd[i]);
    normals[2 * i] = pair.x;
    normals[2 * i + 1] = pair.y;
  }
}

// A run of elements of one visible patch.
struct Run {
  int64_t patch;          // 0 .. M - 1
  int64_t first;          // element of the patch
  int count;              // elements
  int offset;             // where its elements stand in the window; up to 3 unused places lie between two runs
  bool last;              // of its window
  const uint8_t* pixels;  // [count] mirrored where the sample is flipped
  const float* noise;     // [count], rubbish where none was asked for
};

// Calls visit(run) for every run of elements of one task of sample b, in order.
template <class Visit>
static inline void walk_task(const maskdiff_samples* s, const Mirror* mirror, bool with_noise, int64_t b, int64_t task,
                             Visit visit) {
  alignas(64) uint32_t blocks[WINDOW_BLOCKS];
  alignas(64) float normals[WINDOW_ELEMENTS];
  uint8_t mirrored[WINDOW_ELEMENTS];
  const int64_t elements = patch_elements(s), per_patch = noise_blocks((uint32_t)elements);
  const int64_t begin = first_visible(s, b) + task * task_patches(s), end = first_visible(s, b + 1);
  const int64_t stop = begin + task_patches(s) < end ? begin + task_patches(s) : end;
  const bool flip = s->flip[b] != 0;
  const uint8_t* image = s->patches + s->image_ids[b] * s->stride;
  int64_t patch = begin, block = 0;  // where the next window starts
  while (patch < stop) {
    int64_t window_patch = patch, window_block = block;
    int filled = 0;
    while (filled < WINDOW_BLOCKS && patch < stop) {
      const int64_t left = per_patch - block, room = WINDOW_BLOCKS - filled, taken = left < room ? left : room;
      const uint32_t next = (uint32_t)(s->keep_ids[patch] * per_patch + block);
      for (int64_t i = 0; i < taken; i++) blocks[filled + i] = next + (uint32_t)i;
      filled += (int)taken;
      block = taken == left ? 0 : block + taken;
      patch += taken == left;
    }
    if (with_noise) fill_noise((uint64_t)s->seed[0], (uint64_t)s->n[b], blocks, filled, normals);
    for (int used = 0; used < filled;) {
      const int64_t left = per_patch - window_block;
      const int taken = left < filled - used ? (int)left : filled - used;
      const int64_t first = 4 * window_block, last = 4 * (window_block + taken);
      const int count = (int)((last < elements ? last : elements) - first);
      const int64_t row = pixel_row(s, window_patch, s->keep_ids[window_patch], flip);
      const uint8_t* pixels = image + row * elements;
      if (flip) {
        for (int i = 0; i < count; i++) mirrored[i] = pixels[mirror->element[first + i]];
      }
      const int offset = 4 * used;
      used += taken;
      visit(Run{window_patch, first, count, offset, used == filled, flip ? mirrored : pixels + first, normals + offset});
      window_patch++;
      window_block = 0;
    }
  }
}

}  // namespace ISA
}  // namespace maskdiff
