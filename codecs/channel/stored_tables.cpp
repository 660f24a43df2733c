#include "channel/stored_tables.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "channel/prefix_codes.hpp"

namespace kvzip::channel {
namespace {

constexpr std::size_t kMostShapes = 65535;
constexpr int kRunBits = 3;  // of the order of the runs' codes

[[noreturn]] void refuse(const char* why) { throw std::invalid_argument(why); }

// 0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ...
unsigned folded(int x) { return x < 0 ? 2 * unsigned(-x) - 1 : 2 * unsigned(x); }
int unfolded(unsigned x) { return x & 1 ? -int(x / 2) - 1 : int(x / 2); }

int bit_length(std::uint32_t x) { return x ? 32 - __builtin_clz(x) : 0; }

// Where a channel's top is foreseen, `back` channels before it.
std::size_t lag(bool far, std::size_t dim) { return far ? std::max<std::size_t>(1, dim / 2) : 1; }
int foreseen(const std::vector<std::uint8_t>& tops, std::size_t c, std::size_t back, int top_bits) {
  return c >= back ? tops[c - back] : c ? tops[c - 1] : 1 << (top_bits - 1);
}
// From -2^(bits-1) to 2^(bits-1) - 1.
int wrapped(int x, int bits) {
  const int half = 1 << (bits - 1);
  return ((x + half) & (2 * half - 1)) - half;
}

// --- writing -----------------------------------------------------------------------------------

class BitWriter {
 public:
  void put(std::uint64_t bits, int n) {  // at most 32
    held_ |= bits << count_;
    count_ += n;
    if (count_ < 32) return;
    write(4);
    held_ >>= 32;
    count_ -= 32;
  }
  void symbol(int code, unsigned s) {
    const bool direct = s < kDirect && kCodeTables.length[code][s];
    const std::size_t at = direct ? s : kOther;
    put(kCodeTables.bits[code][at], kCodeTables.length[code][at]);
    if (!direct) put(s, 8);
  }
  // Exponential Golomb of order k.
  void golomb(std::uint32_t x, int k) {
    x += 1u << k;
    const int n = bit_length(x) - 1;
    // n >= k, as x >= 2^k. NOLINTNEXTLINE(clang-analyzer-core.BitwiseShift)
    put(1u << (n - k), n - k + 1);
    put(x & ((1u << n) - 1), n);
  }
  // Of a number below n, one bit less for the first ones if n is no power of two.
  void below(std::uint32_t x, std::uint32_t n) {
    const int bits = bit_length(n) - 1;
    const std::uint32_t shorter = (2u << bits) - n;
    if (x < shorter) return put(x, bits);
    put((x + shorter) >> 1, bits);
    put((x + shorter) & 1, 1);
  }
  std::vector<std::uint8_t> bytes() {
    write((count_ + 7) / 8);
    return std::move(out_);
  }

 private:
  void write(int bytes) {
    std::uint8_t first[8];
    std::memcpy(first, &held_, 8);
    out_.insert(out_.end(), first, first + bytes);
  }
  std::vector<std::uint8_t> out_;
  std::uint64_t held_ = 0;
  int count_ = 0;
};

int golomb_bits(std::uint32_t x, int k) { return 2 * bit_length(x + (1u << k)) - 1 - k; }

// From the highest exponent down.
void write_levels(const std::uint8_t* levels, std::size_t width, int escape, bool flip,
                  BitWriter* out) {
  int rest = 1024 - escape * escape, above[2] = {0, 0};
  while (width--) {
    const int codes[2] = {level_code(rest, above[0]), level_code(rest, above[1])};
    for (int sign = 0; sign < 2; ++sign) {
      const int level = above[sign] = levels[2 * width + std::size_t(sign ^ int(flip))];
      out->symbol(codes[sign], unsigned(level));
      rest -= level * level;
    }
  }
}

// In which order shapes are used. A shape's number is when it is used first; its sign is what it
// has there.
struct ShapeUses {
  struct Use {
    std::uint32_t number;
    bool flip;
  };
  std::vector<Use> uses;             // of each shape
  std::vector<std::uint32_t> order;  // shapes by their number
  std::vector<std::uint32_t> runs;  // of channels behind each that takes a new shape, with old ones
  bool constants = false;           // whether a channel is constant

