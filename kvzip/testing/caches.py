"""Made-up caches: any bits, and numbers like a real cache's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits
from kvzip.layout import Origin
from kvzip.snapshot import Snapshot

Maker = Callable[[np.random.Generator, str, tuple[int, ...]], Bits]
"""Makes the bits of a part, given a generator, the format's name, and a shape that ends with heads,
tokens, dim."""


def random_bits(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Bits:
    """Bits of `shape`, every pattern alike: NaN payloads, infinities, subnormals, negative
    zeros."""
    uint = dtypes.get(dtype).uint
    return rng.integers(0, 2 ** (8 * uint.itemsize), tuple(shape), dtype=np.uint64).astype(uint)


def cache_like(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> Bits:
    """Bits of `shape` [..., heads, tokens, dim]: numbers with a scale and a mean for each channel,
    as keys and values have them."""
    scale = 2.0 ** rng.uniform(-6, 3, (shape[-3], 1, shape[-1]))
    mean = rng.normal(0, 1, scale.shape) * (rng.random(scale.shape) < 0.3)
    numbers = (rng.normal(size=tuple(shape)) + mean) * scale
    form = dtypes.get(dtype)
    if form.kind == "scale":
        numbers = np.abs(numbers)
    elif not form.is_float:
        numbers = np.rint(4 * numbers).clip(-128, 127)
    return nearest_bits(numbers, dtype)


def nearest_bits(numbers: NDArray[np.floating[Any]], dtype: str) -> Bits:
    """The bits of the numbers of that format that are nearest to `numbers`, ties to even; the
    greatest where they are greater than all of an 8-bit format. Integers wrap."""
    form = dtypes.get(dtype)
    if form.is_float and form.itemsize > 1:
        if form.name != "bf16":
            return numbers.astype(f"<f{form.itemsize}").view(form.uint)
        wide = numbers.astype(np.float32).view(np.uint32)
        return (
            wide + np.uint32(0x7FFF) + (wide >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
        ).astype(form.uint)
    if not (form.is_float or form.kind == "scale"):
        return numbers.astype(np.int64).astype(form.uint)
    patterns = np.arange(128 if form.is_float else 256, dtype=np.uint8)  # without a sign
    patterns = patterns[dtypes.finite(patterns, dtype)]
    values, size = dtypes.to_float64(patterns, dtype), np.abs(numbers)
    above = np.searchsorted(values, size).clip(1, len(values) - 1)
    below = above - 1
    to_above, to_below = values[above] - size, size - values[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    bits = patterns[np.where(up, above, below)]
    signed = np.signbit(numbers) & form.is_float & ((bits > 0) | (form.kind != "fnuz"))
    return np.asarray(bits | (signed.astype(np.uint8) << np.uint8(7)))


def make_snapshot(
    maker: Maker,
    seed: int,
    dtype: str,
    layers: int = 2,
    heads: int = 2,
    tokens: int = 50,
    dim: int = 16,
    batch: int | None = None,
    ids: bool = True,
) -> Snapshot:
    """A snapshot of keys and values that `maker` makes, [heads, tokens, dim] or with a batch before
    them; with random token ids unless `ids` is False."""
    rng = np.random.default_rng(seed)
    front = () if batch is None else (batch,)
    shape = (*front, heads, tokens, dim)
    return Snapshot.from_arrays(
        [(maker(rng, dtype, shape), maker(rng, dtype, shape)) for _ in range(layers)],
        dtype,
        rng.integers(0, 50000, (*front, tokens)) if ids else None,
        Origin(model="test/model", revision="r1", rope=({"rope_theta": 1e4},)),
    )
