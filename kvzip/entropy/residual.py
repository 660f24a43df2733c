"""What a prediction from other layers leaves of a layer, and how the rest is expected.

A channel is expected where the channels before it, whose residuals are known by then, say. Keys are
predicted with RoPE undone; the two channels that it turns together are turned forward, and the
second is expected given the first. A token's energy, a running mean of the sizes of its residuals,
scales all spreads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.entropy.linear import ADDED, Doubles, Floats
from kvzip.layout import KV, LayerLayout
from kvzip.snapshot import Layer, Snapshot
from kvzip.statistics import densities, gaussian
from kvzip.statistics.rope import ChannelOrder

MEAN_DEVIATION = 0.75
"""The mean deviation as a share of the standard deviation, for what is nearly normal."""
_LIMIT = np.float32(1e9)  # no cache holds more, and squares still add up in float32
_GROUP = 16  # channels between two updates of a token's energy
_PRIOR = 12.0  # channels of size 1 that an energy begins with
_CAP = 12.0  # one channel counts no more than this for the energy


class View:
    """A layer's numbers in coding order, rows of a batch one after the other."""

    def __init__(self, layer: Layer, order: ChannelOrder, dtype: str):
        parts = [layer.block(part) for part in KV]
        flat = [p.transpose(0, 2, 1, 3).reshape(p.shape[0] * p.shape[2], -1) for p in parts]
        self.dtype, self.order = dtype, order
        self.bits = np.concatenate([flat[0][:, order.order[: order.keys]], flat[1]], axis=1)
        self.y: Floats = np.clip(order.unturned(layer), -_LIMIT, _LIMIT)
        """Numbers with RoPE undone, [tokens, channels]."""
        rows, _, tokens, _ = parts[0].shape
        position = np.tile(np.arange(tokens) + layer.layout.first, rows)
        angle = position[:, None] * order.frequency
        heads = len(order.pairs) // max(len(order.frequency), 1)
        self.cos = np.tile(np.cos(angle).astype(np.float32), (1, heads))
        self.sin = np.tile(np.sin(angle).astype(np.float32), (1, heads))

    def take(self, rows: NDArray[Any] | slice) -> View:
        """Some of its tokens."""
        found = View.__new__(View)
        found.dtype, found.order = self.dtype, self.order
        found.bits, found.y = self.bits[rows], self.y[rows]
        found.cos, found.sin = self.cos[rows], self.sin[rows]
        return found

    @cached_property
    def x(self) -> Floats:
        """Numbers as they are stored; 0 for what is not finite."""
        found = dtypes.to_float32(self.bits, self.dtype)
        real = dtypes.finite(self.bits, self.dtype)
        return np.where(real, np.clip(found, -_LIMIT, _LIMIT), np.float32(0))

    @cached_property
    def edges(self) -> tuple[Doubles, Doubles]:
        """Where each number's part of the real line begins and ends."""
        return densities.edges(self.bits, self.dtype)


def held_layers(snapshot: Snapshot) -> list[Layer]:
    """The layers cut to the last tokens of the sequence, those that every layer with tokens holds.
    What has no tokens of the sequence is whole: states, constants, an encoder's keys."""
    timed = [s for s in snapshot.layout.layers if s.counts_tokens and s.stored]
    first = max((layout.first for layout in timed), default=0)
    return [_cut(layer, first) for layer in snapshot.layers]


def _cut(layer: Layer, first: int) -> Layer:
    """The layer without its tokens before position `first`."""
    held = layer.layout
    skip = first - held.first
    if not held.counts_tokens or not held.stored or skip <= 0:
        return layer
    layout, found = held.cut(first, held.cumulative_length), {}
    for name, part in held.parts.items():
        kept = layer.block(name)[:, :, skip if part.tokens is not None else 0 :]
        found[name] = part.from_block(kept)
    return Layer(found, layout)