  ShapeUses(const StoredTables& tables, int top_bits) {
    constexpr std::uint32_t kUnused = ~0u;
    uses.assign(tables.shapes.count(), {kUnused, false});
    std::uint32_t run = 0;
    for (const Channel& channel : tables.channels) {
      if (channel.constant) {
        constants = true;
        continue;
      }
      Use& use = uses[channel.shape];
      if (use.number == kUnused) {
        if (!order.empty()) runs.push_back(run);
        run = 0;
        use = {std::uint32_t(order.size()), bool(channel.base >> top_bits & 1)};
        order.push_back(channel.shape);
      } else {
        ++run;
      }
    }
    runs.push_back(run);
  }

  // The order of the codes that takes the fewest bits for the runs.
  int order_of_runs() const {
    int best = 0;
    long least = -1;
    for (int k = 0; k < 1 << kRunBits; ++k) {
      long bits = 0;
      for (std::uint32_t x : runs) bits += golomb_bits(x, k);
      if (least < 0 || bits < least) {
        least = bits;
        best = k;
      }
    }
    return best;
  }
};

// Codes of the channels' tops, as they differ from what is foreseen from nearby or from far.
struct TopCodes {
  std::vector<unsigned> codes;
  long cost = 0;

  TopCodes(const StoredTables& tables, const TableFormat& format, bool far)
      : codes(format.channels) {
    const int top_bits = format.value_bits - 1;
    const unsigned top_mask = (1u << top_bits) - 1;
    std::vector<std::uint8_t> tops(format.channels);
    for (std::size_t c = 0; c < format.channels; ++c) {
      const Channel& channel = tables.channels[c];
      const int seen = foreseen(tops, c, lag(far, format.dim), top_bits);
      if (channel.constant) {  // its top is what is foreseen
        tops[c] = std::uint8_t(seen);
        continue;
      }
      tops[c] = std::uint8_t((channel.base + tables.shapes.widths[channel.shape] + 1u) & top_mask);
      codes[c] = folded(wrapped(tops[c] - seen, top_bits));
      cost += kCodeTables.cost(kTopCode, int(codes[c]));
    }
  }
};

}  // namespace

std::vector<std::uint8_t> write_tables(const StoredTables& tables, const TableFormat& format) {
  const ShapeLevels& shapes = tables.shapes;
  const int top_bits = format.value_bits - 1;
  const ShapeUses uses(tables, top_bits);
  const TopCodes from_near(tables, format, false), from_far(tables, format, true);
  const bool far = from_far.cost < from_near.cost;
  const std::vector<unsigned>& top_codes = (far ? from_far : from_near).codes;
  const int order_of_runs = uses.order_of_runs();

  BitWriter out;
  out.put(uses.constants, 1);
  out.put(far, 1);
  out.put(unsigned(order_of_runs), kRunBits);
  std::size_t shape_count = 0;
  std::uint32_t run = 0;
  for (std::size_t c = 0; c < format.channels; ++c) {
    const Channel& channel = tables.channels[c];
    if (uses.constants) out.put(channel.constant, 1);
    if (channel.constant) {
      out.put(channel.number, format.number_bits);
      continue;
    }
    if (run) {
      --run;
      const ShapeUses::Use& use = uses.uses[channel.shape];
      out.below(use.number, std::uint32_t(shape_count));
      out.put((channel.base >> top_bits & 1) ^ unsigned(use.flip), 1);
    } else {
      out.symbol(kWidthCode, shapes.widths[channel.shape]);
      out.symbol(kEscapeCode, shapes.escapes[channel.shape]);
      run = uses.runs[shape_count++];
      out.golomb(run, order_of_runs);
    }
    out.symbol(kTopCode, top_codes[c]);
  }
  std::vector<const std::uint8_t*> levels(shapes.count());
  shapes.each(
      [&](std::size_t i, const std::uint8_t* at, std::size_t, std::uint8_t) { levels[i] = at; });
  BitWriter odd;
  for (std::size_t i = 0; i < uses.order.size(); ++i) {
    const std::uint32_t s = uses.order[i];
    write_levels(levels[s], shapes.widths[s] + std::size_t(1), shapes.escapes[s], uses.uses[s].flip,
                 i & 1 ? &odd : &out);
  }
  std::vector<std::uint8_t> bytes = out.bytes(), behind = odd.bytes();
  bytes.insert(bytes.end(), behind.rbegin(), behind.rend());
  return bytes;
}

// --- reading -----------------------------------------------------------------------------------

namespace {

// The next bits, at least 57.
class Window {
 public:
  Window(std::uint64_t bits) : bits_(bits) {}
  int used() const { return used_; }
  std::uint32_t take(int n) {  // at most 32
    const std::uint64_t bits = bits_ & ((std::uint64_t(1) << n) - 1);
    skip(n);
    return std::uint32_t(bits);
  }
  // Of the codes at `codes`, without what follows others.
  unsigned entry(unsigned codes) {
    const unsigned found = (&kCodeTables.entry[0][0] + codes)[bits_ & ((1u << kMaxCode) - 1)];
    skip(int(found & 63));
    return found;
  }
  unsigned symbol_at(unsigned codes) {
    const unsigned found = entry(codes);
    if (!(found & kOtherBit)) return found >> 8;
    const unsigned s = take(8);
    if (s < kDirect && kCodeTables.length[codes >> kMaxCode][s])
      refuse("bad tables: a code longer than it need be");
    return s;
  }
  unsigned symbol(int code) { return symbol_at(unsigned(code) << kMaxCode); }
  std::uint32_t golomb(int k) {
    int n = 0;
    while (!take(1))
      if (++n > 16) refuse("bad tables: a run of channels without an end");
    n += k;
    return (1u << n) + take(n) - (1u << k);
  }
  // `n`: at least 1.
  std::uint32_t below(std::uint32_t n) {
    const int bits = bit_length(n) - 1;
    // NOLINTNEXTLINE(clang-analyzer-core.BitwiseShift)
    const std::uint32_t shorter = (2u << bits) - n;
    const std::uint32_t x = std::uint32_t(bits_) & ((1u << bits) - 1);
    const auto last = std::uint32_t(bits_ >> bits) & 1;
    const bool longer = x >= shorter;  // cannot be foreseen
    skip(bits + longer);
    return x + (longer ? x + last - shorter : 0);
  }

