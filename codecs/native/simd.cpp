#include "native/simd.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(KVZIP_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

bool has(Level level) {
#ifdef KVZIP_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  const bool avx512_vnni =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni");
  const bool avx512 = avx512_vnni && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vpopcntdq");
  switch (level) {
    case Level::scalar: return true;
    case Level::avx2: return avx2;
    case Level::vnni: return avx2 && (has_avx_vnni() || avx512_vnni);
    case Level::avx512: return avx512;
    case Level::amx:
      return avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8");
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
  return __builtin_cpu_supports("avxvnni");
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
