#include "native/simd.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#ifdef KVZIP_X86
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(KVZIP_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(KVZIP_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace kvzip::simd {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "vnni", "avx512", "amx", "neon"};
constexpr const char* kAllNames = "scalar, avx2, vnni, avx512, amx or neon";

#ifdef KVZIP_X86
// What the processor has, of which the system keeps the registers. It is asked itself, since
// `__builtin_cpu_supports` finds nothing at all in what zig (0.17) links.
struct Features {
  bool avx2 = false, fma = false, avx_vnni = false, avx512_vnni = false, avx512 = false,
       amx = false;
};

bool all(unsigned word, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(word >> bit & 1)) return false;
  return true;
}

__attribute__((target("xsave"))) unsigned kept_registers() { return unsigned(_xgetbv(0)); }

Features ask() {
  Features found;
  unsigned a, b, c, d, last;
  // POPCNT and OSXSAVE, LZCNT.
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !all(c, {23, 27})) return found;
  const bool fma = all(c, {12});
  if (!__get_cpuid_count(0x80000001, 0, &a, &b, &c, &d) || !all(c, {5})) return found;
  if (!__get_cpuid_count(7, 0, &last, &b, &c, &d)) return found;
  const unsigned kept = kept_registers();
  // BMI, AVX2, BMI2.
  found.avx2 = all(kept, {1, 2}) && all(b, {3, 5, 8});
  found.fma = found.avx2 && fma;
  // F, DQ, BW, VL; VNNI.
  found.avx512_vnni =
      found.avx2 && all(kept, {5, 6, 7}) && all(b, {16, 17, 30, 31}) && all(c, {11});
  // VBMI, VBMI2, VPOPCNTDQ.
  found.avx512 = found.avx512_vnni && all(c, {1, 6, 14});
  // TILE, INT8.
  found.amx = found.avx512 && all(kept, {17, 18}) && all(d, {24, 25});
  found.avx_vnni =
      found.avx2 && last >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && all(a, {4});
  return found;
}

const Features& features() {
  static const Features found = ask();
  return found;
}
#endif

bool has(Level level) {
#ifdef KVZIP_X86
  const Features& found = features();
  switch (level) {
    case Level::scalar: return true;
    case Level::avx2: return found.avx2;
    case Level::vnni: return found.avx_vnni || found.avx512_vnni;
    case Level::avx512: return found.avx512;
    case Level::amx: return found.amx;
    case Level::neon: return false;
  }
#endif
#ifdef KVZIP_NEON
  if (level == Level::neon) return true;
#endif
  return level == Level::scalar;
}

Level choose() {
  const char* wanted = std::getenv("KVZIP_SIMD");
  if (wanted && *wanted) {
    for (int i = 0; i < kLevels; ++i)
      if (!std::strcmp(wanted, kNames[i]) && has(Level(i))) return Level(i);
    throw Unavailable("KVZIP_SIMD is '" + std::string(wanted) + "': it must be " + kAllNames +
                      ", and one that this processor has");
  }
  for (Level level : {Level::amx, Level::avx512, Level::vnni, Level::avx2, Level::neon})
    if (has(level)) return level;
  return Level::scalar;
}

std::atomic<Level>& current() {
  static std::atomic<Level> chosen{choose()};
  return chosen;
}

}  // namespace

Level level() { return current().load(std::memory_order_relaxed); }

Level vectors() {
  const Level found = level();
  return found == Level::amx ? Level::avx512 : found == Level::vnni ? Level::avx2 : found;
}

bool amx_is_allowed() {
#if defined(KVZIP_X86) && defined(__linux__)
  // Linux keeps memory for a thread's tiles only where it was asked to (its Documentation/arch/x86/
  // xstate.rst): arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
#else
  return false;
#endif
}

bool has_avx_vnni() {
#ifdef KVZIP_X86
  return features().avx_vnni;
#else
  return false;
#endif
}

bool has_fma() {
#ifdef KVZIP_X86
  return features().fma;
#else
  return false;
#endif
}

bool has_dotprod() {
#if defined(KVZIP_NEON) && defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(KVZIP_NEON) && defined(__APPLE__)
  return true;  // of all Macs with ARM's processors
#else
  return false;
#endif
}

bool has_i8mm() {
#if defined(KVZIP_NEON) && defined(__linux__)
  return getauxval(AT_HWCAP2) & 1 << 13;  // HWCAP2_I8MM, of which glibc 2.28 does not know
#elif defined(KVZIP_NEON) && defined(__APPLE__)
  int found = 0;
  std::size_t size = sizeof found;
  return !sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) && found;
#else
  return false;
#endif
}

bool set_level(Level level) {
  if (!has(level) || (level == Level::amx && !amx_is_allowed())) return false;
  current().store(level, std::memory_order_relaxed);
  return true;
}

Level from_name(const char* name) {
  for (int i = 0; i < kLevels; ++i)
    if (!std::strcmp(name, kNames[i])) return Level(i);
  throw std::invalid_argument(std::string("simd: ") + kAllNames + ", not " + name);
}

const char* name_of(Level level) { return kNames[int(level)]; }

}  // namespace kvzip::simd
