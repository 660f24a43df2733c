#include "channel/part.hpp"

#include <algorithm>
#include <cstring>

#include "channel/shapes.hpp"
#include "native/xxh3.hpp"

namespace kvzip::channel {
namespace {

// A coded block is padded to 1/1024 of its numbers, so that a few bytes cannot claim gigabytes.
constexpr std::size_t kMaxExpansion = 1024;

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
  template <typename U>
  U number() {
    U v;
    std::memcpy(&v, take(sizeof v), sizeof v);
    return v;
  }
  std::size_t left() const { return std::size_t(end_ - at_); }

 private:
  const std::uint8_t *at_, *end_;
};

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
                                      Form form) {
  const std::size_t n = heads * dim, numbers = in.batch * in.tokens;
  if (!n || !numbers) return {};
  const std::size_t stride = count_stride(form.value_bits());
  static thread_local Room<std::uint32_t> room;
  std::uint32_t* const counts = room.of(n * stride);
  std::memset(counts, 0, n * stride * sizeof *counts);
  count<T>(in, heads, dim, form.mantissa_bits, counts);
  StoredTables tables;
  tables.channels.resize(n);
  std::vector<const std::uint32_t*> coded;
  for (std::size_t c = 0; c < n; ++c) {
    const std::uint32_t* row = &counts[c * stride];
    Channel& channel = tables.channels[c];
    channel = {};
    channel.number = in.data[std::ptrdiff_t(c / dim) * in.head_stride + std::ptrdiff_t(c % dim)];
    channel.constant = row[channel.number >> form.mantissa_bits] == numbers &&
                       constant<T>(in, c / dim, c % dim);
    if (!channel.constant) coded.push_back(row);
  }
  Shapes shapes = choose_shapes(coded, numbers, form.exponent_bits);
  room.keep_little();
  tables.shapes = std::move(shapes.levels);
  std::size_t live = 0;
  for (Channel& channel : tables.channels) {
    if (channel.constant) continue;
    channel.shape = shapes.shape[live];
    channel.base = shapes.base[live++];
  }
  std::vector<std::uint8_t> out = write_tables(tables, {n, dim, form.value_bits(), form.bits()});
  const double saved = double(n - live) * double(numbers) * form.bits() +
                       double(live) * double(numbers) * form.value_bits() - shapes.bits;
  if (saved < 8.0 * double(out.size())) out.clear();
  return out;
}

const StoredTables& PartTables::stored() const {
  std::call_once(reading_, [&] {
    try {
      stored_ = read_tables(bytes_.data(), bytes_.size(),
                            {heads_ * dim_, dim_, form_.value_bits(), form_.bits()});
    } catch (const std::invalid_argument& error) {
      error_ = error.what();
    }
    std::vector<std::uint8_t>().swap(bytes_);
  });
  if (!error_.empty()) throw std::invalid_argument(error_);
  return stored_;
}

const Encoder* PartTables::encoders(const StoredTables& stored) const {
  const int level = int(simd::level());
  std::unique_ptr<Encoder[]>& encoders = encoders_[level];
  std::call_once(encoding_[level], [&] {
    encoders.reset(new Encoder[stored.shapes.count()]);  // not set to anything
    stored.shapes.each([&](std::size_t i, const std::uint8_t* levels, std::size_t width,
                           std::uint8_t escape) {
      make_encoder(levels, width, escape, form_.exponent_bits, &encoders[i]);
    });
  });
  return encoders.get();
}

template <typename T>
void PartTables::encode(const Block<const T>& block, Encoded* out) const {
  const StoredTables& stored = this->stored();
  Tables tables = this->tables(stored);
  tables.encoders = encoders(stored);
  const std::size_t n = block.batch * tables.heads * block.tokens * tables.dim;
  const std::size_t mantissas = mantissa_bytes(tables, block.batch, block.tokens);
  // Every number may be an escape and shift out a word.
  std::uint16_t* const room = out->room_.of(kSpareWords + 2 * n) + kSpareWords;
  Sink& sink = out->sink_;
  sink.mantissas = out->mantissas_.of(mantissas + 2 * kLanes);
  sink.words = room + n;
  sink.escapes = room + 2 * n;
  out->size = 0;
  if (!channel::encode<T>(tables, block, &sink)) return;
  out->lanes_ = std::min<std::size_t>(kLanes, block.tokens);
  out->mantissa_bytes_ = mantissas;
  out->words_ = std::size_t(room + n - sink.words);
  out->escapes_ = std::size_t(room + 2 * n - sink.escapes);
  const std::size_t size = 9 + 4 * out->lanes_ + 2 * out->escapes_ + mantissas + 2 * out->words_;
  if (size <= n * sizeof(T)) out->size = std::max(size, n * sizeof(T) / kMaxExpansion);
}

