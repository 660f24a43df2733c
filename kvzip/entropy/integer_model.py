"""The arithmetic of `predictive` once more, from codecs/predictive/spec.md alone, in NumPy.

Slow and plain: int64 that is wrapped to 32 bits where the page says so. What it says of each number
is what the native code says, to the last bit; so another coder can be given the same model
(`kvzip entropy --check`), and the tests read and write files with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvzip.dtypes import Bits, DType

Ints: TypeAlias = NDArray[np.int64]

Floats: TypeAlias = NDArray[np.float32]
Pair: TypeAlias = tuple[Bits, Bits]
"""A pair of numbers of bf16, by their bits."""

LIMIT = 1 << 28
CDF = 1 << 24
"""What all intervals of a number's density add up to, that of the escape among them."""
ESCAPE = 1 << 10
"""Size of the escape's interval, the last one."""
HALF = (CDF - ESCAPE) // 2


def wrapped(values: ArrayLike) -> Ints:
    """The lower 32 bits, signed."""
    return np.asarray(values).astype(np.int64).astype(np.int32).astype(np.int64)


def scaled(product: Ints, shift: int) -> Ints:
    """`product / 2^shift`, rounded."""
    return wrapped((product + (1 << (shift - 1))) >> shift)


def clamp(values: Ints, limit: int) -> Ints:
    """The values within -limit ... limit."""
    return np.clip(values, -limit, limit)


def unpacked(blocks: NDArray[Any]) -> Ints:
    """A profile's matrix, [b, g, 4, 4], as [outputs, inputs]."""
    b, g = blocks.shape[:2]
    return blocks.transpose(0, 2, 1, 3).reshape(4 * b, 4 * g).astype(np.int64)


def product(x: NDArray[Any], weight: Ints) -> Ints:
    """``x @ weight.T`` of small integers. Exact: no sum of theirs needs more than 53 bits."""
    found: NDArray[Any] = x.astype(np.float64, copy=False) @ weight.T.astype(np.float64)
    return found.astype(np.int64)


class Grid:
    """The numbers of a format in their order, 0 is the lowest."""

    def __init__(self, exponent_bits: int, mantissa_bits: int):
        self.exponent_bits, self.mantissa_bits = exponent_bits, mantissa_bits
        self.bits_each = 1 + exponent_bits + mantissa_bits
        self.count = 1 << self.bits_each

    def places(self, bits: Bits) -> Ints:
        """Where numbers stand, by their bits."""
        found, half = bits.astype(np.int64), self.count // 2
        return np.where(found >= half, self.count - 1 - found, half + found)

    def bits(self, places: Ints) -> Ints:
        """The bits of the numbers at these places."""
        half = self.count // 2
        return np.where(places >= half, places - half, self.count - 1 - places)

    def magnitudes(self, doubled: Ints, unit: int) -> Ints:
        """Fixed-point values of magnitudes, given twice the place from 0 up: an odd one is the
        middle between two numbers."""
        exponent = doubled >> (self.mantissa_bits + 1)
        fraction = doubled & ((2 << self.mantissa_bits) - 1)
        fraction = np.where(exponent > 0, fraction + (2 << self.mantissa_bits), fraction)
        bias = (1 << (self.exponent_bits - 1)) - 1
        power = np.maximum(exponent, 1) - bias - self.mantissa_bits - unit - 1
        exact = np.ldexp(fraction.astype(np.float64), power)
        found: Ints = np.minimum(np.floor(exact), LIMIT).astype(np.int64)
        return found

    def values(self, places: Ints, unit: int) -> Ints:
        """Fixed-point values."""
        half = self.count // 2
        magnitude = np.where(places >= half, places - half, half - 1 - places)
        found = self.magnitudes(2 * magnitude, unit)
        return np.where(places >= half, found, -found)

    def boundaries(self, places: Ints, unit: int) -> Ints:
        """Fixed-point values of the boundaries below numbers; there is one past the last."""
        half = self.count // 2
        inner = np.where(places >= half, places - half, half - places) - 1
        found = self.magnitudes(2 * np.maximum(inner, 0) + 1, unit) + 1
        found = np.where(inner < 0, 0, found)
        return np.where(places >= half, found, -found)


