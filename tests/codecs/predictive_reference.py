"""The predictive codec's arithmetic once more, from codecs/predictive/spec.md alone, in NumPy.

Slow and plain: int64 that is wrapped to 32 bits where the page says so. What it gives must be what
the native code gives, byte for byte.
"""

from __future__ import annotations

import struct

import numpy as np

LIMIT = 1 << 28
CDF = 1 << 24
TILE, LANES = 64, 32


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

    def values(self, places, unit):
        """Fixed-point values."""
        half = self.count // 2
        magnitude = np.where(places >= half, places - half, half - 1 - places)
        exponent = magnitude >> self.mantissa_bits
        fraction = magnitude & ((1 << self.mantissa_bits) - 1)
        fraction = np.where(exponent > 0, fraction + (1 << self.mantissa_bits), fraction)
        bias = (1 << (self.exponent_bits - 1)) - 1
        power = np.maximum(exponent, 1) - bias - self.mantissa_bits - unit
        exact = np.ldexp(fraction.astype(np.float64), power)
        rounded = np.minimum(np.floor(exact + 0.5), LIMIT).astype(np.int64)
        return np.where(places >= half, rounded, -rounded)


class Density:
    """The distribution of one channel's number for many tokens."""

    def __init__(self, grid, unit, shares, centre, m):
        self.grid, self.unit, self.centre, self.m = grid, unit, centre, m
        self.half = (1 << 23) - grid.count // 2
        self.edges = shares.astype(np.int64) * self.half >> 23

    def z(self, d):
        return np.minimum(np.minimum(np.abs(d), 1 << 27) * self.m >> 15, (1 << 21) - (1 << 13) - 1)

    def boundary(self, k):
        """Twice the boundary under number k, less twice the centre; there is one past the last."""
        last = self.grid.count - 1
        under = self.grid.values(np.clip(k - 1, 0, last), self.unit)
        over = self.grid.values(np.clip(k, 0, last), self.unit)
        return wrapped(under + over - 2 * self.centre)

    def below(self, k):
        d = self.boundary(k)
        at = self.z(d) + (1 << 13)
        octave = np.zeros_like(at)
        for i in range(1, 8):
            octave += at >= 1 << (13 + i)
        cell = 8 * octave + ((at >> (10 + octave)) - 8)
        fine = ((at << 12) >> (10 + octave)) & 0xFFF
        g = self.edges[cell] + ((self.edges[cell + 1] - self.edges[cell]) * fine >> 12)
        found = self.half + np.where(d < 0, -g, g) + k
        return np.where(k <= 0, 0, np.where(k >= self.grid.count, CDF, found))

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
            shift = 3 if table.dtype == np.int16 else 10
            self.settled = (self.known > 0) & (table.dtype == np.int16)
            self.base = wrapped(self.base + np.where(self.known[:, None], rows << shift, 0))
        self.kind = self.region + self.regions * self.known
        self.residual = np.zeros((t, n), np.int64)
        self.output = np.zeros((t, n + -n % 4), np.int64)
        self.within = np.array([unpacked(w) for w in self.get(layer, "within")])
        self.order = np.argsort(self.region, kind="stable")
        self.tiles = [
            some[i : i + TILE]
            for r in range(self.regions)
            for some in [self.order[self.region[self.order] == r]]
            for i in range(0, len(some), TILE)
        ]

    def _run(self, layer, part, groups, code):
        """Steps through the part's channels for each group of tokens. `code(tokens, channel,
        density)` is asked for the places of their numbers in each channel."""
        for t in groups:
            if len(t):
                self._step(layer, part, t, code)
        if part == 1:
            self.inputs[layer] = self.output

    def _step(self, layer, part, t, code):
        heads, dim = self.layers[layer]["k" if part == 0 else "v"]
        before = 0 if part == 0 else int(np.prod(self.layers[layer]["k"]))
        step = self.get(layer, "step")
        pairs = len(step) if part == 0 else 0
        order = self.get(layer, "order")[before : before + heads * dim]
        sine = self.tensors["sine"].astype(np.int64)
        region, kind, energy = self.region[t], self.kind[t], self.energy[t]
        deviations, counted = np.zeros(len(t), np.int64), 0

        def expected(c):
            r = self.residual[t]
            dots = self.within[region, c, : r.shape[1]]
            scale = self.get(layer, "within_scale")[region, c].astype(np.int64)
            dot = wrapped((dots * r).sum(axis=1))
            return clamp(wrapped(self.base[t, c] + scaled(dot * scale, 20)), LIMIT)

        def learn(c, v):
            r = wrapped(v - self.base[t, c])
            self.residual[t, c] = clamp(scaled(r, 10), 127)
            off = wrapped(v - int(self.get(layer, "mean")[c]))
            by = int(self.get(layer, "input_scale")[c])
            self.output[t, c] = clamp(scaled(off * by, 28), 127)

        def coded(c, place, centre, inv):
            m = inv.astype(np.int64) * ((1 << 24) // energy) >> 12
            unit = int(self.get(layer, "unit")[c])
            shares = self.tensors["densities"][self.get(layer, "density")[c]]
            density = Density(self.grid, unit, shares, centre, m)
            k = code(t, order[place], density)
            return self.grid.values(k, unit), np.minimum(density.deviation(k) >> 6, 2048)

        place = 0
        while place < heads * dim:
            c = before + place
            if place % dim < 2 * pairs:
                p = place % dim // 2
                pair = place // dim * pairs + p
                phase = step[p] * self.position[t]
                turn = ((phase + np.uint64(1 << 51)) >> np.uint64(52)).astype(np.int64) & 4095
                sin, cos = sine[turn], sine[(turn + 1024) & 4095]
                cell = turn >> 7
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
                place, counted = place + 2, counted + 2
            else:
                v, dev = coded(c, place, expected(c), self.get(layer, "inverse")[kind, c])
                learn(c, v)
                deviations += dev
                place, counted = place + 1, counted + 1
            if counted >= 16:
                m = deviations // counted
                moved = np.clip(energy + (energy * (m - 256) >> 11), 1 << 8, 1 << 16)
                energy = np.where(self.settled[t], energy, moved)
                deviations, counted = np.zeros(len(t), np.int64), 0
        self.energy[t] = energy

    def _flat(self, block):
        """[rows, heads, tokens, dim] to [tokens, channels]."""
        return block.transpose(0, 2, 1, 3).reshape(self.total, -1)

    def intervals(self, layer, part, block):
        """Start and size of each number's interval, [tokens, channels] as they lie."""
        if part == 0:
            self._begin(layer)
        places = self.grid.places(self._flat(block))
        start, size = np.zeros_like(places), np.zeros_like(places)

        def code(t, channel, density):
            k = places[t, channel]
            start[t, channel] = density.below(k)
            size[t, channel] = density.below(k + 1) - start[t, channel]
            return k

        self._run(layer, part, [self.order], code)
        return start, size

    def encode(self, layer, part, block):
        """The part's bytes and its ideal code length in bits."""
        start, size = self.intervals(layer, part, block)
        at = 0 if part == 0 else int(np.prod(self.layers[layer]["k"]))
        order = self.get(layer, "order")[at : at + start.shape[1]]
        steps = [
            (i % LANES, int(start[t, c]), int(size[t, c]))
            for tile in self.tiles
            for c in order
            for i, t in enumerate(tile)
        ]
        states, words = [1 << 31] * LANES, []
        for lane, begin, width in reversed(steps):
            x = states[lane]
            if x >= width << 39:
                words.append(x & 0xFFFFFFFF)
                x >>= 32
            states[lane] = (x // width << 24) + x % width + begin
        coded = struct.pack(f"<{LANES}Q", *states) + np.array(words[::-1], "<u4").tobytes()
        return coded, float((24 - np.log2(size)).sum())

    def decode(self, layer, part, data):
        """The part's numbers, [rows, heads, tokens, dim] of bits."""
        if part == 0:
            self._begin(layer)
        heads, dim = self.layers[layer]["k" if part == 0 else "v"]
        states = list(struct.unpack_from(f"<{LANES}Q", data))
        words = iter(np.frombuffer(data, "<u4", offset=8 * LANES).tolist())
        places = np.zeros((self.total, heads * dim), np.int64)

        def code(t, channel, density):
            # Tokens 32 apart share a state: the second one's target is known after the first.
            k = np.zeros(len(t), np.int64)
            for begin in range(0, len(t), LANES):
                some = slice(begin, min(begin + LANES, len(t)))
                target = np.zeros(len(t), np.int64)
                target[some] = [x % CDF for x in states[: some.stop - begin]]
                found = density.number(target)
                low, high = density.below(found), density.below(found + 1)
                k[some] = found[some]
                for lane, i in enumerate(range(some.start, some.stop)):
                    x = states[lane]
                    x = int(high[i] - low[i]) * (x >> 24) + int(target[i] - low[i])
                    states[lane] = x << 32 | next(words) if x < 1 << 31 else x
            places[t, channel] = k
            return k

        self._run(layer, part, self.tiles, code)
        assert all(x == 1 << 31 for x in states) and next(words, None) is None
        bits = self.grid.bits(places).reshape(self.rows, self.count, heads, dim)
        return bits.transpose(0, 2, 1, 3)
