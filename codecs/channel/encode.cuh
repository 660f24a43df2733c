// Encoding `channel` on a GPU (spec.md): a warp encodes a stream, from its last number to its
// first.
#pragma once

#include "channel/strip.cuh"

namespace kvzip::channel {

// The tile of a whole strip: of each token the upper 16 bits of 64 numbers.
constexpr unsigned kStripRowBytes = 136;
constexpr unsigned kEncodeSharedBytes = kGroupTokens * kStripRowBytes;
constexpr unsigned kEncoderBytes = sizeof(DeviceEncoder);

// Fields of R bits of the eight tokens into rows: the reverse of unpack_fields.
template <int R>
KVZIP_DEVICE void pack_fields(const unsigned (&field)[8], unsigned (&row)[R]) {
  if constexpr (R == 7) {
#pragma unroll
    for (int j = 0; j < 7; ++j) row[j] = field[j] | (field[7] & 0x01010101u << j) << (7 - j);
  } else if constexpr (R == 3) {
    const unsigned rest = field[6] | field[7] << 3;
#pragma unroll
    for (int j = 0; j < 3; ++j)
      row[j] = field[2 * j] | field[2 * j + 1] << 3 | (rest >> 2 * j & 0x03030303u) << 6;
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      row[j] = field[4 * j] | field[4 * j + 1] << 2 | field[4 * j + 2] << 4 | field[4 * j + 3] << 6;
  }
}
// The same of one channel's mantissas of eight tokens, `stride` bytes from row to row.
template <int M>
KVZIP_DEVICE void pack_column(const unsigned (&mantissa)[8], unsigned char* at, unsigned stride) {
  constexpr int R = M % 8, B = M / 8;
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < 8; ++i) at[(8 * b + i) * stride] = (unsigned char)(mantissa[i] >> 8 * b);
  unsigned field[8], row[R];
  for (int i = 0; i < 8; ++i) field[i] = mantissa[i] >> 8 * B;
  pack_fields<R>(field, row);
  for (int j = 0; j < R; ++j) at[(8 * B + j) * stride] = (unsigned char)row[j];
}

template <int E, int M, typename T>
struct Encoding {
  static constexpr unsigned kRows = rows_per_octet(M);
  static constexpr int kBits = 8 * int(sizeof(T));
  static constexpr unsigned kValues = 2u << E;

  KVZIP_DEVICE static unsigned upper_of(unsigned number) {
    return kBits < 16 ? number << (16 - kBits) & 0xFFFFu : number >> (kBits < 16 ? 0 : kBits - 16);
  }

  // A strip's numbers: their upper bits into the tile, their mantissas into the stream's room.
  // Whether a channel that should be constant is not.
  KVZIP_DEVICE static bool take_any(const StripView& view, unsigned char* mantissas,
                                    unsigned char* tile) {
    const DevicePart& part = *view.part;
    const unsigned live = view.live_count(), octets = (view.strip.lanes + 7) / 8;
    const DeviceChannel* const channels = reinterpret_cast<const DeviceChannel*>(part.channels) +
                                          view.strip.head * part.dim + view.strip.channel;
    bool other = false;
    for (unsigned i = cuda::thread() % kWarp; i < octets * kStripWidth; i += kWarp) {
      const unsigned octet = i / kStripWidth, channel = i % kStripWidth;
      if (channel >= view.strip.width) continue;
      const T* const numbers = reinterpret_cast<const T*>(part.numbers) + view.corner + channel;
      unsigned mantissa[8];
      const bool coded = view.is_live(channel);
      for (unsigned k = 0; k < 8; ++k) {
        const unsigned token = 8 * octet + k;
        const unsigned number =
            token < view.strip.lanes ? numbers[place_of(part, view.first_token + token)] : 0;
        mantissa[k] = number & ((1u << M) - 1);
        if (!coded && token < view.strip.lanes) other |= number != channels[channel].number;
        *reinterpret_cast<uint16_t*>(tile + token * kStripRowBytes + 2 * channel) =
            uint16_t(upper_of(number));
      }
      if (coded)
        pack_column<M>(mantissa, mantissas + octet * kRows * live + view.rank(channel), live);
    }
    return other;
  }

