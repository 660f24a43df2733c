// Decoding `channel` on a GPU (spec.md): a warp decodes a stream. Its thread t holds the states of
// the lanes t, t + 32, t + 64 and t + 96; the alias table of a channel lies in two registers of the
// warp's threads and is looked up by shuffles; a vote tells which states take a word.
#pragma once

#include "channel/strip.cuh"

namespace kvzip::channel {

constexpr unsigned kTableBytes = 256;

// The tile of a half strip: of each token the upper 16 bits of 32 numbers. Rows and octets of
// tokens are apart so that threads fall on different banks of shared memory when they store (a
// token each, four channels) and when they load (two octets, eight channels).
constexpr unsigned kRowBytes = 72, kOctetBytes = 8 * kRowBytes;
constexpr unsigned kTileBytes = kGroupTokens / 8 * kOctetBytes;
KVZIP_DEVICE unsigned tile_at(unsigned token) { return token * kRowBytes; }

// Words on their way from memory: a ring of four pieces, the first words twice so that a step's
// words lie side by side. Between refills four steps take at most one piece.
constexpr unsigned kPieceWords = kUnrolled * kGroupTokens, kPieces = 4;
constexpr unsigned kRingWords = kPieces * kPieceWords;
constexpr unsigned kRingBytes = 2 * (kRingWords + kGroupTokens);
constexpr unsigned kDecodeSharedBytes = kTileBytes + kRingBytes;
static_assert(kTileBytes % 128 == 0, "copies are of 16 bytes");

class WordRing {
 public:
  KVZIP_DEVICE WordRing(unsigned char* room, const unsigned char* words, unsigned count)
      : room_(room), words_(words), bytes_(2 * count) {
    for (unsigned i = 0; i < kPieces; ++i) fetch();
    cuda::wait_copies<2>();
    cuda::sync_warp();
  }
  // Where the next 128 words lie.
  KVZIP_DEVICE const unsigned char* next() const {
    return room_ + 2 * (position & (kRingWords - 1));
  }
  // To be called after every fourth step.
  KVZIP_DEVICE void refill() {
    if (position / kPieceWords + kPieces == issued_) return;
    cuda::sync_warp();  // all have read the words that are overwritten
    fetch();
    cuda::wait_copies<2>();
    cuda::sync_warp();
  }

  unsigned position = 0;

 private:
  KVZIP_DEVICE void fetch() {
    const unsigned lane = cuda::thread() % kWarp;
#pragma unroll
    for (unsigned i = 0; i < 2 * kPieceWords; i += 16 * kWarp) {
      const unsigned from = issued_ * 2 * kPieceWords + i + 16 * lane;
      const unsigned there = from < bytes_ ? smaller(16, bytes_ - from) : 0;
      const unsigned char* source = there ? words_ + from : words_;
      const unsigned to = from & (2 * kRingWords - 1);
      cuda::copy16(room_ + to, source, there);
      if (to < 2 * kGroupTokens) cuda::copy16(room_ + 2 * kRingWords + to, source, there);
    }
    cuda::commit_copies();
    ++issued_;
  }
  unsigned char* room_;
  const unsigned char* words_;
  unsigned bytes_, issued_ = 0;
};

// The mantissas of one channel's eight tokens, from `rows` of bytes that lie `stride` apart.
template <int M>
KVZIP_DEVICE void unpack_column(const unsigned char* at, unsigned stride, unsigned (&out)[8]) {
  constexpr int R = M % 8, B = M / 8;
  unsigned packed[R];
  for (int j = 0; j < R; ++j) packed[j] = at[(8 * B + j) * stride];
  for (int i = 0; i < 8; ++i) out[i] = 0;
  if (R == 7) {
    for (int j = 0; j < R; ++j) {
      out[j] = packed[j] & 0x7F;
      out[7] |= packed[j] >> 7 << j;
    }
  } else if (R == 3) {
    for (int j = 0; j < R; ++j) {
      out[2 * j] = packed[j] & 7;
      out[2 * j + 1] = packed[j] >> 3 & 7;
      out[6] |= packed[j] >> 6 << 2 * j;
    }
    out[7] = out[6] >> 3;
    out[6] &= 7;
  } else {
    for (int j = 0; j < R; ++j)
      for (int i = 0; i < 4; ++i) out[4 * j + i] = packed[j] >> 2 * i & 3;
  }
  for (int b = B - 1; b >= 0; --b)
    for (int i = 0; i < 8; ++i) out[i] = out[i] << 8 | at[(8 * b + i) * stride];
}

// The same of four channels side by side at a time: fields of R bits of the eight tokens, a byte a
// channel.
template <int R>
KVZIP_DEVICE void unpack_fields(const unsigned (&row)[R], unsigned (&field)[8]) {
  if constexpr (R == 7) {
    field[7] = 0;
#pragma unroll
    for (int j = 0; j < 7; ++j) {
      field[j] = row[j] & 0x7F7F7F7Fu;
      field[7] |= row[j] >> (7 - j) & 0x01010101u << j;
    }
  } else if constexpr (R == 3) {
    unsigned rest = 0;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      field[2 * j] = row[j] & 0x07070707u;
      field[2 * j + 1] = row[j] >> 3 & 0x07070707u;
      rest |= (row[j] >> 6 & 0x03030303u) << 2 * j;
    }
    field[6] = rest & 0x07070707u;
    field[7] = rest >> 3 & 0x07070707u;
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) field[4 * j + i] = row[j] >> 2 * i & 0x03030303u;
  }
}

