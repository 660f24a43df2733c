"""Where tensors lie in a saved session of llama.cpp, told from its bytes.

`llama_state_seq_save_file` (a server's slots) and `llama_state_save_file` (`--prompt-cache`) write
magic, version, tokens, and what the model's memory writes of itself: for keys and values the cells
(position, sequences), then for each layer a ggml type, the size of a row, and the rows; for
recurrent states the same with states. A hybrid memory writes one after the other, and a server puts
checkpoints behind them. All of it is little-endian.

The versions differ in what stands between these parts, so nothing here depends on a version: what
does not read like one of them is passed over, byte by byte, up to the next that does. That decides
how well a file is compressed, and never what it is restored to.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.container import Source

SEQUENCE, SESSION = b"qsgg", b"nsgg"
"""What files begin with: 'ggsq', the state of one sequence, and 'ggsn', that of a context; as
little-endian integers."""
_SEARCHED = 1 << 16
"""Bytes that are looked through for the next part that can be read."""
_MOST_STREAMS, _MOST_LAYERS, _MOST_SEQUENCES = 256, 4096, 4096
_MOST_CELLS = 1 << 26
"""Cells that are looked at in all, in a file that could be read in too many ways; what is behind is
carried as bytes."""
_TRY = 1 << 14
"""What a place that is tried costs of these, however few cells it has."""
_TENSOR = 1 << 10
"""What a tensor costs of them, however few rows it has."""
_MOST_TENSORS = 1 << 13
_AHEAD = 1 << 14
"""Bytes that are read at once where a few are wanted: next comes what is behind them."""
_CELL = struct.Struct("<iI")
_TYPES = {
    0: ("fp32", 4, 1),
    1: ("fp16", 2, 1),
    30: ("bf16", 2, 1),
    2: ("bytes", 18, 32),
    3: ("bytes", 20, 32),
    6: ("bytes", 22, 32),
    7: ("bytes", 24, 32),
    8: ("bytes", 34, 32),
    20: ("bytes", 18, 32),
}
"""By ggml's number: our format, the bytes of a block, and the numbers in it. (q4_0, q4_1, q5_0,
q5_1, q8_0, iq4_nl are blocks of codes with their scales.)"""
_OF_CELL = (0, 8, 12)
"""Bytes that versions keep of a cell beside its position: nothing; x, y; x, y, token."""
_OF_ALL = (0, 8)
"""Bytes that versions keep before the layers: nothing; how keys and values are rotated."""


class Tensor(NamedTuple):
    """Rows of numbers in the file."""

    offset: int
    dtype: str
    rows: int
    """How many cells (tokens) it has numbers of."""
    width: int
    """Numbers of a cell; bytes, where the format is quantised."""
    transposed: bool = False
    """Whether the numbers lie as [width, rows] and not as [rows, width]."""


class Section(NamedTuple):
    """Keys and values, or states, of the same cells."""

    positions: NDArray[np.int32]
    """Of each cell."""
    keys: list[Tensor]
    """Of each layer; states, where there are no values."""
    values: list[Tensor]


class Slot(NamedTuple):
    """What can be told of a saved session."""

    kind: str
    version: int
    tokens: NDArray[np.int32] | None
    """The prompt's ids; None where they stand for images or sound, or do not read like ids."""
    architecture: str
    sections: list[Section]


class _Wrong(Exception):
    """The bytes are none of what is looked for."""


class _Cursor:
    """Reads a source from somewhere on, and raises `_Wrong` behind its end.

    `left`: how many cells may still be looked at, of all cursors of one file.
    """

    def __init__(self, source: Source, at: int, left: list[int] | None = None):
        self.source, self.at = source, at
        self._left = [_MOST_CELLS] if left is None else left
        self._ahead, self._from = memoryview(b""), 0

    def spend(self, cells: int) -> None:
        """Look at so many cells, if that may be."""
        if cells > self._left[0]:
            raise _Wrong
        self._left[0] -= cells

    def take(self, length: int) -> memoryview:
        at = self.skip(length)
        if length > _AHEAD:
            return self.source.read(at, length)
        begin = at - self._from
        if not 0 <= begin <= len(self._ahead) - length:
            self._ahead = self.source.read(at, min(_AHEAD, self.source.size - at))
            self._from, begin = at, 0
        return self._ahead[begin : begin + length]

    def peek(self, length: int) -> memoryview:
        """The next bytes, which stay the next."""
        found = self.take(length)
        self.at -= length
        return found

    def skip(self, length: int) -> int:
        """Where it was; `length` bytes on from there it is now."""
        if length < 0 or self.at + length > self.source.size:
            raise _Wrong
        self.at += length
        return self.at - length

    def number(self, least: int = 0, most: int = 2**32 - 1) -> int:
        """An unsigned integer of 32 bits."""
        (found,) = struct.unpack("<I", self.take(4))
        if not least <= found <= most:
            raise _Wrong
        return int(found)

    def long(self) -> int:
        (found,) = struct.unpack("<Q", self.take(8))
        return int(found)


