// adamw_ema: a launch for the norm of the gradients, one for everything else.
//
// Two launches and not one: the update needs the norm of all gradients, and blocks that wait for each other would need a
// grid no larger than the GPU, and atomics. The first makes a sum of squares a block, for equal parts of the flat buffers;
// each block of the second adds those up again, at most 8 KB that the second-level cache holds: no third launch, the same
// bits on every GPU. Counts are written by the second alone, and read from copies that the first has made.
#include "common/adamw.h"
#include "cuda/numbers.cuh"
#include "maskdiff_kernels.h"

namespace maskdiff {
namespace adamw_ema {
namespace {

using namespace ISA;

constexpr unsigned kThreads = 256;
constexpr int64_t kChunk = 16384;       // elements of the flat buffers that a block updates
constexpr int64_t kSums = 1024;         // of squares, at most: as many blocks fill a GPU
constexpr int64_t kLeastOfASum = 4096;  // elements
constexpr int kMost = 512;              // segments of a launch: they travel with its parameters, 32 KB since CUDA 12.1

struct Segment {
  const void* grad;
  int64_t offset, size;
  int dtype, decays;
};

struct Segments { // some of the parameters, in order
  int count;
  int64_t begin, end; // where they lie in the flat buffers; begin: a multiple of kChunk
  Segment of[kMost];
};

struct Workspace { // in device memory
  double sums[kSums];
  float adam_step, ema_step; // before the update
};

template <int N>
struct Size {
  static constexpr int value = N;
};

// Calls body(Size<4 or 1>, segment, position in the flat buffers) so that all elements from begin (a multiple of 4) to end
// are taken once by the block's threads: by fours where gradients and flat buffers (`flats_aligned`) stand so.
template <class Body>
DEVICE void walk(const Segments& segments, int64_t begin, int64_t end, bool flats_aligned, Body body) {
  int s = 0;
  for (int after = segments.count; s < after;) { // the first segment that ends behind `begin`
    const int middle = (s + after) / 2;
    if (segments.of[middle].offset + segments.of[middle].size > begin) after = middle;
    else s = middle + 1;
  }
  for (; s < segments.count && segments.of[s].offset < end; s++) {
    const Segment& segment = segments.of[s];
    const int64_t from = segment.offset > begin ? segment.offset : begin;
    const int64_t last = segment.offset + segment.size;
    const int count = static_cast<int>((last < end ? last : end) - from);
    const bool whole = segment.dtype == MASKDIFF_FLOAT32;
    const bool fours = flats_aligned && segment.offset % 4 == 0 && aligned(segment.grad, whole ? 16 : 8);
    const int in_fours = fours ? count / 4 * 4 : 0, thread = static_cast<int>(ptx::thread_x());
    for (int i = 4 * thread; i < in_fours; i += 4 * kThreads) body(Size<4>{}, segment, from + i);
    for (int i = in_fours + thread; i < count; i += kThreads) body(Size<1>{}, segment, from + i);
  }
}

// A sum a block, of the squares of `part` elements' gradients: added to the sum that is there, or the first one.
KERNEL(kThreads)
add_squares(const maskdiff_adamw update, const Segments segments, int64_t part, bool first, Workspace* workspace) {
  const unsigned block = ptx::block_x(), thread = ptx::thread_x();
  const int64_t begin = segments.begin + block * part;
  double sum = 0;
  walk(segments, begin, begin + part, true, [&](auto size, const Segment& segment, int64_t at) {
    const auto gradients = load_numbers<decltype(size)::value>(segment.grad, segment.dtype, at - segment.offset);
    float squares = 0;
    for (const float x : gradients.x) squares += x * x;
    sum += squares;
  });
  sum = sum_of_block<kThreads>(sum);
  if (thread) return;
  workspace->sums[block] = first ? sum : workspace->sums[block] + sum;
  if (block == 0 && first) workspace->adam_step = *update.adam_step, workspace->ema_step = *update.ema_step;
}

template <int N>
DEVICE void update_elements(const maskdiff_adamw& update, const AdamFactors& factors, const Segment& segment, int64_t at) {
  const auto gradients = load_numbers<N>(segment.grad, segment.dtype, at - segment.offset);
  auto master = load<N>(update.master + at), exp_avg = load<N>(update.exp_avg + at);
  auto exp_avg_sq = load<N>(update.exp_avg_sq + at);
  const bool due = factors.to_ema[0] != 0.0f; // the same in all threads: else averages are not touched
  auto ema = due ? load<N>(update.ema + at) : Floats<N>{};
  const float keep = segment.decays ? factors.keep[1] : factors.keep[0];
  for (int k = 0; k < N; k++) {
    const AdamElement x = adamw(factors, keep, gradients.x[k], {master.x[k], exp_avg.x[k], exp_avg_sq.x[k]});
    master.x[k] = x.master, exp_avg.x[k] = x.exp_avg, exp_avg_sq.x[k] = x.exp_avg_sq;
    ema.x[k] += factors.to_ema[0] * (x.master - ema.x[k]);
  }
  store<N>(update.master + at, master), store<N>(update.exp_avg + at, exp_avg);
  store<N>(update.exp_avg_sq + at, exp_avg_sq);
  if (due) store<N>(update.ema + at, ema);
  if (due && update.ema2) {
    auto ema2 = load<N>(update.ema2 + at);
    for (int k = 0; k < N; k++) ema2.x[k] += factors.to_ema[1] * (master.x[k] - ema2.x[k]);
    store<N>(update.ema2 + at, ema2);
  }
  if (at >= update.low_size) return;
  Halves<N> low;
  for (int k = 0; k < N; k++)
    low.x[k] = update.low_dtype == MASKDIFF_BFLOAT16 ? to_bfloat16(master.x[k]) : to_float16(master.x[k]);
  uint16_t* to = static_cast<uint16_t*>(update.low) + at;
  if (at + N <= update.low_size) *reinterpret_cast<Halves<N>*>(to) = low;
  else
    for (int k = 0; k < N; k++) // the copy ends within these
      if (at + k < update.low_size) to[k] = low.x[k];
}

// A chunk a block. The last launch counts the update.
KERNEL(kThreads)
update_chunk(const maskdiff_adamw update, const maskdiff_adamw_numbers numbers, const Segments segments,
             bool flats_aligned, bool last, const Workspace* workspace, unsigned sums, float* norm, float* skipped) {
  SHARED(AdamFactors, shared_factors, 1);
  const unsigned thread = ptx::thread_x();
  double sum = 0;
  for (unsigned i = thread; i < sums; i += kThreads) sum += workspace->sums[i];
  sum = sum_of_block<kThreads>(sum);
  float value;
  const bool finite = finite_norm(sum, &value);
  if (thread == 0) {
    const float adam_step = workspace->adam_step, ema_step = workspace->ema_step;
    *shared_factors = adam_factors(numbers, update.hyper[0], update.hyper[1], value, adam_step, ema_step);
    if (last && ptx::block_x() == 0) {
      *norm = value, *skipped = finite ? 0.0f : 1.0f;
      if (finite) *update.adam_step = adam_step + 1.0f, *update.ema_step = ema_step + 1.0f;
    }
  }
  ptx::sync_block();
  if (!finite) return;
  const AdamFactors factors = *shared_factors;
  const int64_t begin = segments.begin + ptx::block_x() * kChunk;
  walk(segments, begin, begin + kChunk, flats_aligned, [&](auto size, const Segment& segment, int64_t at) {
    update_elements<decltype(size)::value>(update, factors, segment, at);
  });
}

bool flats_aligned(const maskdiff_adamw& a) {
  uintptr_t all = reinterpret_cast<uintptr_t>(a.master) | reinterpret_cast<uintptr_t>(a.exp_avg);
  all |= reinterpret_cast<uintptr_t>(a.exp_avg_sq) | reinterpret_cast<uintptr_t>(a.ema);
  all |= reinterpret_cast<uintptr_t>(a.ema2) | 2 * reinterpret_cast<uintptr_t>(a.low);
  return all % 16 == 0;
}

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; } // rounded up

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

Segments some_segments(const maskdiff_adamw& a, int64_t first) {
  Segments s{};
  s.count = static_cast<int>(least(a.segments - first, kMost));
  for (int i = 0; i < s.count; i++) {
    const int64_t from = first + i;
    s.of[i] = {a.grads[from], a.offsets[from], a.sizes[from], static_cast<int>(a.grad_dtypes[from]),
               static_cast<int>(a.decays[from])};
  }
  s.begin = s.of[0].offset / kChunk * kChunk;
  s.end = s.of[s.count - 1].offset + s.of[s.count - 1].size;
  return s;
}

} // namespace
} // namespace adamw_ema
} // namespace maskdiff

