// Decoding a part of a layer on a GPU (spec.md): a block of threads does a tile of 32 tokens, a
// thread of a warp each. Group after group, some warps decode a group's numbers, a pair of channels
// after the other, each warp for lanes of its own; beside them other warps multiply what is known
// of the channels before by `within`, for the group that comes next. What the group just before a
// group adds to that, its own warps add.
#pragma once

#include "native/cuda/place.cuh"
#include "predictive/rotation.cuh"
#include "predictive/tiles.cuh"

namespace kvzip::predictive {

using cuda::DevicePart;

constexpr uint64_t kLow = uint64_t(1) << 31;
constexpr int kOne = 1 << 12;  // an energy of 1
constexpr unsigned kMostLanes = 32;
constexpr unsigned kSharedShapes = 16;  // densities that are kept in shared memory
constexpr unsigned kSumStride = 36;     // of a channel's sums, so that stores meet other banks

KVZIP_DEVICE unsigned up(unsigned n, unsigned multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Where the next word of a lane's stream is, and where they end, from the block's counts on.
struct Cursor {
  unsigned at, end;
};

// What is looked up of a group's channels.
struct Staged {
  unsigned* near;           // [group][near_words]
  DeviceChannel* channels;  // [group]
  unsigned* places;         // [group]
};

// What the warps of a block share. gpu_model.py counts its bytes as `shared_bytes`.
struct ChainMemory {
  short* sine;              // [4096]
  int* deviation;           // [3][32] of a group's numbers, of the one before, and the next one's
  Cursor* cursors;          // [kMostLanes]
  uint64_t* states;         // [lanes][32]
  int* sums;                // [3][group, up to a multiple of 8][kSumStride], likewise
  unsigned char* staged;    // twice, of a group and of the next one
  DeviceCell* cells;        // [shapes][kCells] and
  unsigned char* guesses;   // [shapes][kGuesses]; if they are many, of each warp one
  unsigned char* residual;  // [32][residual_bytes], if there is room

  KVZIP_DEVICE ChainMemory(const DeviceLayer& layer, unsigned warps) {
    unsigned char* at = cuda::shared_memory();
    const auto take = [&](unsigned bytes) {
      unsigned char* const found = at;
      at += up(bytes, 16);
      return found;
    };
    const unsigned shapes = layer.shape_count <= kSharedShapes ? layer.shape_count : warps;
    sine = reinterpret_cast<short*>(take(2 * 4096));
    deviation = reinterpret_cast<int*>(take(3 * 32 * 4));
    cursors = reinterpret_cast<Cursor*>(take(kMostLanes * sizeof(Cursor)));
    states = reinterpret_cast<uint64_t*>(take(layer.lanes * 32 * 8));
    sums = reinterpret_cast<int*>(take(3 * up(layer.group, 8) * kSumStride * 4));
    staged = take(2 * staged_bytes(layer));
    cells = reinterpret_cast<DeviceCell*>(take(shapes * kCells * unsigned(sizeof(DeviceCell))));
    guesses = take(shapes * kGuesses);
    residual = at;
  }
  KVZIP_DEVICE static unsigned staged_bytes(const DeviceLayer& layer) {
    return up(layer.group * (layer.near_words * 4 + unsigned(sizeof(DeviceChannel)) + 4), 16);
  }
  KVZIP_DEVICE Staged staged_of(const DeviceLayer& layer, unsigned group) const {
    unsigned char* const at = staged + group % 2 * staged_bytes(layer);
    Staged found;
    found.channels = reinterpret_cast<DeviceChannel*>(at);
    found.places = reinterpret_cast<unsigned*>(found.channels + layer.group);
    found.near = found.places + layer.group;
    return found;
  }
};

// How a launch is made: blocks of threads a job; warps that decode; bytes of a number; whether
// residuals are in shared memory.
struct ChainSettings {
  unsigned blocks, warps, bytes, shared;
};

template <class Grid>
class Chain {
 public:
  KVZIP_DEVICE Chain(const RangeJob& range, const DevicePart* parts, uint32_t* all_flags,
                     const ChainSettings& how, unsigned number, const DeviceTile& tile)
      : job(range),
        layer(*reinterpret_cast<const DeviceLayer*>(range.layer)),
        part(parts[range.part]),
        flags(all_flags),
        settings(how),
        tile_number(number),
        memory(layer, how.warps),
        group_size(layer.group),
        lanes(layer.lanes),
        near_words(layer.near_words),
        residual_bytes(layer.residual_bytes),
        channels(layer.channel_count[range.values]),
        first(layer.first_column[range.values]),
        groups((channels + group_size - 1) / group_size),
        turning(range.values ? 0 : 2 * layer.heads[0] * layer.pairs),
        lane(cuda::thread() % cuda::kWarp),
        warp(cuda::thread() / cuda::kWarp),
        region(tile.region),
        token(token_of(range, tile, lane)),
        active(lane < tile.count),
        own_residual(reinterpret_cast<unsigned char*>(range.residual) +
                     uint64_t(number) * kTileTokens * residual_bytes),
        residual(how.shared ? memory.residual : own_residual) {}

  KVZIP_DEVICE void run() {
    load();
    cuda::sync_block();
    if (warp < settings.warps) decode();
    else multiply();
    store();
  }

 private:
  // Copies: what is read through an address may have changed with every number that is stored.
  const RangeJob job;
  const DeviceLayer& layer;
  const DevicePart part;
  uint32_t* const flags;
  const ChainSettings& settings;
  const unsigned tile_number;
  const ChainMemory memory;
  const unsigned group_size, lanes, near_words, residual_bytes;
  const unsigned channels, first, groups;  // first: column of the part's first channel
  const unsigned turning;                  // channels of pairs that RoPE turns
  const unsigned lane, warp, region;
  const unsigned token;  // the thread's own; behind the tile's last one it goes along with that
  const bool active;     // whether it does not
  unsigned char *const own_residual, *const residual;

  // --- before and after --------------------------------------------------------------------

  KVZIP_DEVICE void load() {
    const unsigned thread = cuda::thread(), threads = cuda::threads_of_block();
    const auto copy = [&](void* to, uint64_t from, unsigned words) {
      for (unsigned i = thread; i < words; i += threads)
        static_cast<unsigned*>(to)[i] = reinterpret_cast<const unsigned*>(from)[i];
    };
    copy(memory.sine, layer.sine, 2 * 4096 / 4);
    if (layer.shape_count <= kSharedShapes) {
      copy(memory.cells, layer.cells,
           layer.shape_count * kCells * unsigned(sizeof(DeviceCell)) / 4);
      copy(memory.guesses, layer.guesses, layer.shape_count * kGuesses / 4);
    }
    for (unsigned i = thread; i < 3 * 32; i += threads) memory.deviation[i] = 0;
    for (unsigned i = thread; i < 3 * up(group_size, 8) * kSumStride; i += threads)
      memory.sums[i] = 0;
    if (settings.shared && job.values)
      for (unsigned row = warp; row < kTileTokens; row += threads / cuda::kWarp)
        for (unsigned at = 4 * lane; at < first; at += 4 * cuda::kWarp)
          *word(residual + row * residual_bytes + at) =
              *word(own_residual + row * residual_bytes + at);
    if (job.counts) load_streams();
  }
  KVZIP_DEVICE static unsigned* word(unsigned char* at) { return reinterpret_cast<unsigned*>(at); }

  KVZIP_DEVICE static uint64_t total_of(uint64_t v) {
    for (unsigned step = cuda::kWarp / 2; step; step /= 2)
      v += uint64_t(cuda::shuffle_xor(unsigned(v >> 32), step)) << 32 |
           cuda::shuffle_xor(unsigned(v), step);
    return v;
  }
  // Counts of words: `bits` each, the first of them in the block's header.
  struct Counts {
    const unsigned char *header, *section;
    unsigned bits;
    int least;

    KVZIP_DEVICE explicit Counts(const RangeJob& job)
        : header(reinterpret_cast<const unsigned char*>(job.header)),
          section(reinterpret_cast<const unsigned char*>(job.counts)),
          bits(header[1]),
          least(*reinterpret_cast<const int*>(header + 4)) {}

    KVZIP_DEVICE uint64_t section_bytes(uint64_t streams) const {
      const uint64_t bytes = (streams * bits + 7) / 8;
      return bytes > kInHeader ? (bytes - kInHeader + 15) / 16 * 16 : 0;
    }
    KVZIP_DEVICE unsigned byte(uint64_t at) const {
      return at < kInHeader ? header[16 - kInHeader + at] : section[at - kInHeader];
    }
    // What a stream has more than its share.
    KVZIP_DEVICE int64_t more(uint64_t stream) const {
      const uint64_t first = stream * bits, end = first + bits;
      unsigned field = 0;
      for (unsigned b = 0; b < 3; ++b)
        if (8 * (first / 8 + b) < end) field |= byte(first / 8 + b) << 8 * b;
      return int64_t(least) + (field >> first % 8 & ((1u << bits) - 1));
    }
    static constexpr unsigned kInHeader = 8;  // bytes
  };
  // Each lane's states, and where its words are.
  KVZIP_DEVICE void load_streams() {
    const Counts counts(job);
    const uint64_t streams = uint64_t(tile_count(job)) * lanes;
    const uint64_t size = counts.section_bytes(streams);
    const bool fits = size <= job.bytes && (job.bytes - size) % 4 == 0;
    const uint64_t words = fits ? (job.bytes - size) / 4 : 0;
    const uint64_t full = words * kTileTokens / (uint64_t(job.tokens) * lanes);
    const auto count_of = [&](uint64_t stream) {
      const unsigned tokens = tile_of(job, unsigned(stream / lanes)).count;
      const uint64_t share =
          tokens == kTileTokens ? full : words * tokens / (uint64_t(job.tokens) * lanes);
      return int64_t(share) + counts.more(stream);
    };
    const uint64_t* const from =
        reinterpret_cast<const uint64_t*>(job.first_states ? job.first_states : job.states);
    for (unsigned l = warp; l < lanes; l += cuda::threads_of_block() / cuda::kWarp) {
      const uint64_t own = uint64_t(tile_number) * lanes + l;
      uint64_t before = 0, all = 0;
      unsigned mine = 0;
      bool negative = false;
      if (fits) {
        for (uint64_t i = lane; i < streams; i += cuda::kWarp) {
          const int64_t count = count_of(i);
          negative |= count < 0;
          all += uint64_t(count);
          before += i < own ? uint64_t(count) : 0;
        }
        mine = unsigned(count_of(own));
      }
      all = total_of(all);
      before = total_of(before);
      bool good = fits && all == words && !cuda::any(negative);
      const unsigned start = unsigned(size / 4 + before);
      if (lane == 0) memory.cursors[l] = good ? Cursor{start, start + mine} : Cursor{0, 0};
      // Zeros follow the last count.
      const uint64_t used = streams * counts.bits, at = used / 8 + lane;
      if (fits && at < Counts::kInHeader + size)
        good = good && counts.byte(at) >> (lane ? 0 : used % 8) == 0;
      const uint64_t x = active ? from[uint64_t(token) * lanes + l] : kLow;
      if (job.first_states) good = good && x >= kLow && !(x >> 63);
      memory.states[l * 32 + lane] = x;
      if (!good) cuda::set_flag(flags + job.row);
    }
  }

  KVZIP_DEVICE void store() {
    if (settings.shared && !job.values)
      for (unsigned row = warp; row < kTileTokens; row += cuda::threads_of_block() / cuda::kWarp)
        for (unsigned at = 4 * lane; at < channels; at += 4 * cuda::kWarp)
          *word(own_residual + row * residual_bytes + at) =
              *word(residual + row * residual_bytes + at);
    if (!job.counts) return;
    uint64_t* const states = reinterpret_cast<uint64_t*>(job.states);
    for (unsigned l = warp; l < lanes; l += cuda::threads_of_block() / cuda::kWarp) {
      const uint64_t x = memory.states[l * 32 + lane];
      const Cursor cursor = memory.cursors[l];
      if (active) states[uint64_t(token) * lanes + l] = x;
      // A writer's states begin where a reader's end.
      if (cursor.at != cursor.end || (job.ends && x != kLow)) cuda::set_flag(flags + job.row);
    }
  }

  // --- within the layer --------------------------------------------------------------------

  // What of the columns before a group is multiplied ahead of it: all but the group before it.
  KVZIP_DEVICE unsigned far_columns(unsigned group) const {
    return group ? (first + (group - 1) * group_size) & ~3u : first;
  }
  KVZIP_DEVICE int* sums_of(unsigned group) const {
    return memory.sums + group % 3 * up(group_size, 8) * kSumStride;
  }

  KVZIP_DEVICE void multiply() const {
    const unsigned warps = cuda::threads_of_block() / cuda::kWarp - settings.warps;
    const unsigned mine = warp - settings.warps;
    const unsigned thread = mine * cuda::kWarp + lane;
    if (groups) {
      stage(0, thread, warps * cuda::kWarp);
      add_far(0, mine, warps);
    }
    cuda::sync_block();
#pragma unroll 1
    for (unsigned g = 0; g < groups; ++g) {
      if (g + 1 < groups) {
        stage(g + 1, thread, warps * cuda::kWarp);
        add_far(g + 1, mine, warps);
      }
      int* const old = sums_of(g + 2);  // of the group before this one
      for (unsigned i = thread; i < up(group_size, 8) * kSumStride; i += warps * cuda::kWarp)
        old[i] = 0;
      cuda::sync_block();
    }
  }
  // Brings what is looked up of a group's channels.
  KVZIP_DEVICE void stage(unsigned group, unsigned thread, unsigned threads) const {
    const unsigned start = group * group_size, left = channels - start;
    const unsigned size = group_size < left ? group_size : left;
    const uint64_t column = first + start;
    const Staged to = memory.staged_of(layer, group);
    const auto copy = [&](void* words, uint64_t address, unsigned count) {
      const auto* const from = reinterpret_cast<const unsigned*>(address);
      for (unsigned i = thread; i < count; i += threads)
        static_cast<unsigned*>(words)[i] = cuda::constant(from + i);
    };
    const uint64_t channel = uint64_t(region) * layer.columns + column;
    copy(to.channels, layer.channels + channel * sizeof(DeviceChannel),
         size * unsigned(sizeof(DeviceChannel)) / 4);
    copy(to.places, layer.places + column * 4, size);
    const uint64_t row = (uint64_t(region) * groups + group) * group_size;
    copy(to.near, layer.near[job.values] + row * near_words * 4, group_size * near_words);
  }
  // Adds a warp's share of a group's products. Weights lie as threads take them: for 32 columns of
  // residuals and 8 channels 8 bytes a thread, the operand `b` of multiply_add.
  KVZIP_DEVICE void add_far(unsigned group, unsigned mine, unsigned warps) const {
    const unsigned limit = far_columns(group), steps = (limit + 31) / 32;
    const unsigned across = up(group_size, 8) / 8;
    const unsigned start =
        cuda::constant(reinterpret_cast<const uint32_t*>(layer.far_start[job.values]) + group);
    const cuda::Two* const weights =
        reinterpret_cast<const cuda::Two*>(layer.far[job.values]) +
        (uint64_t(region) * layer.far_steps[job.values] + start) * cuda::kWarp + lane;
    const unsigned stride = residual_bytes;
    const unsigned char* const row = residual + lane / 4 * stride;
    const auto at = [&](unsigned r, unsigned column) {
      return column < limit ? *reinterpret_cast<const unsigned*>(row + r * stride + column) : 0u;
    };
    for (unsigned n = 0; n < across; ++n) {
      int sums[2][4] = {};
#pragma unroll 4
      for (unsigned k = mine; k < steps; k += warps) {
        const cuda::Two w = cuda::constant(weights + (k * across + n) * cuda::kWarp);
        const unsigned column = 32 * k + lane % 4 * 4;
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
          const unsigned a[4] = {at(16 * half, column), at(16 * half + 8, column),
                                 at(16 * half, column + 16), at(16 * half + 8, column + 16)};
          cuda::multiply_add(sums[half], a, w.v[0], w.v[1]);
        }
      }
      if (mine >= steps) continue;
      int* const to = sums_of(group) + (8 * n + lane % 4 * 2) * kSumStride + lane / 4;
#pragma unroll
      for (unsigned half = 0; half < 2; ++half)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i)
          cuda::add_shared(to + i % 2 * kSumStride + 16 * half + i / 2 * 8, sums[half][i]);
    }
  }

