// Round trips and damage for the channel codec's C++, on every instruction set of this processor.
#include "fuzz.hpp"

#include "channel/block_coder.hpp"

using namespace kvzip::channel;
using namespace kvzip::fuzz;
using kvzip::kRopeRoundings;
using kvzip::NumberFormat;
using kvzip::RopeRounding;
namespace simd = kvzip::simd;

namespace {

Bytes damaged(Bytes bytes) {
  switch (below(4)) {
    case 0: bytes.resize(below(bytes.size() + 1)); break;
    case 1: {
      const std::size_t more = 1 + below(300);
      bytes.insert(bytes.end(), more, std::uint8_t(below(2) ? below(256) : 0));
      break;
    }
    default:
      for (std::size_t n = 1 + below(4); n && !bytes.empty(); --n)
      // Often the counts, at the beginning.
      {
        const std::size_t reach = below(2) ? bytes.size() : std::min<std::size_t>(bytes.size(), 40);
        const std::size_t at = below(reach);
        bytes[at] = std::uint8_t(below(3) ? below(256) : below(2) * 255);
      }
  }
  return bytes;
}

bool same(const StoredTables& a, const StoredTables& b) {
  if (a.shapes.widths != b.shapes.widths || a.shapes.escapes != b.shapes.escapes ||
      a.shapes.levels != b.shapes.levels || a.channels.size() != b.channels.size())
    return false;
  for (std::size_t c = 0; c < a.channels.size(); ++c) {
    const Channel &x = a.channels[c], &y = b.channels[c];
    if (x.constant != y.constant || x.shape != y.shape || x.base != y.base || x.number != y.number)
      return false;
  }
  return true;
}

// Tables of any kind: written and read they are the same, if shapes come in the order of their
// first use with the sign that they have there; damaged they are others or refused.
void stored(NumberFormat format) {
  const std::size_t channels = below(8) ? 1 + below(300) : 65535;
  const TableFormat of{channels, 1 + below(channels), format.value_bits(), format.bits()};
  const std::size_t exponents = std::size_t(1) << format.exponent_bits;
  StoredTables tables;
  const std::size_t most = below(2) ? 5 : channels < 1000 ? 300 : 3000, every = 1 + below(9);
  bool coded = false;
  for (std::size_t c = 0; c < channels; ++c) {
    Channel channel{};
    if (below(every) == 0 && every > 3) {
      channel.constant = true;
      channel.number = std::uint32_t(random_bits() & ((std::uint64_t(1) << format.bits()) - 1));
    } else if (!coded || (tables.shapes.count() < most && below(3) == 0)) {
      coded = true;
      const std::size_t width =
          1 + below(below(4) ? std::min<std::size_t>(exponents, 20) : exponents);
      std::vector<std::uint8_t> levels(2 * width);
      const std::size_t high = below(3) ? 20 : 255;
      for (std::size_t n = 1 + below(31); n; --n)
        levels[below(2 * width)] = std::uint8_t(1 + below(high));
      channel.shape = std::uint16_t(tables.shapes.count());
      channel.base = std::uint16_t(below(exponents));
      tables.shapes.widths.push_back(std::uint8_t(width - 1));
      tables.shapes.escapes.push_back(std::uint8_t(below(2) * below(256)));
      tables.shapes.levels.insert(tables.shapes.levels.end(), levels.begin(), levels.end());
    } else {
      channel.shape = std::uint16_t(below(tables.shapes.count()));
      channel.base = std::uint16_t(below(2 * exponents));
    }
    tables.channels.push_back(channel);
  }
  const Bytes bytes = write_tables(tables, of);
  encoded_bytes.update(bytes.data(), bytes.size());
  check(same(read_tables(bytes.data(), bytes.size(), of), tables), "not the same tables");
  for (int turn = 0; turn < 4; ++turn) {
    const Exact wrong(damaged(bytes));
    try {
      const StoredTables found = read_tables(wrong.data.get(), wrong.size, of);
      const Bytes again = write_tables(found, of);
      check(same(read_tables(again.data(), again.size(), of), found), "not the same other tables");
    } catch (const std::invalid_argument&) {
    }
  }
}

// A block's bytes, which every path must give.
template <typename T>
Bytes encoded_alike(const PartTables& part, const Block<const T>& in, const char* otherwise) {
  Bytes coded;
  for (simd::Level level : kLevels) {
    simd::set_level(level);
    Encoded encoded;
    part.encode<T>(in, &encoded);
    Bytes found(encoded.size);
    if (encoded.size) encoded.write(found.data());
    check(level == kLevels[0] || found == coded, otherwise);
    coded = found;
  }
  return coded;
}

// Tables that the encoder would not choose, of any width, with numbers that follow them.
template <typename T>
void strange(NumberFormat format) {
  const std::size_t exponents = std::size_t(1) << format.exponent_bits, values = 2 * exponents;
  const std::size_t heads = 1 + below(2), dim = 1 + below(130), tokens = 1 + below(400);
  const std::size_t n = heads * dim;
  StoredTables tables;
  std::vector<Alias> shapes;
  for (std::size_t c = 0; c < n; ++c) {
    Channel channel{};
    if (c && below(20) == 0) {
      channel.constant = true;
      channel.number = std::uint32_t(random_bits() & ((std::uint64_t(1) << format.bits()) - 1));
    } else if (shapes.empty() || (shapes.size() < 20 && below(3) == 0)) {
      const std::size_t usual = std::min<std::size_t>(exponents, 20);
      const std::size_t width = 1 + below(below(3) ? usual : exponents);
      std::vector<std::uint8_t> levels(2 * width);
      const std::size_t high = below(3) ? 20 : 255, most = below(4) ? 31 : 3;
      for (std::size_t k = 1 + below(most); k; --k)
        levels[below(2 * width)] = std::uint8_t(1 + below(high));
      const auto escape = std::uint8_t(below(2) * (1 + below(4)));
      channel.shape = std::uint16_t(shapes.size());
      channel.base = std::uint16_t(below(exponents));
      tables.shapes.widths.push_back(std::uint8_t(width - 1));
      tables.shapes.escapes.push_back(escape);
      tables.shapes.levels.insert(tables.shapes.levels.end(), levels.begin(), levels.end());
      shapes.push_back(make_alias(levels.data(), width, escape, format.exponent_bits));
    } else {
      channel.shape = std::uint16_t(below(shapes.size()));
      channel.base = std::uint16_t(below(values));
    }
    tables.channels.push_back(channel);
  }
  const bool misfit = below(8) == 0;
  std::vector<T> numbers(n * tokens);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const Channel& channel = tables.channels[i / (tokens * dim) * dim + i % dim];
    if (channel.constant) {
      numbers[i] = T(channel.number);
      continue;
    }
    const Alias& shape = shapes[channel.shape];
    std::size_t slot = below(kTotal);
    std::uint32_t symbol = 0;
    while (slot >= shape.freq[symbol]) slot -= shape.freq[symbol++];
    const std::uint64_t value = symbol == shape.escape || (misfit && below(5000) == 0)
                                    ? below(values)
                                    : (shape.value[symbol] + channel.base) % values;
    numbers[i] = T(value << format.mantissa_bits |
                   (random_bits() & ((std::uint64_t(1) << format.mantissa_bits) - 1)));
  }
  const Block<const T> in{
      numbers.data(),     1, tokens, std::ptrdiff_t(numbers.size()), std::ptrdiff_t(tokens * dim),
      std::ptrdiff_t(dim)};
  const Bytes bytes = write_tables(tables, {n, dim, format.value_bits(), format.bits()});
  const PartTables part(bytes.data(), bytes.size(), heads, dim, format);
  const Bytes coded = encoded_alike(part, in, "not the same bytes of strange tables");
  encoded_bytes.update(coded.data(), coded.size());
  if (coded.empty()) return;
  for (simd::Level level : kLevels) {
    simd::set_level(level);
    std::vector<T> out(numbers.size());
    Workspace workspace;
    part.decode<T>(coded.data(), coded.size(),
                   {out.data(), 1, tokens, in.batch_stride, in.head_stride, in.token_stride},
                   &workspace);
    check(out == numbers, "not the numbers of strange tables");
  }
}

