"""llama.cpp's saved sessions: read as a snapshot, compressed, restored byte for byte.

.. code-block:: python

    from kvzip.load import llama_cpp

    snapshot = llama_cpp.load_slot("slot.bin")      # `/slots/0?action=save`, or --prompt-cache
    kvzip.write("slot.kvz", snapshot)
    llama_cpp.save_slot(kvzip.decode("slot.kvz"), "slot.bin")

On the command line `kvzip encode slot.bin` and `kvzip decode slot.kvz -o slot.bin` do that. Where
keys and values lie in a file, :mod:`kvzip.load.llama_slot` finds out; all else in it is carried as
bytes, the whole file if need be.

Layers are numbered as they lie in the file, and of kind "full" where they hold every token in its
order. Rows of keys in llama.cpp's cache are all heads side by side, rotated and in the order that
its graphs want them: a slot goes back to llama.cpp, and is no cache for another engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import zip_longest
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.container import Source
from kvzip.container.source import Unchanging, naming, open_source
from kvzip.dtypes import Bits
from kvzip.errors import CorruptError, FormatError, UsageError
from kvzip.files import replacing
from kvzip.load.llama_slot import SEQUENCE, SESSION, Section, Slot, Tensor, read_slot
from kvzip.snapshot import Layer, LayerLayout, Origin, PartLayout, Snapshot

PLACES, REST = "llama_cpp_places", "llama_cpp_rest"
"""Parts of the last layer. Places: for each tensor, in the order of the layers' parts, its offset
in the file, and 1 if it lies as [dim, tokens] there, both 8 bytes, little-endian. Rest: the bytes
between the tensors; more parts of that name with a number, where there are more than 1 GiB."""
_PIECE = 1 << 30


def is_slot(first: bytes | bytearray) -> bool:
    """Whether a file that begins so is a saved session of llama.cpp's."""
    return first[:4] in (SEQUENCE, SESSION)


def load_slot(file: Any) -> Snapshot:
    """The snapshot in a saved session: a path, bytes, or what else :func:`kvzip.open` takes; its
    parts are read when they are first used.

    Raises FormatError for what is no saved session, and the OSError of the path. A file that is
    saved anew while it is read is a CorruptError then.
    """
    source = Unchanging(open_source(file))
    with naming(source):
        slot = read_slot(source)
        if slot is None:
            raise FormatError("the file is no saved session of llama.cpp: it does not begin as one")
    length = max((_length(section) for section in slot.sections), default=0)
    layers, places = [], list[Tensor]()
    for section in slot.sections:
        # A position may be 2**31, of a few cells.
        whole = len(section.positions) == length and bool(
            (section.positions == np.arange(length)).all()
        )
        for pair in zip_longest(section.keys, section.values):
            parts = {n: t for n, t in zip("kv", pair, strict=True) if t is not None}
            layers.append(_layer(source, parts, length, whole))
            places += parts.values()
    layers.append(_rest(source, places, length))
    dtype = next((t.dtype for t in places if t.dtype != "bytes"), "bytes")
    ids = slot.tokens if slot.tokens is not None and len(slot.tokens) == length else None
    return Snapshot(layers, dtype, ids, _origin(slot))


def save_slot(snapshot: Snapshot, path: str | os.PathLike[str]) -> int:
    """Write the saved session that a snapshot was read from, the same bytes; their number.

    Raises UsageError for a snapshot that is of none, or is not whole any more (some of its tokens
    or layers), CorruptError where it makes no sense, and OSError.
    """
    pieces = list(_pieces(snapshot))
    with replacing(path) as file:
        for piece in pieces:
            for bits in piece.read(snapshot):
                file.write(bits)
    return sum(piece.length for piece in pieces)


def is_of_slot(snapshot: Snapshot) -> bool:
    """Whether a snapshot was read from a saved session."""
    return bool(snapshot.layers) and PLACES in snapshot.layers[-1].layout.parts


# --- reading -------------------------------------------------------------------------------


def _length(section: Section) -> int:
    """How many tokens there were when a section was written."""
    return min(max(int(section.positions.max()) + 1, 0), 2**31 - 1)


def _layer(source: Source, parts: dict[str, Tensor], length: int, whole: bool) -> Layer:
    """A layer of the file's tensors. `whole`: they are of all tokens, in their order."""
    axes = "htd" if whole else "hrd"
    layouts = {
        name: PartLayout(tensor.dtype, (1, tensor.rows, tensor.width), axes)
        for name, tensor in parts.items()
    }
    layout = LayerLayout(
        layouts, length, "full" if whole else "state", state_length=None if whole else length
    )

    def read(name: str, *numbers: slice) -> Bits:
        found = _numbers(source, parts[name])
        return np.ascontiguousarray(found).reshape(-1)[numbers[0]] if numbers else found[np.newaxis]

    return Layer.unread(layout, read)