  // --- numbers -----------------------------------------------------------------------------

  // A stream of words, of which each thread has the one that stands as many behind the next.
  struct Words {
    const unsigned* words;
    Cursor cursor;
    unsigned ahead;

    KVZIP_DEVICE void fetch() {
      const unsigned at = cursor.at + cuda::thread() % cuda::kWarp;
      ahead = at < cursor.end ? words[at] : 0;
    }
    // The next word for each thread that wants one.
    KVZIP_DEVICE unsigned take(bool wanted) {
      const unsigned votes = cuda::ballot(wanted);
      const unsigned below = votes & ((1u << cuda::thread() % cuda::kWarp) - 1);
      const unsigned found = cuda::shuffle(ahead, cuda::ones(below));
      cursor.at += cuda::ones(votes);
      return found;
    }
  };
  KVZIP_DEVICE static void advance(const Found& f, int target, uint64_t& x, Words& words,
                                   bool active) {
    const uint64_t y = uint64_t(unsigned(f.high - f.low)) * (x >> 24) + unsigned(target - f.low);
    const bool low = active && y < kLow;
    const unsigned word = words.take(low);
    if (active) x = low ? y << 32 | word : y;
  }
  // Seldom: some tokens' numbers follow as they are, after the others of the channel.
  struct Escaped {
    Found found;
    uint64_t x;
    unsigned at;
  };
  KVZIP_DEVICE_CALL static Escaped escaped(Expected e, float step, uint64_t x, Words words,
                                           bool active) {
    const int target = int(x & (kCdf - 1));
    const bool escape = target >= 2 * kHalf;
    Found f;
    if (escape) f = {0, 2 * kHalf, kCdf, 0, 0};
    else f = Grid::find(target, step, e);
    advance(f, target, x, words, active);
    words.fetch();
    const int next = int(x & (kCdf - 1)), place = next >> (24 - Grid::kBits);
    if (escape) {
      f = Grid::interval(place, e);
      f.low = place << (24 - Grid::kBits);
      f.high = (place + 1) << (24 - Grid::kBits);
    }
    advance(f, next, x, words, active && escape);
    return {f, x, words.cursor.at};
  }

