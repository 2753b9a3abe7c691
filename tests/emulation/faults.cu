// Kernels with one fault each that a switch plants: what the emulator must notice, and must not see in the sound version.
// All read `in` [blocks, 64] and write `out` [blocks, 64], two warps a block. The sound ones compute what tests/emulation/
// test_faults.py says.
#include "cuda/launch.cuh"

using namespace maskdiff;
using namespace maskdiff::ptx;

namespace {

constexpr unsigned N = 64;

#define FAULT(name) \
  template <bool planted> \
  KERNEL(N) name(const uint32_t* in, uint32_t* out)

struct Place { // of this thread
  unsigned t = thread_x(), lane = t % 32, warp = t / 32, at = block_x() * N + t;
};

FAULT(no_block_barrier) { // each takes the value of its mirror
  Place p;
  SHARED(uint32_t, values, N);
  values[p.t] = in[p.at];
  if (!planted) sync_block();
  out[p.at] = values[N - 1 - p.t];
}

FAULT(no_warp_barrier) {
  Place p;
  SHARED(uint32_t, values, N);
  values[p.t] = in[p.at];
  if (!planted) sync_warp();
  out[p.at] = values[p.t ^ 31];
}

FAULT(shuffle_for_barrier) { // every lane waits in a shuffle, so the numbers come out right: yet nothing orders memory
  Place p;
  SHARED(uint32_t, values, N);
  values[p.t] = in[p.at];
  if (planted) shuffle(p.t, 0);
  else sync_warp();
  out[p.at] = values[p.t ^ 31];
}

FAULT(reuse_without_barrier) { // the second round overwrites what the first still reads
  Place p;
  SHARED(uint32_t, values, N);
  uint32_t sum = 0;
  for (unsigned round = 1; round <= 2; round++) {
    values[p.t] = in[p.at] * round;
    sync_block();
    sum += values[N - 1 - p.t];
    if (!planted) sync_block();
  }
  out[p.at] = sum;
}

FAULT(copy_not_awaited) {
  Place p;
  SHARED(uint32_t, values, N * 2);
  if (p.t < N / 4) copy_async16(values + 4 * p.t, in + block_x() * N + 4 * p.t);
  copy_commit();
  if (p.t < N / 4) copy_async16(values + N + 4 * p.t, in + block_x() * N + 4 * p.t);
  copy_commit();
  if (planted) copy_wait<1>();
  else copy_wait<0>();
  sync_block();
  out[p.at] = values[N + p.t];
  copy_wait<0>();
}

FAULT(copy_not_committed) {
  Place p;
  SHARED(uint32_t, values, N);
  if (p.t < N / 4) copy_async16(values + 4 * p.t, in + block_x() * N + 4 * p.t);
  if (!planted) copy_commit();
  copy_wait<0>();
  sync_block();
  out[p.at] = values[p.t];
}

FAULT(copy_read_early) { // the old bytes are the new ones: only who counts on neither notices
  Place p;
  SHARED(uint32_t, values, N);
  values[p.t] = in[p.at];
  sync_block();
  if (p.t < N / 4) copy_async16(values + 4 * p.t, in + block_x() * N + 4 * p.t);
  copy_commit();
  if (!planted) copy_wait<0>();
  sync_block();
  out[p.at] = values[p.t];
  copy_wait<0>();
}

FAULT(uninitialised_shared) { // in the first block the memory is fresh, in others it holds what a block before left
  Place p;
  SHARED(uint32_t, values, N);
  if (!planted || p.t % 2) values[p.t] = in[p.at];
  sync_block();
  out[p.at] = values[N - 1 - p.t];
}

FAULT(read_past_tensor) {
  Place p;
  unsigned last = (blocks_x() * N - 1);
  out[p.at] = in[p.at < last ? p.at + 1 : planted ? last + 1 : 0];
}

FAULT(store_past_shared) {
  Place p;
  SHARED(uint32_t, values, N);
  SHARED(uint32_t, others, N);
  values[p.t] = in[p.at];
  others[p.t] = p.t;
  sync_block();
  if (planted && p.t == N - 1) values[N] = 7; // between the arrays: no number changes
  sync_block();
  out[p.at] = values[others[N - 1 - p.t]];
}

FAULT(divergent_barrier) {
  Place p;
  if (planted && p.warp) {
    sync_block();
  } else {
    sync_block();
  }
  out[p.at] = in[p.at];
}

FAULT(early_exit) {
  Place p;
  out[p.at] = in[p.at];
  if (planted && p.t == 40) return;
  sync_block();
}

FAULT(half_warp_product) {
  Place p;
  uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
  float d[4] = {0, 0, 0, 0};
  if (!planted || p.lane < 16) mma_bf16(d, a, b);
  out[p.at] = in[p.at] + static_cast<uint32_t>(d[0]);
}

FAULT(two_collectives) {
  Place p;
  uint32_t value = in[p.at];
  if (planted && p.lane >= 16) vote(true);
  else value = shuffle_xor(value, 1);
  out[p.at] = value;
}

FAULT(misaligned_matrix) {
  Place p;
  SHARED(uint16_t, rows, 2 * 32 * 8 + 8);
  for (unsigned c = 0; c < 8; c++) rows[p.t * 8 + c] = static_cast<uint16_t>(in[p.at]);
  sync_block();
  uint32_t r[4];
  load_matrix_x4(r, rows + p.t * 8 + (planted ? 4 : 0));
  out[p.at] = r[0] & 0xFFFF;
}

FAULT(misaligned_copy) {
  Place p;
  SHARED(uint32_t, values, N);
  if (p.t < N / 4) copy_async16(values + 4 * p.t, in + block_x() * N + 4 * p.t + (planted && p.t == 0 ? 1 : 0));
  copy_commit();
  copy_wait<0>();
  sync_block();
  out[p.at] = values[p.t];
}

FAULT(copy_outside_shared) {
  Place p;
  SHARED(uint32_t, values, N);
  if (p.t < N / 4) copy_async16(values + 4 * p.t + (planted ? 4 : 0), in + block_x() * N + 4 * p.t);
  copy_commit();
  copy_wait<0>();
  sync_block();
  out[p.at] = values[p.t];
}

FAULT(pool_overrun) { // the launch gives N words
  Place p;
  SHARED_POOL(pool);
  uint32_t* values = pool.take<uint32_t>(planted ? N + 1 : N);
  values[p.t] = in[p.at];
  sync_block();
  out[p.at] = values[N - 1 - p.t];
}

FAULT(blocks_talk) { // a block reads what another block wrote
  Place p;
  out[p.at] = in[p.at];
  if (planted && block_x() && p.t == 0) out[p.at] = out[p.at - N] - in[p.at - N] + in[p.at];
}

template <bool planted>
int run(int number, unsigned blocks, const uint32_t* in, uint32_t* out) {
#define CASE(n, name) \
  case n: return launch(name<planted>, {blocks}, N, N * 4, nullptr, in, out)
  switch (number) {
    CASE(0, no_block_barrier);
    CASE(1, no_warp_barrier);
    CASE(2, shuffle_for_barrier);
    CASE(3, reuse_without_barrier);
    CASE(4, copy_not_awaited);
    CASE(5, copy_not_committed);
    CASE(6, uninitialised_shared);
    CASE(7, read_past_tensor);
    CASE(8, store_past_shared);
    CASE(9, divergent_barrier);
    CASE(10, early_exit);
    CASE(11, half_warp_product);
    CASE(12, two_collectives);
    CASE(13, misaligned_matrix);
    CASE(14, misaligned_copy);
    CASE(15, copy_outside_shared);
    CASE(16, pool_overrun);
    CASE(17, blocks_talk);
    CASE(18, copy_read_early);
    default: return -1;
  }
}

} // namespace

extern "C" __attribute__((visibility("default"))) int fault_run(int number, int planted, int blocks, const uint32_t* in,
                                                                uint32_t* out) {
  unsigned n = static_cast<unsigned>(blocks);
  return planted ? run<true>(number, n, in, out) : run<false>(number, n, in, out);
}