 private:
  void skip(int n) {
    bits_ >>= n;
    used_ += n;
  }
  std::uint64_t bits_;
  int used_ = 0;
};

// Behind the bytes there are so many zeros, more than the levels of a shape can take.
constexpr std::size_t kBehind = 2 * 256 * 2 + 8;

// Bits from the lowest of each byte on. What was read behind the last byte is found out by `check`,
// which must be asked before kBehind is.
class BitReader {
 public:
  BitReader(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  Window window() const {
    std::uint64_t bits;
    std::memcpy(&bits, data_ + (at_ >> 3), 8);
    return bits >> (at_ & 7);
  }
  void skip(std::size_t bits) { at_ += bits; }
  bool has(std::size_t bits) const { return at_ <= 8 * size_ && bits <= 8 * size_ - at_; }
  void check() const {
    if (!has(0)) refuse("bad tables: cut short");
  }
  // Bytes that were read, the last one's rest with them.
  std::size_t end() {
    check();
    const int rest = int(-at_ & 7);
    if (window().take(rest)) refuse("bad tables: their padding is not zeros");
    skip(std::size_t(rest));
    return at_ / 8;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

// Where the codes of a level begin, by what is left of 1024 and the level above.
struct LevelCodes {
  std::uint16_t of[17][64] = {};
  constexpr LevelCodes() {
    for (int r = 0; r < 17; ++r)
      for (int a = 0; a < 64; ++a) of[r][a] = std::uint16_t(level_code(64 * r, a) << kMaxCode);
  }
};
constexpr LevelCodes kLevelCodes{};

// From the shape's highest exponent down.
class LevelReader {
 public:
  LevelReader(unsigned escape) : rest_(1024 - int(escape * escape)) {}
  // A level of either sign.
  void next(BitReader* in, std::uint8_t* levels) {
    const std::uint16_t* codes = &kLevelCodes.of[0][0] + (rest_ & ~(rest_ >> 31) & ~63);
    const unsigned codes0 = codes[above0_], codes1 = codes[above1_];
    Window window = in->window();
    const unsigned entry0 = window.entry(codes0), entry1 = window.entry(codes1);
    unsigned level0 = above0_ = entry0 >> 8, level1 = above1_ = entry1 >> 8;
    if (__builtin_expect((entry0 | entry1) & kOtherBit, 0)) {
      window = in->window();
      level0 = window.symbol_at(codes0);
      level1 = window.symbol_at(codes1);
      above0_ = std::min(level0, 63u);
      above1_ = std::min(level1, 63u);
    }
    in->skip(std::size_t(window.used()));
    rest_ -= int(level0 * level0 + level1 * level1);
    levels[0] = std::uint8_t(level0);
    levels[1] = std::uint8_t(level1);
  }

 private:
  unsigned above0_ = 0, above1_ = 0;
  int rest_;
};

// Two shapes at a time, one of each stream; copies of these can stay in registers.
void read_levels(BitReader* even_stream, BitReader* odd_stream, ShapeLevels* tables) {
  ShapeLevels& shapes = *tables;
  BitReader even = *even_stream, odd = *odd_stream;
  std::uint8_t* at = shapes.levels.data();
  for (std::size_t i = 0; i < shapes.count(); i += 2) {
    even.check();
    odd.check();
    const bool two = i + 1 < shapes.count();
    LevelReader a(shapes.escapes[i]), b(two ? shapes.escapes[i + 1] : 0);
    const std::size_t widths[2] = {shapes.widths[i] + std::size_t(1),
                                   two ? shapes.widths[i + 1] + std::size_t(1) : 0};
    std::uint8_t *const first = at, *const second = at + 2 * widths[0];
    std::uint8_t *to_a = second, *to_b = at = second + 2 * widths[1];
    for (std::size_t both = std::min(widths[0], widths[1]); both; --both) {
      a.next(&even, to_a -= 2);
      b.next(&odd, to_b -= 2);
    }
    while (to_a > first) a.next(&even, to_a -= 2);
    while (to_b > second) b.next(&odd, to_b -= 2);
  }
  *even_stream = even;
  *odd_stream = odd;
}

}  // namespace

StoredTables read_tables(const std::uint8_t* data, std::size_t size, const TableFormat& format) {
  StoredTables tables;
  ShapeLevels& shapes = tables.shapes;
  // Forwards, and backwards: one waits for the next code while the other goes on.
  std::vector<std::uint8_t> copy(2 * (size + kBehind));
  std::copy_n(data, size, copy.begin());
  std::reverse_copy(data, data + size, copy.begin() + std::ptrdiff_t(size + kBehind));
  BitReader in(copy.data(), size), odd(copy.data() + size + kBehind, size);
  const int top_bits = format.value_bits - 1;
  const unsigned top_mask = (1u << top_bits) - 1;
  Window head = in.window();
  const bool constants = head.take(1), far = head.take(1);
  const int order_of_runs = int(head.take(kRunBits));
  in.skip(std::size_t(head.used()));
  const std::size_t back = lag(far, format.dim);
  // A channel takes two bits at least.
  if (!in.has(format.channels) || !in.has(2 * format.channels)) refuse("bad tables: cut short");
  tables.channels.resize(format.channels);
  std::vector<std::uint8_t> tops(format.channels);
  std::uint32_t run = 0;
  std::size_t values = 0;
  bool any_constant = false;
  for (std::size_t c = 0; c < format.channels; ++c) {
    Channel& channel = tables.channels[c];
    const int seen = foreseen(tops, c, back, top_bits);
    in.check();
    Window window = in.window();
    const auto next = [&] {
      in.skip(std::size_t(window.used()));
      window = in.window();
    };
    channel = {};
    channel.constant = constants && window.take(1);
    if (channel.constant) {
      channel.number = window.take(format.number_bits);
      in.skip(std::size_t(window.used()));
      tops[c] = std::uint8_t(seen);
      any_constant = true;
      continue;
    }
    unsigned sign = 0;
    if (run) {
      --run;
      channel.shape = std::uint16_t(window.below(std::uint32_t(shapes.count())));
      sign = window.take(1);
    } else {
      if (shapes.count() == kMostShapes) refuse("bad tables: too many shapes");
      channel.shape = std::uint16_t(shapes.count());
      const unsigned width = window.symbol(kWidthCode);
      if (width > top_mask) refuse("bad tables: a shape makes no sense");
      shapes.widths.push_back(std::uint8_t(width));
      shapes.escapes.push_back(std::uint8_t(window.symbol(kEscapeCode)));
      values += 2 * (std::size_t(width) + 1);
      next();
      run = window.golomb(order_of_runs);
      next();
    }
    const unsigned by = window.symbol(kTopCode);
    in.skip(std::size_t(window.used()));
    if (by > top_mask) refuse("bad tables: a base out of range");
    tops[c] = std::uint8_t(unsigned(seen + unfolded(by)) & top_mask);
    const unsigned from = tops[c] - shapes.widths[channel.shape] - 1u;
    channel.base = std::uint16_t((from & top_mask) | sign << top_bits);
  }
  if (run) refuse("bad tables: more channels than there are");
  if (constants && !any_constant) refuse("bad tables: no channel is constant");
  // A level takes a bit at least.
  if (!in.has(values)) refuse("bad tables: cut short");
  shapes.levels.resize(values);
  read_levels(&in, &odd, &shapes);
  shapes.each([&](std::size_t, const std::uint8_t* levels, std::size_t width, std::uint8_t escape) {
    if (!are_levels(levels, width, escape)) refuse("bad tables: a shape makes no sense");
  });
  if (in.end() + odd.end() != size) refuse("bad tables: longer or shorter than they should be");
  return tables;
}

}  // namespace kvzip::channel