  // What each token has of two channels side by side: fetched a pair ahead.
  struct Pair {
    int product[2], table[2];
    int sin, cos, inverse[2], slope;
    float own_cosine, own_sine;  // of the model's own RoPE
  };
  // What a thread has of its token.
  struct Token {
    uint64_t position;
    uint64_t numbers, low;  // addresses of its numbers: in the part, and of their lower halves
    uint64_t output;        // of what it tells later layers
    int entry, energy;
    bool known;
  };

  KVZIP_DEVICE Token token_here() const {
    const unsigned row = token / job.row_tokens, column = token % job.row_tokens;
    Token t;
    t.position = job.position + column;
    const int64_t at =
        int64_t(row) * part.batch_stride + cuda::place_of(part, job.first_token + column);
    t.numbers = part.numbers + uint64_t(at) * settings.bytes;
    t.low = job.low + 2 * (uint64_t(row) * part.heads * job.row_tokens + column) * part.dim;
    t.output = job.inputs + uint64_t(token) * layer.row_bytes + layer.output + first;
    t.entry = layer.table_bytes ? reinterpret_cast<const int*>(job.entries)[token] : -1;
    t.known = t.entry >= 0 && unsigned(t.entry) < layer.table_rows;
    t.energy = job.begins ? kOne : reinterpret_cast<const int*>(job.energy)[token];
    return t;
  }
  KVZIP_DEVICE void fetch(const Token& t, unsigned place, Pair& o) const {
    const unsigned column = first + place;
    const int* const product = reinterpret_cast<const int*>(job.products) +
                               (uint64_t(tile_number) * layer.columns + column) * kTileTokens +
                               lane;
    const uint64_t entry = uint64_t(unsigned(t.known ? t.entry : 0)) * layer.columns + column;
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
      o.product[i] = layer.input_width ? cuda::constant(product + i * kTileTokens) : 0;
      o.table[i] = 0;
      if (t.known)
        o.table[i] = layer.table_bytes == 2
                         ? reinterpret_cast<const short*>(layer.table)[entry + i] * (1 << 5)
                         : reinterpret_cast<const signed char*>(layer.table)[entry + i] * (1 << 12);
    }
    if (!turns(place)) return;
    const unsigned all = turning / 2, pair = place / 2;
    const unsigned at = cuda::constant(reinterpret_cast<const uint32_t*>(layer.places) + column);
    const unsigned number = (at & 0xFFFF) >> layer.side_by_side;  // of the head's pairs
    const uint64_t step = cuda::constant(reinterpret_cast<const uint64_t*>(layer.step) + number);
    const unsigned turn = unsigned((step * t.position + (uint64_t(1) << 51)) >> 52) & 4095;
    o.sin = memory.sine[turn];
    o.cos = memory.sine[(turn + 1024) & 4095];
    const unsigned kind = region + (t.known ? layer.regions : 0);
    const int* const tables = reinterpret_cast<const int*>(layer.pair_tables) +
                              (uint64_t(kind) * all + pair) * 3 * kAngles + turn / (4096 / kAngles);
    o.inverse[0] = cuda::constant(tables);
    o.inverse[1] = cuda::constant(tables + kAngles);
    o.slope = cuda::constant(tables + 2 * kAngles);
    if (!rotated()) return;
    const float* const angles = reinterpret_cast<const float*>(job.rotation) +
                                (t.position - job.position) * 2 * layer.pairs + number;
    o.own_cosine = cuda::constant(angles);
    o.own_sine = cuda::constant(angles + layer.pairs);
  }
  // Whether pairs may be as they were before RoPE, those of bf16.
  KVZIP_DEVICE bool rotated() const { return Grid::kBias == 127 && job.rotation; }
  // Whether RoPE turns the pair of channels there.
  KVZIP_DEVICE bool turns(unsigned place) const { return place < turning; }

  KVZIP_DEVICE void expect(const DeviceChannel& c, int m, Expected& e) const {
    e.m = m;
    e.unit = c.unit;
    unsigned shape = c.shape;
    if (layer.shape_count > kSharedShapes) {  // they are brought when they are needed
      shape = warp;
      const auto copy = [&](void* to, uint64_t from, unsigned bytes) {
#pragma unroll 1
        for (unsigned i = lane; i < bytes / 4; i += cuda::kWarp)
          static_cast<unsigned*>(to)[i] = reinterpret_cast<const unsigned*>(from)[i];
      };
      constexpr unsigned kBytes = kCells * unsigned(sizeof(DeviceCell));
      cuda::sync_warp();
      copy(memory.cells + warp * kCells, layer.cells + c.shape * kBytes, kBytes);
      copy(memory.guesses + warp * kGuesses, layer.guesses + c.shape * kGuesses, kGuesses);
      cuda::sync_warp();
    }
    e.cell = memory.cells + shape * kCells;
    e.guesses = memory.guesses + shape * kGuesses;
  }
  // The numbers of a channel: read from where they are known, or decoded and written there.
  KVZIP_DEVICE uint64_t address_of(const Token& t, unsigned place) const {
    const unsigned head = place >> 16, d = place & 0xFFFF;
    return t.numbers + (uint64_t(head) * uint64_t(part.head_stride) + d) * settings.bytes;
  }
  KVZIP_DEVICE Found number(const Token& t, unsigned place, const Expected& e, uint64_t& x,
                            Words& words, bool& escape) const {
    const uint64_t address = address_of(t, place);
    escape = false;
    if (!job.counts) {
      const unsigned bits = settings.bytes == 1 ? *reinterpret_cast<const uint8_t*>(address)
                            : settings.bytes == 2
                                ? *reinterpret_cast<const uint16_t*>(address)
                                : *reinterpret_cast<const uint32_t*>(address) >> 16;
      return Grid::interval(Grid::place_of(bits), e);
    }
    words.fetch();
    const int target = int(x & (kCdf - 1));
    escape = target >= 2 * kHalf;
    const float step = about(4096.0f, float(greater(e.m, 1)));
    Found f;
    if (cuda::any(escape)) {
      const Escaped after = escaped(e, step, x, words, active);
      f = after.found;
      x = after.x;
      words.cursor.at = after.at;
    } else {
      f = Grid::find(target, step, e);
      advance(f, target, x, words, active);
    }
    const unsigned bits = Grid::bits_of(f.place);
    if (!active) return f;
    if (settings.bytes == 1) {
      *reinterpret_cast<uint8_t*>(address) = uint8_t(bits);
    } else if (settings.bytes == 2) {
      *reinterpret_cast<uint16_t*>(address) = uint16_t(bits);
    } else {
      const unsigned head = place >> 16, d = place & 0xFFFF;
      const uint64_t low = t.low + 2 * (uint64_t(head) * job.row_tokens * part.dim + d);
      *reinterpret_cast<uint32_t*>(address) = bits << 16 | *reinterpret_cast<const uint16_t*>(low);
    }
    return f;
  }

  KVZIP_DEVICE int energy_after(const Token& t, unsigned group) const {
    const unsigned size = group + 1 < groups ? group_size : channels - group * group_size;
    const int off = memory.deviation[group % 3 * 32 + lane] - 256 * int(size);
    const int moved = t.energy + ((t.energy >> 3) * off >> 12);
    const bool settled = t.known && layer.table_bytes == 2;
    return settled ? t.energy : greater(lesser(moved, 1 << 16), 1 << 8);
  }

  KVZIP_DEVICE void decode() const {
    Token t = token_here();
    Pair now, next;
    if (2 * warp < channels) fetch(t, 2 * warp, now);
    cuda::sync_block();
#pragma unroll 1
    for (unsigned g = 0; g < groups; ++g) {
      if (g) t.energy = energy_after(t, g - 1);
      if (warp == 0) memory.deviation[(g + 1) % 3 * 32 + lane] = 0;
      const int calm = inverse_energy(t.energy);
      const unsigned start = g * group_size;
      const unsigned size = group_size < channels - start ? group_size : channels - start;
      int deviation = 0;
#pragma unroll 1
      for (unsigned i = 2 * warp, l = warp; i < size; i += 2 * settings.warps) {
        unsigned then = start + i + 2 * settings.warps;
        if (then >= start + size) then = start + group_size + 2 * warp;
        if (then < channels) fetch(t, then, next);
        deviation += decode_pair(t, g, i, size, l, calm, now);
        now = next;
        l += settings.warps;  // which divide the lanes
        if (l >= lanes) l = warp;
      }
      if (2 * warp < size) cuda::add_shared(memory.deviation + g % 3 * 32 + lane, deviation);
      cuda::sync_block();
    }
    if (groups) t.energy = energy_after(t, groups - 1);
    if (warp == 0 && active) reinterpret_cast<int*>(job.energy)[token] = t.energy;
  }

  // Channels i and i + 1 of a group, of lane l. Returns how far their numbers deviate.
  KVZIP_DEVICE int decode_pair(const Token& t, unsigned group, unsigned i, unsigned size,
                               unsigned l, int calm, const Pair& o) const {
    const unsigned place = group * group_size + i;
    const bool pair = turns(place), both = i + 1 < size;
    const Staged staged = memory.staged_of(layer, group);
    const DeviceChannel* const channel = staged.channels + i;
    int base[2], expected[2], near[2] = {0, 0};
    unsigned char* const row = residual + lane * residual_bytes;
    if (group) add_near(row + far_columns(group), staged.near + i * near_words, near);
#pragma unroll
    for (unsigned j = 0; j < 2; ++j) {
      const DeviceChannel& c = channel[j];
      const int known = sums_of(group)[(i + j) * kSumStride + lane] + near[j];
      base[j] = clamp(sum(c.bias, scaled<20>(o.product[j], c.weight_scale)), kClamp) + o.table[j];
      expected[j] = clamp(sum(base[j], scaled<20>(known, c.within_scale)), kClamp);
    }
    Expected e;
    e.centre = expected[0];
    int second = expected[1];
    int turned_first = 0, turned_second = 0;  // where the two are expected after RoPE
    bool before = false;                      // whether the pair is coded as it was before it
    if (pair) {
      turned_first = turned(expected[0], o.cos, expected[1], -o.sin);
      turned_second = turned(expected[1], o.cos, expected[0], o.sin);
      before = rotated() &&
               product_size(expected[0], expected[1]) > product_size(turned_first, turned_second);
      if (!before) e.centre = turned_first;
    }
    Words words{reinterpret_cast<const unsigned*>(job.counts), memory.cursors[l], 0};
    uint64_t x = memory.states[l * 32 + lane];
    const auto inverse_of = [&](unsigned j) {
      return pair && !before ? o.inverse[j] : channel[j].inverse[t.known];
    };
    expect(channel[0], narrow(inverse_of(0), calm), e);
    int value[2] = {0, 0}, deviation = 0;
    unsigned bits[2] = {0, 0};
    // One copy of what decodes a number: code beyond the instruction cache costs more than a jump.
#pragma unroll 1
    for (unsigned j = 0;; ++j) {
      bool escape;
      const Found f = number(t, staged.places[i + j], e, x, words, escape);
      deviation += lesser(f.z >> (kZBits - 8), 2048);
      if (j) value[1] = f.value;
      else value[0] = f.value;
      if (j) bits[1] = Grid::bits_of(f.place);
      else bits[0] = Grid::bits_of(f.place);
      if (j || !both) break;
      before = before && !escape;  // an escape is as it is after RoPE, and so is the second
      if (pair && !before)
        second = clamp(sum(turned_second, scaled<12>(f.value - turned_first, o.slope)), kClamp);
      expect(channel[1], narrow(inverse_of(1), calm), e);
      e.centre = second;
    }
    if (job.counts) {
      memory.states[l * 32 + lane] = x;
      if (lane == 0) memory.cursors[l] = words.cursor;
      cuda::sync_warp();
    }
    if (before) {
      Rotation{o.own_cosine, o.own_sine, job.rounds_products != 0}.turn(bits);
#pragma unroll
      for (unsigned j = 0; j < 2; ++j)
        if (active)
          *reinterpret_cast<uint16_t*>(address_of(t, staged.places[i + j])) = uint16_t(bits[j]);
    } else if (pair) {
      const int a = value[0], b = value[1];
      value[0] = clamp(turned(a, o.cos, b, o.sin), kClamp);
      value[1] = clamp(turned(b, o.cos, a, -o.sin), kClamp);
    }
    tell(t, channel, place, row, value, base, both);
    return deviation;
  }
  // What the channels of the group before say of two channels of this one. Where groups begin
  // at no multiple of four, the last word holds bytes that lanes of this one write meanwhile, too:
  // whatever they are, their weights are 0.
  KVZIP_DEVICE void add_near(const unsigned char* row, const unsigned* weights,
                             int (&near)[2]) const {
    const unsigned* const known = reinterpret_cast<const unsigned*>(row);
#pragma unroll 4
    for (unsigned k = 0; k < near_words; ++k) {
      near[0] = cuda::dot4(known[k], weights[k], near[0]);
      near[1] = cuda::dot4(known[k], weights[near_words + k], near[1]);
    }
  }
  // What two channels tell those after them, and the layers after this one.
  KVZIP_DEVICE void tell(const Token& t, const DeviceChannel* channel, unsigned place,
                         unsigned char* row, const int (&value)[2], const int (&base)[2],
                         bool both) const {
    unsigned r[2], q[2];
#pragma unroll
    for (unsigned j = 0; j < 2; ++j) {
      const DeviceChannel& c = channel[j];
      const int off = difference(value[j], base[j]);
      r[j] = unsigned(clamp(sum(off, 1 << (kResidualShift - 1)) >> kResidualShift, 127)) & 0xFF;
      q[j] = unsigned(clamp(scaled<28>(difference(value[j], c.mean), c.input_scale), 127)) & 0xFF;
    }
    const unsigned column = first + place;
    auto* const output = reinterpret_cast<unsigned char*>(t.output + place);
    if (both) {
      *reinterpret_cast<uint16_t*>(row + column) = uint16_t(r[0] | r[1] << 8);
      if (active) *reinterpret_cast<uint16_t*>(output) = uint16_t(q[0] | q[1] << 8);
    } else {
      row[column] = (unsigned char)r[0];
      if (active) *output = (unsigned char)q[0];
    }
  }
};

