// A warp of a GPU on a CPU, so that kernels are tested and fuzzed where there is no GPU: each
// thread is a fibre, and fibres change places where threads of a warp meet. What it cannot show: a
// missing
// `__syncwarp`, since every meeting synchronises here; racecheck on a GPU shows that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define KVZIP_SHIM_ASAN 1
#else
#define KVZIP_SHIM_ASAN 0
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace kvzip::shim {

constexpr int kWarp = 32;

// --- fibres ----------------------------------------------------------------------------------

#if defined(__x86_64__) || defined(__aarch64__)
// Saves what a call must keep on the stack, stores where that is in *from, and goes on at `to`.
extern "C" void kvzip_shim_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.weak kvzip_shim_switch
.type kvzip_shim_switch, @function
kvzip_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
.size kvzip_shim_switch, .-kvzip_shim_switch
)");
constexpr int kSaved = 6;
#else
asm(R"(
.text
.weak kvzip_shim_switch
.type kvzip_shim_switch, %function
kvzip_shim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size kvzip_shim_switch, .-kvzip_shim_switch
)");
#endif
#endif

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "shim: %s\n", why);
  std::abort();
}

struct Index {
  std::uint32_t x = 0, y = 0, z = 0;
};

// An asynchronous copy lands at its wait and not before; until then its place holds rubbish.
struct PendingCopy {
  unsigned char* to;
  unsigned char bytes[16];
};

struct Fibre {
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
#if !defined(__x86_64__) && !defined(__aarch64__)
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  bool done = false;
  Index thread;
  int lane = 0;
  struct Warp* warp = nullptr;
  std::vector<std::vector<PendingCopy>> groups{1};
};

// What the lanes of a warp bring to where they meet. A lane is at most one meeting ahead, so two
// sets of places are enough.
struct Warp {
  std::uint64_t value[2][kWarp];
  const char* kind[2] = {nullptr, nullptr};
  int arrived = 0;
  unsigned phase = 0;
};

struct Block {
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Warp> warps;
  int arrived = 0;
  unsigned phase = 0;
};

struct State {
  Fibre* current = nullptr;
  Block* block = nullptr;
  void* scheduler = nullptr;
#if !defined(__x86_64__) && !defined(__aarch64__)
  ucontext_t scheduler_context;
#endif
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
  void* scheduler_fake = nullptr;
  unsigned char* shared = nullptr;
  Index block_index, block_dim, grid_dim;
  const std::function<void()>* kernel = nullptr;
};
inline State& state() {
  static thread_local State s;
  return s;
}

constexpr std::size_t kStack = std::size_t(KVZIP_SHIM_ASAN ? 512 : 64) << 10;

inline void yield() {
  State& s = state();
  Fibre* self = s.current;
#if KVZIP_SHIM_ASAN
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, s.scheduler_stack,
                                 s.scheduler_stack_size);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  kvzip_shim_switch(&self->stack_pointer, s.scheduler);
#else
  swapcontext(&self->context, &s.scheduler_context);
#endif
#if KVZIP_SHIM_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

inline void fibre_main() {
  State& s = state();
#if KVZIP_SHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_stack_size);
#endif
  (*s.kernel)();
  state().current->done = true;
  yield();
  fail("a thread that had ended went on");
}

inline void resume(Fibre* fibre) {
  State& s = state();
  s.current = fibre;
#if KVZIP_SHIM_ASAN
  __sanitizer_start_switch_fiber(&s.scheduler_fake, fibre->stack.get(), kStack);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  kvzip_shim_switch(&s.scheduler, fibre->stack_pointer);
#else
  swapcontext(&s.scheduler_context, &fibre->context);
#endif
#if KVZIP_SHIM_ASAN
  __sanitizer_finish_switch_fiber(s.scheduler_fake, nullptr, nullptr);
#endif
}

