// The bytes of tables and blocks (spec.md): sizes are checked and memory is allocated here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "channel/device_jobs.hpp"
#include "channel/kernels.hpp"
#include "channel/stored_tables.hpp"
#include "native/number_format.hpp"
#include "native/rotation.hpp"

namespace kvzip::channel {

// The tables that fit one layer's keys or values best, as bytes; none when they would not pay.
template <typename T>
std::vector<std::uint8_t> make_tables(const Block<const T>& numbers, std::size_t heads,
                                      std::size_t dim, NumberFormat format);

// Values of the channels of one layer's keys or values, added up over documents, for tables that
// are kept apart from what is coded with them.
class Counts {
 public:
  Counts(std::size_t heads, std::size_t dim, NumberFormat format);

  const NumberFormat& format() const { return format_; }
  std::size_t heads() const { return heads_; }
  std::size_t dim() const { return dim_; }

  // `block` is of these heads and dim, and T of the format's size.
  template <typename T>
  void add(const Block<const T>& block);

  // What others like them would take, about, if each channel's values were coded with exactly the
  // table that they are drawn from; it is told from those that were seen.
  double bits() const;

  // Tables that can code any numbers, and those best that were counted. At least one is.
  std::vector<std::uint8_t> tables() const;

 private:
  NumberFormat format_;
  std::size_t heads_, dim_;
  std::uint64_t numbers_ = 0;  // of each channel
  std::vector<std::uint32_t> counts_;
};

// What numbers would take, about, under tables of their own: `Counts::bits` of them alone.
template <typename T>
double own_bits(const Block<const T>& block, std::size_t heads, std::size_t dim,
                NumberFormat format);

// Memory for one block after the other: fresh pages cost more than much that is done with them.
template <typename U>
class Room {
 public:
  // Not set to anything.
  U* of(std::size_t n) {
    if (n > size_) {
      room_.reset(new U[n]);
      size_ = n;
    }
    return room_.get();
  }
  // Not to be called while in use.
  void keep_little() {
    if (size_ * sizeof(U) > std::size_t(8) << 20) {
      room_.reset();
      size_ = 0;
    }
  }

 private:
  std::unique_ptr<U[]> room_;
  std::size_t size_ = 0;
};

// A coded block in pieces, to be put together where it is wanted; `size` 0 when it would not be
// shorter than the numbers themselves.
class Encoded {
 public:
  std::size_t size = 0;
  void write(std::uint8_t* out) const;
  void keep_little() {
    mantissas_.keep_little();
    room_.keep_little();
  }

 private:
  friend class PartTables;
  struct Piece {
    std::uint32_t states[kLanes];
    Coded at;
  };
  Room<std::uint8_t> mantissas_;
  Room<std::uint16_t> room_;  // of words and escapes
  std::vector<Piece> streams_;
};

class PartTables;

// What is decoded with one after the other: the tables used last stay ready. It must not outlive
// them.
class Workspace {
 private:
  friend class PartTables;
  const PartTables* of_ = nullptr;
  std::vector<Decoder> decoders_;
  std::vector<Coded> streams_;
};

// The tables of one layer's keys or values. They are read when they are needed first, by whichever
// thread it is; that and each later use throw std::invalid_argument when the bytes make no sense.
class PartTables {
 public:
  // Copies the bytes. `lasting`: what is looked up in decoding is made once and stays, for blocks
  // that come now and then; not only with what decoded the block before.
  PartTables(const std::uint8_t* data, std::size_t size, std::size_t heads, std::size_t dim,
             NumberFormat format, bool lasting = false)
      : format_(format), heads_(heads), dim_(dim), lasting_(lasting), bytes_(data, data + size) {}

  const NumberFormat& format() const { return format_; }
  std::size_t heads() const { return heads_; }
  std::size_t dim() const { return dim_; }

  // `block` is of these heads and dim, and T of the format's size.
  template <typename T>
  void encode(const Block<const T>& block, Encoded* out) const;
  template <typename T>
  void decode(const std::uint8_t* data, std::size_t size, const Block<T>& block,
              Workspace* workspace) const;

  // The streams of a coded block of so many numbers: where they are, all that can be seen of them
  // without decoding checked.
  void find(const std::uint8_t* data, std::size_t size, std::size_t batch, std::size_t tokens,
            std::vector<Coded>* streams) const;

  // What kernels look up when they decode, of each shape.
  std::vector<Decoder> decoders() const;
  // How each channel uses a shape, as a GPU reads it.
  std::vector<DeviceChannel> device_channels() const;
  // What a GPU's encoder looks up; returns false when a shape has more exponents than it takes.
  bool make_device_encoders(std::vector<DeviceEncoder>* out) const;
  // How a block of so many numbers is cut into streams.
  std::vector<Stream> streams(std::size_t batch, std::size_t tokens) const;

 private:
  const StoredTables& stored() const;
  // What kernels need, but for what they look up.
  Tables tables() const {
    const StoredTables& stored = this->stored();
    return {nullptr, nullptr, stored.channels.data(), live_.data(),
            heads_,  dim_,    format_.value_bits(),   format_.mantissa_bits,
            wide_};
  }
  void make_decoders(Decoder* decoders) const;
  const Decoder* decoders(Workspace* workspace) const;
  // Whether the channels that are constant in the tables are so in the block.
  template <typename T>
  bool constant(const Block<const T>& block) const;
  // Made when they are needed; of each instruction set.
  const Encoder* encoders() const;

  NumberFormat format_;
  std::size_t heads_, dim_;
  bool lasting_;
  mutable std::vector<std::uint8_t> bytes_;
  mutable std::once_flag reading_;
  mutable StoredTables stored_;
  mutable std::vector<Live> live_;
  mutable bool wide_ = false;
  mutable std::string error_;
  mutable std::once_flag decoding_[simd::kLevels];
  mutable std::vector<Decoder> decoders_[simd::kLevels];
  mutable std::once_flag encoding_[simd::kLevels];
  mutable std::unique_ptr<Encoder[]> encoders_[simd::kLevels];
};

// Numbers stored as they are: copies them into place. Throws std::invalid_argument.
template <typename T>
void copy_raw(const std::uint8_t* data, std::size_t size, std::size_t heads, std::size_t dim,
              const Block<T>& block);

// XXH3-64 of the numbers in the order of [batch, heads, tokens, dim].
template <typename T>
std::uint64_t checksum(const Block<T>& block, std::size_t heads, std::size_t dim);

// What a block begins with; 1 is none.
enum Mode : std::uint8_t {
  kRawBlock = 0,
  kCodedBlock = 2,
  kUnturnedBlock = 3  // of keys before RoPE
};

// A block of keys before RoPE, taken apart: the coded block within, how its keys are turned, and
// the pairs that nothing turns to.
struct Unturned {
  const std::uint8_t* coded;
  std::size_t size;
  RopeRounding rounding;
  const std::uint8_t* exceptions;
  std::size_t exception_count;

  // Throws std::invalid_argument.
  Unturned(const std::uint8_t* data, std::size_t size);
  // Turns the decoded keys, of which the first token stands at the position `first`, and puts the
  // exceptions in their places. Throws std::invalid_argument.
  void turn(const Rotation& rotation, std::size_t first, std::size_t heads, std::size_t dim,
            const Block<std::uint16_t>& block) const;
};

// What a block begins with, and all in it, is at multiples of so many bytes.
constexpr std::size_t kAligned = 16;

}  // namespace kvzip::channel
