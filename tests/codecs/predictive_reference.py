"""The predictive codec's bytes once more, from codecs/predictive/spec.md alone, on the arithmetic
of `kvzip.entropy.integer_model`.

Slow and plain. What it gives must be what the native code gives, byte for byte.
"""

from __future__ import annotations

import itertools

import numpy as np

from kvzip.entropy.integer_model import CDF, ESCAPE, HALF, IntegerModel, Known, Rotation

TILE = 32


class Chain(IntegerModel):
    """A token range of rows x count tokens from `start` on, its parts in their order."""

    def __init__(self, tensors, description, rows, count, start, form, token_ids=None):
        super().__init__(tensors, description, rows, count, start, form, token_ids, TILE)
        self.states = None
        self.cuts = []  # tiles of the parts that were modelled, and how they were turned

    def rotated(self, angles, rounding):
        """What turned keys, by cosines and sines and how they were rounded; 0: nothing known."""
        return Rotation(angles, rounding, self.total) if rounding else None

    def model(self, layer, part, block, angles=None, rounding=0):
        """What the coder is told: of each stream its steps (token, start, size) in their order. And
        the ideal code length."""
        if part == 0:
            self.begin(layer)
        self.cuts.append((self.tiles, rounding))
        numbers = Known(self.grid, self.flat(block))
        spare = 24 - self.grid.count.bit_length() + 1
        streams = [[] for _ in range(len(self.tiles) * self.lanes)]

        def code(tile, lane, channel, density):
            t = self.tiles[tile]
            k = numbers.places(t, channel, density)
            start, size = density.below(k), density.below(k + 1) - density.below(k)
            size = np.where(density.escaped, 0, size)
            stream = streams[tile * self.lanes + lane]
            for token, s, n in zip(t, start, size, strict=True):
                stream.append((token, int(s), int(n)) if n > 0 else (token, 2 * HALF, ESCAPE))
            for token, n, number in zip(t, size, k, strict=True):
                if n <= 0:
                    stream.append((token, int(number) << spare, 1 << spare))
            return k

        self.run(layer, part, code, self.rotated(angles, rounding))
        bits = sum(24 - np.log2(size) for stream in streams for _, _, size in stream)
        return streams, float(bits)

    def encode(self, modelled):
        """The bytes of parts that were modelled one after the other."""
        states = [[1 << 31] * self.lanes for _ in range(self.total)]
        found, counted = [], []
        for streams in reversed(modelled):
            words = []
            for number, stream in enumerate(streams):
                own, lane = [], number % self.lanes
                for token, start, size in reversed(stream):
                    x = states[token][lane]
                    if x >= size << 39:
                        own.append(x & 0xFFFFFFFF)
                        x >>= 32
                    states[token][lane] = (x // size << 24) + x % size + start
                words.append(own[::-1])
            counted.append([len(w) for w in words])
            found.append(np.array([w for own in words for w in own], "<u4").tobytes())
        parts = []
        for cut, counts, words in zip(self.cuts, counted[::-1], found[::-1], strict=True):
            header, section = self.packed(counts, *cut)
            first = b"" if parts else self.stored(states)
            parts.append(header + first + section + words)
        return parts

    def shares(self, words, tiles):
        """What each stream has of all words, by its tokens."""
        all_tokens = self.total * self.lanes
        return [words * len(t) // all_tokens for t in tiles for _ in range(self.lanes)]

    def packed(self, counts, tiles, rounding):
        """The header, and what of the counts it does not hold."""
        more = [n - s for n, s in zip(counts, self.shares(sum(counts), tiles), strict=True)]
        least = min(more, default=0)
        bits = (max(more, default=0) - least).bit_length()
        number = sum((m - least) << bits * i for i, m in enumerate(more))
        data = number.to_bytes(max(8, -(-bits * len(more) // 8)), "little")
        kind = 4 if rounding else 3
        header = bytes([kind, bits, rounding, 0]) + least.to_bytes(4, "little", signed=True)
        return header + data[:8], padded(data[8:])

    def unpacked(self, header, data):
        """The counts, and the words behind them."""
        kind, bits, rounding, zero = header[:4]
        assert zero == 0 and (1 <= rounding <= 6 if kind == 4 else (kind, rounding) == (3, 0))
        least = int.from_bytes(header[4:8], "little", signed=True)
        streams = len(self.tiles) * self.lanes
        size = max(0, -(-bits * streams // 8) - 8)
        size += -size % 16
        words = np.frombuffer(data[size:], "<u4").tolist()
        number = int.from_bytes(header[8:] + data[:size], "little")
        fields = [number >> bits * i & (1 << bits) - 1 for i in range(streams)]
        assert number >> bits * streams == 0
        shares = self.shares(len(words), self.tiles)
        return [s + least + field for s, field in zip(shares, fields, strict=True)], words

    def stored(self, states):
        """States as they are stored."""
        whole = [x.to_bytes(8, "little") for row in states for x in row]
        tops = [x[5:].rstrip(b"\0") for x in whole]
        lengths = sum(len(top) << 2 * i for i, top in enumerate(tops))
        low = b"".join(x[:5] for x in whole)
        return padded(low + lengths.to_bytes(-(-len(tops) // 4), "little") + b"".join(tops))

    def taken(self, data):
        """The states that a range begins with, and what is behind them."""
        count = self.total * self.lanes
        at = 5 * count + -(-count // 4)
        lengths = int.from_bytes(data[5 * count : at], "little")
        states = []
        for i in range(count):
            n = lengths >> 2 * i & 3
            states.append(int.from_bytes(data[5 * i : 5 * i + 5] + data[at : at + n], "little"))
            at += n
        rows = [states[i : i + self.lanes] for i in range(0, count, self.lanes)]
        return rows, data[at + -at % 16 :]

    def decode(self, layer, part, data, angles=None):
        """The part's numbers, [rows, heads, tokens, dim] of bits."""
        if part == 0:
            self.begin(layer)
        heads, dim = self.layers[layer]["k" if part == 0 else "v"]
        header, data = data[:16], data[16:]
        if self.states is None:
            self.states, data = self.taken(data)
        counts, words = self.unpacked(header, data)
        ends = np.cumsum([0, *counts]).tolist()
        assert ends[-1] == len(words)
        streams = [iter(words[a:b]) for a, b in itertools.pairwise(ends)]
        places = np.zeros((self.total, heads * dim), np.int64)
        spare = 24 - self.grid.count.bit_length() + 1

        def code(tile, lane, channel, density):
            t, stream = self.tiles[tile], streams[tile * self.lanes + lane]
            target = np.array([self.states[token][lane] % CDF for token in t])
            escaped = target >= 2 * HALF
            k = density.number(np.where(escaped, 0, target))
            low, high = density.below(k), density.below(k + 1)
            low, high = np.where(escaped, 2 * HALF, low), np.where(escaped, CDF, high)
            for i, token in enumerate(t):
                self._take(token, lane, int(low[i]), int(high[i]), stream)
            for i, token in enumerate(t):
                if escaped[i]:
                    k[i] = self.states[token][lane] % CDF >> spare
                    begin = int(k[i]) << spare
                    self._take(token, lane, begin, begin + (1 << spare), stream)
            density.escaped = escaped
            places[t, channel] = k
            pair = density.unturned
            if pair is not None and pair.second:
                before = self.grid.bits(places[t, pair.other]), self.grid.bits(k)
                turned = pair.turn.turned(tuple(x.astype(np.uint16) for x in before))
                for c, z in zip((pair.other, channel), turned, strict=True):
                    now = self.grid.places(z)
                    places[t, c] = np.where(pair.before, now, places[t, c])
            return k

        self.run(layer, part, code, self.rotated(angles, header[2]))
        assert all(next(stream, None) is None for stream in streams)
        bits = self.grid.bits(places).reshape(self.rows, self.count, heads, dim)
        return bits.transpose(0, 2, 1, 3)

    def _take(self, token, lane, low, high, stream):
        x = self.states[token][lane]
        x = (high - low) * (x >> 24) + x % CDF - low
        self.states[token][lane] = x << 32 | next(stream) if x < 1 << 31 else x

    def at_the_end(self):
        """Whether states are where a writer's begin."""
        return all(x == 1 << 31 for row in self.states for x in row)


def padded(data):
    return data + bytes(-len(data) % 16)
