"""The predictive codec's arithmetic once more, from codecs/predictive/spec.md alone, in NumPy.

Slow and plain: int64 that is wrapped to 32 bits where the page says so. What it gives must be what
the native code gives, byte for byte.
"""

from __future__ import annotations

import itertools

import numpy as np

LIMIT = 1 << 28
CDF = 1 << 24
TILE = 32
ESCAPE = 1 << 10
HALF = (CDF - ESCAPE) // 2


def wrapped(values):
    """The lower 32 bits, signed."""
    return np.asarray(values).astype(np.int64).astype(np.int32).astype(np.int64)


def scaled(product, shift):
    return wrapped((product + (1 << (shift - 1))) >> shift)


def clamp(values, limit):
    return np.clip(values, -limit, limit)


def unpacked(blocks):
    """[b, g, 4, 4] to [outputs, inputs]."""
    b, g = blocks.shape[:2]
    return blocks.transpose(0, 2, 1, 3).reshape(4 * b, 4 * g).astype(np.int64)


class Grid:
    """The numbers of a format in their order, 0 is the lowest."""

    def __init__(self, exponent_bits, mantissa_bits):
        self.exponent_bits, self.mantissa_bits = exponent_bits, mantissa_bits
        self.count = 1 << (1 + exponent_bits + mantissa_bits)

    def places(self, bits):
        bits, half = bits.astype(np.int64), self.count // 2
        return np.where(bits >= half, self.count - 1 - bits, half + bits)

    def bits(self, places):
        half = self.count // 2
        return np.where(places >= half, places - half, self.count - 1 - places)

    def magnitudes(self, doubled, unit):
        """Fixed-point values of magnitudes, given twice the place from 0 up: an odd one is the
        middle between two numbers."""
        exponent = doubled >> (self.mantissa_bits + 1)
        fraction = doubled & ((2 << self.mantissa_bits) - 1)
        fraction = np.where(exponent > 0, fraction + (2 << self.mantissa_bits), fraction)
        bias = (1 << (self.exponent_bits - 1)) - 1
        power = np.maximum(exponent, 1) - bias - self.mantissa_bits - unit - 1
        exact = np.ldexp(fraction.astype(np.float64), power)
        return np.minimum(np.floor(exact), LIMIT).astype(np.int64)

    def values(self, places, unit):
        """Fixed-point values."""
        half = self.count // 2
        magnitude = np.where(places >= half, places - half, half - 1 - places)
        found = self.magnitudes(2 * magnitude, unit)
        return np.where(places >= half, found, -found)

    def boundaries(self, places, unit):
        """Fixed-point values of the boundaries below numbers; there is one past the last."""
        half = self.count // 2
        inner = np.where(places >= half, places - half, half - places) - 1
        found = self.magnitudes(2 * np.maximum(inner, 0) + 1, unit) + 1
        found = np.where(inner < 0, 0, found)
        return np.where(places >= half, found, -found)


class Density:
    """The distribution of one channel's number for many tokens."""

    def __init__(self, grid, unit, shares, centre, m):
        self.grid, self.unit, self.centre, self.m = grid, unit, centre, m
        self.edges = shares.astype(np.int64) * HALF >> 23

    def z(self, d):
        return np.minimum(np.minimum(np.abs(d), 1 << 27) * self.m >> 13, (1 << 23) - (1 << 15) - 1)

    def boundary(self, k):
        """Twice the boundary under number k, less twice the centre."""
        return wrapped(2 * (self.grid.boundaries(k, self.unit) - self.centre))

    def below(self, k):
        d = self.boundary(k)
        at = self.z(d) + (1 << 15)
        octave = np.zeros_like(at)
        for i in range(1, 8):
            octave += at >= 1 << (15 + i)
        cell = 8 * octave + ((at >> (12 + octave)) - 8)
        fine = ((at << 12) >> (12 + octave)) & 0xFFF
        g = self.edges[cell] + ((self.edges[cell + 1] - self.edges[cell]) * fine >> 12)
        found = HALF + np.where(d < 0, -g, g)
        return np.where(k <= 0, 0, np.where(k >= self.grid.count, 2 * HALF, found))

    def deviation(self, k):
        return (self.z(self.boundary(k)) + self.z(self.boundary(k + 1))) >> 1

    def number(self, target):
        """The number in whose interval the target lies."""
        low, end = np.zeros_like(target), np.full_like(target, self.grid.count)
        while (end - low > 1).any():
            middle = (low + end) >> 1
            lies_under = self.below(middle) <= target
            low, end = np.where(lies_under, middle, low), np.where(lies_under, end, middle)
        return low