class Density:
    """The distribution of one channel's number for many tokens: of each, `centre` is where it is
    expected, and `m` how narrowly."""

    def __init__(self, grid: Grid, unit: int, shares: NDArray[Any], centre: Ints, m: Ints):
        self.grid, self.unit, self.centre, self.m = grid, unit, centre, m
        self.edges = shares.astype(np.int64) * HALF >> 23
        self.unturned: Unturned | None = None
        self.escaped = np.zeros(len(centre), bool)
        """Which numbers are escapes."""

    def z(self, d: Ints) -> Ints:
        """|z| at twice the distance from the centre."""
        most = (1 << 23) - (1 << 15) - 1
        return np.asarray(np.minimum(np.minimum(np.abs(d), 1 << 27) * self.m >> 13, most))

    def boundary(self, k: Ints) -> Ints:
        """Twice the boundary under number k, less twice the centre."""
        return wrapped(2 * (self.grid.boundaries(k, self.unit) - self.centre))

    def below(self, k: Ints) -> Ints:
        """Where the interval of number k begins, and that of the one before it ends."""
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

    def deviation(self, k: Ints) -> Ints:
        """How far from the centre number k is."""
        return (self.z(self.boundary(k)) + self.z(self.boundary(k + 1))) >> 1

    def number(self, target: Ints) -> Ints:
        """The number in whose interval the target lies."""
        low, end = np.zeros_like(target), np.full_like(target, self.grid.count)
        while (end - low > 1).any():
            middle = (low + end) >> 1
            lies_under = self.below(middle) <= target
            low, end = np.where(lies_under, middle, low), np.where(lies_under, end, middle)
        return low


class Rotation:
    """RoPE as a model turns keys of bf16, and back. Floats are of 32 bits, each step rounded."""

    def __init__(self, angles: Floats, rounding: ArrayLike, tokens: int):
        """`angles`: cosines and sines, [tokens, 2, pairs], of each row of a batch; `rounding`: of
        each of all `tokens` 1 to 6, as the page has them; 0: its pairs are coded as they are after
        RoPE."""
        rows = tokens // len(angles) if len(angles) else 0
        self.cosine, self.sine = (np.tile(angles[:, i], (rows, 1)) for i in (0, 1))
        self.rounding = np.broadcast_to(np.asarray(rounding), tokens)

    def of(self, tokens: Ints, pair: int) -> _Turn:
        """The rotation of one pair of a head."""
        by = self.cosine[tokens, pair], self.sine[tokens, pair]
        return _Turn(*by, np.isin(self.rounding[tokens], (1, 4)))


def angles(radians: Floats, positions: Ints, scale: float = 1.0, wide: bool = False) -> Floats:
    """Cosines and sines, [positions, 2, pairs], of frequencies in radians a position, in float32
    (`wide`) or rounded to bf16."""
    angle = (positions.astype(np.float32)[:, None] * radians).astype(np.float64)
    both = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32) * np.float32(scale)
    found: Floats = np.where(np.abs(both) < np.float32(2.0**-40), np.float32(0), both)
    return found if wide else rounded(found)


def floats(bits: Bits) -> Floats:
    """Numbers of bf16."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def rounded(values: Floats) -> Floats:
    """To the nearest numbers of bf16, of two as near ones to the even one."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def counted(bits: Bits) -> Bits:
    """Numbers before RoPE: those that are not from 2^-60 to 2^61 count as 0."""
    exponent = bits >> 7 & 255
    return np.where((exponent >= 67) & (exponent <= 187), bits, bits & 0x8000)


def _upper(values: Floats) -> Bits:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