def _numbers(source: Source, tensor: Tensor) -> Bits:
    """[rows, width] of a tensor."""
    form = dtypes.get(tensor.dtype)
    shape = (tensor.width, tensor.rows) if tensor.transposed else (tensor.rows, tensor.width)
    data = source.read(tensor.offset, shape[0] * shape[1] * form.itemsize)
    bits: Bits = np.frombuffer(data, form.uint).reshape(shape)
    return bits.T if tensor.transposed else bits


def _rest(source: Source, places: list[Tensor], length: int) -> Layer:
    """The layer of what is not in the tensors."""
    gaps, at = [], 0
    for tensor in sorted(places):
        gaps.append((at, tensor.offset))
        at = tensor.offset + tensor.rows * tensor.width * dtypes.get(tensor.dtype).itemsize
    gaps.append((at, source.size))
    rest = b"".join(bytes(source.read(begin, end - begin)) for begin, end in gaps)
    table = np.array([(t.offset, t.transposed) for t in places], "<u8")
    parts = {PLACES: np.frombuffer(table.tobytes(), np.uint8)}
    whole = np.frombuffer(rest, np.uint8)
    for i in range(0, max(len(rest), 1), _PIECE):
        parts[f"{REST}_{i // _PIECE}" if i else REST] = whole[i : i + _PIECE]
    layouts = {name: PartLayout("bytes", bits.shape, "d") for name, bits in parts.items()}
    return Layer(parts, LayerLayout(layouts, length, "state", state_length=length))


def _origin(slot: Slot) -> Origin:
    return Origin(
        architecture=slot.architecture,
        software={"llama.cpp": f"{slot.kind}, version {slot.version}"},
    )


# --- writing -------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A tensor, or bytes between two, at its place in the file."""

    length: int
    layer: int
    part: str
    transposed: bool = False
    begin: int = 0
    """Where the bytes begin in the rest."""

    def read(self, snapshot: Snapshot) -> Iterator[memoryview]:
        if self.part == REST:
            yield from _between(snapshot.layers[self.layer], self.begin, self.length)
            return
        bits = snapshot.layers[self.layer].once(self.part)[0]
        yield np.ascontiguousarray(bits.T if self.transposed else bits).data.cast("B")


def _pieces(snapshot: Snapshot) -> Iterator[_Piece]:
    """All of the file, in its order."""
    if not is_of_slot(snapshot):
        raise UsageError("the snapshot is of no saved session of llama.cpp")
    last = len(snapshot.layers) - 1
    places = _places(snapshot)
    parts = [found for found in snapshot.layout.parts() if found[0] < last]
    if len(parts) != len(places):
        raise UsageError("the snapshot is not whole: layers of the saved session are missing")
    tensors = [(*place, *part) for place, part in zip(places.tolist(), parts, strict=True)]
    at = begin = 0
    for offset, transposed, i, name, part in sorted(tensors, key=itemgetter(0)):
        if offset < at or transposed > 1 or part.axes not in ("htd", "hrd") or part.shape[0] != 1:
            raise CorruptError("the saved session's tensors do not lie one after the other")
        if offset > at:
            yield _Piece(offset - at, last, REST, begin=begin)
        begin, at = begin + offset - at, offset + part.nbytes
        yield _Piece(part.nbytes, i, name, bool(transposed))
    left = _rest_length(snapshot.layers[last]) - begin
    if left < 0:
        raise CorruptError("the saved session lacks bytes between its tensors")
    yield _Piece(left, last, REST, begin=begin)


def _places(snapshot: Snapshot) -> NDArray[np.uint64]:
    table = np.ascontiguousarray(snapshot.layers[-1].once(PLACES))
    if table.dtype != np.uint8 or table.size % 16:
        raise CorruptError("the places of the saved session's tensors make no sense")
    return table.reshape(-1).view("<u8").reshape(-1, 2)


def _rest_parts(layer: Layer) -> list[str]:
    return [name for name in layer.layout.parts if name.startswith(REST)]


def _rest_length(layer: Layer) -> int:
    return sum(layer.layout.parts[name].numbers for name in _rest_parts(layer))


def _between(layer: Layer, begin: int, length: int) -> Iterator[memoryview]:
    """Bytes of the rest, from `begin` on."""
    for name in _rest_parts(layer):
        size = layer.layout.parts[name].numbers
        if begin < size and length:
            bits = np.ascontiguousarray(layer.part(name)).reshape(-1)[begin : begin + length]
            yield bits.data.cast("B")
            length -= bits.size
        begin = max(begin - size, 0)
