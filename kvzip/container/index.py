"""The index of a .kvz file: which blocks a layout has, in which order, and where they lie.

docs/format.md has it byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kvzip import dtypes
from kvzip.codec import Codec
from kvzip.codecs import _native
from kvzip.errors import FormatError
from kvzip.snapshot import PARTS, LayerLayout, Layout, Part

RECORD = np.dtype(
    [
        ("layer", "<u4"),
        ("part", "u1"),
        ("kind", "u1"),
        ("reserved", "<u2"),
        ("start", "<u4"),
        ("tokens", "<u4"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("stored_checksum", "<u8"),
        ("raw_checksum", "<u8"),
    ]
)
_BLOCK, _TABLES = 0, 1
ALIGNMENT = 64
"""Entries begin at multiples of so many bytes: what a GPU, or a copy to one, reads at once."""


Key = tuple[int, Part]
"""A layer's number, and which of its parts."""


def aligned(length: int) -> int:
    """The next multiple of `ALIGNMENT`: what an entry of so many bytes takes up in the file."""
    return -(-length // ALIGNMENT) * ALIGNMENT


class Entry(NamedTuple):
    """Place of one block, or of one part's tables, in the order of the file."""

    layer: int
    part: Part
    tables: bool
    start: int
    """First token, counted from the first that the layer holds."""
    tokens: int

    def record(self, offset: int, length: int, stored: int, raw: int) -> tuple[int, ...]:
        """The entry as one of `RECORD`."""
        kind = _TABLES if self.tables else _BLOCK
        part = PARTS.index(self.part)
        return (self.layer, part, kind, 0, self.start, self.tokens, offset, length, stored, raw)


def entries(layout: Layout, block_tokens: int) -> Iterator[Entry]:
    """Every entry of a file of that layout, layer by layer, K before V, tables before blocks."""
    for i, layer in enumerate(layout.layers):
        first = layer.first
        cuts = [(start - first, stop - start) for start, stop in _cuts(layer, block_tokens)]
        for part in PARTS:
            yield Entry(i, part, True, 0, 0)
            for start, tokens in cuts:
                yield Entry(i, part, False, start, tokens)


def _cuts(layer: LayerLayout, block_tokens: int) -> Iterator[tuple[int, int]]:
    """First and last position of each block. Layers that begin at different positions are cut at
    the same ones, multiples of `block_tokens`."""
    start, end = layer.first, layer.cumulative_length
    while start < end:
        stop = min((start // block_tokens + 1) * block_tokens, end)
        yield start, stop
        start = stop


def entry_count(layout: Layout, block_tokens: int) -> int:
    """How many entries a file of that layout has."""
    return sum(2 * (1 + _block_count(layer, block_tokens)) for layer in layout.layers)


def _block_count(layer: LayerLayout, block_tokens: int) -> int:
    if not layer.stored:
        return 0
    return -(-layer.cumulative_length // block_tokens) - layer.first // block_tokens


class Index:
    """A file's index as columns: each list has one item for each entry, in the order of the file.
    They are lists, because a file has many entries and each is looked at once.

    A row is the number of an entry.
    """

    def __init__(self, records: Any, start: int, size: int, layout: Layout, block_tokens: int):
        """Read `records`, a buffer, from a file of `size` bytes in which the entries begin at byte
        `start`. Raises FormatError unless every record is the one that the layout asks for, and
        entries follow each other, each at the next multiple of `ALIGNMENT`."""
        spans = [(layer.first, layer.cumulative_length) for layer in layout.layers]
        try:
            columns = _native.read_index(
                records, start, size, ALIGNMENT, spans, min(block_tokens, 2**31)
            )
        except ValueError as error:
            raise FormatError(str(error)) from None
        self.position: list[int]
        """The position in the sequence of the entry's first token."""
        self.tokens: list[int]
        """How many tokens the entry holds; tables hold none."""
        self.offset: list[int]
        """Where the entry lies in the file."""
        self.length: list[int]
        """How many bytes the codec made, without the zeros behind them."""
        self.stored_checksum: list[int]
        self.raw_checksum: list[int]
        self.position, self.tokens, self.offset, self.length = columns[:4]
        self.stored_checksum, self.raw_checksum = columns[4:]
        self.key: list[Key] = []
        """The layer and the part that the entry belongs to."""
        self.rows: dict[Key, range] = {}
        """The rows of each part of each layer: its tables, then its blocks."""
        at, before, blocks = 0, None, 0
        for i, layer in enumerate(layout.layers):
            if layer != before:  # most are alike, and comparing is faster
                before, blocks = layer, _block_count(layer, block_tokens)
            for part in PARTS:
                key, end = (i, part), at + 1 + blocks
                self.rows[key] = range(at, end)
                self.key += [key] * (1 + blocks)
                at = end

    def __len__(self) -> int:
        return len(self.length)

    def span(self, row: int) -> tuple[int, int]:
        """Where an entry lies, and how many bytes it takes up, with the zeros behind it."""
        return self.offset[row], aligned(self.length[row])

    def tables_row(self, row: int) -> int:
        """The row of the tables that an entry's part has."""
        return self.rows[self.key[row]].start

    def name(self, row: int) -> str:
        """What an entry is called in errors."""
        layer, part = self.key[row]
        start = self.position[row]
        what = "the tables of " if row == self.tables_row(row) else ""
        return f"{what}layer {layer} {part}, tokens {start}:{start + self.tokens[row]}"

    def check_sizes(self, layout: Layout, codec: Codec) -> None:
        """Raise FormatError if a block claims more numbers than its bytes can stand for."""
        form, room = dtypes.get(layout.dtype), codec.max_decoded_size
        before, sizes = None, {}
        for layer in layout.layers:
            if layer != before:
                before = layer
                for part in PARTS:
                    sizes[layer.shape(part)] = layer.token_numbers(part) * form.itemsize
        blocks = [length for length, n in zip(self.length, self.tokens, strict=True) if n]
        if not blocks or max(self.tokens) * max(sizes.values()) <= room(min(blocks), form):
            return
        for row, (i, part) in enumerate(self.key):
            claimed = sizes[layout.layers[i].shape(part)] * self.tokens[row]
            if claimed and claimed > room(self.length[row], form):
                raise FormatError(f"entry {row} of the index claims more than its bytes can hold")
