// Walks over the visible elements of a sample, their pixels and noise at hand: what noisy_patches and denoising_loss share.
//
// A thread takes four elements at a time, a quad: as many normals as one block of counted randomness gives. Neighbouring
// threads read neighbouring words and write neighbouring vectors; where a patch is flipped they read single bytes, all of
// them within the same lines. Nothing depends on which block or thread takes a quad.
#pragma once
#include "common/normals.h"
#include "common/philox.h"
#include "common/samples.h"
#include "cuda/numbers.cuh"

namespace maskdiff {
namespace visible {

using namespace ISA;

constexpr unsigned kThreads = 256;

struct Sample { // the same for all threads of a block
  int64_t begin;        // its first visible patch
  uint32_t patches;     // visible
  const uint8_t* image; // null: a number of the sample is out of range
  uint64_t seed, n;
  float alpha, sigma;
  bool flip;
};

struct Quad {
  int64_t patch;    // 0 .. M - 1
  uint32_t element; // the first, of the patch
  int count;        // 4, or fewer at the end of a patch that 4 does not divide
  float x0[4], eps[4];
};

DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

DEVICE Sample sample_of(const maskdiff_samples& s, int64_t b) {
  Sample sample{};
  sample.begin = clamp(first_visible(&s, b), 0, s.total);
  sample.patches = static_cast<uint32_t>(clamp(first_visible(&s, b + 1), sample.begin, s.total) - sample.begin);
  const int64_t image = s.image_ids[b], t = s.alpha_sigma ? s.timestep[b] : 0;
  const bool in_range = image >= 0 && image < s.images && t >= 0 && (!s.alpha_sigma || t < s.timesteps);
  if (in_range) sample.image = s.patches + image * s.stride;
  if (in_range && s.alpha_sigma) sample.alpha = s.alpha_sigma[2 * t], sample.sigma = s.alpha_sigma[2 * t + 1];
  sample.seed = static_cast<uint64_t>(*s.seed), sample.n = static_cast<uint64_t>(s.n[b]);
  sample.flip = s.flip[b] != 0;
  return sample;
}

struct alignas(4) Bytes {
  uint8_t x[4];
};

// The bytes of a quad; `words`: they stand as an aligned word.
DEVICE Bytes load_bytes(const maskdiff_samples& s, const uint8_t* pixels, const Quad& quad, bool flip, bool words) {
  if (words && !flip) return *reinterpret_cast<const Bytes*>(pixels + quad.element);
  Bytes bytes = {};
  const uint32_t channels = static_cast<uint32_t>(s.channels), row = static_cast<uint32_t>(s.patch) * channels;
  Mirrored at = mirrored_from(quad.element, row, channels);
  for (int k = 0; k < 4; k++) {
    const uint32_t mirrored = next_mirrored(&at, row, channels);
    if (k < quad.count) bytes.x[k] = pixels[flip ? mirrored : quad.element + k];
  }
  return bytes;
}

// Calls visit(quad) for the quads of one part of a sample, each by one thread. Where a number is out of range, pixels and
// noise are NaN and no memory is touched.
template <class Visit>
DEVICE void walk(const maskdiff_samples& s, const Sample& sample, uint32_t part, uint32_t parts, bool with_pixels,
                 bool with_noise, Visit visit) {
  const uint32_t elements = static_cast<uint32_t>(patch_elements(&s)), per_patch = noise_blocks(elements);
  const bool words = aligned(s.patches, 4) && s.stride % 4 == 0 && elements % 4 == 0;
  const uint32_t quads = sample.patches * per_patch;
  for (uint32_t q = part * kThreads + ptx::thread_x(); q < quads; q += parts * kThreads) {
    const uint32_t block = q % per_patch, left = elements - 4 * block;
    Quad quad{sample.begin + q / per_patch, 4 * block, left < 4 ? static_cast<int>(left) : 4, {}, {}};
    const int32_t place = s.keep_ids[quad.patch];
    bool there = sample.image && place >= 0 && place < s.grid_down * s.grid_across;
    if (there && with_pixels) {
      const int64_t row = pixel_row(&s, quad.patch, place, sample.flip);
      there = row >= 0 && row < s.rows;
      if (there) {
        const Bytes bytes = load_bytes(s, sample.image + row * elements, quad, sample.flip, words);
        for (int k = 0; k < 4; k++) quad.x0[k] = normalised(bytes.x[k]);
      }
    }
    if (there && with_noise) {
      const Words words_of_block = philox(sample.seed, sample.n, NOISE, static_cast<uint32_t>(place) * per_patch + block);
      const Pair first = normal_pair(words_of_block.a, words_of_block.b);
      const Pair second = normal_pair(words_of_block.c, words_of_block.d);
      quad.eps[0] = first.x, quad.eps[1] = first.y, quad.eps[2] = second.x, quad.eps[3] = second.y;
    }
    for (int k = 0; k < 4 && !there; k++) quad.x0[k] = quad.eps[k] = float_of(0x7FC00000u);
    visit(quad);
  }
}

// Whether the kernels count so far.
inline bool countable(const maskdiff_samples& s) {
  const int64_t elements = patch_elements(&s), most = (int64_t{1} << 31) - 1;
  if (elements < 1 || elements > 65535 || s.batch < 1 || s.batch > most || s.total < 0) return false;
  return s.total <= most / noise_blocks(static_cast<uint32_t>(elements));
}

inline int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; } // rounded up

// Blocks a sample, `most` at most: about `blocks` in all where there is so much to do, and all with the same turns to take.
inline uint32_t parts_of(const maskdiff_samples& s, int64_t blocks, int64_t most) {
  const int64_t quads = over(s.total * noise_blocks(static_cast<uint32_t>(patch_elements(&s))), s.batch);
  int64_t parts = over(blocks, s.batch);
  if (parts > most) parts = most;
  const int64_t turns = over(quads, parts * kThreads);
  return static_cast<uint32_t>(turns > 0 ? over(quads, turns * kThreads) : 1);
}

} // namespace visible
} // namespace maskdiff