template <int E, int M, typename T>
struct Decoding {
  static constexpr int kTop = 16;       // bits of a number that the tile holds
  static constexpr int kShift = E - 3;  // from an entry's value to the tile's upper bits
  static constexpr unsigned kMarker = 1u << (14 - E);  // below a value: it is an escape
  static constexpr unsigned kValueMask = 0xFFFFu & ~(2 * kMarker - 1);
  static constexpr unsigned kFieldMask = ((2u << E) - 1) << 12;  // of a value in an entry
  static constexpr unsigned kRows = rows_per_octet(M);
  static constexpr int kBits = 8 * int(sizeof(T));

  // A number of its tile's upper bits and its mantissa.
  KVZIP_DEVICE static T number(unsigned upper, unsigned mantissa) {
    if constexpr (kBits < kTop) return T(upper >> (kTop - kBits) | mantissa);
    else return T(upper << (kBits - kTop) | mantissa);
  }

  // Numbers of a half strip into place, from the tile and the mantissas, eight channels of eight
  // tokens a thread. Whole: 32 channels that are not constant and 128 tokens, all of it aligned.
  KVZIP_DEVICE static void merge_whole(const StripView& view, unsigned half,
                                       const unsigned char* tile) {
    const unsigned lane = cuda::thread() % kWarp, group = lane & 3;
    const DevicePart& part = *view.part;
    T* const numbers = reinterpret_cast<T*>(part.numbers);
    constexpr unsigned kAhead =
        kRows <= 10 ? 2 : 1;  // passes whose mantissas are waited for together
    unsigned rows[kAhead][kRows][2];
#pragma unroll
    for (unsigned pass = 0; pass < 2; ++pass) {
      const unsigned octet = 8 * pass + (lane >> 2);
#pragma unroll
      for (unsigned p = pass; p < (pass % kAhead ? pass : pass + kAhead); ++p) {
        const unsigned char* at =
            view.mantissas + (8 * p + (lane >> 2)) * kRows * kStripWidth + half * kHalf + 8 * group;
#pragma unroll
        for (unsigned j = 0; j < kRows; ++j) {
          const cuda::Two two =
              cuda::constant(reinterpret_cast<const cuda::Two*>(at + j * kStripWidth));
          rows[p % kAhead][j][0] = two.v[0];
          rows[p % kAhead][j][1] = two.v[1];
        }
      }
      const auto& row = rows[pass % kAhead];
      constexpr int R = M % 8, B = M / 8;
      unsigned field[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned packed[R];
#pragma unroll
        for (int j = 0; j < R; ++j) packed[j] = row[8 * B + j][h];
        unpack_fields<R>(packed, field[h]);
      }
      const unsigned token = view.first_token + 8 * octet;
      const int64_t start = view.corner + int64_t(half * kHalf + 8 * group);
      const bool together = !part.pages || (token % part.page_tokens) + 8 <= part.page_tokens;
      T* out = numbers + start + place_of(part, token);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i && !together) out = numbers + start + place_of(part, token + unsigned(i));
        cuda::Four upper;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const cuda::Two two = *reinterpret_cast<const cuda::Two*>(
              tile + tile_at(8 * octet + unsigned(i)) + 16 * group + 8 * unsigned(h));
          upper.v[2 * h] = two.v[0];
          upper.v[2 * h + 1] = two.v[1];
        }
        if constexpr (kBits == 8) {
          cuda::Two v;
#pragma unroll
          for (int h = 0; h < 2; ++h)
            v.v[h] = cuda::bytes_of(upper.v[2 * h], upper.v[2 * h + 1], 0x7531) | field[h][i];
          cuda::stream(reinterpret_cast<cuda::Two*>(out), v);
        } else if constexpr (kBits == 16) {
          cuda::Four v;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            unsigned low = field[h][i], high = 0;
            if constexpr (B == 1) {  // the field lies above a whole byte
              high = low;
              low = row[i][h];
            }
            // Bytes 0 and 1, then 2 and 3, each with its high byte beside it.
            v.v[2 * h] = upper.v[2 * h] | cuda::bytes_of(low, high, 0x5140);
            v.v[2 * h + 1] = upper.v[2 * h + 1] | cuda::bytes_of(low, high, 0x7362);
          }
          cuda::stream(reinterpret_cast<cuda::Four*>(out), v);
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            cuda::Four v;
            const unsigned low0 = cuda::bytes_of(row[i][h], row[8 + i][h], 0x5140);
            const unsigned low1 = cuda::bytes_of(row[i][h], row[8 + i][h], 0x7362);
            const unsigned high0 = upper.v[2 * h] | cuda::bytes_of(field[h][i], 0, 0x4140);
            const unsigned high1 = upper.v[2 * h + 1] | cuda::bytes_of(field[h][i], 0, 0x4342);
            v.v[0] = cuda::bytes_of(low0, high0, 0x5410);
            v.v[1] = cuda::bytes_of(low0, high0, 0x7632);
            v.v[2] = cuda::bytes_of(low1, high1, 0x5410);
            v.v[3] = cuda::bytes_of(low1, high1, 0x7632);
            cuda::stream(reinterpret_cast<cuda::Four*>(out + 4 * h), v);
          }
        }
        out += part.token_stride;
      }
    }
  }

  // The same of any half strip, a channel of eight tokens at a time.
  KVZIP_DEVICE static void merge_any(const StripView& view, unsigned half,
                                     const unsigned char* tile) {
    const unsigned lane = cuda::thread() % kWarp, channel = half * kHalf + lane;
    if (channel >= view.strip.width) return;
    const DevicePart& part = *view.part;
    T* const numbers = reinterpret_cast<T*>(part.numbers) + view.corner + channel;
    const unsigned live = view.live_count(), rank = view.rank(channel);
    const bool coded = view.is_live(channel);
    T fixed = 0;
    if (!coded) {
      const DeviceChannel* channels = reinterpret_cast<const DeviceChannel*>(part.channels);
      fixed = T(channels[view.strip.head * part.dim + view.strip.channel + channel].number);
    }
    for (unsigned first = 0; first < view.strip.lanes; first += 8) {
      unsigned mantissa[8];
      if (coded) unpack_column<M>(view.mantissas + first / 8 * kRows * live + rank, live, mantissa);
      for (unsigned i = 0; i < 8 && first + i < view.strip.lanes; ++i) {
        const unsigned upper =
            *reinterpret_cast<const uint16_t*>(tile + tile_at(first + i) + 2 * lane);
        numbers[place_of(part, view.first_token + first + i)] =
            coded ? number(upper, mantissa[i]) : fixed;
      }
    }
  }

  // The end of a strip's mantissas, which the states held: into the numbers that stand in their
  // place already. `carried`: words of 16 bits.
  KVZIP_DEVICE static void mend(const StripView& view, const uint16_t* carried, unsigned words) {
    const unsigned live = view.live_count(), octets = (view.strip.lanes + 7) / 8;
    const unsigned bytes = octets * kRows * live, stored = bytes - 2 * words;
    const DevicePart& part = *view.part;
    const unsigned columns = octets * view.strip.width,
                   first = stored / (kRows * (live ? live : 1));
    for (unsigned i = first * view.strip.width + cuda::thread() % kWarp; i < columns; i += kWarp) {
      const unsigned octet = i / view.strip.width, channel = i % view.strip.width;
      if (!view.is_live(channel)) continue;
      unsigned char rows[kRows];
      for (unsigned j = 0; j < kRows; ++j) {
        const unsigned at = (octet * kRows + j) * live + view.rank(channel);
        rows[j] = at < stored
                      ? view.mantissas[at]
                      : (unsigned char)(carried[(at - stored) / 2] >> (at - stored) % 2 * 8);
      }
      unsigned mantissa[8];
      unpack_column<M>(rows, 1, mantissa);
      T* const numbers = reinterpret_cast<T*>(part.numbers) + view.corner + channel;
      for (unsigned k = 0; k < 8 && 8 * octet + k < view.strip.lanes; ++k) {
        T& number = numbers[place_of(part, view.first_token + 8 * octet + k)];
        number = T(T(number >> M << M) | mantissa[k]);
      }
    }
  }

  // Escapes still to come.
  struct Escapes {
    const uint16_t* values;
    unsigned count, position;
  };

  // Puts the escapes of kUnrolled channels from `first` on into the tile, in the order in which
  // they were written; returns where the next ones stand. Those that are not there count as 0.
  KVZIP_DEVICE_CALL static unsigned put_escapes(Escapes escapes, unsigned first, unsigned lanes,
                                                unsigned char* tile) {
    const unsigned lane = cuda::thread() % kWarp, below = (1u << lane) - 1;
    cuda::sync_warp();
#pragma unroll 1
    for (unsigned i = 0; i < kUnrolled * kGroupTokens / kWarp; ++i) {
      const unsigned channel = first + i / (kGroupTokens / kWarp);
      const unsigned token = i % (kGroupTokens / kWarp) * kWarp + lane;
      uint16_t* const upper = reinterpret_cast<uint16_t*>(tile + tile_at(token)) + channel;
      const bool escaped = token < lanes && (*upper & kMarker);
      const unsigned votes = cuda::ballot(escaped);
      if (!votes) continue;
      const unsigned at = escapes.position + cuda::ones(votes & below);
      if (escaped) *upper = uint16_t(at < escapes.count ? escapes.values[at] << (15 - E) : 0);
      // One more than there are tells that some were missing.
      escapes.position = smaller(escapes.position + cuda::ones(votes), escapes.count + 1);
    }
    return escapes.position;
  }

  // Values of a half strip into the tile. `mine`: what the thread's number says of that channel of
  // the half. Whole: every channel is coded and every lane has a token.
  template <int K, bool kWhole>
  KVZIP_DEVICE static void decode_half(const DevicePart& part, DeviceChannel mine, unsigned live,
                                       unsigned lanes, unsigned (&x)[K], WordRing& words,
                                       Escapes& escapes, unsigned char* tile) {
    const unsigned lane = cuda::thread() % kWarp, below = (1u << lane) - 1;
    const unsigned char* const tables =
        reinterpret_cast<const unsigned char*>(part.tables) + 8 * lane;
    // Tables come from memory four channels ahead; that of a constant channel is not used.
    const unsigned table_of_mine = mine.shape == kConstantShape ? 0 : mine.shape * kTableBytes;
    cuda::Two next[kUnrolled];
    const auto fetch = [&](unsigned channel) {
      return cuda::constant(
          reinterpret_cast<const cuda::Two*>(tables + cuda::shuffle(table_of_mine, channel)));
    };
#pragma unroll
    for (unsigned c = 0; c < kUnrolled; ++c) next[c] = fetch(c);
#pragma unroll 1
    for (unsigned group = 0; group < kHalf; group += kUnrolled) {
      unsigned upper[K][kUnrolled / 2];
      if (!kWhole) {
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (unsigned j = 0; j < kUnrolled / 2; ++j) upper[k][j] = 0;
      }
#pragma unroll
      for (unsigned c = 0; c < kUnrolled; ++c) {
        const unsigned channel = group + c;
        const unsigned base = cuda::shuffle(mine.number, channel) << 12;
        unsigned own = next[c].v[0], other = next[c].v[1];
        next[c] = fetch((channel + kUnrolled) & 31);
        if (!kWhole && !(live >> channel & 1)) continue;
        own = ((own + base) & kFieldMask) | (own & ~kFieldMask);
        other = ((other + base) & kFieldMask) | (other & ~kFieldMask);
        // All states side by side, since each waits long for its own.
        unsigned entry[K], y[K], votes[K], word[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const unsigned bucket = x[k] >> 5;
          const unsigned a = cuda::shuffle(own, bucket), b = cuda::shuffle(other, bucket);
          const bool second = x[k] * (1u << 27) + ((1u << 27) - 1) >= a;
          entry[k] = second ? b : a;
          unsigned rank = x[k] & 31;
          if (second) rank = (b >> 21) + rank;
          y[k] = (entry[k] & 2047) * (x[k] >> 10) + rank;
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const bool there = kWhole || lane + kWarp * unsigned(k) < lanes;
          votes[k] = cuda::ballot(there && y[k] < kMinState);
        }
        const unsigned char* at = words.next();
#pragma unroll
        for (int k = 0; k < K; ++k) {
          word[k] = *reinterpret_cast<const uint16_t*>(at + 2 * cuda::ones(votes[k] & below));
          const unsigned taken = cuda::ones(votes[k]);
          at += 2 * taken;
          words.position += taken;
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const unsigned z = y[k] < kMinState ? y[k] << 16 | word[k] : y[k];
          if (kWhole) x[k] = z;
          else x[k] = lane + kWarp * unsigned(k) < lanes ? z : x[k];
          if (c % 2 == 0) upper[k][c / 2] = entry[k] >> kShift & (kValueMask | kMarker);
          else upper[k][c / 2] |= entry[k] << (16 - kShift) & (kValueMask | kMarker) << 16;
        }
      }
      words.refill();
      unsigned marked = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        *reinterpret_cast<cuda::Two*>(tile + tile_at(lane + kWarp * unsigned(k)) +
                                      2 * group) = {{upper[k][0], upper[k][1]}};
        marked |= upper[k][0] | upper[k][1];
      }
      if (cuda::any(marked & (kMarker << 16 | kMarker)))
        escapes.position = put_escapes(escapes, group, lanes, tile);
    }
  }

  template <int K>
  KVZIP_DEVICE static bool decode(const StreamJob& job, const DevicePart& part,
                                  unsigned char* room) {
    const unsigned lane = cuda::thread() % kWarp;
    unsigned char* const tile = room;
    const unsigned char* const stream = reinterpret_cast<const unsigned char*>(job.stream);
    const unsigned states_bytes = (stored_states(job.lanes) + 15) & ~15u;
    const unsigned char* mantissas = stream + states_bytes;
    const unsigned char* const coded = mantissas + ((job.mantissas + 15) & ~15u);
    WordRing words(room + kTileBytes, coded, job.words);
    Escapes escapes{reinterpret_cast<const uint16_t*>(coded) + job.words, job.escapes, 0};
    bool damaged = false;
    unsigned x[K];
    const unsigned char* top = coded + 2 * (job.words + job.escapes);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned j = lane + kWarp * unsigned(k);
      const bool there = j < job.lanes;
      const bool has_top = there && stream[3 * job.lanes + j / 8] >> j % 8 & 1;
      const unsigned votes = cuda::ballot(has_top);
      x[k] = kMinState;
      if (there) {
        x[k] = unsigned(stream[3 * j]) | unsigned(stream[3 * j + 1]) << 8 |
               unsigned(stream[3 * j + 2]) << 16;
        if (has_top) x[k] |= unsigned(top[cuda::ones(votes & ((1u << lane) - 1))]) << 24;
      }
      damaged |= x[k] < (has_top ? kTopState : kMinState);
      top += cuda::ones(votes);
    }
    for (unsigned s = 0; s < job.strips; ++s) {
      StripView view(part, job.first_token, job.tokens, job.first_strip + s);
      view.mantissas = mantissas;
      const DeviceStrip& strip = view.strip;
      const bool whole = view.is_whole<T>(mantissas);
      // They come nearer while values are decoded.
      for (unsigned at = 128 * lane; at < (strip.lanes + 7) / 8 * kRows * view.live_count();
           at += 128 * kWarp)
        cuda::prefetch(mantissas + at);
#pragma unroll 1
      for (unsigned half = 0; half < 2 && half * kHalf < strip.width; ++half) {
        const unsigned live = half ? view.live_high : view.live_low;
        const DeviceChannel own = half ? view.mine[1] : view.mine[0];
        if (live == ~0u && strip.lanes == kWarp * unsigned(K))
          decode_half<K, true>(part, own, live, strip.lanes, x, words, escapes, tile);
        else decode_half<K, false>(part, own, live, strip.lanes, x, words, escapes, tile);
        cuda::sync_warp();
        if (whole) merge_whole(view, half, tile);
        else merge_any(view, half, tile);
        cuda::sync_warp();
      }
      const unsigned octets = (strip.lanes + 7) / 8, live = view.live_count();
      if (s + 1 == job.strips) {
        // The states end as the last words of these mantissas.
        const unsigned carried = smaller(job.lanes, octets * kRows * live / 2);
        uint16_t* const tail = reinterpret_cast<uint16_t*>(tile);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const unsigned j = lane + kWarp * unsigned(k);
          if (j >= job.lanes) continue;
          damaged |= x[k] >> 16 != 1 || (j >= carried && x[k] != kMinState);
          tail[j] = uint16_t(x[k]);
        }
        cuda::sync_warp();
        mend(view, tail, carried);
      }
      mantissas += octets * kRows * live;
    }
    cuda::wait_copies<0>();
    cuda::sync_warp();
    return cuda::any(damaged) || words.position != job.words || escapes.position != job.escapes;
  }

  // Reads up to 512 bytes behind a stream's end, which must be there, whatever they are.
  KVZIP_DEVICE static void run(const StreamJob* jobs, uint32_t count, const DevicePart* parts,
                               uint32_t* flags) {
    if (cuda::block() >= count) return;
    const StreamJob job = jobs[cuda::block()];
    const DevicePart part = parts[job.part];
    unsigned char* const room = cuda::shared_memory();
    const bool damaged = job.lanes <= 32   ? decode<1>(job, part, room)
                         : job.lanes <= 64 ? decode<2>(job, part, room)
                                           : decode<4>(job, part, room);
    if (damaged && cuda::thread() % kWarp == 0) cuda::set_flag(flags + job.row);
  }
};

#ifndef KVZIP_BLOCKS_OF_SM
#define KVZIP_BLOCKS_OF_SM 12
#endif
#define KVZIP_CHANNEL_DECODE(name, E, M, T)                                             \
  KVZIP_KERNEL(kWarpsOfBlock * 32, KVZIP_BLOCKS_OF_SM)                                  \
  channel_decode_##name(const StreamJob* jobs, uint32_t count, const DevicePart* parts, \
                        uint32_t* flags) {                                              \
    Decoding<E, M, T>::run(jobs, count, parts, flags);                                  \
  }
KVZIP_EACH_FORMAT(KVZIP_CHANNEL_DECODE)
#undef KVZIP_CHANNEL_DECODE

}  // namespace kvzip::channel
