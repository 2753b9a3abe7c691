// One small kernel for every wrapper in csrc/cuda/ptx.cuh. Each writes what it got as plain words, which the tests compare
// with tables of their own: under the emulator here, bit for bit on a GPU when one is there.
#include "cuda/launch.cuh"

using namespace maskdiff;
using namespace maskdiff::ptx;

#define ENTRY extern "C" __attribute__((visibility("default")))

namespace {

// Fragments as they come: a [tests, 32, 4], b [tests, 32, 2], d [tests, 32, 4], one block of one warp a test.
template <bool bf16>
KERNEL(32) multiply(const uint32_t* a, const uint32_t* b, float* d) {
  unsigned at = block_x() * 32 + thread_x();
  uint32_t fa[4] = {a[4 * at], a[4 * at + 1], a[4 * at + 2], a[4 * at + 3]}, fb[2] = {b[2 * at], b[2 * at + 1]};
  float fd[4] = {d[4 * at], d[4 * at + 1], d[4 * at + 2], d[4 * at + 3]};
  if (bf16) mma_bf16(fd, fa, fb);
  else mma_fp16(fd, fa, fb);
  for (int i = 0; i < 4; i++) d[4 * at + i] = fd[i];
}

// 32 rows of 8 elements, `stride` elements apart in shared memory; out [2, 32, 4]: as they stand and transposed.
KERNEL(32) load_matrices(const uint16_t* rows, int stride, uint32_t* out) {
  SHARED_POOL(pool);
  uint16_t* tile = pool.take<uint16_t>(32 * stride);
  for (int c = 0; c < 8; c++) tile[thread_x() * stride + c] = rows[thread_x() * 8 + c];
  sync_warp();
  uint32_t plain[4], transposed[4];
  load_matrix_x4(plain, tile + thread_x() * stride);
  load_matrix_x4_transposed(transposed, tile + thread_x() * stride);
  const uint32_t halves[2][2] = {{transposed[0], transposed[1]}, {transposed[2], transposed[3]}};
  store_words(out + thread_x() * 4, plain);
  for (int i = 0; i < 2; i++) store_words(out + 128 + thread_x() * 4 + 2 * i, halves[i]);
}

// in [32]; out [4, 32, 32]: shuffle from each lane, xor each number, up and down each distance; votes [33, 32]: one lane
// votes, then all those whose word is odd.
KERNEL(32) exchange(const uint32_t* in, uint32_t* out, uint32_t* votes) {
  unsigned lane = thread_x();
  uint32_t value = whole<uint32_t>(in + lane);
  for (unsigned i = 0; i < 32; i++) {
    out[(0 * 32 + i) * 32 + lane] = shuffle(value, i);
    out[(1 * 32 + i) * 32 + lane] = shuffle_xor(value, i);
    out[(2 * 32 + i) * 32 + lane] = shuffle_up(value, i);
    out[(3 * 32 + i) * 32 + lane] = shuffle_down(value, i);
    votes[i * 32 + lane] = vote(lane == i);
  }
  votes[32 * 32 + lane] = vote(value & 1);
}

// Every thread copies `rounds` vectors of 16 bytes through two halves of shared memory, one round ahead; its neighbour's
// reach out. valid [rounds]: 0 leaves zeros.
KERNEL(256) copy_ahead(const uint32_t* in, const int* valid, int rounds, uint32_t* out) {
  SHARED(uint32_t, halves, 2 * 256 * 4);
  unsigned t = thread_x(), n = threads(), neighbour = (t + 33) % n;
  const uint32_t* from = in + block_x() * rounds * n * 4;
  uint32_t* to = out + block_x() * rounds * n * 4;
  copy_async16(halves + t * 4, from + t * 4, valid[0]);
  copy_commit();
  for (int r = 0; r < rounds; r++) {
    if (r + 1 < rounds) copy_async16(halves + ((r + 1) % 2 * n + t) * 4, from + ((r + 1) * n + t) * 4, valid[r + 1]);
    copy_commit();
    copy_wait<1>();
    sync_block();
    for (int i = 0; i < 4; i++) to[(r * n + t) * 4 + i] = halves[(r % 2 * n + neighbour) * 4 + i];
    sync_block();
  }
  copy_wait<0>();
}

// y [4, n]: 2^x as bits, x and -x packed as bf16, as fp16; the i-th fp16 widened, as bits.
KERNEL(128) convert(const float* x, uint32_t* y, int n) {
  unsigned i = block_x() * threads() + thread_x();
  if (i >= static_cast<unsigned>(n)) return;
  union {
    float f;
    uint32_t bits;
  } power = {exp2_fast(x[i])}, wide = {widen_fp16(static_cast<uint16_t>(i))};
  y[i] = power.bits;
  y[n + i] = pack_bf16(x[i], -x[i]);
  y[2 * n + i] = pack_fp16(x[i], -x[i]);
  y[3 * n + i] = wide.bits;
}

// in, out [down, across, threads]: the sum over the block up to and with each thread. Warp scans by shuffles, their totals
// through shared memory.
KERNEL(1024) scan(const uint32_t* in, uint32_t* out) {
  SHARED(uint32_t, totals, 32);
  unsigned t = thread_x(), lane = t % 32, warp = t / 32;
  unsigned at = (block_y() * blocks_x() + block_x()) * threads() + t;
  uint32_t sum = in[at];
  for (unsigned d = 1; d < 32; d *= 2) {
    uint32_t other = shuffle_up(sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) totals[warp] = sum;
  sync_block();
  for (unsigned w = 0; w < warp; w++) sum += totals[w];
  out[at] = sum;
}

ZEROED(uint32_t, arrivals, 4);

// in [blocks] reaches all [blocks]; the last block adds that up to *sum.
KERNEL(64) add_up(const uint32_t* in, uint32_t* all, int counter, uint32_t* sum) {
  SHARED(uint32_t, last, 1);
  if (thread_x() == 0) {
    all[block_x()] = in[block_x()];
    *last = last_to_arrive(arrivals + counter, blocks_x());
  }
  sync_block();
  if (!*last || thread_x() != 33) return;
  *sum = 0;
  for (unsigned b = 0; b < blocks_x(); b++) *sum += all[b];
}

} // namespace

ENTRY int wrapper_multiply(int bf16, const uint32_t* a, const uint32_t* b, float* d, int tests, void* stream) {
  if (bf16) return launch(multiply<true>, {static_cast<unsigned>(tests)}, 32, 0, stream, a, b, d);
  return launch(multiply<false>, {static_cast<unsigned>(tests)}, 32, 0, stream, a, b, d);
}
ENTRY int wrapper_load_matrices(const uint16_t* rows, int stride, uint32_t* out, void* stream) {
  return launch(load_matrices, {1}, 32, 64 * static_cast<size_t>(stride), stream, rows, stride, out);
}
ENTRY int wrapper_exchange(const uint32_t* in, uint32_t* out, uint32_t* votes, void* stream) {
  return launch(exchange, {1}, 32, 0, stream, in, out, votes);
}
ENTRY int wrapper_copy_ahead(const uint32_t* in, const int* valid, int blocks, int threads, int rounds, uint32_t* out,
                             void* stream) {
  return launch(copy_ahead, {static_cast<unsigned>(blocks)}, static_cast<unsigned>(threads), 0, stream, in, valid, rounds,
                out);
}
ENTRY int wrapper_convert(const float* x, uint32_t* y, int n, void* stream) {
  return launch(convert, {static_cast<unsigned>((n + 127) / 128)}, 128, 0, stream, x, y, n);
}
ENTRY int wrapper_scan(const uint32_t* in, uint32_t* out, int across, int down, int threads, void* stream) {
  return launch(scan, {static_cast<unsigned>(across), static_cast<unsigned>(down)}, static_cast<unsigned>(threads), 0,
                stream, in, out);
}
ENTRY int wrapper_add_up(const uint32_t* in, uint32_t* all, int blocks, int counter, uint32_t* sum, void* stream) {
  return launch(add_up, {static_cast<unsigned>(blocks)}, 64, 0, stream, in, all, counter, sum);
}
