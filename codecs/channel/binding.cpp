// What Python sees of the channel codec: sizes are checked and memory is allocated here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "channel/kernels.hpp"
#include "channel/shapes.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::channel {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Numbers = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

// Reads little-endian fields one after the other, never past the end.
class Cursor {
 public:
  Cursor(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}
  const std::uint8_t* take(std::size_t n) {
    if (n > std::size_t(end_ - at_)) throw std::invalid_argument("cut short");
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

template <typename U>
void put(std::vector<std::uint8_t>& out, U v) {
  const auto* p = reinterpret_cast<const std::uint8_t*>(&v);
  out.insert(out.end(), p, p + sizeof v);
}

struct Form {
  int exponent_bits, mantissa_bits;
  int value_bits() const { return exponent_bits + 1; }
  int itemsize() const { return (value_bits() + mantissa_bits) / 8; }
  void check() const {
    const int e = exponent_bits, m = mantissa_bits;
    if (!((e == 8 && (m == 7 || m == 23)) || (e == 5 && (m == 10 || m == 2)) || (e == 4 && m == 3)))
      throw std::invalid_argument("not a number format of ours");
  }
};

// The tables of one layer's keys or values, from the bytes that spec.md calls the tables.
class PartTables {
 public:
  PartTables(const Bytes& bytes, std::size_t heads, std::size_t dim, int exponent_bits,
             int mantissa_bits)
      : form_{exponent_bits, mantissa_bits} {
    form_.check();
    const std::size_t n = heads * dim;
    Cursor in(bytes.data(), bytes.shape(0));
    const std::size_t shapes = in.number<std::uint16_t>();
    if (n > in.left()) throw std::invalid_argument("cut short");
    const std::uint8_t* widths = in.take(shapes);
    const std::uint8_t* escapes = in.take(shapes);
    decoders_.resize(shapes);
    encoders_.resize(shapes);
    for (std::size_t i = 0; i < shapes; ++i) {
      const std::size_t width = std::size_t(widths[i]) + 1;
      if (width > std::size_t(1) << exponent_bits ||
          !make_shape(in.take(2 * width), width, escapes[i], exponent_bits, &decoders_[i],
                      &encoders_[i]))
        throw std::invalid_argument("a table makes no sense");
    }
    channels_.resize(n);
    const std::uint8_t* kinds = in.take(n);
    std::size_t shape = 0;
    for (std::size_t c = 0; c < n; ++c) {
      Channel& channel = channels_[c];
      channel = {};
      channel.constant = kinds[c] == kConstant;
      if (kinds[c] > kConstant) throw std::invalid_argument("a channel of unknown kind");
      if (channel.constant) {
        std::memcpy(&channel.number, in.take(std::size_t(form_.itemsize())),
                    std::size_t(form_.itemsize()));
      } else {
        channel.shape = in.number<std::uint16_t>();
        channel.base = in.number<std::uint16_t>();
        if (channel.shape >= shapes || channel.base >> form_.value_bits())
          throw std::invalid_argument("a channel of no table");
      }
    }
    if (in.left()) throw std::invalid_argument("longer than it should be");
    tables_ = {decoders_.data(), encoders_.data(), channels_.data(), heads,
               dim,              form_.value_bits(), mantissa_bits};
  }

  template <typename T, typename Array>
  Block<T> block(const Array& array) const {
    if (sizeof(T) != std::size_t(form_.itemsize()) || array.shape(1) != tables_.heads ||
        array.shape(3) != tables_.dim)
      throw std::invalid_argument("a block of another shape or dtype than its tables");
    if (array.stride(3) != 1 && tables_.dim > 1)
      throw std::invalid_argument("the last axis must be contiguous");
    return {array.data(),    array.shape(0),  array.shape(2),
            array.stride(0), array.stride(1), array.stride(2)};
  }

  // Bytes of a coded block, without its mode byte, or nothing when they would not be shorter
  // than the numbers themselves.
  template <typename T>
  nb::object encode(const Numbers<const T>& array) const {
    const Block<const T> in = block<const T>(array);
    const std::size_t n = in.batch * tables_.heads * in.tokens * tables_.dim;
    std::vector<std::uint8_t> out;
    bool fits;
    {
      nb::gil_scoped_release released;
      // Room for every number to be an escape and to shift out a word.
      std::vector<std::uint16_t> words(n), escapes(n);
      Streams streams;
      fits = encode_values<T>(tables_, in, words.data() + n, escapes.data() + n, &streams);
      if (fits) {
        const std::size_t lanes = std::min<std::size_t>(kLanes, in.tokens);
        const std::size_t mantissas = mantissa_bytes(tables_, in.batch, in.tokens);
        const std::size_t size =
            8 + 4 * lanes + 2 * streams.escapes + mantissas + 2 * streams.words;
        fits = size < n * sizeof(T);
        if (fits) {
          out.resize(size);
          std::uint8_t* p = out.data();
          const std::uint32_t counts[2] = {std::uint32_t(streams.escapes),
                                           std::uint32_t(streams.words)};
          std::memcpy(p, counts, 8);
          std::memcpy(p += 8, streams.states, 4 * lanes);
          std::memcpy(p += 4 * lanes, escapes.data() + n - streams.escapes, 2 * streams.escapes);
          encode_mantissas<T>(tables_, in, p += 2 * streams.escapes);
          std::memcpy(p += mantissas, words.data() + n - streams.words, 2 * streams.words);
        }
      }
    }
    if (!fits) return nb::none();
    return nb::bytes(out.data(), out.size());
  }

  template <typename T>
  void decode(const Bytes& bytes, const Numbers<T>& array) const {
    const Block<T> out = block<T>(array);
    Cursor in(bytes.data(), bytes.shape(0));
    const std::size_t escapes = in.number<std::uint32_t>(), words = in.number<std::uint32_t>();
    const std::uint8_t* states = in.take(4 * std::min<std::size_t>(kLanes, out.tokens));
    const std::uint8_t* escape_values = in.take(2 * escapes);
    const std::uint8_t* mantissas = in.take(mantissa_bytes(tables_, out.batch, out.tokens));
    const std::uint8_t* stream = in.take(2 * words);
    // Padding (spec.md) is zeros and nothing else.
    bool good = true;
    for (std::size_t left = in.left(); left; --left) good &= *in.take(1) == 0;
    if (good) {
      nb::gil_scoped_release released;
      good = kvzip::channel::decode<T>(tables_, out, states, escape_values, escapes, mantissas,
                                       stream, words);
    }
    if (!good) throw std::invalid_argument("its streams do not fit each other");
  }

  enum Kind : std::uint8_t { kCoded = 0, kConstant = 1 };

 private:
  Form form_;
  std::vector<Decoder> decoders_;
  std::vector<Encoder> encoders_;
  std::vector<Channel> channels_;
  Tables tables_;
};

// Bits saved by an ideal coder that knows these counts, against storing each value as it is.
double expected_gain(const std::uint32_t* counts, int value_bits) {
  double total = 0, sum = 0;
  for (std::size_t v = 0; v < std::size_t(1) << value_bits; ++v)
    if (counts[v]) {
      total += counts[v];
      sum += counts[v] * std::log2(double(counts[v]));
    }
  return total * value_bits - (total * std::log2(total) - sum);
}

// The tables that fit one layer's keys or values best, as bytes; none when they would not pay.
template <typename T>
nb::bytes make_tables(const Numbers<const T>& array, int exponent_bits, int mantissa_bits) {
  const Form form{exponent_bits, mantissa_bits};
  form.check();
  if (std::size_t(form.itemsize()) != sizeof(T) || (array.stride(3) != 1 && array.shape(3) > 1))
    throw std::invalid_argument("numbers of another dtype, or not contiguous");
  const std::size_t heads = array.shape(1), dim = array.shape(3), n = heads * dim;
  if (n >= 1u << 16) throw std::length_error("more than 65,535 channels in a part");
  const Block<const T> in{array.data(),    array.shape(0),  array.shape(2),
                          array.stride(0), array.stride(1), array.stride(2)};
  std::vector<std::uint8_t> out;
  {
    nb::gil_scoped_release released;
    std::vector<std::uint32_t> counts(n << form.value_bits());
    std::vector<T> first(n);
    std::vector<std::uint8_t> same(n, 1);
    if (in.batch && in.tokens)
      for (std::size_t c = 0; c < n; ++c)
        first[c] = in.data[std::ptrdiff_t(c / dim) * in.head_stride + std::ptrdiff_t(c % dim)];
    count<T>(in, heads, dim, mantissa_bits, form.value_bits(), counts.data(), first.data(),
             same.data());
    double gain = 0;  // bits that the tables will save
    std::size_t live = 0;
    for (std::size_t c = 0; c < n; ++c) {
      const std::uint32_t* row = &counts[c << form.value_bits()];
      if (same[c]) {
        gain += double(in.batch * in.tokens) * 8 * sizeof(T);
        continue;
      }
      gain += expected_gain(row, form.value_bits());
      std::copy(row, row + (std::size_t(1) << form.value_bits()),
                &counts[live++ << form.value_bits()]);
    }
    const Shapes shapes = choose_shapes(counts.data(), live, exponent_bits);
    put(out, std::uint16_t(shapes.widths.size()));
    for (const auto* piece : {&shapes.widths, &shapes.escapes, &shapes.levels})
      out.insert(out.end(), piece->begin(), piece->end());
    for (std::uint8_t constant : same) out.push_back(constant ? PartTables::kConstant : PartTables::kCoded);
    live = 0;
    for (std::size_t c = 0; c < n; ++c) {
      if (same[c]) {
        put(out, first[c]);
      } else {
        put(out, shapes.shape[live]);
        put(out, shapes.base[live++]);
      }
    }
    // Tables come down to about half their size when the caller compresses them.
    if (gain < 4.0 * double(out.size())) out.clear();
  }
  return nb::bytes(out.data(), out.size());
}

template <typename T>
void bind_for(nb::module_& m, nb::class_<PartTables>& tables) {
  m.def("channel_tables", &make_tables<T>, "numbers"_a, "exponent_bits"_a, "mantissa_bits"_a,
        "The tables that fit one layer's keys or values best, as bytes (codecs/channel/spec.md).");
  tables.def("encode", &PartTables::encode<T>, "numbers"_a,
             "A coded block's bytes, or None when they are not shorter than the numbers.");
  tables.def("decode", &PartTables::decode<T>, "data"_a, "out"_a,
             "Fill `out` from a coded block's bytes; raises ValueError.");
}

}  // namespace

void bind(nb::module_& m) {
  nb::class_<PartTables> tables(m, "ChannelTables");
  tables.def(nb::init<const Bytes&, std::size_t, std::size_t, int, int>(), "data"_a, "heads"_a,
             "dim"_a, "exponent_bits"_a, "mantissa_bits"_a);
  bind_for<std::uint8_t>(m, tables);
  bind_for<std::uint16_t>(m, tables);
  bind_for<std::uint32_t>(m, tables);
}

}  // namespace kvzip::channel
