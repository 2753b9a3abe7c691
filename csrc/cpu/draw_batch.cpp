// draw_batch: which images, patches, flips, timesteps and labels the samples of a batch use.
#include <stdlib.h>

#include "cpu/ops.h"
#include "cpu/philox_vector.h"

namespace maskdiff {
namespace ISA {

static inline uint32_t element(uint64_t seed, uint64_t n, uint32_t purpose, uint32_t e) {
  return word_of(philox(seed, n, purpose, e / 4), e % 4);
}

// words[e] for e in [0, count), rounded up to whole blocks and then to BLOCKS_AT_ONCE of them: room for 31 more.
static void fill_words(uint64_t seed, uint64_t n, uint32_t purpose, int64_t count, uint32_t* words) {
  constexpr int WINDOW = 64;  // blocks
  alignas(64) uint32_t blocks[WINDOW], even[2 * WINDOW], odd[2 * WINDOW];
  for (int64_t first = 0; 4 * first < count; first += WINDOW) {
    const int64_t left = (count + 3) / 4 - first;
    int taken = left < WINDOW ? (int)left : WINDOW;
    while (taken % BLOCKS_AT_ONCE) taken++;
    for (int i = 0; i < taken; i++) blocks[i] = (uint32_t)(first + i);
    philox_blocks(seed, n, purpose, blocks, taken, even, odd);
    for (int i = 0; i < 2 * taken; i++) {
      words[4 * first + 2 * i] = even[i];
      words[4 * first + 2 * i + 1] = odd[i];
    }
  }
}

// The position, in the order of n's epoch, of sample n: 8 Feistel rounds on two digits of base ceil(sqrt(images)), walked
// until the result is in range.
static uint64_t shuffled(uint64_t seed, uint64_t n, uint64_t images, uint64_t base) {
  const uint64_t epoch = n / images;
  uint64_t x = n % images;
  do {
    uint64_t left = x / base, right = x % base;
    for (uint32_t round = 0; round < 8; round++) {
      const Words words = philox(seed, epoch, ORDER, (uint32_t)(2 * right + round / 4));
      const uint64_t mixed = (left + high_word(word_of(words, round % 4), base)) % base;
      left = right;
      right = mixed;
    }
    x = base * left + right;
  } while (x >= images);
  return x;
}

static uint64_t ceil_root(uint64_t value) {
  uint64_t root = (uint64_t)__builtin_sqrt((double)value);
  while (root * root < value) root++;
  while (root > 1 && (root - 1) * (root - 1) >= value) root--;
  return root;
}

// The `wanted`-th smallest of words[0 .. count), and how many words below it there are. Radix 256, high digits first.
static uint32_t smallest(const uint32_t* words, int64_t count, int64_t wanted, int64_t* below) {
  uint32_t prefix = 0, known = 0;
  *below = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < count; i++) histogram[words[i] >> shift & 255] += (words[i] & known) == prefix;
    uint32_t digit = 0;
    while (*below + histogram[digit] < wanted) *below += histogram[digit++];
    prefix |= digit << shift;
    known |= 255u << shift;
  }
  return prefix;
}

// chosen[i] = 1 for the `wanted` smallest of (words[i], i), else 0.
static void choose(const uint32_t* words, int64_t count, int64_t wanted, uint8_t* chosen) {
  int64_t below;
  const uint32_t last = smallest(words, count, wanted, &below);
  int64_t equal = wanted - below;  // of those that equal the last, the first so many
  for (int64_t i = 0; i < count; i++) {
    chosen[i] = words[i] < last || (words[i] == last && equal > 0);
    equal -= words[i] == last;
  }
}

static void visible_crop(const maskdiff_draw* d, uint64_t n, int64_t count, int32_t* ids) {
  int64_t side = 1;
  while (side * side < count) side++;
  const Words words = philox((uint64_t)d->seed[0], n, MASK, 0);
  const int64_t row = (int64_t)high_word(words.a, (uint64_t)(d->grid_down - side + 1));
  const int64_t column = (int64_t)high_word(words.b, (uint64_t)(d->grid_across - side + 1));
  for (int64_t i = 0; i < side; i++) {
    for (int64_t j = 0; j < side; j++) *ids++ = (int32_t)((row + i) * d->grid_across + column + j);
  }
}

