// CUDA without a GPU: what csrc/cuda/ptx.cuh offers, for g++. Every CUDA thread is a fiber, every block one OpenMP thread.
//
// A fiber runs until it waits at a barrier or collective; which one runs next is the seed's choice (0: the lowest thread,
// 1: the highest, others: random). What a GPU leaves undefined is an error here that names the source lines. Built with
// -fsanitize=address,undefined, shared arrays have red zones; with -fsanitize=thread, only what orders memory on a GPU
// (sync_block, sync_warp, launch) orders it here. A test tool: never shipped, never a backend.
#pragma once
#include <sys/mman.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define IF_ASAN(...) __VA_ARGS__
#else
#define IF_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(const void*, size_t);
extern "C" void __tsan_write_range(const void*, size_t);
#define IF_TSAN(...) __VA_ARGS__
#define EMULATOR __attribute__((no_sanitize("thread"))) inline // its own accesses are not the kernel's
#else
#define IF_TSAN(...)
#define EMULATOR inline
#endif

#define MASKDIFF_EMULATED 1
#define KERNEL(max_threads) static void
#define DEVICE inline
#define SHARED(T, name, n) \
  T* const name = static_cast<T*>(maskdiff::emulator::shared_array(__FILE__, __LINE__, sizeof(T) * (n)))
#define ZEROED(T, name, n) static T name[n]
#define SHARED_POOL(name) \
  maskdiff::ptx::Pool name {}

namespace maskdiff {
namespace emulator {

constexpr size_t kStack = 256 << 10, kGuard = 4096, kShared = 227 << 10, kMemory = 2 * kShared, kRedZone = 128;
constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxCopies = 256, kMaxArrays = 64, kKept = 8;

inline uint64_t seed = 0; // of the scheduler
inline std::string error; // of the last launch: the first thing that went wrong
inline std::mutex error_mutex;

struct Copy {
  void* to;
  const void* from; // null: zeros arrive
  unsigned group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr; // kGuard bytes without access, then kStack
  unsigned thread = 0;
  bool done = false;
  const char* waits = nullptr; // for what, at which line
  int line = 0;
  unsigned group = 0, copies = 0; // asynchronous copies: the open group, those that nothing has waited for
  Copy copy[kMaxCopies];
  void *fake_stack = nullptr, *context = nullptr; // the sanitizers'
  const void* bottom = nullptr;
  size_t size = kStack;
};

struct Meeting { // a barrier of the block, or a barrier or collective of a warp
  const char* what = nullptr;
  int line = 0;
  unsigned arrived = 0, generation = 0;
  void* slots[kWarp];
  uint64_t tags[2]; // for thread sanitizer: one tag for all generations would order what is not ordered
};

struct Array {
  const char* file; // null: from the pool
  int line;         // from the pool: its number
  size_t bytes;
  char* data;
};

struct Block {
  unsigned threads, x = 0, y = 0, grid_x = 1, finished = 0, last_warp = 0, array_count = 0;
  size_t pool_bytes = 0, pool_used = 0, memory_used = 0;
  bool failed = false;
  std::unique_ptr<Fiber[]> fibers;
  Fiber scheduler; // the OpenMP thread itself
  const std::function<void()>* body = nullptr;
  Meeting meeting, warp_meetings[kMaxThreads / kWarp];
  uint32_t runnable[kMaxThreads / kWarp]; // a word a warp
  uint64_t random = 0, stickiness = 0;
  char* memory; // shared: arrays between poisoned red zones
  Array arrays[kMaxArrays];

  explicit Block(unsigned n);
  ~Block();
  Block(const Block&) = delete;
  void run(const std::function<void()>& kernel);
};

inline thread_local Block* block = nullptr;
inline thread_local Fiber* self = nullptr;

#if defined(__x86_64__)
extern "C" void maskdiff_switch(void** from, void* to);
asm(R"(.text
maskdiff_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret)");
EMULATOR void* new_context(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(top) - 8; // six registers, the entry, its return address
  for (int i = 0; i < 8; i++) sp[i] = i == 6 ? reinterpret_cast<void*>(entry) : nullptr;
  return sp;
}
#else
} // namespace emulator
} // namespace maskdiff
#include <ucontext.h>
namespace maskdiff {
namespace emulator {
EMULATOR void maskdiff_switch(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}
EMULATOR void* new_context(char* top, void (*entry)()) {
  ucontext_t* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
  getcontext(context);
  context->uc_stack.ss_sp = top - kStack;
  context->uc_stack.ss_size = static_cast<size_t>(reinterpret_cast<char*>(context) - (top - kStack));
  makecontext(context, entry, 0);
  return context;
}
#endif

IF_ASAN(inline void arrived(Fiber& here) { // whoever comes to a fiber comes from the scheduler: where is its stack?
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &size);
  if (&here != &block->scheduler) block->scheduler.bottom = bottom, block->scheduler.size = size;
})

EMULATOR void switch_to(Fiber& from, Fiber& to) {
  self = &to;
  IF_TSAN(__tsan_switch_to_fiber(to.context, __tsan_switch_to_fiber_no_sync);)
  IF_ASAN(__sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);)
  maskdiff_switch(&from.stack_pointer, to.stack_pointer);
  IF_ASAN(arrived(from);)
}