  // The same where all 64 channels are coded, all 128 tokens are there, and all of it is aligned:
  // eight channels of eight tokens a thread.
  KVZIP_DEVICE static void take_whole(const StripView& view, unsigned char* mantissas,
                                      unsigned char* tile) {
    constexpr int R = M % 8, B = M / 8;
    const unsigned lane = cuda::thread() % kWarp, group = lane & 7;
    const DevicePart& part = *view.part;
    const T* const numbers =
        reinterpret_cast<const T*>(part.numbers) + view.corner + int64_t(8 * group);
#pragma unroll 1
    for (unsigned octet = lane >> 3; octet < kGroupTokens / 8; octet += 4) {
      const unsigned token = view.first_token + 8 * octet;
      const bool together = !part.pages || (token % part.page_tokens) + 8 <= part.page_tokens;
      const T* from = numbers + place_of(part, token);
      unsigned raw[8][2 * sizeof(T)];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i && !together) from = numbers + place_of(part, token + unsigned(i));
        if constexpr (sizeof(T) == 1) {
          const cuda::Two two = *reinterpret_cast<const cuda::Two*>(from);
          raw[i][0] = two.v[0];
          raw[i][1] = two.v[1];
        } else {
#pragma unroll
          for (unsigned q = 0; q < sizeof(T) / 2; ++q) {
            const cuda::Four four = reinterpret_cast<const cuda::Four*>(from)[q];
#pragma unroll
            for (int j = 0; j < 4; ++j) raw[i][4 * q + unsigned(j)] = four.v[j];
          }
        }
        from += part.token_stride;
      }
      unsigned char* const at = mantissas + octet * kRows * kStripWidth + 8 * group;
      unsigned row[kRows][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned field[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          // Byte b of the four channels' numbers.
          const auto byte = [&](unsigned b) {
            if constexpr (sizeof(T) == 1) return raw[i][h];
            else if constexpr (sizeof(T) == 2)
              return cuda::bytes_of(raw[i][2 * h], raw[i][2 * h + 1], b ? 0x7531 : 0x6420);
            else {
              const unsigned low =
                  cuda::bytes_of(raw[i][4 * h], raw[i][4 * h + 1], b | (b + 4) << 4);
              const unsigned high =
                  cuda::bytes_of(raw[i][4 * h + 2], raw[i][4 * h + 3], b | (b + 4) << 4);
              return cuda::bytes_of(low, high, 0x5410);
            }
          };
#pragma unroll
          for (unsigned b = 0; b < unsigned(B); ++b) row[8 * b + unsigned(i)][h] = byte(b);
          field[i] = byte(B) & ((1u << R) - 1) * 0x01010101u;
        }
        unsigned packed[R];
        pack_fields<R>(field, packed);
#pragma unroll
        for (int j = 0; j < R; ++j) row[8 * B + j][h] = packed[j];
      }
#pragma unroll
      for (unsigned j = 0; j < kRows; ++j)
        *reinterpret_cast<cuda::Two*>(at + j * kStripWidth) = {{row[j][0], row[j][1]}};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          cuda::Two two;
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            if constexpr (sizeof(T) == 1)
              two.v[q] = cuda::bytes_of(raw[i][h], 0, q ? 0x3424 : 0x1404);
            else if constexpr (sizeof(T) == 2) two.v[q] = raw[i][2 * h + q];
            else
              two.v[q] = cuda::bytes_of(raw[i][4 * h + 2 * q], raw[i][4 * h + 2 * q + 1], 0x7632);
          }
          *reinterpret_cast<cuda::Two*>(tile + (8 * octet + unsigned(i)) * kStripRowBytes +
                                        16 * group + 8 * unsigned(h)) = two;
        }
    }
  }

  struct Output {
    uint16_t *words, *escapes;      // where what was written last stands
    const uint16_t* escapes_begin;  // nothing may be written before
    bool failed;
  };

  // Writes the escapes of a step, of state K - 1 first.
  template <int K>
  KVZIP_DEVICE_CALL static Output put_escapes(Output out, unsigned escaped,
                                              const unsigned (&value)[K]) {
    const unsigned lane = cuda::thread() % kWarp, below = (1u << lane) - 1;
#pragma unroll
    for (int k = K - 1; k >= 0; --k) {
      const unsigned votes = cuda::ballot(escaped >> k & 1);
      const unsigned count = cuda::ones(votes);
      if (count > unsigned(out.escapes - out.escapes_begin)) {
        out.failed = true;
        continue;
      }
      out.escapes -= count;
      if (escaped >> k & 1) out.escapes[cuda::ones(votes & below)] = uint16_t(value[k]);
    }
    return out;
  }

  template <int K, bool kWhole>
  KVZIP_DEVICE static void encode_strip(const StripView& view, unsigned (&x)[K], Output& out,
                                        const unsigned char* tile) {
    const DeviceChannel(&mine)[2] = view.mine;
    const unsigned lane = cuda::thread() % kWarp, below = (1u << lane) - 1;
    const unsigned lanes = view.strip.lanes;
    const uint32_t* const tables = reinterpret_cast<const uint32_t*>(view.part->tables) + lane;
    struct Looked {
      unsigned map, symbol, inverse, begins, shift;
    };
    const auto fetch = [&](unsigned channel) {
      const unsigned shape =
          cuda::shuffle(channel < kHalf ? mine[0].shape : mine[1].shape, channel);
      const uint32_t* const at =
          tables + (shape == kConstantShape ? 0 : shape) * (kEncoderBytes / 4);
      return Looked{cuda::constant(at), cuda::constant(at + 32), cuda::constant(at + 64),
                    cuda::constant(at + 96), cuda::constant(at + 128)};
    };
    Looked next = fetch(kStripWidth - 1);
#pragma unroll 1
    for (unsigned group = kStripWidth; group; group -= kUnrolled) {
      cuda::Two upper[K];
#pragma unroll
      for (int k = 0; k < K; ++k)
        upper[k] = *reinterpret_cast<const cuda::Two*>(
            tile + (lane + kWarp * unsigned(k)) * kStripRowBytes + 2 * (group - kUnrolled));
#pragma unroll
      for (int c = int(kUnrolled) - 1; c >= 0; --c) {
        const unsigned channel = group - kUnrolled + unsigned(c);
        const Looked own = next;
        next = fetch(channel ? channel - 1 : 0);
        const unsigned base =
            cuda::shuffle(channel < kHalf ? mine[0].number : mine[1].number, channel);
        if (!kWhole && !view.is_live(channel)) continue;
        unsigned value[K], entry[K], votes[K], inverse[K], escaped = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const unsigned number = c % 2 ? upper[k].v[c / 2] >> 16 : upper[k].v[c / 2] & 0xFFFFu;
          value[k] = number >> (15 - E);
          const unsigned relative = (value[k] - base) & (kValues - 1);
          const unsigned exponent = relative & (kValues / 2 - 1);
          const unsigned pair = cuda::shuffle(own.map, exponent);
          unsigned symbol = (relative >> E ? pair >> 8 : pair) & 63;
          const bool there = kWhole || lane + kWarp * unsigned(k) < lanes;
          if (!(symbol & 32) || exponent >= 32) {
            symbol = own.map >> 24;
            if (there) {
              escaped |= 1u << k;
              out.failed |= symbol == 255;
            }
          }
          entry[k] = cuda::shuffle(own.symbol, symbol);
          inverse[k] = cuda::shuffle(own.inverse, symbol);
          votes[k] = cuda::ballot(there && x[k] >> 22 >= (entry[k] & 2047));
        }
        if (cuda::any(escaped != 0)) out = put_escapes<K>(out, escaped, value);
#pragma unroll
        for (int k = K - 1; k >= 0; --k) {
          out.words -= cuda::ones(votes[k]);
          const bool full = votes[k] >> lane & 1;
          if (full) out.words[cuda::ones(votes[k] & below)] = uint16_t(x[k]);
          const unsigned frequency = entry[k] & 2047;
          const unsigned y = full ? x[k] >> 16 : x[k];
          unsigned quotient = cuda::high_product(y, inverse[k]);
          unsigned rest = y - quotient * frequency;
          if (rest >= frequency) {
            rest -= frequency;
            ++quotient;
          }
          const unsigned rank = (entry[k] >> 11) + rest;
          const unsigned begins = cuda::shuffle(own.begins, rank >> 5);
          const unsigned before = cuda::shuffle(own.map, rank >> 5) >> 16 & 255;
          const unsigned piece = before - 1 + cuda::ones(begins << (31 - (rank & 31)));
          const unsigned shifts = cuda::shuffle(own.shift, piece >> 1);
          const unsigned slot = (rank + (piece & 1 ? shifts >> 16 : shifts)) & 1023;
          const unsigned z = quotient << 10 | slot;
          if (kWhole) x[k] = z;
          else x[k] = lane + kWarp * unsigned(k) < lanes ? z : x[k];
        }
      }
    }
  }

  template <int K>
  KVZIP_DEVICE static void encode(const EncodeJob& job, const DevicePart& part,
                                  EncodedStream* encoded, unsigned char* tile) {
    const unsigned lane = cuda::thread() % kWarp;
    unsigned char* const room = reinterpret_cast<unsigned char*>(job.room);
    unsigned char* const begin = room + ((4 * job.lanes + 15) & ~15u);
    uint16_t* const words =
        reinterpret_cast<uint16_t*>(begin + ((job.mantissas + 2 * kGroupTokens + 15) & ~15u));
    Output out{words + job.numbers, words + job.numbers + job.numbers / 4, words + job.numbers,
               false};
    const uint16_t* const words_end = out.words;
    const uint16_t* const escapes_end = out.escapes;
    unsigned x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = kMinState;
    unsigned char* mantissas = nullptr;
#pragma unroll 1
    for (unsigned s = job.strips; s-- > 0;) {
      const StripView view(part, job.first_token, job.tokens, job.first_strip + s);
      const DeviceStrip& strip = view.strip;
      const unsigned bytes = (strip.lanes + 7) / 8 * kRows * view.live_count();
      const bool last = s + 1 == job.strips;
      const unsigned carried = last ? smaller(job.lanes, bytes / 2) : 0;
      // The last strip's end goes into the states.
      mantissas = (last ? begin + job.mantissas + 2 * carried : mantissas) - bytes;
      const bool complete = (view.live_low & view.live_high) == ~0u;
      const bool whole = view.is_whole<T>(mantissas);
      if (whole) take_whole(view, mantissas, tile);
      else out.failed |= take_any(view, mantissas, tile);
      cuda::sync_warp();
      if (last) {
        const unsigned char* const tail = begin + job.mantissas;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const unsigned j = lane + kWarp * unsigned(k);
          if (j < carried) x[k] |= unsigned(tail[2 * j]) | unsigned(tail[2 * j + 1]) << 8;
        }
      }
      if (complete && strip.lanes == kWarp * unsigned(K)) encode_strip<K, true>(view, x, out, tile);
      else encode_strip<K, false>(view, x, out, tile);
      cuda::sync_warp();
    }
    unsigned tops = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned j = lane + kWarp * unsigned(k);
      if (j < job.lanes) reinterpret_cast<uint32_t*>(room)[j] = x[k];
      tops += cuda::ones(cuda::ballot(j < job.lanes && x[k] >= kTopState));
    }
    const bool failed = cuda::any(out.failed);
    if (lane == 0)
      encoded[job.row] = {unsigned(words_end - out.words), unsigned(escapes_end - out.escapes),
                          failed, tops};
  }

  KVZIP_DEVICE static void run(const EncodeJob* jobs, uint32_t count, const DevicePart* parts,
                               EncodedStream* encoded) {
    if (cuda::block() >= count) return;
    const EncodeJob job = jobs[cuda::block()];
    const DevicePart part = parts[job.part];
    unsigned char* const tile = cuda::shared_memory();
    if (job.lanes <= 32) encode<1>(job, part, encoded, tile);
    else if (job.lanes <= 64) encode<2>(job, part, encoded, tile);
    else encode<4>(job, part, encoded, tile);
  }
};