// Tables of one block code any others, with what is looked up made anew or kept.
template <typename T>
void others(const Block<const T>& in, std::size_t heads, std::size_t dim, NumberFormat format) {
  Counts counts(heads, dim, format);
  counts.add<T>(in);
  const Bytes tables = counts.tables();
  encoded_bytes.update(tables.data(), tables.size());
  const PartTables part(tables.data(), tables.size(), heads, dim, format, below(2));
  const std::size_t tokens = 1 + below(300), row = heads * dim;
  std::vector<T> numbers(tokens * row);
  for (T& x : numbers) x = below(3) ? in.data[below(dim)] : T(random_bits());
  const Block<const T> other{
      numbers.data(),     1, tokens, std::ptrdiff_t(numbers.size()), std::ptrdiff_t(dim),
      std::ptrdiff_t(row)};
  const Bytes coded = encoded_alike(part, other, "not the same bytes of others");
  if (coded.empty()) return;
  for (simd::Level level : kLevels) {
    simd::set_level(level);
    std::vector<T> out(numbers.size());
    Workspace workspace;
    part.decode<T>(
        coded.data(), coded.size(),
        {out.data(), 1, tokens, other.batch_stride, other.head_stride, other.token_stride},
        &workspace);
    check(out == numbers, "not the numbers of others");
  }
}