EMULATOR void report(Block& b, const std::string& text) {
  std::lock_guard<std::mutex> lock(error_mutex);
  if (error.empty()) error = "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + "): " + text;
  b.failed = true;
}

[[noreturn]] EMULATOR void fail(const char* format, ...) { // format: the thread's number comes first
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  report(*block, "thread " + std::to_string(self->thread) + ": " + text);
  switch_to(*self, block->scheduler); // for good: the block is abandoned
  abort();
}

EMULATOR uint64_t next_random(Block& b) { // xorshift64*
  b.random ^= b.random >> 12, b.random ^= b.random << 25, b.random ^= b.random >> 27;
  return b.random * 0x2545F4914F6CDD1Dull >> 16;
}

EMULATOR Fiber* pick(Block& b) { // which runnable thread goes on; null: none can
  unsigned first = 0, total = 0;
  for (unsigned w = 0; w < b.threads / kWarp; w++) total += __builtin_popcount(b.runnable[w]);
  if (total == 0) return nullptr;
  if (seed >= 2 && b.runnable[b.last_warp] && next_random(b) % 100 < b.stickiness)
    first = b.last_warp, total = __builtin_popcount(b.runnable[first]);
  unsigned choice = seed == 0 ? 0 : seed == 1 ? total - 1 : next_random(b) % total, w = first;
  for (unsigned here; choice >= (here = __builtin_popcount(b.runnable[w])); w++) choice -= here;
  uint32_t bits = b.runnable[w];
  while (choice--) bits &= bits - 1;
  b.last_warp = w;
  return &b.fibers[w * kWarp + __builtin_ctz(bits)];
}

EMULATOR void fiber_main() {
  IF_ASAN(arrived(*self);)
  for (;;) { // a turn a block: fibers are used again
    (*block->body)();
    if (self->copies) fail("returns with an asynchronous copy that it did not wait for");
    self->done = true;
    block->finished++;
    block->runnable[self->thread / kWarp] &= ~(1u << self->thread % kWarp);
    IF_TSAN(__tsan_release(block);)
    switch_to(*self, block->scheduler);
  }
}

EMULATOR std::string who_waits(Block& b) {
  std::string text = "no thread can go on";
  for (unsigned t = 0, end; t < b.threads; t = end) {
    Fiber& f = b.fibers[t];
    for (end = t + 1; end < b.threads && b.fibers[end].done == f.done && b.fibers[end].line == f.line;) end++;
    text += ", threads " + std::to_string(t) + "-" + std::to_string(end - 1);
    text += f.done ? " have returned" : std::string(" wait at ") + f.waits + ", line " + std::to_string(f.line);
  }
  return text;
}

EMULATOR Block::Block(unsigned n) : threads(n), fibers(new Fiber[n]) {
  memory = static_cast<char*>(aligned_alloc(kRedZone, kMemory));
  memset(memory, 0xFF, kMemory);
  for (unsigned t = 0; t < n; t++) {
    Fiber& f = fibers[t];
    f.thread = t;
    void* stack = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, kGuard, PROT_NONE)) abort();
    f.stack = static_cast<char*>(stack);
    f.bottom = f.stack + kGuard;
    f.stack_pointer = new_context(f.stack + kGuard + kStack, fiber_main);
    IF_TSAN(f.context = __tsan_create_fiber(0);)
  }
}

EMULATOR Block::~Block() {
  IF_TSAN(__tsan_acquire(this);) // only now: no block is ordered after another
  for (unsigned t = 0; t < threads; t++) {
    IF_TSAN(__tsan_destroy_fiber(fibers[t].context);)
    IF_ASAN(__asan_unpoison_memory_region(fibers[t].stack, kGuard + kStack);)
    munmap(fibers[t].stack, kGuard + kStack);
  }
  IF_ASAN(__asan_unpoison_memory_region(memory, kMemory);)
  free(memory);
}

EMULATOR void Block::run(const std::function<void()>& kernel) {
  body = &kernel;
  random = (seed + 1) * 0x9E3779B97F4A7C15ull ^ (x + 1) * 0xBF58476D1CE4E5B9ull ^ (y + 1) * 0x94D049BB133111EBull;
  stickiness = next_random(*this) % 100;
  IF_ASAN(__asan_unpoison_memory_region(memory, kMemory);)
  memset(memory, 0xFF, memory_used);
  IF_ASAN(__asan_poison_memory_region(memory, kMemory);)
  memory_used = pool_used = array_count = finished = last_warp = 0;
  for (unsigned w = 0; w < threads / kWarp; w++) runnable[w] = ~0u;
  for (unsigned t = 0; t < threads; t++) fibers[t].done = false;
  block = this;
  IF_TSAN(scheduler.context = __tsan_get_current_fiber();)
  while (finished < threads && !failed) {
    Fiber* next = pick(*this);
    if (next) switch_to(scheduler, *next);
    else report(*this, who_waits(*this));
  }
}