#define KVZIP_CHANNEL_ENCODE(name, E, M, T)                                             \
  KVZIP_KERNEL(kWarpsOfBlock * 32, 12)                                                  \
  channel_encode_##name(const EncodeJob* jobs, uint32_t count, const DevicePart* parts, \
                        EncodedStream* encoded) {                                       \
    Encoding<E, M, T>::run(jobs, count, parts, encoded);                                \
  }
KVZIP_EACH_FORMAT(KVZIP_CHANNEL_ENCODE)
#undef KVZIP_CHANNEL_ENCODE

// From the rooms to where the streams stand in their block, where zeros are.
constexpr unsigned kPlaceThreads = 128;
static_assert(kPlaceThreads == kGroupTokens, "a thread has a state");
KVZIP_KERNEL(kPlaceThreads, 8)
channel_place_streams(const PlaceJob* jobs, uint32_t count) {
  if (cuda::block() >= count) return;
  const PlaceJob job = jobs[cuda::block()];
  const unsigned thread = cuda::thread(), threads = cuda::threads_of_block();
  const unsigned mantissas = (job.mantissas + 15) & ~15u;
  const unsigned char* const states = reinterpret_cast<const unsigned char*>(job.room);
  const unsigned char* const room = states + ((4 * job.lanes + 15) & ~15u);
  unsigned char* const stream = reinterpret_cast<unsigned char*>(job.stream);
  unsigned char* const out = stream + ((stored_states(job.lanes) + 15) & ~15u);
  for (unsigned at = 16 * thread; at < mantissas; at += 16 * threads) {
    // Bytes beyond the section's end are zeros.
    cuda::Four four = *reinterpret_cast<const cuda::Four*>(room + at);
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned from = at + 4 * i;
      if (from >= job.mantissas) four.v[i] = 0;
      else if (job.mantissas - from < 4) four.v[i] &= (1u << 8 * (job.mantissas - from)) - 1;
    }
    cuda::stream(reinterpret_cast<cuda::Four*>(out + at), four);
  }
  const uint16_t* const end =
      reinterpret_cast<const uint16_t*>(room + ((job.mantissas + 2 * kGroupTokens + 15) & ~15u)) +
      job.numbers;
  const uint16_t* const words = end - job.words;
  const uint16_t* const escapes = end + job.numbers / 4 - job.escapes;
  unsigned char* const to = out + mantissas;
  const unsigned all = job.words + job.escapes;
  const auto half = [&](unsigned i) -> unsigned {
    return i < job.words ? words[i] : escapes[i - job.words];
  };
  for (unsigned i = 2 * thread; i + 1 < all; i += 2 * threads)
    *reinterpret_cast<uint32_t*>(to + 2 * i) = half(i) | half(i + 1) << 16;
  if (all % 2 && thread == 0)
    *reinterpret_cast<uint16_t*>(to + 2 * all - 2) = uint16_t(half(all - 1));
  // The state of a thread's own lane; its highest byte stands behind those of the lanes before.
  const unsigned lane = thread % kWarp;
  unsigned before = 0, x = 0, votes = 0;
  for (unsigned first = 0; first <= thread - lane; first += kWarp) {
    before += cuda::ones(votes);
    x = first + lane < job.lanes ? reinterpret_cast<const uint32_t*>(states)[first + lane] : 0;
    votes = cuda::ballot(x >= kTopState);
  }
  if (thread >= job.lanes) return;
  for (unsigned i = 0; i < 3; ++i) stream[3 * thread + i] = (unsigned char)(x >> 8 * i);
  if (lane % 8 == 0) stream[3 * job.lanes + thread / 8] = (unsigned char)(votes >> lane);
  if (x >= kTopState)
    to[2 * all + before + cuda::ones(votes & ((1u << lane) - 1))] = (unsigned char)(x >> 24);
}

}  // namespace kvzip::channel
