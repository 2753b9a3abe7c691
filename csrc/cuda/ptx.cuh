// What CUDA and PTX give a kernel, as plain functions: the only inline assembly and the only question which compiler runs.
//
// Under nvcc the functions below are the instructions themselves. Under g++ they come from tests/emulation/emulator.h,
// where the same kernels run on a CPU and are checked. Rules for kernels (each is checked by a test or the emulator):
// include this file and launch.cuh and nothing of CUDA; shared memory only by SHARED or SHARED_POOL; blocks talk to each
// other through last_to_arrive alone, and none waits for another; one barrier or
// collective per source line, all 32 lanes of a warp in it; blocks are multiples of 32 threads; no thread returns before
// the last barrier or with an asynchronous copy open; only sync_block and sync_warp order memory, shuffles and matrix
// instructions never do; bf16 and fp16 are uint16_t.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "emulator.h"
#else
#define MASKDIFF_EMULATED 0
#define KERNEL(max_threads) static __global__ void __launch_bounds__(max_threads)
#define DEVICE __device__ __forceinline__
#define SHARED(T, name, n) __shared__ __align__(128) T name[n] // T name[n], one for the block
#define ZEROED(T, name, n) static __device__ T name[n] // one for the GPU, zero when the library is loaded
#define SHARED_POOL(name)                                       /* the launch's dynamic shared memory, carved by take */ \
  extern __shared__ __align__(128) unsigned char maskdiff_pool[];                                                        \
  maskdiff::ptx::Pool name { maskdiff_pool }

namespace maskdiff {
namespace ptx {

struct Pool {
  unsigned char* next;
  template <class T>
  DEVICE T* take(int n) { // n elements, 16-byte aligned; every thread takes the same arrays in the same order
    T* array = reinterpret_cast<T*>(next);
    next += (n * sizeof(T) + 15) / 16 * 16;
    return array;
  }
};

DEVICE unsigned thread_x() { return threadIdx.x; }
DEVICE unsigned threads() { return blockDim.x; }
DEVICE unsigned block_x() { return blockIdx.x; }
DEVICE unsigned block_y() { return blockIdx.y; }
DEVICE unsigned blocks_x() { return gridDim.x; }

// Barriers: what was written before by any thread of the block (warp) is seen after by all of them.
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// Shuffles: T is a 4-byte type. Up and down give a lane its own value where there is no such lane.
template <class T>
DEVICE T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
DEVICE T shuffle_xor(T value, unsigned bits) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_xor_sync(0xffffffffu, value, bits);
}
template <class T>
DEVICE T shuffle_up(T value, unsigned distance) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_up_sync(0xffffffffu, value, distance);
}
template <class T>
DEVICE T shuffle_down(T value, unsigned distance) {
  static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
  return __shfl_down_sync(0xffffffffu, value, distance);
}
DEVICE uint32_t vote(bool yes) { return __ballot_sync(0xffffffffu, yes); } // bit l: lane l's vote

// Whether this block is the last of `blocks` that come here; the counter is then 0 again, for the next launch. By one
// thread a block: what it wrote before, the last block's thread sees, and after a barrier all of that block.
DEVICE bool last_to_arrive(uint32_t* counter, uint32_t blocks) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(blocks - 1) : "memory");
  return before == blocks - 1;
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address (16-byte aligned) of row l % 8 of
// matrix l / 8. r[i] holds matrix i, row l / 4, columns 2 (l % 4) and one more (low half first); transposed: the columns
// of the matrix in shared memory take the rows' place.
DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b: a is 16 x 16, b 16 x 8, d 16 x 8 in fp32. With g = lane / 4 and c = 2 (lane % 4), low half first:
// a[0] = A[g][c, c+1], a[1] = A[g+8][c, c+1], a[2] = A[g][c+8, c+9], a[3] = A[g+8][c+8, c+9];
// b[0] = B[c, c+1][g], b[1] = B[c+8, c+9][g]; d[0], d[1] = D[g][c, c+1], d[2], d[3] = D[g+8][c, c+1].
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Asynchronous copies of 16 bytes from global to shared memory, both 16-byte aligned; where `valid` is false nothing is
// read and zeros arrive. A copy belongs to the group that the next copy_commit closes; copy_wait<N> waits for all closed
// groups but the last N of this thread. Other threads see the bytes only after a barrier that follows the wait.
DEVICE void copy_async16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <class T>
DEVICE const T& whole(const void* at) { // a T that is read at once: it stands aligned to its size
  return *static_cast<const T*>(at);
}

// Four words to a 16-byte aligned place in global memory, two to an 8-byte aligned one, at once: the compiler may split
// plain stores.
DEVICE void store_words(void* to, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}
DEVICE void store_words(void* to, const uint32_t (&x)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x[0]), "r"(x[1]) : "memory");
}

DEVICE float exp2_fast(float x) { // 2^x to 2 ulp; results below 2^-126 are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even, `low` in the low half.
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
DEVICE float widen_fp16(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

} // namespace ptx
} // namespace maskdiff
#endif
