"""The index of a .kvz file: which blocks a layout has, in which order, and where they lie.

docs/format.md has it byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codec import Codec
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


def _pieces(layout: Layout, block_tokens: int, most: int) -> list[NDArray[Any]]:
    """For each layer the first 16 bytes of its records but for its number, which say which blocks
    they are, as four numbers: what `entries` gives, for thousands of them at once. Raises
    FormatError when they are more than `most`."""
    pieces: list[NDArray[Any]] = []
    before, piece = None, np.zeros((0, 4), "<u4")
    for layer in layout.layers:
        if layer != before:  # most are alike, and comparing is faster
            before, n = layer, 1 + _block_count(layer, block_tokens)
            if 2 * n > most:
                raise FormatError("the index does not fit the shapes in the header")
            cuts = np.array(list(_cuts(layer, block_tokens)), np.int64).reshape(-1, 2)
            piece = np.zeros((2 * n, 4), "<u4")
            piece[:n, 1], piece[n:, 1] = _BLOCK << 8, 1 | _BLOCK << 8
            piece[::n, 1] += (_TABLES - _BLOCK) << 8
            piece[1:n, 2] = piece[n + 1 :, 2] = cuts[:, 0] - layer.first
            piece[1:n, 3] = piece[n + 1 :, 3] = cuts[:, 1] - cuts[:, 0]
        pieces.append(piece)
    return pieces


class Index:
    """A file's index as columns, one item of each list an entry, and `rows`: those of each part,
    its tables first. Lists, because a file has many entries and each is looked at once."""

    def __init__(
        self, records: NDArray[Any], start: int, size: int, layout: Layout, block_tokens: int
    ):
        """Of a file of `size` bytes, in which the entries begin at `start`. Raises FormatError
        unless every record is the one that the layout asks for, and bytes follow without a gap."""
        pieces = _pieces(layout, block_tokens, len(records))
        sizes = list(map(len, pieces))
        if len(records) != sum(sizes):
            raise FormatError("the index does not fit the shapes in the header")
        lengths = records["length"]
        if len(records) and int(lengths.max()) > size:
            raise FormatError("a block is longer than the file")
        offsets = np.empty(len(records) + 1, np.uint64)
        offsets[0] = start
        np.cumsum(lengths, out=offsets[1:])
        offsets[1:] += np.uint64(start)
        if (offsets[:-1] != records["offset"]).any() or int(offsets[-1]) != size:
            raise FormatError("the blocks do not follow each other without gap or overlap")
        places = np.concatenate(pieces) if pieces else np.zeros((0, 4), "<u4")
        places[:, 0] = np.arange(len(pieces)).repeat(sizes)
        differ = records.view("<u4").reshape(len(records), -1)[:, :4] != places
        if differ.any():
            row = int(differ.any(axis=1).argmax())
            raise FormatError(f"entry {row} of the index is not the block that belongs there")
        self.start: list[int] = records["start"].tolist()
        self.tokens: list[int] = records["tokens"].tolist()
        self.offset: list[int] = offsets.tolist()
        self.length: list[int] = lengths.tolist()
        self.stored_checksum: list[int] = records["stored_checksum"].tolist()
        self.raw_checksum: list[int] = records["raw_checksum"].tolist()
        self.key: list[tuple[int, Part]] = []
        """Layer and part."""
        self.rows: dict[tuple[int, Part], range] = {}
        at = 0
        for i, both in enumerate(sizes):
            for part in PARTS:
                key, end = (i, part), at + both // 2
                self.rows[key] = range(at, end)
                self.key += [key] * (end - at)
                at = end

    def __len__(self) -> int:
        return len(self.length)

    def check_sizes(self, layout: Layout, codec: Codec) -> None:
        """Raise FormatError if a block claims more numbers than its bytes can stand for."""
        form, room = dtypes.get(layout.dtype), codec.max_decoded_size
        before, sizes = None, [0, 0]
        for i, layer in enumerate(layout.layers):
            if layer != before:
                before = layer
                shapes = [layer.shape(part) for part in PARTS]
                sizes = [math.prod((*s[:-2], s[-1])) * form.itemsize for s in shapes]
            for part, size in zip(PARTS, sizes, strict=True):
                for row in self.rows[i, part][1:]:
                    if size * self.tokens[row] > room(self.length[row], form):
                        raise FormatError(
                            f"entry {row} of the index claims more than its bytes can hold"
                        )
