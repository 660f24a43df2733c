"""The index of a .kvz file: which blocks a layout has, in which order, and where they lie.

docs/format.md has it byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvzip.codecs import _native
from kvzip.errors import FormatError
from kvzip.kept import cached_property
from kvzip.layout import LayerLayout, Layout

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
_WHOLE = 2**31
"""A step that no part is long enough to be cut by."""
ALIGNMENT = 64
"""Entries begin at multiples of so many bytes: what a GPU, or a copy to one, reads at once."""


Key = tuple[int, str]
"""A layer's number, and the name of one of its parts."""


def aligned(length: int) -> int:
    """The next multiple of `ALIGNMENT`: what an entry of so many bytes takes up in the file."""
    return -(-length // ALIGNMENT) * ALIGNMENT


class Entry(NamedTuple):
    """Place of one block, or of one part's tables, in the order of the file."""

    layer: int
    part: str
    number: int
    """Which of the layer's parts it is, from 0 on."""
    tables: bool
    start: int
    """First token, counted from the first that the layer holds; row, of a part without tokens."""
    tokens: int
    """How many tokens, or rows."""

    @property
    def key(self) -> Key:
        return self.layer, self.part

    def record(self, offset: int, length: int, stored: int, raw: int) -> tuple[int, ...]:
        """The entry as one of `RECORD`."""
        kind = _TABLES if self.tables else _BLOCK
        return (
            self.layer,
            self.number,
            kind,
            0,
            self.start,
            self.tokens,
            offset,
            length,
            stored,
            raw,
        )


def entries(layout: Layout, block_tokens: int) -> Iterator[Entry]:
    """Every entry of a file of that layout, layer by layer, part by part, tables before blocks."""
    for i, layer in enumerate(layout.layers):
        for number, name in enumerate(layer.parts):
            first, stop, step = _cuts(layer, name, block_tokens)
            yield Entry(i, name, number, True, 0, 0)
            for begin, end in _blocks(first, stop, step):
                yield Entry(i, name, number, False, begin - first, end - begin)


def _cuts(layer: LayerLayout, part: str, block_tokens: int) -> tuple[int, int, int]:
    """The first position that a part holds, the one behind the last, and the step at whose
    multiples it is cut into blocks. A part without tokens is one block of all its rows."""
    first, stop = layer.span(part)
    return first, stop, _WHOLE if layer.parts[part].tokens is None else min(block_tokens, _WHOLE)


def _blocks(first: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """The first position of each block and the one behind its last. Layers that begin at different
    positions are cut at the same ones, multiples of `step`."""
    while first < stop:
        end = min((first // step + 1) * step, stop)
        yield first, end
        first = end


def entry_count(layout: Layout, block_tokens: int) -> int:
    """How many entries a file of that layout has."""
    return sum(
        1 + _block_count(*_cuts(layer, name, block_tokens))
        for layer in layout.layers
        for name in layer.parts
    )


def _block_count(first: int, stop: int, step: int) -> int:
    return 0 if first == stop else -(-stop // step) - first // step


class Index:
    """A file's index as columns: each list has one item for each entry, in the order of the file.
    They are lists, because a file has many entries and each is looked at once, and made when they
    are first asked for, since opening a file asks for none.

    A row is the number of an entry.
    """

    def __init__(self, records: Any, start: int, size: int, layout: Layout, block_tokens: int):
        """Read `records`, a buffer, from a file of `size` bytes in which the entries begin at byte
        `start`. Raises FormatError unless every record is the one that the layout asks for, and
        entries follow each other, each at the next multiple of `ALIGNMENT`."""
        self.timeless: set[Key] = set()
        """The parts that have no tokens, but rows."""
        cuts: list[list[tuple[str, int, int, int]]] = []
        before, timeless = None, []
        for i, layer in enumerate(layout.layers):
            if layer is not before:  # most are one object
                before = layer
                found = [(name, *_cuts(layer, name, block_tokens)) for name in layer.parts]
                timeless = [name for name, part in layer.parts.items() if part.tokens is None]
            cuts.append(found)
            for name in timeless:
                self.timeless.add((i, name))
        try:
            self._entries = _native.Index(records, start, size, ALIGNMENT, cuts)
        except ValueError as error:
            raise FormatError(str(error)) from None

    @cached_property
    def position(self) -> list[int]:
        """The position in the sequence of the entry's first token, or its first row."""
        return self._entries.positions()

    @cached_property
    def tokens(self) -> list[int]:
        """How many tokens, or rows, the entry holds; tables hold none."""
        return self._entries.tokens()

    @cached_property
    def offset(self) -> list[int]:
        """Where the entry lies in the file."""
        return self._entries.offsets()

    @cached_property
    def length(self) -> list[int]:
        """How many bytes the codec made, without the zeros behind them."""
        return self._entries.lengths()

    @cached_property
    def stored_checksum(self) -> list[int]:
        """The checksum of the bytes that the codec made."""
        return self._entries.stored_checksums()

    @cached_property
    def raw_checksum(self) -> list[int]:
        """The checksum of the numbers that they stand for."""
        return self._entries.raw_checksums()

    @cached_property
    def _keys(self) -> tuple[list[Key], dict[Key, range]]:
        return self._entries.keys()

    @cached_property
    def key(self) -> list[Key]:
        """The layer and the part that the entry belongs to."""
        return self._keys[0]

    @cached_property
    def rows(self) -> dict[Key, range]:
        """The rows of each part of each layer: its tables, then its blocks."""
        return self._keys[1]

    @cached_property
    def shortest(self) -> int:
        """The least length of a block that holds any number; 0 where there is none."""
        return self._entries.shortest()

    def __len__(self) -> int:
        return len(self._entries)

    def runs(self, rows: Sequence[int], most: int) -> list[tuple[int, int, list[int]]]:
        """Entries, in the order of the file, in runs of neighbours that take up at most `most`
        bytes, or are one entry: where each run begins, its bytes, its rows."""
        return self._entries.runs(rows, most)

    def stored(
        self, data: memoryview, begin: int, rows: Sequence[int], most: int
    ) -> dict[int, memoryview]:
        """The stored bytes of entries by their rows, out of `data`, which are those of the file
        from `begin` on. Raises ValueError unless there are zeros only behind each, and the
        checksums of those that have any bytes and at most `most` match."""
        return self._entries.stored(data, begin, rows, most)

    def span(self, row: int) -> tuple[int, int]:
        """Where an entry lies, and how many bytes it takes up, with the zeros behind it."""
        return self.offset[row], aligned(self.length[row])

    def tables_row(self, row: int) -> int:
        """The row of the tables that an entry's part has."""
        return self.rows[self.key[row]].start

    def name(self, row: int) -> str:
        """What an entry is called in errors."""
        layer, part = key = self.key[row]
        start = self.position[row]
        what = "the tables of " if row == self.tables_row(row) else ""
        lines = "rows" if key in self.timeless else "tokens"
        return f"{what}layer {layer} {part}, {lines} {start}:{start + self.tokens[row]}"
