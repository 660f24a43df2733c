// Threads for one call of compiled code.
#pragma once

#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kvzip {

// Calls `work` on so many threads, this one among them, and throws what the first to fail threw.
// Where the system has no more threads, fewer do it.
template <typename Work>
void on_threads(std::size_t count, const Work& work) {
  std::exception_ptr error;
  std::mutex failing;
  const auto guarded = [&] {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failing);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(count);
  try {
    while (others.size() + 1 < count) others.emplace_back(guarded);
  } catch (const std::exception&) {
  }
  guarded();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace kvzip