// The tiles of a job, by `blocks` blocks of threads.
template <class Grid>
KVZIP_DEVICE void chain_tiles(const RangeJob* jobs, uint32_t count, const DevicePart* parts,
                              uint32_t* flags, const ChainSettings& settings) {
  const unsigned number = cuda::block() / settings.blocks, tile = cuda::block() % settings.blocks;
  if (number >= count || tile >= tile_count(jobs[number])) return;
  const RangeJob& job = jobs[number];
  Chain<Grid>(job, parts, flags, settings, tile, tile_of(job, tile)).run();
}

#define KVZIP_CHAIN(name, E, M)                                                             \
  KVZIP_KERNEL(384, 1)                                                                      \
  predictive_chain_##name(const RangeJob* jobs, uint32_t count, const DevicePart* parts,    \
                          uint32_t* flags, uint32_t blocks, uint32_t warps, uint32_t bytes, \
                          uint32_t shared) {                                                \
    chain_tiles<Grid<E, M>>(jobs, count, parts, flags, {blocks, warps, bytes, shared});     \
  }
KVZIP_CHAIN(bf16, 8, 7)
KVZIP_CHAIN(fp16, 5, 10)
KVZIP_CHAIN(fp8_e4m3fn, 4, 3)
KVZIP_CHAIN(fp8_e5m2, 5, 2)
#undef KVZIP_CHAIN

}  // namespace kvzip::predictive