void Encoded::write(std::uint8_t* out) const {
  std::uint8_t* p = out;
  const std::uint32_t counts[2] = {std::uint32_t(escapes_), std::uint32_t(words_)};
  *p++ = kCodedBlock;
  const auto append = [&](const void* data, std::size_t bytes) {
    if (bytes) std::memcpy(p, data, bytes);
    p += bytes;
  };
  append(counts, 8);
  append(sink_.states, 4 * lanes_);
  append(sink_.escapes, 2 * escapes_);
  append(sink_.mantissas, mantissa_bytes_);
  append(sink_.words, 2 * words_);
  std::memset(p, 0, std::size_t(out + size - p));
}

template <typename T>
void PartTables::decode(const std::uint8_t* data, std::size_t size, const Block<T>& block,
                        Workspace* workspace) const {
  const StoredTables& stored = this->stored();
  Tables tables = this->tables(stored);
  Cursor in(data, size);
  if (in.number<std::uint8_t>() != kCodedBlock) throw std::invalid_argument("not a coded block");
  Coded coded;
  coded.escape_count = in.number<std::uint32_t>();
  coded.word_count = in.number<std::uint32_t>();
  coded.states = in.take(4 * std::min<std::size_t>(kLanes, block.tokens));
  coded.escapes = in.take(2 * coded.escape_count);
  coded.mantissas = in.take(mantissa_bytes(tables, block.batch, block.tokens));
  coded.words = in.take(2 * coded.word_count);
  for (std::size_t left = in.left(); left; --left)
    if (*in.take(1)) throw std::invalid_argument("its padding is not zeros");
  std::vector<Decoder>& decoders = workspace->decoders_;
  if (workspace->of_ != this) {
    workspace->of_ = nullptr;
    if (decoders.size() < stored.shapes.count()) decoders.resize(stored.shapes.count());
    stored.shapes.each([&](std::size_t i, const std::uint8_t* levels, std::size_t width,
                           std::uint8_t escape) {
      make_decoder(levels, width, escape, form_.exponent_bits, &decoders[i]);
    });
    workspace->of_ = this;
  }
  tables.decoders = decoders.data();
  if (!channel::decode<T>(tables, block, coded))
    throw std::invalid_argument("its streams do not fit each other");
}

template <typename T>
void copy_raw(const std::uint8_t* data, std::size_t size, std::size_t heads, std::size_t dim,
              const Block<T>& block) {
  if (size != 1 + block.batch * heads * block.tokens * dim * sizeof(T))
    throw std::invalid_argument("numbers of another size");
  ++data;
  each_run(block, heads, dim, [&](T* run, std::size_t n) {
    std::memcpy(run, data, n * sizeof(T));
    data += n * sizeof(T);
  });
}

template <typename T>
std::uint64_t checksum(const Block<T>& block, std::size_t heads, std::size_t dim) {
  Xxh3 hash;
  each_run(block, heads, dim, [&](const T* run, std::size_t n) { hash.update(run, n * sizeof(T)); });
  return hash.digest();
}

#define KVZIP_INSTANTIATE(T)                                                                    \
  template std::vector<std::uint8_t> make_tables(const Block<const T>&, std::size_t,           \
                                                 std::size_t, Form);                            \
  template void PartTables::encode(const Block<const T>&, Encoded*) const;                      \
  template void PartTables::decode(const std::uint8_t*, std::size_t, const Block<T>&,           \
                                   Workspace*) const;                                           \
  template void copy_raw(const std::uint8_t*, std::size_t, std::size_t, std::size_t,            \
                         const Block<T>&);                                                      \
  template std::uint64_t checksum(const Block<T>&, std::size_t, std::size_t);
KVZIP_INSTANTIATE(std::uint8_t)
KVZIP_INSTANTIATE(std::uint16_t)
KVZIP_INSTANTIATE(std::uint32_t)
#undef KVZIP_INSTANTIATE

}  // namespace kvzip::channel