def read_slot(source: Source) -> Slot | None:
    """What a saved session holds; None where the bytes do not begin like one."""
    cursor = _Cursor(source, 0)
    try:
        magic = bytes(cursor.take(4))
        if magic not in (SEQUENCE, SESSION):
            return None
        kind, version = magic[::-1].decode(), cursor.number()
    except _Wrong:
        return None
    tokens, architecture = None, ""
    try:
        given = np.frombuffer(bytes(cursor.take(4 * cursor.number())), "<i4")
        tokens = _ids(given)
        if kind == "ggsn":
            architecture = _session(cursor)
    except _Wrong:
        pass
    return Slot(kind, version, tokens, architecture, list(_sections(source, cursor.at)))


def _ids(given: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """The ids in a list of tokens; a server of late puts -1, 1 and their number before them, and
    what images there are behind."""
    if len(given) >= 3 and given[0] == -1 and given[1] == 1 and 0 <= given[2] <= len(given) - 3:
        given = given[3 : 3 + given[2]]
    return given if (given >= 0).all() else None


def _session(cursor: _Cursor) -> str:
    """Pass over what a context's state begins with; the model's architecture."""
    name = bytes(cursor.take(cursor.number(1, 256)))
    after = cursor.at
    try:  # versions up to 9: outputs, logits, embeddings
        cursor.skip(4 * cursor.number())
        cursor.skip(4 * cursor.long())
        cursor.skip(4 * cursor.long())
        _section(cursor.source, cursor.at)
    except _Wrong:
        cursor.at = after
    return name.decode("ascii", "replace") if name.isascii() else ""


def _sections(source: Source, at: int) -> Iterator[Section]:
    """All that can be read from `at` on."""
    left, tensors = [_MOST_CELLS], 0
    while at < source.size:
        for begin in _candidates(source, at):
            left[0] -= _TRY
            try:
                found, end = _section(source, begin, left)
            except _Wrong:
                if left[0] < 0:
                    return
                continue
            tensors += sum(len(section.keys) + len(section.values) for section in found)
            if tensors > _MOST_TENSORS:
                return
            yield from found
            at = end
            break
        else:
            return


def _candidates(source: Source, at: int) -> list[int]:
    """Where from `at` on a section may begin: with how many streams, or cells of states, it has."""
    near = bytes(source.read(at, min(_SEARCHED, source.size - at)))
    found: list[int] = []
    for shift in range(min(4, len(near))):
        numbers = np.frombuffer(near, "<u4", (len(near) - shift) // 4, shift)
        likely = np.flatnonzero((numbers > 0) & (numbers <= _MOST_SEQUENCES))
        found += (at + shift + 4 * likely).tolist()
    return sorted(found)


def _section(source: Source, at: int, left: list[int] | None = None) -> tuple[list[Section], int]:
    """What one memory has written at a place, and where it ends."""
    for read in (_attention, _recurrent):
        cursor = _Cursor(source, at, left)
        try:
            return read(cursor), cursor.at
        except _Wrong:
            continue
    raise _Wrong


def _attention(cursor: _Cursor) -> list[Section]:
    """Keys and values of all streams."""
    found = []
    for _ in range(cursor.number(1, _MOST_STREAMS)):
        cells = cursor.number(0, 2**31 - 1)
        if cells:
            found.append(_first(cursor, cells, _keys_and_values, *_OF_CELL))
    if not found:
        raise _Wrong
    return found


def _recurrent(cursor: _Cursor) -> list[Section]:
    """States of all layers that keep any; the others write nothing."""
    return [_first(cursor, cursor.number(1, _MOST_SEQUENCES), _states, 0)]


def _first(
    cursor: _Cursor,
    cells: int,
    read: Callable[[_Cursor, int], tuple[list[Tensor], list[Tensor]]],
    *extras: int,
) -> Section:
    """A section of so many cells, the first that can be read of those with so many bytes extra."""
    at = cursor.at
    for extra in extras:
        cursor.at = at
        try:
            positions = _positions(cursor, cells, extra)
            return Section(positions, *read(cursor, cells))
        except _Wrong:
            continue
    raise _Wrong


def _positions(cursor: _Cursor, cells: int, extra: int) -> NDArray[np.int32]:
    """The position of each cell: it, how many sequences there are, the extra bytes, and these."""
    at, size = cursor.at, 12 + extra
    if cells * size <= cursor.source.size - at:
        # A first look at one cell: most places that are tried are none.
        _, sequences = _CELL.unpack(cursor.peek(8))
        if sequences == 1:
            cursor.spend(cells)
            records = np.frombuffer(bytes(cursor.take(cells * size)), "<i4").reshape(cells, -1)
            if (records[:, 1] == 1).all() and (
                (records[:, -1] >= 0) & (records[:, -1] < _MOST_SEQUENCES)
            ).all():
                return np.ascontiguousarray(records[:, 0])
    cursor.at = at
    if cells * (8 + extra) > cursor.source.size - at:
        raise _Wrong
    cursor.spend(256 * cells)  # it takes longer
    positions = np.empty(cells, np.int32)
    for i in range(cells):
        positions[i], sequences = _CELL.unpack(cursor.take(8))
        if sequences > _MOST_SEQUENCES:
            raise _Wrong
        cursor.skip(extra)
        if sequences:
            cursor.spend(sequences)
            held = struct.unpack(f"<{sequences}I", cursor.take(4 * sequences))
            if max(held) >= _MOST_SEQUENCES:
                raise _Wrong
    return positions


def _keys_and_values(cursor: _Cursor, cells: int) -> tuple[list[Tensor], list[Tensor]]:
    transposed, layers = cursor.number(0, 1), cursor.number(1, _MOST_LAYERS)
    at, keys = cursor.at, list[Tensor]()
    for extra in _OF_ALL:
        cursor.at = at + extra
        with suppress(_Wrong):
            keys = [_rows(cursor, cells) for _ in range(layers)]
            break
    if not keys:
        raise _Wrong
    values: list[Tensor] = []
    while len(values) < layers:  # of latent attention there are none
        at = cursor.at
        try:
            values.append(_columns(cursor, cells) if transposed else _rows(cursor, cells))
        except _Wrong:
            cursor.at = at
            break
    return keys, values


def _states(cursor: _Cursor, cells: int) -> tuple[list[Tensor], list[Tensor]]:
    cursor.number(0, 0)
    layers, states = cursor.number(1, _MOST_LAYERS), list[Tensor]()
    while len(states) < 2 * layers:
        at = cursor.at
        try:
            states.append(_rows(cursor, cells))
        except _Wrong:
            cursor.at = at
            break
    if not states:
        raise _Wrong
    return states, []


def _rows(cursor: _Cursor, cells: int) -> Tensor:
    """A tensor row after row: its type, and the bytes of a row, before it."""
    cursor.spend(_TENSOR)
    name, block, numbers = _type(cursor)
    size = cursor.long()
    if not size or size % block or size >= 1 << 31:
        raise _Wrong
    width = size // block * numbers if name != "bytes" else size
    return Tensor(cursor.skip(cells * size), name, cells, width)


def _columns(cursor: _Cursor, cells: int) -> Tensor:
    """A tensor column after column: type, bytes of a number, and the columns, before it."""
    cursor.spend(_TENSOR)
    name, block, _ = _type(cursor)
    size, width = cursor.number(1, 8), cursor.number(1, 1 << 24)
    if name == "bytes" or size != block:
        raise _Wrong
    return Tensor(cursor.skip(cells * width * size), name, cells, width, True)


def _type(cursor: _Cursor) -> tuple[str, int, int]:
    found = _TYPES.get(cursor.number())
    if found is None:
        raise _Wrong
    return found