class Within:
    """Expects each channel from the residuals of those before it, or each alone."""

    def __init__(self, covariance: Doubles, pairs: Sequence[tuple[int, int]], alone: bool = False):
        """`covariance`: of the residuals, [channels, channels], in coding order; `alone`: only
        its diagonal is used."""
        self.first = np.array([a for a, _ in pairs], np.int64)
        self.second = np.array([b for _, b in pairs], np.int64)
        self.coefficients: Floats | None = None
        variance = np.maximum(np.diag(covariance), 1e-30).astype(np.float64)
        both = np.zeros(len(pairs))
        if not alone:
            known = gaussian.conditional(gaussian.cholesky(covariance, ADDED), pairs)
            self.coefficients = known.coefficients.astype(np.float32)
            variance, both = known.variance, known.shared
        self.variance, self.both = variance.astype(np.float32), both.astype(np.float32)

    def expect(self, view: View, base: Floats) -> tuple[Floats, Floats]:
        """Where each number is expected and its spread (mean deviation), [tokens, channels], as
        numbers are stored: keys turned."""
        p = np.array(base, np.float32)
        if self.coefficients is not None:
            p += (view.y - base) @ self.coefficients.T
        # A dead channel's prediction is right to the last digit that float32 has.
        size = np.sqrt((view.y**2).mean(axis=0)) * np.float32(1e-6)
        floor = np.maximum(size, np.float32(1e-30))
        s = np.tile(np.maximum(np.sqrt(self.variance), floor), (len(p), 1))
        if len(self.first):
            one, two = self.first, self.second
            sin, cos = view.sin, view.cos
            first, rest, slope = gaussian.turned(
                self.variance[one], self.variance[two], self.both, sin, cos
            )
            ahead, beside = p[:, one], p[:, two]
            p[:, one] = ahead * cos - beside * sin
            turned = beside * cos + ahead * sin
            p[:, two] = turned + slope * (view.x[:, one] - p[:, one])
            s[:, one] = np.maximum(np.sqrt(first), floor[one])
            s[:, two] = np.maximum(np.sqrt(rest), floor[two])
        return p, s * np.float32(MEAN_DEVIATION)


def energies(z: Floats) -> Floats:
    """The energy that each number of residuals z [tokens, channels], in units of their spreads,
    is coded with: what its token's channels before it say, to the last multiple of 16."""
    tokens, channels = z.shape
    groups = -(-channels // _GROUP)
    size = np.zeros((tokens, groups * _GROUP), np.float32)
    size[:, :channels] = np.minimum(np.abs(z), _CAP)
    sums = size.reshape(tokens, groups, _GROUP).sum(axis=2)
    before = np.cumsum(sums, axis=1) - sums
    energy = (_PRIOR + before) / (_PRIOR + _GROUP * np.arange(groups))
    return np.repeat(energy.astype(np.float32), _GROUP, axis=1)[:, :channels]


class Density:
    """The channels' mixtures, learned from residuals of calibration documents."""

    def __init__(self, energy: bool, sample: int):
        """`sample`: tokens that are looked at in a document, evenly spread."""
        self.energy, self.sample = energy, sample
        self._seen: list[tuple[Floats, Floats]] = []

    def learn(self, view: View, p: Floats, s: Floats) -> None:
        """Take in a document whose numbers are expected at `p` with spreads `s`."""
        rows = np.unique(np.linspace(0, len(p) - 1, min(self.sample, len(p))).astype(np.int64))
        some, p, s = view.take(rows), p[rows], s[rows]
        low, high = some.edges
        s = s * energies((some.x - p) / s) if self.energy else s
        ends = [((end - p) / s).astype(np.float32) for end in (low, high)]
        self._seen.append((ends[0], ends[1]))

    @cached_property
    def weights(self) -> Doubles:
        """[channels, scales]; what was learned from is forgotten."""
        low, high = (np.concatenate(ends) for ends in zip(*self._seen, strict=True))
        self._seen.clear()
        return densities.mixture(low, high)

    def code_length(self, view: View, p: Floats, s: Floats) -> Floats:
        """Ideal bits of each number, [tokens, channels]."""
        if self.energy:
            s = s * energies((view.x - p) / s)
        low, high = view.edges
        bits = dtypes.get(view.dtype).bits
        return densities.code_length(low, high, p, s, self.weights, bits)


class PartBits(msgspec.Struct, frozen=True):
    """Bits per number of one layer's keys, values or other part."""

    bits: float
    heads: list[float]
    channels: list[list[float]]
    """[heads][dim]; empty where a model tells them only together."""


LayerBits = dict[str, PartBits]
"""Bits per number of one layer, by the names of its parts."""


def by_channel(
    mean: NDArray[np.floating], order: ChannelOrder, shapes: Sequence[tuple[int, int]]
) -> LayerBits:
    """Mean bits of channels in coding order, [channels], as heads x dim of keys and of values."""
    keys = np.empty(order.keys)
    keys[order.order[: order.keys]] = mean[: order.keys]
    means = (keys, mean[order.keys :])
    return {name: part_bits(m.reshape(s)) for name, m, s in zip(KV, means, shapes, strict=True)}


def part_bits(mean: NDArray[np.floating]) -> PartBits:
    """The bits of a part, from the mean bits of its channels [heads, dim]."""
    rounded = np.round(mean.astype(np.float64), 4)
    heads = [float(h) for h in mean.mean(axis=1)] if mean.size else []
    return PartBits(float(mean.mean()) if mean.size else 0.0, heads, rounded.tolist())


def head_shapes(layer: LayerLayout) -> list[tuple[int, int]]:
    """(heads, dim) of keys and of values."""
    return [(part.size("h"), part.size("d")) for part in map(layer.part, KV)]
