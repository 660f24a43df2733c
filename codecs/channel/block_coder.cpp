#include "channel/block_coder.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "channel/device_tables.hpp"
#include "channel/shape_clustering.hpp"
#include "native/xxh3.hpp"

namespace kvzip::channel {
namespace {

// A coded block is padded to 1/1024 of its numbers, so that a few bytes cannot claim gigabytes.
constexpr std::size_t kMaxExpansion = 1024;

// Counts have 32 bits.
constexpr std::uint64_t kMostCounted = 0xFFFFFFFF;

// Reads little-endian fields one after the other, never past the end.
class Cursor {
 public:
  Cursor(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}
  const std::uint8_t* take(std::size_t n) {
    if (n > left()) throw std::invalid_argument("cut short");
    const std::uint8_t* p = at_;
    at_ += n;
    return p;
  }
  void zeros(std::size_t n) {
    const std::uint8_t* const p = take(n);
    if (std::any_of(p, p + n, [](std::uint8_t byte) { return byte; }))
      throw std::invalid_argument("its padding is not zeros");
  }
  std::size_t left() const { return std::size_t(end_ - at_); }

 private:
  const std::uint8_t *at_, *end_;
};

constexpr std::size_t padding(std::size_t size) { return (kAligned - size % kAligned) % kAligned; }
constexpr std::size_t padded(std::size_t size) { return size + padding(size); }

// Bytes before the first stream: the mode, and of each stream how many words and escapes it has.
constexpr std::size_t kModeBytes = 8, kCountsBytes = 8;
std::size_t header_size(std::size_t streams) { return padded(kModeBytes + kCountsBytes * streams); }

std::size_t stream_size(const Coded& coded) {
  const Stream& stream = coded.stream;
  return padded(stream.stored_states()) + padded(stream.stored_mantissas()) +
         padded(2 * (coded.word_count + coded.escape_count) + coded.top_count);
}

// How many states have a highest byte. Throws std::invalid_argument where one is said to have it
// that there is not.
std::size_t tops(const Coded& coded) {
  const std::size_t lanes = coded.stream.lanes;
  std::size_t found = 0;
  for (const std::uint8_t* bits = coded.states + 3 * lanes;
       bits < coded.states + coded.stream.stored_states(); ++bits)
    found += std::size_t(__builtin_popcount(*bits));
  if (lanes % 8 && coded.states[coded.stream.stored_states() - 1] >> lanes % 8)
    throw std::invalid_argument("states of no token");
  return found;
}

// A pair's place and its two numbers.
constexpr std::size_t kExceptionBytes = 8;

std::size_t least_size(std::size_t raw_bytes) { return padded(raw_bytes / kMaxExpansion); }

// Numbers that lie side by side, in the order of [batch, heads, tokens, dim].
template <typename T, typename Use>
void each_run(const Block<T>& block, std::size_t heads, std::size_t dim, const Use& use) {
  const bool rows = block.token_stride == std::ptrdiff_t(dim) || block.tokens == 1;
  const std::size_t head = block.tokens * dim;
  const bool all = rows && (block.head_stride == std::ptrdiff_t(head) || heads == 1) &&
                   (block.batch_stride == std::ptrdiff_t(heads * head) || block.batch == 1);
  if (!block.batch || !heads || !head) return;
  if (all) return use(block.data, block.batch * heads * head);
  for (std::size_t b = 0; b < block.batch; ++b)
    for (std::size_t h = 0; h < heads; ++h) {
      T* at = block.data + std::ptrdiff_t(b) * block.batch_stride +
              std::ptrdiff_t(h) * block.head_stride;
      if (rows) use(at, head);
      else
        for (std::size_t t = 0; t < block.tokens; ++t, at += block.token_stride) use(at, dim);
    }
}

}  // namespace

template <typename T>
std::vector<std::uint8_t> make_tables(const Block<const T>& in, std::size_t heads, std::size_t dim,
                                      NumberFormat format) {
  const std::size_t n = heads * dim, numbers = in.batch * in.tokens;
  if (!n || !numbers || numbers > kMostCounted) return {};
  const std::size_t stride = count_stride(format.value_bits());
  static thread_local Room<std::uint32_t> room;
  std::uint32_t* const counts = room.of(n * stride);
  std::memset(counts, 0, n * stride * sizeof *counts);
  count(in, heads, dim, format.mantissa_bits, counts);
  StoredTables tables;
  tables.channels.resize(n);
  std::vector<const std::uint32_t*> coded;
  for (std::size_t c = 0; c < n; ++c) {
    const std::uint32_t* row = &counts[c * stride];
    Channel& channel = tables.channels[c];
    channel = {};
    channel.number = in.data[std::ptrdiff_t(c / dim) * in.head_stride + std::ptrdiff_t(c % dim)];
    channel.constant =
        row[channel.number >> format.mantissa_bits] == numbers && constant<T>(in, c / dim, c % dim);
    if (!channel.constant) coded.push_back(row);
  }
  Shapes shapes = choose_shapes(coded, numbers, format.exponent_bits);
  room.keep_little();
  tables.shapes = std::move(shapes.levels);
  std::size_t live = 0;
  for (Channel& channel : tables.channels) {
    if (channel.constant) continue;
    channel.shape = shapes.shape[live];
    channel.base = shapes.base[live++];
  }
  std::vector<std::uint8_t> out =
      write_tables(tables, {n, dim, format.value_bits(), format.bits()});
  const double saved = double(n - live) * double(numbers) * format.bits() +
                       double(live) * double(numbers) * format.value_bits() - shapes.bits;
  if (saved < 8.0 * double(out.size())) out.clear();
  return out;
}

Counts::Counts(std::size_t heads, std::size_t dim, NumberFormat format)
    : format_(format),
      heads_(heads),
      dim_(dim),
      counts_(heads * dim * count_stride(format.value_bits())) {}

template <typename T>
void Counts::add(const Block<const T>& block) {
  if (!block.batch) return;
  // After so many numbers the rest would change little, and is left out.
  Block<const T> counted = block;
  counted.tokens = std::min<std::uint64_t>(block.tokens, (kMostCounted - numbers_) / block.batch);
  count(counted, heads_, dim_, format_.mantissa_bits, counts_.data());
  numbers_ += std::uint64_t(counted.batch) * counted.tokens;
}

namespace {

// What numbers of so many channels would take, about, as `own_bits` has it.
template <typename C>
double bits_of(const C* counts, std::size_t channels, std::uint64_t numbers, NumberFormat format) {
  if (!numbers) return 0;
  // Tables of the values themselves take that much less for each value that occurs (Miller, Madow).
  const double each = 0.5 / std::log(2.0);
  std::vector<double> logs(std::min<std::uint64_t>(numbers, 4096) + 1);
  for (std::size_t k = 1; k < logs.size(); ++k) logs[k] = std::log2(double(k));
  double bits =
      double(channels) * double(numbers) * (format.mantissa_bits + std::log2(double(numbers)));
  // Few values occur: most are passed by together.
  constexpr std::size_t kTogether = 16, kWords = kTogether * sizeof(C) / 8;
  for (std::size_t c = 0; c < channels; ++c, counts += count_stride(format.value_bits()))
    for (std::size_t v = 0; v < std::size_t(1) << format.value_bits(); v += kTogether) {
      std::uint64_t words[kWords], any = 0;
      std::memcpy(words, counts + v, sizeof words);
      for (const std::uint64_t word : words) any |= word;
      for (std::size_t i = 0; any && i < kTogether; ++i)
        if (const std::size_t k = counts[v + i])
          bits += each - double(k) * (k < logs.size() ? logs[k] : std::log2(double(k)));
    }
  return bits;
}

}  // namespace

double Counts::bits() const { return bits_of(counts_.data(), heads_ * dim_, numbers_, format_); }

template <typename T>
double own_bits(const Block<const T>& block, std::size_t heads, std::size_t dim,
                NumberFormat format) {
  const std::size_t numbers = block.batch * block.tokens, n = heads * dim;
  if (numbers > UINT8_MAX) {
    Counts counts(heads, dim, format);
    counts.add(block);
    return counts.bits();
  }
  // A quarter of the memory.
  static thread_local Room<std::uint8_t> room;
  const std::size_t size = n * count_stride(format.value_bits());
  std::uint8_t* const counts = room.of(size);
  std::memset(counts, 0, size);
  count(block, heads, dim, format.mantissa_bits, counts);
  const double bits = bits_of(counts, n, numbers, format);
  room.keep_little();
  return bits;
}

std::vector<std::uint8_t> Counts::tables() const {
  const std::size_t n = heads_ * dim_;
  if (!numbers_) throw std::invalid_argument("nothing was counted");
  std::vector<const std::uint32_t*> rows;
  for (std::size_t c = 0; c < n; ++c)
    rows.push_back(&counts_[c * count_stride(format_.value_bits())]);
  Shapes shapes = choose_shapes(rows, numbers_, format_.exponent_bits, true);
  StoredTables tables;
  tables.shapes = std::move(shapes.levels);
  tables.channels.resize(n);
  for (std::size_t c = 0; c < n; ++c)
    tables.channels[c] = {shapes.shape[c], shapes.base[c], false, 0};
  return write_tables(tables, {n, dim_, format_.value_bits(), format_.bits()});
}

const StoredTables& PartTables::stored() const {
  std::call_once(reading_, [&] {
    try {
      stored_ = read_tables(bytes_.data(), bytes_.size(),
                            {heads_ * dim_, dim_, format_.value_bits(), format_.bits()});
    } catch (const std::invalid_argument& error) {
      error_ = error.what();
    }
    std::vector<std::uint8_t>().swap(bytes_);
    if (!error_.empty()) return;
    for (const std::uint8_t width : stored_.shapes.widths) wide_ |= width >= 128;
    std::size_t before = 0;
    for (std::size_t h = 0; h < heads_; ++h)
      for (std::size_t first = 0; first < dim_; first += kStrip) {
        Live live{0, before};
        for (std::size_t c = first; c < std::min(first + kStrip, dim_); ++c)
          live.channels |= std::uint64_t(!stored_.channels[h * dim_ + c].constant) << (c - first);
        live_.push_back(live);
        before += std::size_t(__builtin_popcountll(live.channels));
      }
    live_.push_back({0, before});
  });
  if (!error_.empty()) throw std::invalid_argument(error_);
  return stored_;
}

void PartTables::make_decoders(Decoder* decoders) const {
  stored().shapes.each(
      [&](std::size_t i, const std::uint8_t* levels, std::size_t width, std::uint8_t escape) {
        make_decoder(levels, width, escape, format_.exponent_bits, &decoders[i]);
      });
}

std::vector<Decoder> PartTables::decoders() const {
  std::vector<Decoder> found(stored().shapes.count());
  make_decoders(found.data());
  return found;
}

const Decoder* PartTables::decoders(Workspace* workspace) const {
  if (lasting_) {
    const int level = int(simd::vectors());
    std::call_once(decoding_[level], [&] { decoders_[level] = decoders(); });
    return decoders_[level].data();
  }
  std::vector<Decoder>& decoders = workspace->decoders_;
  if (workspace->of_ != this) {
    workspace->of_ = nullptr;
    if (decoders.size() < stored().shapes.count()) decoders.resize(stored().shapes.count());
    make_decoders(decoders.data());
    workspace->of_ = this;
  }
  return decoders.data();
}

template <typename T>
bool PartTables::constant(const Block<const T>& block) const {
  if (!block.batch || !block.tokens) return true;
  for (std::size_t c = 0; c < stored_.channels.size(); ++c) {
    const Channel& channel = stored_.channels[c];
    if (!channel.constant) continue;
    const std::size_t head = c / dim_, at = c % dim_;
    if (block.data[std::ptrdiff_t(head) * block.head_stride + std::ptrdiff_t(at)] !=
            channel.number ||
        !channel::constant<T>(block, head, at))
      return false;
  }
  return true;
}

const Encoder* PartTables::encoders() const {
  const StoredTables& stored = this->stored();
  const int level = int(simd::vectors());
  std::unique_ptr<Encoder[]>& encoders = encoders_[level];
  std::call_once(encoding_[level], [&] {
    encoders.reset(new Encoder[stored.shapes.count()]);  // not set to anything
    stored.shapes.each(
        [&](std::size_t i, const std::uint8_t* levels, std::size_t width, std::uint8_t escape) {
          make_encoder(levels, width, escape, format_.exponent_bits, &encoders[i]);
        });
  });
  return encoders.get();
}

template <typename T>
void PartTables::encode(const Block<const T>& block, Encoded* out) const {
  Tables tables = this->tables();
  tables.encoders = encoders();
  const std::size_t n = block.batch * heads_ * block.tokens * dim_;
  const Streams streams(tables, block.batch, block.tokens);
  // Every number may be an escape and shift out a word.
  std::uint16_t* const room = out->room_.of(kSpareWords + 2 * n) + kSpareWords;
  Sink sink;
  sink.mantissas = out->mantissas_.of(streams.mantissas()) + streams.mantissas();
  sink.words = room + n;
  sink.escapes = room + 2 * n;
  out->size = 0;
  if (!constant(block)) return;
  out->streams_.resize(streams.count());
  std::size_t size = header_size(streams.count());
  for (std::size_t i = streams.count(); i-- > 0;) {
    const std::uint16_t *const words = sink.words, *const escapes = sink.escapes;
    Coded& at = out->streams_[i].at;
    at.stream = streams[i];
    if (!channel::encode<T>(tables, block, at.stream, &sink)) return;
    std::memcpy(out->streams_[i].states, sink.states, sizeof sink.states);
    at.mantissas = sink.mantissas;
    at.words = reinterpret_cast<const std::uint8_t*>(sink.words);
    at.escapes = reinterpret_cast<const std::uint8_t*>(sink.escapes);
    at.word_count = std::size_t(words - sink.words);
    at.escape_count = std::size_t(escapes - sink.escapes);
    at.top_count = std::size_t(std::count_if(sink.states, sink.states + at.stream.lanes,
                                             [](std::uint32_t x) { return x >= kTop; }));
    size += stream_size(at);
  }
  size = std::max(size, least_size(n * sizeof(T)));
  if (size < kAligned + n * sizeof(T)) out->size = size;
}

void Encoded::write(std::uint8_t* out) const {
  std::uint8_t* p = out;
  const auto append = [&](const void* data, std::size_t bytes) {
    if (bytes) std::memcpy(p, data, bytes);
    p += bytes;
  };
  const auto pad = [&](std::size_t bytes) {
    std::memset(p, 0, bytes);
    p += bytes;
  };
  const std::uint8_t mode = kCodedBlock;
  append(&mode, 1);
  pad(kModeBytes - 1);
  for (const Piece& piece : streams_) {
    const std::uint32_t counts[2] = {std::uint32_t(piece.at.word_count),
                                     std::uint32_t(piece.at.escape_count)};
    append(counts, sizeof counts);
  }
  pad(padding(std::size_t(p - out)));
  for (const Piece& piece : streams_) {
    const Coded& at = piece.at;
    std::uint8_t with_top[kLanes / 8] = {}, tops[kLanes];
    std::size_t top_count = 0;
    for (std::size_t j = 0; j < at.stream.lanes; ++j) {
      append(&piece.states[j], 3);
      if (piece.states[j] < kTop) continue;
      with_top[j / 8] |= std::uint8_t(1u << j % 8);
      tops[top_count++] = std::uint8_t(piece.states[j] >> 24);
    }
    append(with_top, (at.stream.lanes + 7) / 8);
    pad(padding(std::size_t(p - out)));
    append(at.mantissas, at.stream.stored_mantissas());
    pad(padding(std::size_t(p - out)));
    append(at.words, 2 * at.word_count);
    append(at.escapes, 2 * at.escape_count);
    append(tops, top_count);
    pad(padding(std::size_t(p - out)));
  }
  pad(std::size_t(out + size - p));
}

std::vector<DeviceChannel> PartTables::device_channels() const {
  const std::vector<Channel>& channels = stored().channels;
  std::vector<DeviceChannel> found(channels.size());
  std::transform(channels.begin(), channels.end(), found.begin(), [](const Channel& channel) {
    return channel.constant ? DeviceChannel{kConstantShape, channel.number}
                            : DeviceChannel{channel.shape, channel.base};
  });
  return found;
}

bool PartTables::make_device_encoders(std::vector<DeviceEncoder>* out) const {
  const StoredTables& stored = this->stored();
  out->resize(stored.shapes.count());
  bool all = true;
  stored.shapes.each(
      [&](std::size_t i, const std::uint8_t* levels, std::size_t width, std::uint8_t escape) {
        const Alias alias = make_alias(levels, width, escape, format_.exponent_bits);
        all = all && make_device_encoder(alias, &(*out)[i]);
      });
  return all;
}

std::vector<Stream> PartTables::streams(std::size_t batch, std::size_t tokens) const {
  const Tables tables = this->tables();
  const Streams streams(tables, batch, tokens);
  std::vector<Stream> found;
  for (std::size_t i = 0; i < streams.count(); ++i) found.push_back(streams[i]);
  return found;
}

void PartTables::find(const std::uint8_t* data, std::size_t size, std::size_t batch,
                      std::size_t tokens, std::vector<Coded>* out) const {
  const Tables tables = this->tables();
  std::size_t raw_bytes = format_.itemsize();
  for (const std::size_t n : {batch, heads_, tokens, dim_})
    if (__builtin_mul_overflow(raw_bytes, n, &raw_bytes)) throw std::invalid_argument("cut short");
  Cursor in(data, size);
  if (*in.take(1) != kCodedBlock) throw std::invalid_argument("not a coded block");
  if (least_size(raw_bytes) > size) throw std::invalid_argument("cut short");
  in.zeros(kModeBytes - 1);
  const Streams streams(tables, batch, tokens);
  const std::uint8_t* counts = in.take(kCountsBytes * streams.count());
  const auto to_alignment = [&] { in.zeros(padding(size - in.left())); };
  to_alignment();
  out->clear();
  for (std::size_t i = 0; i < streams.count(); ++i, counts += kCountsBytes) {
    Coded coded;
    coded.stream = streams[i];
    std::uint32_t found[2];
    std::memcpy(found, counts, sizeof found);
    coded.word_count = found[0];
    coded.escape_count = found[1];
    coded.states = in.take(coded.stream.stored_states());
    coded.top_count = tops(coded);
    to_alignment();
    coded.mantissas = in.take(coded.stream.stored_mantissas());
    to_alignment();
    coded.words = in.take(2 * coded.word_count);
    coded.escapes = in.take(2 * coded.escape_count);
    coded.tops = in.take(coded.top_count);
    to_alignment();
    out->push_back(coded);
  }
  if (in.left() && size != least_size(raw_bytes)) throw std::invalid_argument("too long");
  in.zeros(in.left());
}

template <typename T>
void PartTables::decode(const std::uint8_t* data, std::size_t size, const Block<T>& block,
                        Workspace* workspace) const {
  Tables tables = this->tables();
  std::vector<Coded>& streams = workspace->streams_;
  find(data, size, block.batch, block.tokens, &streams);
  tables.decoders = decoders(workspace);
  if (!channel::decode<T>(tables, block, streams.data(), streams.size()))
    throw std::invalid_argument("its streams do not fit each other");
}

Unturned::Unturned(const std::uint8_t* data, std::size_t bytes) {
  Cursor in(data, bytes);
  const std::uint8_t* const head = in.take(kAligned);
  std::uint32_t count;
  std::memcpy(&count, head + 4, sizeof count);
  const bool zeros = !head[2] && !head[3] &&
                     std::all_of(head + 8, head + kAligned, [](std::uint8_t b) { return !b; });
  if (head[0] != kUnturnedBlock || !is_rope_rounding(head[1]) || !zeros)
    throw std::invalid_argument("its head makes no sense");
  rounding = RopeRounding(head[1]);
  exception_count = count;
  exceptions = in.take(kExceptionBytes * count);
  in.zeros(padding(kExceptionBytes * count));
  size = in.left();
  coded = in.take(size);
}

void Unturned::turn(const Rotation& rotation, std::size_t first, std::size_t heads, std::size_t dim,
                    const Block<std::uint16_t>& block) const {
  const std::size_t pairs = rotation.pairs();
  if (2 * pairs > dim) throw std::invalid_argument("more pairs are turned than there are");
  for (std::size_t b = 0; b < block.batch; ++b)
    rotation.turn({block.data + std::ptrdiff_t(b) * block.batch_stride, heads, block.tokens,
                   block.head_stride, block.token_stride},
                  first, rounding);
  const std::uint64_t all = std::uint64_t(block.batch) * heads * block.tokens * pairs;
  std::uint64_t next = 0;
  for (std::size_t i = 0; i < exception_count; ++i) {
    std::uint32_t place;
    std::uint16_t numbers[2];
    std::memcpy(&place, exceptions + kExceptionBytes * i, sizeof place);
    std::memcpy(numbers, exceptions + kExceptionBytes * i + sizeof place, sizeof numbers);
    if (place < next || place >= all) throw std::invalid_argument("an exception of no pair");
    next = std::uint64_t(place) + 1;
    const std::size_t pair = place % pairs, row = place / pairs, t = row % block.tokens;
    const std::size_t h = row / block.tokens % heads, b = row / block.tokens / heads;
    std::uint16_t* const key = block.data + std::ptrdiff_t(b) * block.batch_stride +
                               std::ptrdiff_t(h) * block.head_stride +
                               std::ptrdiff_t(t) * block.token_stride;
    const Rotation::Places places = rotation.places_of(pair, rounding);
    key[places.first] = numbers[0];
    key[places.second] = numbers[1];
  }
}

template <typename T>
void copy_raw(const std::uint8_t* data, std::size_t size, std::size_t heads, std::size_t dim,
              const Block<T>& block) {
  if (size != kAligned + block.batch * heads * block.tokens * dim * sizeof(T))
    throw std::invalid_argument("numbers of another size");
  Cursor(data, size).zeros(kAligned);  // the mode is 0, too
  data += kAligned;
  each_run(block, heads, dim, [&](T* run, std::size_t n) {
    std::memcpy(run, data, n * sizeof(T));
    data += n * sizeof(T);
  });
}

template <typename T>
std::uint64_t checksum(const Block<T>& block, std::size_t heads, std::size_t dim) {
  Xxh3 hash;
  each_run(block, heads, dim,
           [&](const T* run, std::size_t n) { hash.update(run, n * sizeof(T)); });
  return hash.digest();
}

#define KVZIP_INSTANTIATE(T)                                                                      \
  template std::vector<std::uint8_t> make_tables(const Block<const T>&, std::size_t, std::size_t, \
                                                 NumberFormat);                                   \
  template void Counts::add(const Block<const T>&);                                               \
  template double own_bits(const Block<const T>&, std::size_t, std::size_t, NumberFormat);        \
  template void PartTables::encode(const Block<const T>&, Encoded*) const;                        \
  template void PartTables::decode(const std::uint8_t*, std::size_t, const Block<T>&, Workspace*) \
      const;                                                                                      \
  template void copy_raw(const std::uint8_t*, std::size_t, std::size_t, std::size_t,              \
                         const Block<T>&);                                                        \
  template std::uint64_t checksum(const Block<T>&, std::size_t, std::size_t);
KVZIP_INSTANTIATE(std::uint8_t)
KVZIP_INSTANTIATE(std::uint16_t)
KVZIP_INSTANTIATE(std::uint32_t)
#undef KVZIP_INSTANTIATE

}  // namespace kvzip::channel