class Chain:
    """A token range of rows x count tokens from `start` on, its parts in their order."""

    def __init__(self, tensors, description, rows, count, start, form, token_ids=None):
        self.tensors, self.layers = tensors, description["layers"]
        self.group, self.lanes = description["group"], description["lanes"]
        self.rows, self.count, self.total = rows, count, rows * count
        mantissa = 7 if form.bits == 32 else form.mantissa_bits
        self.grid = Grid(form.exponent_bits, mantissa)
        self.position = np.tile(np.arange(count, dtype=np.uint64) + np.uint64(start), rows)
        place = {int(t): i for i, t in enumerate(tensors.get("token_ids", ()))}
        ids = [] if token_ids is None else np.asarray(token_ids).reshape(-1)
        self.entry = np.array([place.get(int(t), -1) for t in ids], np.int64)
        if len(self.entry) != self.total:
            self.entry = np.full(self.total, -1)
        self.energy = np.full(self.total, 1 << 12, np.int64)
        self.inputs = {}
        self.states = None

    def get(self, layer, name):
        return self.tensors.get(f"{layer}.{name}")

    def _begin(self, layer):
        """Regions of the tokens, what is expected from other layers."""
        t = self.total
        n = self.get(layer, "bias").shape[1]
        inputs = [self.inputs[a] for a in self.layers[layer]["inputs"]]
        x = np.concatenate([np.zeros((t, 0), np.int64), *inputs], axis=1)
        bias, scale = self.get(layer, "bias").astype(np.int64), self.get(layer, "weight_scale")
        self.regions = len(bias)
        self.region = np.zeros(t, np.int64)
        if self.regions > 1:
            centre = unpacked(self.get(layer, "centre"))[: self.regions]
            self.region = wrapped(x @ centre.T + self.get(layer, "centre_bias")).argmax(axis=1)
        self.base = np.zeros((t, n), np.int64)
        for r in range(self.regions):
            mine = self.region == r
            weight = unpacked(self.get(layer, "weight")[r])[:n]
            product = wrapped(x[mine] @ weight.T) * scale[r].astype(np.int64)
            self.base[mine] = clamp(wrapped(bias[r] + scaled(product, 20)), LIMIT)
        table, self.known = self.get(layer, "table"), np.zeros(t, np.int64)
        self.settled = np.zeros(t, bool)
        if table is not None:
            self.known = ((self.entry >= 0) & (self.entry < len(table))).astype(np.int64)
            rows = table[np.where(self.known, self.entry, 0)].astype(np.int64)
            shift = 5 if table.dtype == np.int16 else 12
            self.settled = (self.known > 0) & (table.dtype == np.int16)
            self.base = wrapped(self.base + np.where(self.known[:, None], rows << shift, 0))
        self.kind = self.region + self.regions * self.known
        self.residual = np.zeros((t, n), np.int64)
        self.output = np.zeros((t, n + -n % 4), np.int64)
        self.within = np.array([unpacked(w) for w in self.get(layer, "within")])
        self.tokens = np.argsort(self.region, kind="stable")
        self.tiles = [
            some[i : i + TILE]
            for r in range(self.regions)
            for some in [self.tokens[self.region[self.tokens] == r]]
            for i in range(0, len(some), TILE)
        ]

    def _run(self, layer, part, code):
        """Steps through the part's channels for each tile. `code(tile, lane, channel, density)` is
        asked for the places of its tokens' numbers in each channel."""
        for tile, t in enumerate(self.tiles):
            self._step(layer, part, tile, t, code)
        if part == 1:
            self.inputs[layer] = self.output

    def _step(self, layer, part, tile, t, code):
        heads, dim = self.layers[layer]["k" if part == 0 else "v"]
        before = 0 if part == 0 else int(np.prod(self.layers[layer]["k"]))
        step = self.get(layer, "step")
        pairs = len(step) if part == 0 else 0
        channels, turned = heads * dim, 2 * heads * pairs
        order = self.get(layer, "order")[before : before + channels]
        sine = self.tensors["sine"].astype(np.int64)
        region, kind, energy = self.region[t], self.kind[t], self.energy[t]

        def expected(c):
            dots = self.within[region, c, : residual.shape[1]]
            scale = self.get(layer, "within_scale")[region, c].astype(np.int64)
            dot = wrapped((dots * residual).sum(axis=1))
            return clamp(wrapped(self.base[t, c] + scaled(dot * scale, 20)), LIMIT)

        def learn(c, v):
            r = wrapped(v - self.base[t, c])
            self.residual[t, c] = clamp(scaled(r, 12), 127)
            off = wrapped(v - int(self.get(layer, "mean")[c]))
            by = int(self.get(layer, "input_scale")[c])
            self.output[t, c] = clamp(scaled(off * by, 28), 127)

        def coded(c, place, centre, inv):
            m = inv.astype(np.int64) * ((1 << 24) // energy) >> 12
            unit = int(self.get(layer, "unit")[c])
            shares = self.tensors["densities"][self.get(layer, "density")[c]]
            density = Density(self.grid, unit, shares, centre, m)
            lane = place % self.group // 2 % self.lanes
            k = code(tile, lane, order[place], density)
            return self.grid.values(k, unit), np.minimum(density.deviation(k) >> 8, 2048)

        for begin in range(0, channels, self.group):
            end = min(begin + self.group, channels)
            # What a group knows is what was known before it.
            residual, deviations = self.residual[t].copy(), np.zeros(len(t), np.int64)
            place = begin
            while place < end:
                c = before + place
                if place < turned:
                    _head, p = divmod(int(order[place]), dim)
                    assert p < pairs and order[place + 1] == order[place] + pairs
                    phase = step[p] * self.position[t]
                    turn = ((phase + np.uint64(1 << 51)) >> np.uint64(52)).astype(np.int64) & 4095
                    sin, cos = sine[turn], sine[(turn + 1024) & 4095]
                    cell, pair = turn >> 7, place // 2
                    a, b = expected(c), expected(c + 1)
                    px, py = scaled(a * cos - b * sin, 14), scaled(b * cos + a * sin, 14)
                    inv = self.get(layer, "pair_inverse")
                    x, dev = coded(c, place, px, inv[kind, pair, 0, cell])
                    slope = self.get(layer, "pair_slope")[kind, pair, cell].astype(np.int64)
                    centre = clamp(wrapped(py + scaled(wrapped(x - px) * slope, 12)), LIMIT)
                    y, other = coded(c + 1, place + 1, centre, inv[kind, pair, 1, cell])
                    learn(c, clamp(scaled(x * cos + y * sin, 14), LIMIT))
                    learn(c + 1, clamp(scaled(y * cos - x * sin, 14), LIMIT))
                    deviations += dev + other
                    place += 2
                else:
                    v, dev = coded(c, place, expected(c), self.get(layer, "inverse")[kind, c])
                    learn(c, v)
                    deviations += dev
                    place += 1
            off = deviations - 256 * (end - begin)
            moved = np.clip(energy + ((energy >> 3) * off >> 12), 1 << 8, 1 << 16)
            energy = np.where(self.settled[t], energy, moved)
        self.energy[t] = energy

    def _flat(self, block):
        """[rows, heads, tokens, dim] to [tokens, channels]."""
        return block.transpose(0, 2, 1, 3).reshape(self.total, -1)

    def model(self, layer, part, block):
        """What the coder is told: of each stream its steps (token, start, size) in their order. And
        the ideal code length."""
        if part == 0:
            self._begin(layer)
        places = self.grid.places(self._flat(block))
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

        self._run(layer, part, code)
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
            self._begin(layer)
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

        self._run(layer, part, code)
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