inline void prepare(Fibre* fibre) {
  if (!fibre->stack) fibre->stack.reset(new unsigned char[kStack]);
#if defined(__x86_64__) || defined(__aarch64__)
  auto top = (reinterpret_cast<std::uintptr_t>(fibre->stack.get()) + kStack) & ~std::uintptr_t(63);
#if defined(__x86_64__)
  auto** at = reinterpret_cast<void**>(top) - 2;  // as after a call: 8 below a multiple of 16
  *at = reinterpret_cast<void*>(&fibre_main);
  at -= kSaved;
  std::memset(at, 0, kSaved * sizeof *at);
#else
  auto** at = reinterpret_cast<void**>(top - 160);
  std::memset(at, 0, 160);
  at[11] = reinterpret_cast<void*>(&fibre_main);
#endif
  fibre->stack_pointer = at;
#else
  getcontext(&fibre->context);
  fibre->context.uc_stack.ss_sp = fibre->stack.get();
  fibre->context.uc_stack.ss_size = kStack;
  fibre->context.uc_link = nullptr;
  makecontext(&fibre->context, &fibre_main, 0);
#endif
}

// --- meetings --------------------------------------------------------------------------------

// All lanes of a warp bring a value; returns the places where they lie.
inline const std::uint64_t* meet(const char* kind, std::uint64_t value) {
  Fibre& self = *state().current;
  Warp& warp = *self.warp;
  const unsigned phase = warp.phase, at = phase & 1;
  if (!warp.arrived) warp.kind[at] = kind;
  else if (std::strcmp(warp.kind[at], kind)) fail("the lanes of a warp meet at different places");
  warp.value[at][self.lane] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.phase;
  }
  while (warp.phase == phase) yield();
  return warp.value[at];
}

inline void meet_block() {
  Block& block = *state().block;
  const unsigned phase = block.phase;
  if (++block.arrived == int(block.fibres.size())) {
    block.arrived = 0;
    ++block.phase;
  }
  while (block.phase == phase) yield();
}

// --- launching -------------------------------------------------------------------------------

// Runs a kernel's blocks one after the other. `seed`: 0 runs threads in order, else in an order
// that changes all the time.
inline void launch(std::uint32_t grid, std::uint32_t block, std::size_t shared_bytes,
                   const std::function<void()>& kernel, std::uint64_t seed = 0) {
  if (!block || block % kWarp) fail("a block must be whole warps");
  State& s = state();
  s.kernel = &kernel;
  s.grid_dim.x = grid;
  s.block_dim.x = block;
  std::vector<unsigned char> shared(shared_bytes + 128);
  s.shared = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<std::uintptr_t>(shared.data()) + 127) & ~std::uintptr_t(127));
  std::vector<std::unique_ptr<Fibre>> fibres(block);
  for (auto& fibre : fibres) fibre = std::make_unique<Fibre>();
  Block room;
  room.fibres = std::move(fibres);
  s.block = &room;
  std::vector<std::uint32_t> order(block);
  std::uint64_t random = seed * 0x9E3779B97F4A7C15u + 1;
  for (std::uint32_t b = 0; b < grid; ++b) {
    std::memset(s.shared, 0xA5, shared_bytes);
    s.block_index.x = b;
    room.warps.assign(block / kWarp, Warp{});
    room.arrived = 0;
    for (std::uint32_t t = 0; t < block; ++t) {
      Fibre& fibre = *room.fibres[t];
      fibre.thread.x = t;
      fibre.lane = int(t % kWarp);
      fibre.warp = &room.warps[t / kWarp];
      fibre.done = false;
      fibre.groups.assign(1, {});
      order[t] = t;
      prepare(&fibre);
    }
    for (std::uint32_t left = block; left;) {
      if (seed)
        for (std::uint32_t i = block; i-- > 1;) {
          random = random * 6364136223846793005u + 1442695040888963407u;
          std::swap(order[i], order[(random >> 33) % (i + 1)]);
        }
      for (const std::uint32_t t : order) {
        Fibre& fibre = *room.fibres[t];
        if (fibre.done) continue;
        resume(&fibre);
        left -= fibre.done;
      }
    }
  }
  s.block = nullptr;
}

}  // namespace kvzip::shim