// Keys before RoPE: found alike on all paths, and turned back to what they were found for; and a
// block of them, damaged.
void turned() {
  using kvzip::Rotation;
  const std::size_t heads = 1 + below(3), tokens = 1 + below(40), pairs = 1 + below(70);
  const std::size_t dim = 2 * pairs + below(3), first = below(2) ? below(600) : below(1 << 20);
  const bool token_major = below(2);
  const auto token = std::ptrdiff_t(token_major ? heads * dim : dim);
  const auto head = std::ptrdiff_t(token_major ? dim : tokens * dim);
  const auto rounding = RopeRounding(1 + below(kRopeRoundings));
  std::vector<float> frequencies(pairs);
  for (float& f : frequencies) f = float(below(1 << 20)) * 0x1p-20f;
  if (below(8) == 0) frequencies[below(pairs)] = below(2) ? 1e30f : -1e10f;
  const Rotation rotation(frequencies.data(), pairs, below(4) ? 1.0f : 1.25f);
  std::vector<std::uint16_t> keys(heads * tokens * dim);
  const bool wild = below(4) == 0;
  for (std::uint16_t& x : keys)
    x = std::uint16_t(wild ? random_bits()
                           : below(2) << 15 | (127 - below(12)) << 7 | (random_bits() & 0x7F));
  if (!wild) rotation.turn({keys.data(), heads, tokens, head, token}, first, rounding);
  std::vector<std::uint16_t> before;
  std::vector<std::uint64_t> before_missing;
  for (simd::Level level : kLevels) {
    simd::set_level(level);
    std::vector<std::uint16_t> out = keys, again;
    std::vector<std::uint64_t> missing;
    rotation.unturn({keys.data(), heads, tokens, head, token}, first, rounding,
                    {out.data(), heads, tokens, head, token}, keys.size(), &missing);
    check(level == kLevels[0] || (out == before && missing == before_missing),
          "not the same keys before RoPE");
    before = out;
    before_missing = missing;
    rotation.turn({out.data(), heads, tokens, head, token}, first, rounding);
    for (const std::uint64_t place : missing) {
      const std::size_t row = std::size_t(place) / pairs;
      const std::size_t key = row / tokens * std::size_t(head) + row % tokens * std::size_t(token);
      const auto [one, other] = rotation.places_of(std::size_t(place) % pairs, rounding);
      out[key + one] = keys[key + one];
      out[key + other] = keys[key + other];
    }
    check(out == keys, "keys that are not turned back");
  }
  // A block as it may come, of which the coded one within is not looked at here: mostly with a head
  // that makes sense, and exceptions in their order, of which some may be of no pair.
  const std::size_t count = below(6), all = heads * tokens * pairs;
  Bytes bytes(16 + (8 * count + 15) / 16 * 16 + 16 * below(3));
  bytes[0] = 3;
  bytes[1] = std::uint8_t(1 + below(kRopeRoundings));
  bytes[4] = std::uint8_t(count);
  std::size_t next = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const auto place = std::uint32_t(next + below(below(6) ? 1 + all / 6 : all + 2));
    const auto numbers = std::uint32_t(random_bits());
    std::memcpy(&bytes[16 + 8 * i], &place, 4);
    std::memcpy(&bytes[20 + 8 * i], &numbers, 4);
    next = place + 1;
  }
  const Exact block(below(3) ? bytes : damaged(bytes));
  try {
    const Unturned unturned(block.data.get(), block.size);
    unturned.turn(rotation, first, heads, dim,
                  {keys.data(), 1, tokens, std::ptrdiff_t(keys.size()), head, token});
  } catch (const std::invalid_argument&) {
  }
}

// A block of numbers as they are, damaged or not, into any order of axes with something between the
// rows; and their checksum.
template <typename T>
void plain() {
  const std::size_t batch = 1 + below(2), heads = 1 + below(3), tokens = 1 + below(20);
  const std::size_t dim = 1 + below(70), row = dim + below(2) * below(5);
  const bool token_major = below(2);
  Bytes bytes(16 + batch * heads * tokens * dim * sizeof(T));
  for (std::size_t i = 16; i < bytes.size(); ++i) bytes[i] = std::uint8_t(random_bits());
  const Exact data(below(2) ? bytes : damaged(bytes));
  const std::unique_ptr<T[]> out(new T[(batch * heads * tokens - 1) * row + dim]);
  const Block<T> block{out.get(),
                       batch,
                       tokens,
                       std::ptrdiff_t(heads * tokens * row),
                       std::ptrdiff_t(token_major ? row : tokens * row),
                       std::ptrdiff_t(token_major ? heads * row : row)};
  try {
    copy_raw<T>(data.data.get(), data.size, heads, dim, block);
  } catch (const std::invalid_argument&) {
    return;
  }
  kvzip::Xxh3 hash;
  hash.update(data.data.get() + 16, data.size - 16);
  check(checksum<T>(block, heads, dim) == hash.digest(), "not the numbers as they are");
}

