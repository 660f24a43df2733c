"""What a store of a given size has room for, with each codec: the third answer beside time and
dollars."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvzip.choice.cost import CodecFigures, number
from kvzip.eval.quantities import significant
from kvzip.eval.traffic.capacity import capacities, needed_capacity
from kvzip.eval.traffic.trace import BLOCK_TOKENS, Trace


class Kept(msgspec.Struct, frozen=True):
    """What a store keeps with one codec."""

    codec: str
    ratio: float
    documents: float
    """Caches of this length."""
    hit_rate: float | None
    """Of a trace's blocks, of an LRU store; None without a trace."""


class Room(msgspec.Struct, frozen=True):
    """A store and what it keeps, the codec of the smallest ratio first."""

    bytes: float
    trace: str | None
    kept: list[Kept]

    def line(self) -> str:
        """One line of advice: raw, and the codec that keeps most."""
        first, best = self.kept[0], self.kept[-1]
        text = f"Room: {_size(self.bytes)} holds {significant(first.documents)} such caches "
        text += _named(first)
        if best is not first:
            text += f" and {significant(best.documents)} {_named(best)} ({best.ratio:.2f}x)"
        if first.hit_rate is None or best.hit_rate is None:
            return f"{text}; what your traffic finds of them: --trace."
        text += f". Of {self.trace}'s blocks an LRU store of that size finds {first.hit_rate:.1%}"
        return text + (f" and {best.hit_rate:.1%}." if best is not first else ".")


def room(
    store_bytes: float,
    raw_bytes: float,
    bytes_per_token: float,
    codecs: Sequence[CodecFigures],
    trace: Trace | None = None,
) -> Room:
    """What a store of so many bytes keeps of caches of `raw_bytes`, and finds of a trace's blocks.

    A codec's profile lies in the store, too, once. Raises KVZipError for sizes that are not above
    zero.
    """
    number("store", store_bytes, zero=False)
    by_ratio = sorted(codecs, key=lambda codec: codec.ratio)
    if any(codec.name == "raw" for codec in by_ratio):  # a file of raw bytes has a header
        by_ratio.sort(key=lambda codec: codec.name != "raw")
    rates: list[float | None] = [None] * len(by_ratio)
    left = [max(store_bytes - codec.profile_bytes, 0.0) for codec in by_ratio]
    if trace is not None:
        needed, block = needed_capacity(trace), bytes_per_token * BLOCK_TOKENS
        rates = [
            capacities([size / block], [codec.ratio], needed)[0].hit_rate if size else 0.0
            for size, codec in zip(left, by_ratio, strict=True)
        ]
    return Room(
        store_bytes,
        None if trace is None else trace.name,
        [
            Kept(codec.name, codec.ratio, size * codec.ratio / raw_bytes, rate)
            for codec, size, rate in zip(by_ratio, left, rates, strict=True)
        ],
    )


def _named(kept: Kept) -> str:
    return "raw" if kept.codec == "raw" else f"with {kept.codec}"


def _size(value: float) -> str:
    return f"{significant(value / 1e12)} TB" if value >= 1e12 else f"{significant(value / 1e9)} GB"