// Waits until all `size` threads of a meeting are there; the last to come executes for all. All must have come from the
// same line for the same thing.
EMULATOR void meet(Meeting& m, unsigned size, const char* what, int line, void* slot = nullptr,
                   void (*execute)(void**) = nullptr) {
  Block& b = *block;
  unsigned warp = self->thread / kWarp, lane = self->thread % kWarp;
  if (m.arrived && (m.line != line || m.what != what))
    fail("comes to %s, line %d, while others wait at %s, line %d", what, line, m.what, m.line);
  m.what = self->waits = what, m.line = self->line = line, m.slots[lane] = slot;
  b.runnable[warp] &= ~(1u << lane);
  if (++m.arrived == size) {
    if (execute) execute(m.slots);
    m.arrived = 0, m.generation++;
    if (&m == &b.meeting) b.stickiness = next_random(b) % 100;
    for (unsigned w = 0; w < b.threads / kWarp; w++)
      if (w == warp || &m == &b.meeting) b.runnable[w] = ~0u;
  }
  switch_to(*self, b.scheduler);
}
EMULATOR Meeting& my_warp() { return block->warp_meetings[self->thread / kWarp]; }
EMULATOR void barrier(Meeting& m, unsigned size, const char* what, int line) {
  IF_TSAN(void* tag = &m.tags[m.generation % 2]; __tsan_release(tag);)
  meet(m, size, what, line);
  IF_TSAN(__tsan_acquire(tag);)
}

// A shared array: found again by where it was declared, or made by the first thread that comes there.
EMULATOR void* shared_array(const char* file, int line, size_t bytes) {
  Block& b = *block;
  for (Array* a = b.arrays; a < b.arrays + b.array_count; a++)
    if (a->file == file && a->line == line && a->bytes == bytes) return a->data;
  size_t used = kRedZone + (bytes + kRedZone - 1) / kRedZone * kRedZone;
  if (b.array_count == kMaxArrays || b.memory_used + used + kRedZone > kMemory)
    fail("line %d: more shared memory than any GPU has, or more than %u arrays", line, kMaxArrays);
  char* data = b.memory + b.memory_used + kRedZone;
  IF_ASAN(__asan_unpoison_memory_region(data, bytes);)
  b.arrays[b.array_count++] = {file, line, bytes, data};
  b.memory_used += used;
  return data;
}
EMULATOR void* pool_array(unsigned number, size_t bytes) {
  Block& b = *block;
  for (Array* a = b.arrays; a < b.arrays + b.array_count; a++) {
    if (a->file || a->line != static_cast<int>(number)) continue;
    if (a->bytes == bytes) return a->data;
    fail("takes %zu bytes as array %u of the pool, another thread took %zu", bytes, number, a->bytes);
  }
  b.pool_used += (bytes + 15) / 16 * 16;
  if (b.pool_used > b.pool_bytes)
    fail("array %u of the pool ends at byte %zu, the launch gave %zu", number, b.pool_used, b.pool_bytes);
  return shared_array(nullptr, static_cast<int>(number), bytes);
}
EMULATOR void check_shared(const void* p, const char* what, int line) { // 16 bytes at p: aligned, within one array
  const char* at = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("%s, line %d: address not 16-byte aligned", what, line);
  for (Array* a = block->arrays; a < block->arrays + block->array_count; a++)
    if (at >= a->data && at + 16 <= a->data + a->bytes) return;
  fail("%s, line %d: address not in shared memory", what, line);
}

struct Grid {
  unsigned x, y = 1;
};

template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, unsigned threads, size_t pool_bytes, A... arguments) {
  error.clear();
  if (threads == 0 || threads % kWarp || threads > kMaxThreads || grid.x == 0 || grid.y == 0 || pool_bytes > kShared) {
    error = "launch: a block has 32, 64, ... 1024 threads, a grid at least one block, the pool at most 227 KB";
    return 1;
  }
  const std::function<void()> body = [&] { kernel(arguments...); };
  std::vector<std::unique_ptr<Block>> kept; // thread sanitizer: no block runs on what another one touched
#pragma omp parallel
  {
    std::unique_ptr<Block> runner;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < static_cast<long>(grid.x) * grid.y; i++) {
      if (!runner) runner.reset(new Block(threads));
      const unsigned number = static_cast<unsigned>(seed == 1 ? static_cast<long>(grid.x) * grid.y - 1 - i : i);
      runner->x = number % grid.x, runner->y = number / grid.x;
      runner->grid_x = grid.x, runner->pool_bytes = pool_bytes;
      runner->run(body);
      if (runner->failed) runner.reset(); // its fibers stand in the middle of the kernel
      IF_TSAN(if (runner) kept.push_back(std::move(runner)); if (kept.size() > kKept) kept.clear();)
    }
  }
  return error.empty() ? 0 : 1;
}

} // namespace emulator
} // namespace maskdiff
#include "instructions.h"
