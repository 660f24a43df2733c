"""Frequencies of the fields of numbers.

What an ideal coder would need that knew them beforehand, with nothing spent on telling them: those
of the documents themselves (empirical entropies), or of others (cross-entropies).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits
from kvzip.layout import KV
from kvzip.snapshot import Layer, Snapshot


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
    """Binary logarithms; 0 for what is not above zero."""
    return np.log2(np.where(x > 0, x, 1))


def channel_counts(part: Bits, dtype: str) -> NDArray[Any]:
    """How often each sign and exponent, or each number that is no float, occurs in each channel of
    one layer's keys or values.

    `part`: [heads, tokens, dim] or a batch of it. Returns int64 [heads, dim, symbols].
    """
    return _by_channel(dtypes.sign_exponent(part, dtype), dtypes.get(dtype).symbols)


def _by_channel(values: Bits, symbols: int) -> NDArray[Any]:
    """How often each value occurs in each channel, int64 [heads, dim, symbols]."""
    block = values if values.ndim == 4 else values[np.newaxis]
    _, heads, _, dim = block.shape
    channel = np.arange(heads)[:, None, None] * dim + np.arange(dim)
    flat = (block.astype(np.int64) + channel * symbols).reshape(-1)
    return np.bincount(flat, minlength=heads * dim * symbols).reshape(heads, dim, symbols)


def _mantissas(part: Bits, dtype: str) -> NDArray[Any]:
    """How often each mantissa occurs. One of 23 bits has more values than there are numbers: its
    top 12 are counted, the others taken as they are."""
    form = dtypes.get(dtype)
    fields = dtypes.mantissa(part, dtype) >> part.dtype.type(_unseen(form))
    size = 1 << (form.mantissa_bits - _unseen(form))
    return np.bincount(fields.reshape(-1).astype(np.int64), minlength=size)


def _unseen(form: dtypes.DType) -> int:
    """How many low bits of a mantissa are not counted, but taken as they are."""
    return max(form.mantissa_bits - 12, 0)


def planes(snapshot: Snapshot) -> list[Measure]:
    """Entropy of the fields of numbers, of all numbers alike and of each channel apart: of floats
    their sign, exponent and mantissa; of other numbers, which have 8 bits, the halves of the byte
    and the byte."""
    form = dtypes.get(snapshot.dtype)
    kind = _Floats if form.is_float else _Bytes
    tallies = {part: kind(form) for part in KV}
    for layer in snapshot.layers:
        for part in KV:
            tallies[part].add(layer.part(part), snapshot.dtype)
    bits: dict[str, list[float]] = {part: tallies[part].bits() for part in KV}
    return [
        Measure(name, width, bits["k"][i], bits["v"][i])
        for i, (name, width) in enumerate(kind.fields(form))
    ]


class _Tally:
    """Counts of one part over layers."""

    def __init__(self, symbols: int):
        self.values = np.zeros(symbols, np.int64)
        self._apart: list[tuple[float, int]] = []

    @staticmethod
    def fields(form: dtypes.DType) -> list[tuple[str, int]]:
        """Names of the fields, and how many bits each has."""
        raise NotImplementedError

    def add(self, part: Bits, dtype: str) -> None:
        """Count one layer's numbers."""
        counts = channel_counts(part, dtype)
        self.values += counts.sum(axis=(0, 1))
        self._apart.append((entropy(counts), part.size))

    def bits(self) -> list[float]:
        """The entropies of the fields, in their order."""
        raise NotImplementedError

    def apart(self) -> float:
        """The entropy with a table for each channel."""
        numbers = sum(n for _, n in self._apart)
        return sum(bits * n for bits, n in self._apart) / max(numbers, 1)


class _Floats(_Tally):
    def __init__(self, form: dtypes.DType):
        super().__init__(form.symbols)
        self.form = form
        self.mantissas = np.zeros(1 << (form.mantissa_bits - _unseen(form)), np.int64)

    @staticmethod
    def fields(form: dtypes.DType) -> list[tuple[str, int]]:
        return [
            ("sign", 1),
            ("exponent", form.exponent_bits),
            ("mantissa", form.mantissa_bits),
            ("sign and exponent", 1 + form.exponent_bits),
            ("sign and exponent, each channel apart", 1 + form.exponent_bits),
            ("whole number, fields apart", form.bits),
            ("whole number, each channel apart, mantissa raw", form.bits),
        ]

    def add(self, part: Bits, dtype: str) -> None:
        super().add(part, dtype)
        self.mantissas += _mantissas(part, dtype)

    def bits(self) -> list[float]:
        table, apart = self.values.reshape(2, -1), self.apart()
        sign, exponent = entropy(table.sum(axis=1)), entropy(table.sum(axis=0))
        mantissa = entropy(self.mantissas) + _unseen(self.form)
        both, whole = entropy(self.values), sign + exponent + mantissa
        return [sign, exponent, mantissa, both, apart, whole, apart + self.form.mantissa_bits]


