"""Frequencies of the fields of numbers.

What an ideal coder would need that knew them beforehand, with nothing spent on telling them: those
of the documents themselves (empirical entropies), or of others (cross-entropies).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits
from kvzip.snapshot import Layer, Snapshot

Key = tuple[int, str]
"""A part of a layer: the layer's number, the part's name."""


class Measure(msgspec.Struct, frozen=True):
    """Bits per number of one field of the numbers of one format, for each part that has some."""

    plane: str
    dtype: str
    """The format that has the field."""
    width: int
    """Bits that the field has."""
    parts: dict[str, float]
    """By the part's name ("k", "v", ...): all layers that have it in this format."""


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
    one layer's keys, values or other part.

    `part`: [heads, tokens or rows, dim] or a batch of it. Returns int64 [heads, dim, symbols].
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
    """How often each mantissa occurs."""
    form = dtypes.get(dtype)
    size = 1 << (form.mantissa_bits - _unseen(form))
    return np.bincount(counted_mantissas(part, dtype)[0], minlength=size)


def counted_mantissas(part: Bits, dtype: str) -> tuple[NDArray[np.int64], int]:
    """The mantissas as they are counted, in one row, and how many low bits of each are not. One of
    23 bits has more values than there are numbers: its top 12 are counted, the others taken as they
    are."""
    unseen = _unseen(dtypes.get(dtype))
    fields = dtypes.mantissa(part, dtype) >> part.dtype.type(unseen)
    return fields.reshape(-1).astype(np.int64), unseen


def _unseen(form: dtypes.DType) -> int:
    """How many low bits of a mantissa are not counted, but taken as they are."""
    return max(form.mantissa_bits - 12, 0)


def planes(snapshot: Snapshot) -> list[Measure]:
    """Entropy of the fields of numbers, of all numbers alike and of each channel apart: of floats
    their sign, exponent and mantissa; of other numbers, which have 8 bits, the halves of the byte
    and the byte.

    Parts of one name and format are taken together, whichever layers they are of. Gives the fields
    of each format, in the order in which the snapshot has them.
    """
    tallies: dict[dtypes.DType, dict[str, _Tally]] = {}
    for i, name, part in snapshot.layout.parts():
        kind = _Floats if part.form.is_float else _Bytes
        found = tallies.setdefault(part.form, {}).setdefault(name, kind(part.form))
        found.add(snapshot.layers[i].block(name), part.dtype)
    measures = []
    for form, by_name in tallies.items():
        bits = {name: tally.bits() for name, tally in by_name.items()}
        fields = next(iter(by_name.values())).fields(form)
        measures += [
            Measure(plane, form.name, width, {name: found[i] for name, found in bits.items()})
            for i, (plane, width) in enumerate(fields)
        ]
    return measures


class _Tally:
    """Counts of the parts of one name and format, over layers."""

    def __init__(self, symbols: int):
        self.values = np.zeros(symbols, np.int64)
        self._apart: list[tuple[float, int]] = []

    @staticmethod
    def fields(form: dtypes.DType) -> list[tuple[str, int]]:
        """Names of the fields, and how many bits each has."""
        raise NotImplementedError

    def add(self, part: Bits, dtype: str) -> None:
        """Count one layer's numbers, in the shape of blocks."""
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
"""Which numbers share a table of sign and exponent; parts of unequal name or format never do."""
_PARENT = 8.0  # numbers of the level above that stand behind each table


class Frequencies:
    """How often signs and exponents occur in each channel of each layer's parts, and mantissas in
    each part. In formats of 8 bits the whole number is counted in place of sign and exponent."""

    def __init__(self) -> None:
        self.forms: dict[Key, dtypes.DType] = {}
        self.values: dict[Key, NDArray[Any]] = {}
        """[heads, dim, symbols]"""
        self.mantissas: dict[Key, NDArray[Any]] = {}

    def add(self, layers: Sequence[Layer]) -> None:
        """Count the numbers of one document."""
        for i, layer in enumerate(layers):
            for name, part in layer.layout.parts.items():
                self.count((i, name), part.form, layer.block(name))

    def count(self, key: Key, form: dtypes.DType, bits: Bits) -> None:
        """Count one part's numbers, [batch, heads, tokens, dim]."""
        if form.bits == 8:
            found, fine = _by_channel(bits, 256), np.full(1, bits.size)
        else:
            found, fine = channel_counts(bits, form.name), _mantissas(bits, form.name)
        self.forms[key] = form
        # States have many channels: counts of 64 bits would take twice the memory.
        self.values[key] = self.values.get(key, 0) + found.astype(np.uint32)
        self.mantissas[key] = self.mantissas.get(key, 0) + fine

    def of(self, keys: Set[Key]) -> Frequencies:
        """Those of some parts alone."""
        found = Frequencies()
        for key in self.forms.keys() & keys:
            found.forms[key] = self.forms[key]
            found.values[key] = self.values[key]
            found.mantissas[key] = self.mantissas[key]
        return found

    def numbers(self) -> dict[Key, int]:
        """How many numbers were counted of each layer's parts."""
        return {key: int(counts.sum()) for key, counts in self.values.items()}

    def code_lengths(
        self, learned: Frequencies | None = None
    ) -> dict[str, dict[Key, NDArray[Any]]]:
        """Mean bits of each channel's numbers [heads, dim], by level, layer and part, with tables
        of these frequencies or of `learned` ones. The mantissa always has one table."""
        found: dict[str, dict[Key, NDArray[Any]]] = {level: {} for level in LEVELS}
        source = learned or self
        for keys in self._alike():
            every = np.sum([source.values[key].sum(axis=(0, 1)) for key in keys], axis=0)
            mantissas = np.sum([source.mantissas[key] for key in keys], axis=0)
            fine = _shares(mantissas, None, learned is not None)
            for key in keys:
                counts, known = self.values[key], source.values[key]
                numbers = np.maximum(counts.sum(axis=-1), 1)
                mantissa = -(self.mantissas[key] * _log2(fine)).sum() / max(counts.sum(), 1)
                mantissa += _unseen(self.forms[key])
                table = _shares(every, None, learned is not None)
                levels = (every, known.sum(axis=(0, 1)), known.sum(axis=1)[:, None], known)
                for level, seen in zip(LEVELS, levels, strict=True):
                    if level != LEVELS[0]:
                        table = _shares(seen, table, learned is not None)
                    found[level][key] = mantissa - (counts * _log2(table)).sum(axis=-1) / numbers
        return found

    def _alike(self) -> list[list[Key]]:
        """The parts of one name and format, all layers' together."""
        groups: dict[tuple[str, dtypes.DType], list[Key]] = {}
        for key, form in self.forms.items():
            groups.setdefault((key[1], form), []).append(key)
        return list(groups.values())


def _shares(counts: NDArray[Any], parent: NDArray[Any] | None, smooth: bool) -> NDArray[Any]:
    """Probabilities from counts [..., symbols]; `smooth`: nothing is impossible, and few counts
    lean on the `parent`, by default all symbols alike."""
    if not smooth:
        return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1))
    if parent is None:
        parent = np.full(counts.shape[-1], 1 / counts.shape[-1])
    total = counts.sum(axis=-1, keepdims=True)
    return np.asarray((counts + _PARENT * parent) / (total + _PARENT))
