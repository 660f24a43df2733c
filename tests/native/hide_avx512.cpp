// Hides AVX-512, AMX and AVX-VNNI from a program and all that it starts, as a processor that has
// AVX2 at most: `make without-avx512`. Not kvzip alone, which KVZIP_SIMD holds, but torch, oneDNN,
// MKL, OpenBLAS and NumPy, too, find no more than that.
//
// Loaded before the program (LD_PRELOAD), it has Linux forbid `cpuid` (arch_prctl of ARCH_CPUID),
// and answers the fault that the instruction is then from a table that it made before. Each exec
// forgets this, and loads it again. Static programs see the processor as it is, and so does
// /proc/cpuinfo. The loader itself has asked before: GLIBC_TUNABLES says to glibc what it may use.

#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

// glibc's own, which sanitizers leave as it is.
extern "C" int __sigaction(int, const struct sigaction*, struct sigaction*);

namespace {

struct Answer {
  std::uint32_t eax, ebx, ecx, edx;
};

constexpr int kForbidOrAllowCpuid = 0x1012;  // ARCH_SET_CPUID
constexpr std::uint32_t kExtended = 0x80000000, kLeaves = 0x30, kSubleaves = 64;
Answer basic[kLeaves][kSubleaves], extended[kLeaves];
struct sigaction theirs;  // what the program does about other faults
bool forbidden = false;

void ask() {
  for (std::uint32_t leaf = 0; leaf < kLeaves; ++leaf) {
    if (leaf <= __get_cpuid_max(0, nullptr))
      for (std::uint32_t sub = 0; sub < kSubleaves; ++sub) {
        Answer& found = basic[leaf][sub];
        __cpuid_count(leaf, sub, found.eax, found.ebx, found.ecx, found.edx);
      }
    if (kExtended + leaf <= __get_cpuid_max(kExtended, nullptr)) {
      Answer& found = extended[leaf];
      __cpuid(kExtended + leaf, found.eax, found.ebx, found.ecx, found.edx);
    }
  }
}

constexpr std::uint32_t bits() { return 0; }

template <typename... More>
constexpr std::uint32_t bits(int first, More... more) {
  return 1u << first | bits(more...);
}

// The numbers of bits are those of Intel's manual, volume 2, "CPUID".
void hide() {
  Answer& features = basic[7][0];
  features.ebx &= ~bits(16, 17, 21, 26, 27, 28, 30, 31);  // AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL
  features.ecx &= ~bits(1, 6, 8, 11, 12, 14);      // VBMI, VBMI2, GFNI, VNNI, BITALG, VPOPCNTDQ
  features.edx &= ~bits(2, 3, 8, 22, 23, 24, 25);  // 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX
  Answer& newer = basic[7][1];
  newer.eax &= ~bits(4, 5, 21, 23);     // AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA
  newer.edx &= ~bits(4, 5, 8, 10, 19);  // AVX-VNNI-INT8, AVX-NE-CONVERT, AMX, AVX-VNNI-INT16, AVX10
  Answer(&registers)[kSubleaves] = basic[0xd];  // what is kept of them
  for (const int of : {5, 6, 7, 17, 18}) {      // masks, 512 bits twice, tiles
    registers[0].eax &= ~bits(of);
    registers[of] = {};
  }
  for (const int leaf : {0x1d, 0x1e, 0x24}) std::memset(basic[leaf], 0, sizeof basic[leaf]);
}

Answer answer(std::uint32_t leaf, std::uint32_t sub) {
  if (leaf - kExtended < kLeaves) return extended[leaf - kExtended];
  if (leaf >= kLeaves) return {};
  return basic[leaf][sub < kSubleaves ? sub : 0];
}

void on_fault(int number, siginfo_t* info, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* const at = reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]);
  if (info->si_code == SI_KERNEL && at[0] == 0x0f && at[1] == 0xa2) {
    const Answer found =
        answer(std::uint32_t(registers[REG_RAX]), std::uint32_t(registers[REG_RCX]));
    registers[REG_RAX] = found.eax;
    registers[REG_RBX] = found.ebx;
    registers[REG_RCX] = found.ecx;
    registers[REG_RDX] = found.edx;
    registers[REG_RIP] += 2;
  } else if (theirs.sa_flags & SA_SIGINFO) {
    theirs.sa_sigaction(number, info, context);
  } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
    theirs.sa_handler(number);
  } else {
    __sigaction(number, &theirs, nullptr);  // and the fault happens again
  }
}

__attribute__((constructor(101))) void forbid() {
  ask();
  hide();
  struct sigaction ours = {};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  __sigaction(SIGSEGV, &ours, &theirs);
  forbidden = !syscall(SYS_arch_prctl, kForbidOrAllowCpuid, 0);
  if (forbidden) return;
  constexpr char message[] = "hide_avx512: this processor's cpuid cannot be forbidden\n";
  if (write(STDERR_FILENO, message, sizeof message - 1) < 0) _exit(126);
  _exit(125);
}

}  // namespace

// What a program does about faults is kept for those that are no cpuid.
extern "C" int sigaction(int number, const struct sigaction* wanted, struct sigaction* before) {
  if (number != SIGSEGV || !forbidden) {
    static const auto next = reinterpret_cast<decltype(&sigaction)>(dlsym(RTLD_NEXT, "sigaction"));
    return next(number, wanted, before);
  }
  const struct sigaction old = theirs;
  if (wanted) theirs = *wanted;
  if (before) *before = old;
  return 0;
}

extern "C" sighandler_t signal(int number, sighandler_t wanted) {
  struct sigaction action = {}, before;
  action.sa_handler = wanted;
  action.sa_flags = SA_RESTART;
  return sigaction(number, &action, &before) ? SIG_ERR : before.sa_handler;
}
