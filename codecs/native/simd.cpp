#include "native/simd.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvzip::simd {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "neon"};

bool has(Level level) {
#ifdef KVZIP_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  switch (level) {
    case Level::scalar: return true;
    case Level::avx2: return avx2;
    case Level::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq");
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
    throw Unavailable(
        "KVZIP_SIMD is '" + std::string(wanted) +
        "': it must be scalar, avx2, avx512 or neon, and one that this processor has");
  }
  for (Level level : {Level::avx512, Level::avx2, Level::neon})
    if (has(level)) return level;
  return Level::scalar;
}

std::atomic<Level>& current() {
  static std::atomic<Level> chosen{choose()};
  return chosen;
}

}  // namespace

Level level() { return current().load(std::memory_order_relaxed); }

bool set_level(Level level) {
  if (!has(level)) return false;
  current().store(level, std::memory_order_relaxed);
  return true;
}

Level from_name(const char* name) {
  for (int i = 0; i < kLevels; ++i)
    if (!std::strcmp(name, kNames[i])) return Level(i);
  throw std::invalid_argument("simd: one of scalar, avx2, avx512, neon, not " + std::string(name));
}

const char* name_of(Level level) { return kNames[int(level)]; }

}  // namespace kvzip::simd