class _Turn:
    """How a pair is turned, for many tokens."""

    TRIES, NEAREST = (0, 1, -1, 2, -2, 3, -3), 3

    def __init__(self, cosine: Floats, sine: Floats, each: NDArray[np.bool_]):
        self.cosine, self.sine, self.each = cosine, sine, each

    def product(self, a: Floats, b: Floats) -> Floats:
        return np.where(self.each, rounded(a * b), a * b)

    def turned(self, pair: Pair) -> Pair:
        """What a pair becomes."""
        with np.errstate(all="ignore"):
            a, b = (floats(counted(x)) for x in pair)
            first = rounded(self.product(a, self.cosine) - self.product(b, self.sine))
            second = rounded(self.product(b, self.cosine) + self.product(a, self.sine))
        return _upper(first), _upper(second)

    def unturned(
        self, pair: Pair, centre: tuple[Floats, Floats], weight: tuple[Floats, Floats]
    ) -> tuple[Pair, NDArray[np.bool_]]:
        """A pair that becomes this one, and where there is one. Which it is, if there are several,
        is a writer's affair; this is what ours takes."""
        one = np.float32(1)
        cosine, sine = self.cosine, self.sine
        with np.errstate(all="ignore"):
            y1, y2 = floats(pair[0]), floats(pair[1])
            scale = one / (cosine * cosine + sine * sine)
            about1 = (y1 * cosine + y2 * sine) * scale
            about2 = (y2 * cosine - y1 * sine) * scale
            swapped = np.abs(about2) > np.abs(about1)
            start = rounded(np.where(swapped, about2, about1))
            u1, v1 = np.where(swapped, -sine, cosine), np.where(swapped, cosine, -sine)
            u2, v2 = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
            by1, by2 = one / v1, one / v2
            room1, room2 = _half_step(y1) * np.abs(by1), _half_step(y2) * np.abs(by2)
            found = np.zeros(len(y1), bool)
            best = np.zeros(len(y1), np.uint16), np.zeros(len(y1), np.uint16)
            least = np.zeros(len(y1), np.float32)
            for number, steps in enumerate(self.TRIES):
                wide = _stepped(start, steps)
                q1 = (y1 - self.product(wide, u1)) * by1
                q2 = (y2 - self.product(wide, u2)) * by2
                low1, low2, high1, high2 = q1 - room1, q2 - room2, q1 + room1, q2 + room2
                low, high = np.where(low1 > low2, low1, low2), np.where(high1 < high2, high1, high2)
                middle = rounded((low + high) * np.float32(0.5))
                for more in (0, 1, -1):
                    narrow = _stepped(middle, more)
                    a = _upper(np.where(swapped, narrow, wide))
                    b = _upper(np.where(swapped, wide, narrow))
                    z1, z2 = self.turned((a, b))
                    far = np.abs(floats(a) - centre[0]) * weight[0]
                    far = far + np.abs(floats(b) - centre[1]) * weight[1]
                    better = ~found | (far < least) if number < self.NEAREST else ~found
                    # What is no number comes in other bits from other processors.
                    better = better & (counted(a) == a) & (counted(b) == b)
                    better = better & (z1 == pair[0]) & (z2 == pair[1])
                    best = np.where(better, a, best[0]), np.where(better, b, best[1])
                    least = np.where(better, far, least)
                    found = found | better
        return best, found


