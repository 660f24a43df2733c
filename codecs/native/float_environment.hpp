// How a thread computes with floating point.
#pragma once

#include <cfenv>

namespace kvzip {

// While it lives, the thread computes as IEEE 754 begins: rounding to the nearest, subnormals kept.
// What decides bytes, or is kept for other threads, may not depend on what an application has set.
class DefaultEnvironment {
 public:
  DefaultEnvironment() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultEnvironment() { std::fesetenv(&before_); }
  DefaultEnvironment(const DefaultEnvironment&) = delete;
  DefaultEnvironment& operator=(const DefaultEnvironment&) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace kvzip