template <typename T>
void once(NumberFormat format) {
  plain<T>();
  stored(format);
  strange<T>(format);
  const std::size_t sizes[] = {1, 2, 5, 33, 63, 64, 65, 130};
  const bool many = below(4) == 0;  // heads: more than one stream
  const std::size_t batch = 1 + below(2), heads = 1 + below(many ? 40 : 3);
  const std::size_t dim = sizes[below(many ? 3 : 8)], tokens = 1 + below(below(2) ? 20 : 400);
  // In any order of axes, and with something between the rows.
  const std::size_t row = dim + below(2) * below(5);
  const bool token_major = below(2);
  Block<T> block{nullptr,
                 batch,
                 tokens,
                 std::ptrdiff_t(heads * tokens * row),
                 std::ptrdiff_t(token_major ? row : tokens * row),
                 std::ptrdiff_t(token_major ? heads * row : row)};
  const std::size_t span = (batch * heads * tokens - 1) * row + dim;
  const std::unique_ptr<T[]> numbers(new T[span]);
  const int spread = 1 + int(below(12));
  std::vector<T> constants(dim);
  for (T& c : constants) c = T(random_bits());
  const bool some_constant = below(2), wild = below(8) == 0;
  for (std::size_t i = 0; i < span; ++i) {
    const std::size_t c = i % row % dim;
    int exponent = (1 << format.exponent_bits) - 3 - int(c % 3);
    for (int k = 0; k < spread && exponent > 1; ++k) exponent -= int(below(2));
    const auto sign = std::uint64_t(below(2));
    std::uint64_t x = (sign << format.exponent_bits | std::uint64_t(exponent))
                      << format.mantissa_bits;
    x |= random_bits() & ((std::uint64_t(1) << format.mantissa_bits) - 1);
    if (wild || below(500) == 0) x = random_bits();
    if (some_constant && c % 4 == 1) x = constants[c];
    numbers[i] = T(x);
  }
  block.data = numbers.get();
  const Block<const T> in{block.data,        batch, tokens, block.batch_stride, block.head_stride,
                          block.token_stride};
  others<T>(in, heads, dim, format);
  const Bytes tables = make_tables<T>(in, heads, dim, format);
  if (tables.empty()) return;
  const Exact stored(tables);
  const PartTables part(stored.data.get(), stored.size, heads, dim, format);
  const Bytes coded = encoded_alike(part, in, "not the same bytes on all paths");
  encoded_bytes.update(tables.data(), tables.size());
  encoded_bytes.update(coded.data(), coded.size());
  if (coded.empty()) return;

  // Everything that can be wrong: the block, or the tables, or nothing.
  for (int turn = 0; turn < 6; ++turn) {
    const bool whole = turn == 0;
    const Exact data(whole || turn == 5 ? coded : damaged(coded));
    std::unique_ptr<PartTables> other;
    if (turn == 5) {
      const Exact wrong(damaged(tables));
      other = std::make_unique<PartTables>(wrong.data.get(), wrong.size, heads, dim, format);
    }
    std::vector<std::vector<T>> results;
    for (simd::Level level : kLevels) {
      simd::set_level(level);
      const std::unique_ptr<T[]> out(new T[span]);
      std::copy_n(numbers.get(), span, out.get());
      if (whole)  // the numbers must come back, what lies between them must stay
        for (std::size_t b = 0; b < batch; ++b)
          for (std::size_t h = 0; h < heads; ++h)
            for (std::size_t t = 0; t < tokens; ++t)
              std::fill_n(out.get() + std::ptrdiff_t(b) * in.batch_stride +
                              std::ptrdiff_t(h) * in.head_stride +
                              std::ptrdiff_t(t) * in.token_stride,
                          dim, T(0));
      Block<T> target = block;
      target.data = out.get();
      bool good = true;
      try {
        Workspace workspace;
        (other ? *other : part).decode<T>(data.data.get(), data.size, target, &workspace);
      } catch (const std::invalid_argument&) {
        good = false;
      }
      results.emplace_back();
      if (good) results.back().assign(out.get(), out.get() + span);
      check(results.back() == results[0], "not the same numbers on all paths");
    }
    if (whole)
      check(results[0] == std::vector<T>(numbers.get(), numbers.get() + span), "not the numbers");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    turned();
    once<std::uint16_t>({8, 7});
    once<std::uint16_t>({5, 10});
    once<std::uint32_t>({8, 23});
    once<std::uint8_t>({4, 3});
    once<std::uint8_t>({5, 2});
  });
}