def _half_step(values: Floats) -> Floats:
    power: Floats = (values.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    return power * np.float32(2.0**-8)


def _stepped(values: Floats, steps: int) -> Floats:
    return (values.view(np.int32) + np.int32(steps * 65536)).view(np.float32)


@dataclass
class Unturned:
    """What a density says of a number of a pair that may be coded as it was before RoPE."""

    second: bool
    before: NDArray[np.bool_]
    """Where it is, unless the first of the pair is an escape."""
    turn: _Turn
    other: int
    """The pair's other channel."""
    centre: tuple[Floats, Floats]
    """Where the two are expected before RoPE, and how much it counts how far off they are."""
    weight: tuple[Floats, Floats]


Code: TypeAlias = Callable[[int, int, int, Density], Ints]
"""What gives the places of the numbers of a tile in a channel: of the tile's number, a lane, the
channel and its density, of which it sets `escaped`."""


class Known:
    """The numbers of a block, as a writer codes them."""

    def __init__(self, grid: Grid, bits: Bits):
        """`bits`: [tokens, channels]."""
        self.grid, self.bits = grid, bits
        self._second: Bits = np.empty(0, np.uint16)

    def places(self, tokens: Ints, channel: int, density: Density) -> Ints:
        """Of some tokens' numbers in a channel; tells the density which are escapes."""
        bits, pair = self.bits[tokens, channel], density.unturned
        if pair is None or not pair.before.any():
            return self._told(bits, density, np.zeros(len(bits), bool))
        if pair.second:
            return self._told(
                np.where(pair.before, self._second, bits), density, np.zeros(len(bits), bool)
            )
        cached = bits, self.bits[tokens, pair.other]
        (first, self._second), found = pair.turn.unturned(cached, pair.centre, pair.weight)
        self._told(first, density, np.zeros(len(bits), bool))
        escapes = pair.before & (density.escaped | ~found)
        return self._told(np.where(pair.before & ~escapes, first, bits), density, escapes)

    def _told(self, bits: Bits, density: Density, escapes: NDArray[np.bool_]) -> Ints:
        k = self.grid.places(bits)
        density.escaped = escapes | (density.below(k + 1) <= density.below(k))
        return k


class IntegerModel:
    """A token range of rows x count tokens from `start` on, its parts in their order.

    `tile`: tokens that go through the channels together, of one region; 0 for all of a region.
    """

    def __init__(
        self,
        tensors: Mapping[str, NDArray[Any]],
        description: Mapping[str, Any],
        rows: int,
        count: int,
        start: int,
        form: DType,
        token_ids: NDArray[Any] | None = None,
        tile: int = 0,
    ):
        self.tensors, self.layers = tensors, description["layers"]
        self.group, self.lanes = description["group"], description["lanes"]
        self.rows, self.count, self.total, self.tile = rows, count, rows * count, tile
        mantissa = 7 if form.bits == 32 else form.mantissa_bits
        self.grid = Grid(form.exponent_bits, mantissa)
        self.position = np.tile(np.arange(count, dtype=np.uint64) + np.uint64(start), rows)
        place = {int(t): i for i, t in enumerate(tensors.get("token_ids", ()))}
        ids: Any = [] if token_ids is None else np.asarray(token_ids).reshape(-1)
        self.entry = np.array([place.get(int(t), -1) for t in ids], np.int64)
        if len(self.entry) != self.total:
            self.entry = np.full(self.total, -1)
        self.energy = np.full(self.total, 1 << 12, np.int64)
        self.inputs: dict[int, Ints] = {}
        self.tiles: list[Ints] = []
        self.rotation: Rotation | None = None

    def get(self, layer: int, name: str) -> Any:
        """A tensor of a layer, or None."""
        return self.tensors.get(f"{layer}.{name}")

    def begin(self, layer: int) -> None:
        """Find the regions of the tokens, and what is expected from other layers."""
        t = self.total
        n = self.get(layer, "bias").shape[1]
        inputs = [self.inputs[a] for a in self.layers[layer]["inputs"]]
        x = np.concatenate([np.zeros((t, 0), np.int64), *inputs], axis=1)
        bias, scale = self.get(layer, "bias").astype(np.int64), self.get(layer, "weight_scale")
        regions = len(bias)
        self.region = np.zeros(t, np.int64)
        if regions > 1:
            centre = unpacked(self.get(layer, "centre"))[:regions]
            scores = wrapped(product(x, centre) + self.get(layer, "centre_bias"))
            self.region = scores.argmax(axis=1)
        self.base = np.zeros((t, n), np.int64)
        for r in range(regions):
            mine = self.region == r
            weight = unpacked(self.get(layer, "weight")[r])[:n]
            dot = wrapped(product(x[mine], weight)) * scale[r].astype(np.int64)
            self.base[mine] = clamp(wrapped(bias[r] + scaled(dot, 20)), LIMIT)
        table, known = self.get(layer, "table"), np.zeros(t, np.int64)
        self.settled = np.zeros(t, bool)
        if table is not None:
            known = ((self.entry >= 0) & (self.entry < len(table))).astype(np.int64)
            rows = table[np.where(known, self.entry, 0)].astype(np.int64)
            shift = 5 if table.dtype == np.int16 else 12
            self.settled = (known > 0) & (table.dtype == np.int16)
            self.base = wrapped(self.base + np.where(known[:, None], rows << shift, 0))
        self.kind = self.region + regions * known
        self.residual = np.zeros((t, n), np.int64)
        self.output = np.zeros((t, n + -n % 4), np.int64)
        self.within = [unpacked(w) for w in self.get(layer, "within")]
        tokens = np.argsort(self.region, kind="stable")
        self.tiles = [
            some[i : i + (self.tile or len(some))]
            for r in range(regions)
            for some in [tokens[self.region[tokens] == r]]
            for i in range(0, len(some), self.tile or len(some))
        ]

    def run(self, layer: int, part: int, code: Code, rotation: Rotation | None = None) -> None:
        """Go through the channels of a part, keys (0) or values (1), for each tile; `code` is asked
        for its numbers. `rotation`: what turned the keys, where pairs may be coded as before it."""
        self.rotation = rotation if part == 0 else None
        for tile, tokens in enumerate(self.tiles):
            _Step(self, layer, part, tile, tokens, code).run()
        if part == 1:
            self.inputs[layer] = self.output

    def flat(self, block: Bits) -> Bits:
        """[rows, heads, tokens, dim] as [tokens, channels]."""
        return block.transpose(0, 2, 1, 3).reshape(self.total, -1)


class _Step:
    """A tile of one part: group after group of its channels."""

    def __init__(
        self, model: IntegerModel, layer: int, part: int, tile: int, tokens: Ints, code: Code
    ):
        self.model, self.layer, self.tile, self.t, self.code = model, layer, tile, tokens, code
        heads, self.dim = model.layers[layer]["k" if part == 0 else "v"]
        self.before = 0 if part == 0 else int(np.prod(model.layers[layer]["k"]))
        self.channels = heads * self.dim
        self.step = model.get(layer, "step")
        self.pairs = len(self.step) if part == 0 else 0
        self.turned = 2 * heads * self.pairs
        self.order = model.get(layer, "order")[self.before : self.before + self.channels]
        self.kind, self.energy = model.kind[tokens], model.energy[tokens]
        self.region = int(model.region[tokens[0]]) if len(tokens) else 0
        self.sine = model.tensors["sine"].astype(np.int64)
        self.known = np.zeros((len(tokens), 0))
        """Residuals of the channels before a group."""

    def run(self) -> None:
        """Code all groups, and keep what later parts need."""
        for begin in range(0, self.channels, self.model.group):
            end = min(begin + self.model.group, self.channels)
            # What a group knows is what was known before it.
            self.known = self.model.residual[self.t, : self.before + begin].astype(np.float64)
            deviations, place = np.zeros(len(self.t), np.int64), begin
            while place < end:
                if place < self.turned:
                    deviations += self._pair(place)
                    place += 2
                else:
                    deviations += self._single(place)
                    place += 1
            off = deviations - 256 * (end - begin)
            energy = self.energy + ((self.energy >> 3) * off >> 12)
            moved = np.clip(energy, 1 << 8, 1 << 16)
            self.energy = np.where(self.model.settled[self.t], self.energy, moved)
        self.model.energy[self.t] = self.energy

    def _get(self, name: str) -> Any:
        return self.model.get(self.layer, name)

    def _expected(self, c: int) -> Ints:
        """Where a channel is expected."""
        within = self.model.within[self.region][c, : self.known.shape[1]]
        dot = wrapped(product(self.known, within[None])[:, 0])
        scale = int(self._get("within_scale")[self.region, c])
        return clamp(wrapped(self.model.base[self.t, c] + scaled(dot * scale, 20)), LIMIT)

    def _coded(
        self,
        place: int,
        centre: Ints,
        inverse: NDArray[Any],
        unturned: Unturned | None = None,
    ) -> tuple[Ints, Ints]:
        """The fixed-point values of a channel's numbers, and how far off they are."""
        c = self.before + place
        m = inverse.astype(np.int64) * ((1 << 24) // self.energy) >> 12
        unit = int(self._get("unit")[c])
        shares = self.model.tensors["densities"][self._get("density")[c]]
        density = Density(self.model.grid, unit, shares, centre, m)
        density.unturned = unturned
        lane = place % self.model.group // 2 % self.model.lanes
        k = self.code(self.tile, lane, int(self.order[place]), density)
        if unturned is not None and not unturned.second:
            unturned.before &= ~density.escaped
        return self.model.grid.values(k, unit), np.minimum(density.deviation(k) >> 8, 2048)

    def _learn(self, c: int, v: Ints) -> None:
        """Keep what a channel tells those after it."""
        model, t = self.model, self.t
        model.residual[t, c] = clamp(scaled(wrapped(v - model.base[t, c]), 12), 127)
        off = wrapped(v - int(self._get("mean")[c]))
        model.output[t, c] = clamp(scaled(off * int(self._get("input_scale")[c]), 28), 127)

    def _single(self, place: int) -> Ints:
        c = self.before + place
        v, deviation = self._coded(place, self._expected(c), self._get("inverse")[self.kind, c])
        self._learn(c, v)
        return deviation

    def _pair(self, place: int) -> Ints:
        """Two channels that RoPE turns together."""
        c, sine = self.before + place, self.sine
        p, apart = int(self.order[place]) % self.dim, self.order[place + 1] - self.order[place]
        if apart != self.pairs:  # pairs are side by side
            assert apart == 1 and p % 2 == 0
            p //= 2
        assert p < self.pairs
        phase = self.step[p] * self.model.position[self.t]
        turn = ((phase + np.uint64(1 << 51)) >> np.uint64(52)).astype(np.int64) & 4095
        sin, cos = sine[turn], sine[(turn + 1024) & 4095]
        cell, pair = turn >> 7, place // 2
        a, b = self._expected(c), self._expected(c + 1)
        px, py = scaled(a * cos - b * sin, 14), scaled(b * cos + a * sin, 14)
        spreads = self._get("pair_inverse")[self.kind, pair, :, cell]
        own = self._get("inverse")[self.kind, c : c + 2]
        first = self._unturned(place, p, (a, b), _size(a, b) > _size(px, py))
        before = np.zeros(len(a), bool) if first is None else first.before
        centre, inverse = np.where(before, a, px), np.where(before, own[:, 0], spreads[:, 0])
        x, deviation = self._coded(place, centre, inverse, first)
        second = None
        if first is not None:
            before = first.before
            second = replace(first, second=True, other=int(self.order[place]))
        slope = self._get("pair_slope")[self.kind, pair, cell].astype(np.int64)
        turned = clamp(wrapped(py + scaled(wrapped(x - px) * slope, 12)), LIMIT)
        centre, inverse = np.where(before, b, turned), np.where(before, own[:, 1], spreads[:, 1])
        y, other = self._coded(place + 1, centre, inverse, second)
        back = (
            clamp(scaled(x * cos + y * sin, 14), LIMIT),
            clamp(scaled(y * cos - x * sin, 14), LIMIT),
        )
        self._learn(c, np.where(before, x, back[0]))
        self._learn(c + 1, np.where(before, y, back[1]))
        return deviation + other

    def _unturned(
        self, place: int, p: int, expected: tuple[Ints, Ints], coarser: NDArray[np.bool_]
    ) -> Unturned | None:
        """What the density of a pair's first number says, where pairs may be coded as they were
        before RoPE. `coarser`: where their grid is expected to be the coarser one."""
        rotation, c = self.model.rotation, self.before + place
        if rotation is None:
            return None
        unit = np.float32(2.0 ** np.clip(int(self._get("unit")[c]), -126, 127))
        # What is known but for its rounding is likely to be the nearest.
        settled = self.model.settled[self.t]
        own = [np.where(settled, self._get("inverse")[self.kind, c + i], 0) for i in (0, 1)]
        return Unturned(
            second=False,
            before=coarser & (rotation.rounding[self.t] > 0),
            turn=rotation.of(self.t, p),
            other=int(self.order[place + 1]),
            centre=(_float32(expected[0]) * unit, _float32(expected[1]) * unit),
            weight=(_float32(own[0]), _float32(own[1])),
        )


def _float32(values: Ints) -> Floats:
    return values.astype(np.int32).astype(np.float32)


def _size(a: Ints, b: Ints) -> Floats:
    """The size of products, as numbers of 32 bits have it."""
    found: Floats = np.abs(_float32(a) * _float32(b))
    return found
