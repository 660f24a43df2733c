// Memory for vectors, and memory that is used again.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace kvzip::predictive {

// Arrays begin where a line of the cache does.
template <typename T, std::size_t alignment = 64>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{alignment};
  template <typename U>
  struct rebind {
    using other = AlignedAllocator<U, alignment>;
  };

  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U, alignment>&) {}
  T* allocate(std::size_t n) {
    if (n > std::size_t(-1) / sizeof(T)) throw std::bad_alloc();
    return static_cast<T*>(::operator new(n * sizeof(T), kAlignment));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const AlignedAllocator&) const { return true; }
  bool operator!=(const AlignedAllocator&) const { return false; }
};

template <typename T>
using Aligned = std::vector<T, AlignedAllocator<T>>;

// A stack of arrays that lie in pieces of memory. Arrays are not cleared. The kernel clears fresh
// pages, which took a fifth of the time of encoding, so pieces are kept for the next stack.
class Stack {
 public:
  Stack() = default;
  Stack(const Stack&) = delete;
  ~Stack() {
    for (Piece& piece : pieces_) keep(std::move(piece));
  }

  // Room for so many bytes, until it is popped. So many will be asked for in all.
  void* push(std::size_t size, std::size_t all) {
    size = rounded(size);
    if (pieces_.empty() || pieces_.back().size - pieces_.back().used < size)
      // What a whole piece was too little for needs others like it.
      pieces_.push_back(piece(size, pieces_.empty() ? all : std::max(all, kPiece)));
    Piece& last = pieces_.back();
    void* const found = last.data.get() + last.used;
    last.used += size;
    return found;
  }
  // The last array is not needed any more.
  void pop(std::size_t size) {
    pieces_.back().used -= rounded(size);
    if (pieces_.back().used) return;
    keep(std::move(pieces_.back()));
    pieces_.pop_back();
  }

 private:
  static constexpr std::size_t kPiece = 32u << 20, kMostKept = 4;
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::uint8_t* p) const { ::operator delete(p, kAlignment); }
  };
  struct Piece {
    std::unique_ptr<std::uint8_t[], Free> data;
    std::size_t size, used = 0;

    explicit Piece(std::size_t n)
        : data(static_cast<std::uint8_t*>(::operator new(n, kAlignment))), size(n) {}
  };
  struct Kept {
    std::mutex lock;
    std::vector<Piece> pieces;
  };

  static std::size_t rounded(std::size_t size) { return (size + 63) / 64 * 64; }
  static Kept& kept() {
    static Kept& found = *new Kept;  // never destroyed: chains may live longer than statics
    return found;
  }
  // Nobody waits for the lock: after a fork it may be held by a thread that is not there any more.
  static Piece piece(std::size_t size, std::size_t all) {
    if (size <= kPiece && all >= kPiece) {
      const std::unique_lock<std::mutex> lock(kept().lock, std::try_to_lock);
      if (lock && !kept().pieces.empty()) {
        Piece found = std::move(kept().pieces.back());
        kept().pieces.pop_back();
        return found;
      }
    }
    return Piece(std::max(size, std::min(kPiece, all)));
  }
  static void keep(Piece piece) {
    piece.used = 0;
    if (piece.size != kPiece) return;
    const std::unique_lock<std::mutex> lock(kept().lock, std::try_to_lock);
    if (lock && kept().pieces.size() < kMostKept) kept().pieces.push_back(std::move(piece));
  }

  std::vector<Piece> pieces_;
};

}  // namespace kvzip::predictive
