"""How many bits a number of a KV cache holds, under models from the simplest up.

All figures are empirical entropies in bits per number: what an ideal coder would need that knew
the frequencies beforehand, with nothing spent on telling them.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits
from kvzip.snapshot import PARTS, Part, Snapshot


class Measure(msgspec.Struct, frozen=True):
    """Bits per number of one field of the numbers, for keys and for values."""

    plane: str
    width: int
    """Bits that the field has."""
    k: float
    v: float


def entropy(counts: NDArray[Any]) -> float:
    """Shannon entropy in bits per symbol of the rows of `counts` [..., symbols], weighted by how
    many symbols each row counts."""
    counts = counts.reshape(-1, counts.shape[-1]).astype(np.float64)
    rows = counts.sum(axis=1)
    total = rows.sum()
    if total == 0:
        return 0.0
    # -sum n log2(n/N) = N log2 N - sum n log2 n, row by row
    bits = (rows * _log2(rows)).sum() - (counts * _log2(counts)).sum()
    return float(bits / total)


def _log2(x: NDArray[Any]) -> NDArray[Any]:
    return np.log2(np.where(x > 0, x, 1))


def channel_counts(part: Bits, dtype: str) -> NDArray[Any]:
    """How often each sign and exponent occurs in each channel of one layer's keys or values.

    `part`: [heads, tokens, dim] or a batch of it. Returns int64 [heads, dim, symbols].
    """
    block = part if part.ndim == 4 else part[np.newaxis]
    _, heads, _, dim = block.shape
    symbols = dtypes.get(dtype).symbols
    values = dtypes.sign_exponent(block, dtype).astype(np.int64)
    channel = np.arange(heads)[:, None, None] * dim + np.arange(dim)
    flat = (values + channel * symbols).reshape(-1)
    return np.bincount(flat, minlength=heads * dim * symbols).reshape(heads, dim, symbols)


def planes(snapshot: Snapshot) -> list[Measure]:
    """Entropy of sign, exponent and mantissa, of all numbers alike and of each channel apart."""
    form = dtypes.get(snapshot.dtype)
    tallies = {part: _Tally(form) for part in PARTS}
    for layer in snapshot.layers:
        for part in PARTS:
            tallies[part].add(layer.part(part), snapshot.dtype)
    names = [
        ("sign", 1),
        ("exponent", form.exponent_bits),
        ("mantissa", form.mantissa_bits),
        ("sign and exponent", 1 + form.exponent_bits),
        ("sign and exponent, each channel apart", 1 + form.exponent_bits),
        ("whole number, fields apart", form.bits),
        ("whole number, each channel apart, mantissa raw", form.bits),
    ]
    bits: dict[Part, list[float]] = {part: tallies[part].bits() for part in PARTS}
    return [
        Measure(name, width, bits["k"][i], bits["v"][i]) for i, (name, width) in enumerate(names)
    ]


class _Tally:
    """Counts of one part over layers."""

    def __init__(self, form: dtypes.DType):
        self.form = form
        self.values = np.zeros(form.symbols, np.int64)
        self.mantissas = np.zeros(1 << min(form.mantissa_bits, 12), np.int64)
        self.apart: list[tuple[float, int]] = []

    def add(self, part: Bits, dtype: str) -> None:
        counts = channel_counts(part, dtype)
        self.values += counts.sum(axis=(0, 1))
        self.apart.append((entropy(counts), part.size))
        # A mantissa of 23 bits has more values than there are numbers: its top 12 are counted,
        # the others taken as they are.
        low = max(self.form.mantissa_bits - 12, 0)
        fields = (dtypes.mantissa(part, dtype) >> part.dtype.type(low)).reshape(-1)
        self.mantissas += np.bincount(fields, minlength=len(self.mantissas))

    def bits(self) -> list[float]:
        form, table = self.form, self.values.reshape(2, -1)
        sign, exponent = entropy(table.sum(axis=1)), entropy(table.sum(axis=0))
        mantissa = entropy(self.mantissas) + max(form.mantissa_bits - 12, 0)
        both = entropy(self.values)
        numbers = sum(n for _, n in self.apart)
        apart = sum(bits * n for bits, n in self.apart) / max(numbers, 1)
        whole = sign + exponent + mantissa
        return [sign, exponent, mantissa, both, apart, whole, apart + form.mantissa_bits]