// Blocks of side x side patches, `count` patches in all. scratch: words and flags of all blocks.
static void visible_blocks(const maskdiff_draw* d, uint64_t n, int64_t side, int64_t count, uint32_t* words,
                           uint8_t* chosen, int32_t* ids) {
  const int64_t wide = d->grid_across / side, blocks = d->grid_down / side * wide;
  fill_words((uint64_t)d->seed[0], n, MASK, blocks, words);
  choose(words, blocks, count / (side * side), chosen);
  for (int64_t row = 0; row < d->grid_down; row++) {
    for (int64_t block = 0; block < wide; block++) {
      if (!chosen[row / side * wide + block]) continue;
      for (int64_t j = 0; j < side; j++) *ids++ = (int32_t)(row * d->grid_across + block * side + j);
    }
  }
}

// Sample i of a group gets the count whose key (word << 32 | index) is the i-th smallest.
static void share_counts(const maskdiff_draw* d, const uint32_t* words, int32_t* cu_patches) {
  for (int64_t i = 0; i < d->group; i++) {
    int64_t rank = 0;
    for (int64_t j = 0; j < d->group; j++) rank += words[j] < words[i] || (words[j] == words[i] && j < i);
    cu_patches[rank + 1] = (int32_t)d->counts[i];
  }
}

static int fill_cu_patches(const maskdiff_draw* d) {
  uint32_t* words = (uint32_t*)malloc((size_t)(d->group + 32) * sizeof(uint32_t));
  if (!words) return MASKDIFF_NO_MEMORY;
  d->cu_patches[0] = 0;
  for (int64_t b = 0; b < d->batch; b += d->group) {
    fill_words((uint64_t)d->seed[0], (uint64_t)d->n[b], RAGGED, d->group, words);
    share_counts(d, words, d->cu_patches + b);
  }
  for (int64_t b = 0; b < d->batch; b++) d->cu_patches[b + 1] += d->cu_patches[b];
  free(words);
  return MASKDIFF_OK;
}

static void draw_sample(const maskdiff_draw* d, uint64_t base, int64_t b, uint32_t* words, uint8_t* chosen) {
  const uint64_t seed = (uint64_t)d->seed[0], n = (uint64_t)d->n[b];
  const int64_t position = (int64_t)shuffled(seed, n, (uint64_t)d->images, base);
  d->image_ids[b] = d->ids ? d->ids[position] : position;
  d->mirrored[b] = element(seed, n, FLIP, 0) < (uint64_t)d->flip;
  d->timestep[b] = (int64_t)high_word(element(seed, n, TIMESTEP, 0), (uint64_t)d->timesteps);
  d->drop_label[b] = element(seed, n, LABEL_DROPOUT, 0) < (uint64_t)d->label_dropout;
  const int64_t first = d->group > 1 ? d->cu_patches[b] : b * d->counts[0];
  const int64_t count = d->group > 1 ? d->cu_patches[b + 1] - first : d->counts[0];
  int32_t* ids = d->keep_ids + first;
  if (d->kind == MASKDIFF_DENSE) {
    for (int64_t i = 0; i < count; i++) ids[i] = (int32_t)i;
  } else if (d->kind == MASKDIFF_CROP) {
    visible_crop(d, n, count, ids);
  } else {
    visible_blocks(d, n, d->kind == MASKDIFF_BLOCK ? d->size : 1, count, words, chosen, ids);
  }
}

int draw_batch(const maskdiff_draw* d, int threads) {
  if (d->kind < MASKDIFF_DENSE || d->kind > MASKDIFF_CROP) return MASKDIFF_BAD_OPTION;
  if (d->group > 1 && fill_cu_patches(d) != MASKDIFF_OK) return MASKDIFF_NO_MEMORY;
  const uint64_t base = ceil_root((uint64_t)d->images);
  const size_t patches = (size_t)(d->grid_down * d->grid_across);
  int error = MASKDIFF_OK;
#pragma omp parallel num_threads(threads)
  {
    void* scratch = malloc((patches + 32) * (sizeof(uint32_t) + 1));
    uint32_t* words = (uint32_t*)scratch;
    if (!scratch) {
#pragma omp atomic write
      error = MASKDIFF_NO_MEMORY;
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < d->batch; b++) {
      if (scratch) draw_sample(d, base, b, words, (uint8_t*)(words + patches + 32));
    }
    free(scratch);
  }
  return error;
}

}  // namespace ISA
}  // namespace maskdiff