class _Bytes(_Tally):
    def __init__(self, form: dtypes.DType):
        super().__init__(form.symbols)

    @staticmethod
    def fields(form: dtypes.DType) -> list[tuple[str, int]]:
        return [
            ("upper four bits", 4),
            ("lower four bits", 4),
            ("byte", form.bits),
            ("byte, each channel apart", form.bits),
        ]

    def bits(self) -> list[float]:
        table = self.values.reshape(16, 16)
        upper, lower = entropy(table.sum(axis=1)), entropy(table.sum(axis=0))
        return [upper, lower, entropy(self.values), self.apart()]


# --- tables by level -----------------------------------------------------------------------------

LEVELS = ("all numbers alike", "by layer", "by head", "by channel")
"""Which numbers share a table of sign and exponent; keys and values never do."""
_PARENT = 8.0  # numbers of the level above that stand behind each table


class Frequencies:
    """How often signs and exponents occur in each channel of each layer, and mantissas in each
    layer. Of formats of 8 bits, the whole number is counted in place of sign and exponent."""

    def __init__(self, dtype: str):
        self.form = dtypes.get(dtype)
        self.values: dict[tuple[int, str], NDArray[Any]] = {}
        """[heads, dim, symbols]"""
        self.mantissas: dict[tuple[int, str], NDArray[Any]] = {}

    def add(self, layers: Sequence[Layer]) -> None:
        """Count the numbers of one document."""
        name = self.form.name
        for i, layer in enumerate(layers):
            for part in KV:
                bits = layer.part(part)
                if self.form.bits == 8:
                    found, fine = _by_channel(bits, 256), np.full(1, bits.size)
                else:
                    found, fine = channel_counts(bits, name), _mantissas(bits, name)
                self.values[i, part] = self.values.get((i, part), 0) + found
                self.mantissas[i, part] = self.mantissas.get((i, part), 0) + fine

    def code_lengths(
        self, learned: Frequencies | None = None
    ) -> dict[str, dict[tuple[int, str], NDArray[Any]]]:
        """Mean bits of each channel's numbers [heads, dim], by level, layer and part, with tables
        of these frequencies or of `learned` ones. The mantissa always has one table."""
        found: dict[str, dict[tuple[int, str], NDArray[Any]]] = {level: {} for level in LEVELS}
        for part in KV:
            keys = [key for key in self.values if key[1] == part]
            source = learned or self
            if not keys:
                continue
            every = np.sum([source.values[key].sum(axis=(0, 1)) for key in keys], axis=0)
            mantissas = np.sum([source.mantissas[key] for key in keys], axis=0)
            fine = _shares(mantissas, None, learned is not None)
            for key in keys:
                counts, known = self.values[key], source.values[key]
                numbers = np.maximum(counts.sum(axis=-1), 1)
                mantissa = -(self.mantissas[key] * _log2(fine)).sum() / max(counts.sum(), 1)
                mantissa += _unseen(self.form)
                table = _shares(every, None, learned is not None)
                levels = (every, known.sum(axis=(0, 1)), known.sum(axis=1)[:, None], known)
                for level, seen in zip(LEVELS, levels, strict=True):
                    if level != LEVELS[0]:
                        table = _shares(seen, table, learned is not None)
                    found[level][key] = mantissa - (counts * _log2(table)).sum(axis=-1) / numbers
        return found


def _shares(counts: NDArray[Any], parent: NDArray[Any] | None, smooth: bool) -> NDArray[Any]:
    """Probabilities from counts [..., symbols]; `smooth`: nothing is impossible, and few counts
    lean on the `parent`, by default all symbols alike."""
    if not smooth:
        return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1))
    if parent is None:
        parent = np.full(counts.shape[-1], 1 / counts.shape[-1])
    total = counts.sum(axis=-1, keepdims=True)
    return np.asarray((counts + _PARENT * parent) / (total + _PARENT))
