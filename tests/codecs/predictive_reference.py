"""The predictive codec's bytes once more, from codecs/predictive/spec.md alone, on the arithmetic
of `kvzip.entropy.integer_model`.

Slow and plain. What it gives must be what the native code gives, byte for byte.
"""

from __future__ import annotations

import itertools

import numpy as np

from kvzip.entropy.integer_model import CDF, ESCAPE, HALF, IntegerModel

TILE = 32


class Chain(IntegerModel):
    """A token range of rows x count tokens from `start` on, its parts in their order."""

    def __init__(self, tensors, description, rows, count, start, form, token_ids=None):
        super().__init__(tensors, description, rows, count, start, form, token_ids, TILE)
        self.states = None

    def model(self, layer, part, block):
        """What the coder is told: of each stream its steps (token, start, size) in their order. And
        the ideal code length."""
        if part == 0:
            self.begin(layer)
        places = self.grid.places(self.flat(block))
        spare = 24 - self.grid.count.bit_length() + 1
        streams = [[] for _ in range(len(self.tiles) * self.lanes)]

        def code(tile, lane, channel, density):
            t = self.tiles[tile]
            k = places[t, channel]
            start, size = density.below(k), density.below(k + 1) - density.below(k)
            stream = streams[tile * self.lanes + lane]
            for token, s, n in zip(t, start, size, strict=True):
                stream.append((token, int(s), int(n)) if n > 0 else (token, 2 * HALF, ESCAPE))
            for token, n, number in zip(t, size, k, strict=True):
                if n <= 0:
                    stream.append((token, int(number) << spare, 1 << spare))
            return k

        self.run(layer, part, code)
        bits = sum(24 - np.log2(size) for stream in streams for _, _, size in stream)
        return streams, float(bits)

    def encode(self, modelled):
        """The bytes of parts that were modelled one after the other."""
        states = [[1 << 31] * self.lanes for _ in range(self.total)]
        found = []
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
            counts = padded(np.array([len(w) for w in words], "<u2").tobytes())
            found.append(counts + np.array([w for own in words for w in own], "<u4").tobytes())
        found.append(padded(np.array(states, "<u8").tobytes()) + found.pop())
        return found[::-1]

    def decode(self, layer, part, data):
        """The part's numbers, [rows, heads, tokens, dim] of bits."""
        if part == 0:
            self.begin(layer)
        heads, dim = self.layers[layer]["k" if part == 0 else "v"]
        if self.states is None:
            size = 8 * self.total * self.lanes
            numbers = np.frombuffer(data[:size], "<u8").reshape(self.total, self.lanes)
            self.states = [[int(x) for x in row] for row in numbers]
            data = data[size + -size % 16 :]
        count = len(self.tiles) * self.lanes
        counts = np.frombuffer(data, "<u2", count).astype(np.int64)
        words = np.frombuffer(data[2 * count + -2 * count % 16 :], "<u4").tolist()
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
            places[t, channel] = k
            return k

        self.run(layer, part, code)
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