using namespace maskdiff;
using namespace maskdiff::adamw_ema;

int maskdiff_cuda_adamw_ema_workspace(void) {
  return static_cast<int>(over(sizeof(Workspace), sizeof(double)));
}

int maskdiff_cuda_adamw_ema(const maskdiff_adamw* update, const maskdiff_adamw_numbers* numbers, float* norm,
                            float* skipped, double* workspace, int device, void* stream) {
  if (!is_dtype(update->low_dtype) || (update->low_size && update->low_dtype == MASKDIFF_FLOAT32))
    return MASKDIFF_BAD_OPTION;
  for (int64_t s = 0; s < update->segments; s++)
    if (!is_dtype(update->grad_dtypes[s])) return MASKDIFF_BAD_OPTION;
  if (numbers->ema_every < 1) return MASKDIFF_BAD_OPTION;
  if (update->segments == 0) return MASKDIFF_BAD_RANGE;
  OnDevice here(device);
  Workspace* const space = reinterpret_cast<Workspace*>(workspace);
  const int64_t size = update->offsets[update->segments - 1] + update->sizes[update->segments - 1];
  const auto sums = static_cast<unsigned>(least(kSums, over(size, kLeastOfASum)));
  for (int64_t s = 0; s < update->segments; s += kMost) {
    const Segments segments = some_segments(*update, s);
    const int64_t part = over(over(segments.end - segments.begin, sums), 4) * 4;
    const int code = launch(add_squares, {sums}, kThreads, 0, stream, *update, segments, part, s == 0, space);
    if (code) return code;
  }
  for (int64_t s = 0; s < update->segments; s += kMost) {
    const Segments segments = some_segments(*update, s);
    const auto chunks = static_cast<unsigned>(over(segments.end - segments.begin, kChunk));
    const bool last = s + kMost >= update->segments;
    const int code = launch(update_chunk, {chunks}, kThreads, 0, stream, *update, *numbers, segments,
                            flats_aligned(*update), last, space, sums, norm, skipped);
    if (code) return code;
  }
  return MASKDIFF_OK;
}
