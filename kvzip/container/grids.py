"""Parts on a grid: a codec that stores narrow codes by another codec, and the search for grids.

docs/format.md has the bytes, kvzip/grids/spec.md the arithmetic.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, get_args

import msgspec
import numpy as np

from kvzip import dtypes
from kvzip.codec import Codec, Context, get_codec
from kvzip.container.index import Key, aligned
from kvzip.dtypes import Bits, DType
from kvzip.errors import CorruptError, UnsupportedError
from kvzip.grids import HALVES, WIDE, Found, Grid, Narrow, find, narrow, suspicions, widen
from kvzip.layout import Kind, Origin, PartLayout
from kvzip.snapshot import Layer
from kvzip.version import newer

_LEAST = 4096
"""Raw bytes of the smallest part that a grid is looked for in."""
_KNOWN = "found"
"""Under which a part on its grid is kept from its tables to its blocks."""
_CODES, _REST, _OFF = "codes", "rest", "off"
"""Under which the codecs of codes, of other channels and of whole parts keep what they do."""
_PLAIN, _ON_GRID = 0, 1
_SCALES: tuple[Any, ...] = (None, "e8m0", "bf16", "fp32")
_SCALES_BY = "planes:mode=byte,order=channel,coder=zstd"
"""What stores scales (docs/format.md)."""
_HEAD = struct.Struct("<BB4Q")
_LENGTH = struct.Struct("<Q")
_OFF_GRID = _LENGTH.pack((1 << 64) - 1)
"""What a part's tables begin with if the part takes less without its grid."""
_WINDOW = 64
_PLACES, _LINES = 2, 512
_WORTH = 0.95
"""A grid must save so much of what the codec makes of a sample without it."""
_ELSEWHERE, _PLACES_ELSEWHERE = 1 << 16, 16
"""How many numbers beside the sample are tried on its grid, in how many places."""
_STRETCH, _STRETCHES = 1 << 20, 32
"""A part is stored both ways to compare, in so many stretches of so many raw bytes at most."""


class _Tables(NamedTuple):
    first: int
    """Position of the part's first token."""
    codes: Any
    rest: Any
    off_grid: bool = False
    """Whether the part is stored without its grid; then `rest` is of all channels."""


class GridCodec(Codec):
    """Stores blocks of a part whose numbers are on a grid.

    `codes` stores the codes, and `rest` the channels beside the grid, as they are; scales go
    through `planes`. A block that is not on the grid after all is stored as it is. It is made
    from a file's header, and has no name of its own.
    """

    codec_id: ClassVar[str] = "grid"

    def __init__(self, grid: Grid, codes: Codec, rest: Codec, block_lines: int = 1 << 20):
        """`block_lines`: the tokens, or rows, of a block, by which a writer compares."""
        self._block_lines = block_lines
        self.grid, self.codes, self.rest = grid, codes, rest
        self._narrow, self._scales = _form(grid.narrow), get_codec(_SCALES_BY)

    def get_config(self) -> dict[str, Any]:
        return {
            "id": self.codec_id,
            "grid": msgspec.to_builtins(self.grid),
            "codes": self.codes.get_config(),
            "rest": self.rest.get_config(),
        }

    def takes(self, part: PartLayout, kind: Any, name: str) -> bool:
        _, _, lines, dim = part.block_shape
        (start, stop), (height, width) = self.grid.channels, self.grid.group
        return (
            self.grid.wide == part.dtype
            and 0 <= start < stop <= dim
            and 1 <= height <= lines
            and 1 <= width <= stop - start
            and (self.grid.narrow in HALVES) == (self.grid.scale is None)
            and (self.grid.wide == "fp32" or self.grid.scale is not None)
            and self.codes.takes(codes_layout(self.grid, part), kind, name)
            and self.rest.takes(part, kind, name)
        )

    # --- blocks ----------------------------------------------------------------------------

    def encode(self, block: Bits, context: Context) -> bytes:
        tables: _Tables = context.tables
        if tables.off_grid:
            return self.rest.encode(block, self._off_grid(context, tables.rest))
        begin = context.start - tables.first
        found = context.scratch[_KNOWN].cut(begin, begin + block.shape[2])
        narrower = self._context(context, self._narrow, tables.codes, _CODES)
        codes = self.codes.encode(found.codes, narrower)
        scales = rest = b""
        if found.scales is not None:
            form = dtypes.get(found.grid.scale)
            scales = self._scales.encode(found.scales, self._context(context, form, None))
        if found.rest.size:
            wide = self._context(context, context.dtype, tables.rest, _REST)
            rest = self.rest.encode(found.rest, wide)
        positions = found.positions.astype(_positions(block.size)).tobytes()
        head = _HEAD.pack(
            _ON_GRID,
            _SCALES.index(found.grid.scale),
            len(codes),
            len(scales),
            len(rest),
            len(found.positions),
        )
        data = b"".join((head, codes, scales, rest, positions, found.exceptions.tobytes()))
        return data if len(data) <= block.nbytes else bytes([_PLAIN]) + block.tobytes()

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        if context.tables.off_grid:
            context = self._context(context, context.dtype, context.tables.rest)
            self.rest.decode(data, out, context)
            return
        if len(data) and data[0] == _PLAIN:
            if len(data) != 1 + out.nbytes:
                raise CorruptError(f"{len(data)} bytes for a block of {1 + out.nbytes}")
            out[...] = np.frombuffer(data[1:], out.dtype).reshape(out.shape)
            return
        if len(data) and data[0] != _ON_GRID:
            raise UnsupportedError(newer(f"a block of kind {data[0]} on a grid"))
        if len(data) < _HEAD.size:
            raise CorruptError("a block of a grid without its head")
        _, scale, *lengths, count = _HEAD.unpack_from(data)
        if scale >= len(_SCALES):
            raise UnsupportedError(newer(f"scales of format {scale} on a grid"))
        places, numbers = _positions(out.size), out.dtype
        sizes = [*lengths, count * places.itemsize, count * numbers.itemsize]
        if _HEAD.size + sum(sizes) != len(data):
            raise CorruptError("a block of a grid whose lengths are not its own")
        pieces, at = [], _HEAD.size
        for size in sizes:
            pieces.append(data[at : at + size])
            at += size
        codes, scales, rest, positions, exceptions = pieces
        grid = msgspec.structs.replace(self.grid, scale=_SCALES[scale])
        # How many tokens of its group came before the block's first.
        first = (context.start - context.tables.first) % grid.group[0]
        narrowed = self._codes(codes, out, context)
        found = Found(
            grid,
            narrowed,
            self._decoded_scales(scales, grid, first, out, context),
            self._rest(rest, out, context),
            # By numpy 1 the sum of an array and a number is of the array's format.
            np.frombuffer(positions, places).astype(np.uint64)
            + np.uint64(first * narrowed.size // out.shape[2]),
            np.frombuffer(exceptions, numbers),
        )
        widen(found, out, first)

    def _codes(self, data: memoryview, out: Bits, context: Context) -> Bits:
        start, stop = self.grid.channels
        codes = np.empty((*out.shape[:-1], stop - start), self._narrow.uint)
        self.codes.decode(data, codes, self._context(context, self._narrow, context.tables.codes))
        return codes

    def _decoded_scales(
        self, data: memoryview, grid: Grid, first: int, out: Bits, context: Context
    ) -> Bits | None:
        if grid.scale is None:
            return None
        *front, tokens, _ = out.shape
        start, stop = grid.channels
        groups = -(-(first + tokens) // grid.group[0]), -(-(stop - start) // grid.group[1])
        form = dtypes.get(grid.scale)
        scales = np.empty((*front, *groups), form.uint)
        self._scales.decode(data, scales, self._context(context, form, None))
        return scales

    def _rest(self, data: memoryview, out: Bits, context: Context) -> Bits:
        start, stop = self.grid.channels
        rest = np.empty((*out.shape[:-1], out.shape[-1] - (stop - start)), out.dtype)
        if rest.size:
            context = self._context(context, context.dtype, context.tables.rest)
            self.rest.decode(data, rest, context)
        elif len(data):
            raise CorruptError("bytes of channels that there are not")
        return rest

    def _context(
        self, context: Context, form: DType, tables: Any, keeps: str | None = None
    ) -> Context:
        """The context of a piece. `keeps`: under which its codec keeps what it wants from tables to
        blocks, apart from what the codecs of other pieces do."""
        scratch = {} if keeps is None else context.scratch.setdefault(keeps, {})
        return msgspec.structs.replace(context, dtype=form, tables=tables, scratch=scratch)

    def _off_grid(self, context: Context, tables: Any) -> Context:
        """The context of a part that is stored without the grid."""
        return self._context(context, context.dtype, tables, _OFF)

    def max_encoded_size(self, raw_bytes: int) -> int:
        return max(1 + raw_bytes, self.rest.max_encoded_size(raw_bytes))

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        codes = self.codes.max_decoded_size(encoded_bytes, self._narrow) // self._narrow.itemsize
        rest = self.rest.max_decoded_size(encoded_bytes, dtype)
        return max(codes * dtype.itemsize + rest, encoded_bytes)

    # --- tables ----------------------------------------------------------------------------

    def make_tables(self, part: Bits, context: Context) -> bytes:
        found = context.scratch.get(_KNOWN)
        if found is not None:
            return self._tables_on_grid(found, context)
        found = context.scratch[_KNOWN] = narrow(part, self.grid)
        on, off = self._tables_on_grid(found, context), self._tables_off_grid(part, context)
        if self._is_smaller(part, found, on, off, context):
            return on
        del context.scratch[_KNOWN]
        return _OFF_GRID + off

    def _tables_on_grid(self, found: Found, context: Context) -> bytes:
        narrower = self._context(context, self._narrow, None, _CODES)
        codes, rest = self.codes.make_tables(found.codes, narrower), b""
        if found.rest.size:
            wide = self._context(context, context.dtype, None, _REST)
            rest = self.rest.make_tables(found.rest, wide)
        return _LENGTH.pack(len(codes)) + codes + rest

    def _tables_off_grid(self, part: Bits, context: Context) -> bytes:
        return self.rest.make_tables(part, self._off_grid(context, None))

    def _is_smaller(
        self, part: Bits, found: Found, on: bytes, off: bytes, context: Context
    ) -> bool:
        """Whether the part takes less on its grid, with tables `on`, than without, with tables
        `off`. The sample that chose the grid may be unlike the rest; so some of all is stored both
        ways."""
        exceptions = found.positions.size * (_positions(part.size).itemsize + part.itemsize)
        if exceptions > part.nbytes // 2:
            return False
        tables = self.load_tables(memoryview(on), part.shape, context)
        plain = self.rest.load_tables(memoryview(off), part.shape, context)
        lines = part.shape[2]
        size = min(self._block_lines, max(1, lines * _STRETCH // part.nbytes))
        starts = range(0, lines, size)
        step = -(-len(starts) // _STRETCHES)
        saved = 0
        for i in starts[::step]:
            block = part[:, :, i : i + size]
            at = msgspec.structs.replace(context, start=context.start + i, tables=tables)
            without = self.rest.encode(block, self._off_grid(at, plain))
            saved += aligned(len(without)) - aligned(len(self.encode(block, at)))
        return saved * step > len(on) - len(off)

    @staticmethod
    def is_unused(data: Any) -> bool:
        """Whether tables that begin with these bytes are of a part that is stored without its
        grid."""
        return bytes(data[: _LENGTH.size]) == _OFF_GRID

    def load_tables(self, data: memoryview, shape: tuple[int, ...], context: Context) -> _Tables:
        if self.is_unused(data):
            plain = self.rest.load_tables(data[_LENGTH.size :], shape, context)
            return _Tables(context.start, None, plain, off_grid=True)
        start, stop = self.grid.channels
        length = _LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else -1
        end = _LENGTH.size + length
        if not _LENGTH.size <= end <= len(data):
            raise CorruptError("tables of a grid that are cut short")
        front, channels = shape[:-1], shape[-1] - (stop - start)
        narrower = self._context(context, self._narrow, None)
        codes = self.codes.load_tables(data[_LENGTH.size : end], (*front, stop - start), narrower)
        rest = None
        if channels:
            rest = self.rest.load_tables(data[end:], (*front, channels), context)
        elif end != len(data):
            raise CorruptError("tables of channels that there are not")
        return _Tables(context.start, codes, rest)

    def max_tables_size(self, shape: tuple[int, ...], dtype: DType) -> int:
        codes = self.codes.max_tables_size(shape, self._narrow)
        return _LENGTH.size + codes + self.rest.max_tables_size(shape, dtype)

    @staticmethod
    def most_tables(rest: Codec, part: PartLayout, kind: Kind, name: str) -> int:
        """An upper bound of what the tables of a part take, whatever grid it is on."""
        shape, forms = part.block_shape, {_form(narrow) for narrow in get_args(Narrow)}
        narrowed = [msgspec.structs.replace(part, dtype=form.name) for form in forms]
        codes = (taker(rest, p, kind, name).max_tables_size(shape, p.form) for p in narrowed)
        return _LENGTH.size + max(codes) + rest.max_tables_size(shape, part.form)


def taker(codec: Codec, part: PartLayout, kind: Kind, name: str) -> Codec:
    """The codec, or the first of those that it falls back to, that takes a layer's part. Raises
    UnsupportedError when none of them does."""
    found, tried = codec, [codec.codec_id]
    while not found.takes(part, kind, name):
        if found.fallback is None or found.fallback in tried:
            raise UnsupportedError(
                f"no codec of {', '.join(tried)} takes a part {name!r} in a layer of kind {kind}, "
                f"which is {part.dtype} {list(part.shape)}"
            )
        tried.append(found.fallback)
        found = get_codec(found.fallback)
    return found


def codes_layout(grid: Grid, part: PartLayout) -> PartLayout:
    """The layout of a part's codes on a grid."""
    start, stop = grid.channels
    return _without(msgspec.structs.replace(part, dtype=_form(grid.narrow).name), stop - start)


def _without(part: PartLayout, dim: int) -> PartLayout:
    """The part with so many channels."""
    at = part.axes.find("d")
    if at < 0:
        return part
    return msgspec.structs.replace(part, shape=(*part.shape[:at], dim, *part.shape[at + 1 :]))


def _form(narrow: Narrow) -> DType:
    """The format in which codecs see codes: their own, where it is one of ours."""
    return dtypes.get("uint8" if narrow in ("int4", "fp4_e2m1") else narrow)


def _positions(numbers: int) -> np.dtype[Any]:
    """The integers that the positions of exceptions in a block of so many numbers are stored as."""
    return np.dtype("<u4" if numbers < 1 << 32 else "<u8")


# --- the search ----------------------------------------------------------------------------


def may_use_grids(codec: Codec, profile: Any) -> bool:
    """Whether parts may be stored on grids: not where blocks are predicted from others, nor by a
    profile, which knows the numbers as they are."""
    return codec.independent and profile is None


def may_be_on_grid(part: PartLayout) -> bool:
    """Whether a grid is looked for in a part."""
    return part.dtype in WIDE and part.nbytes >= _LEAST


def find_grids(
    layers: Sequence[Layer], codec_of: Callable[[Key], Codec], block_tokens: int
) -> dict[Key, GridCodec]:
    """The parts that are on grids, with the codec for each.

    A few numbers of each part are looked at, and a sample of those that look as if they were on a
    grid. `codec_of`: the codec that stores a part without a grid. `block_tokens`: the tokens of
    a block.
    """
    found: dict[Key, GridCodec] = {}
    known: dict[str, Grid] = {}
    shared: dict[GridCodec, GridCodec] = {}  # parts that are alike have one
    for i, layer in enumerate(layers):
        for name, part in layer.layout.parts.items():
            if not (may_be_on_grid(part) and _looks_narrow(layer, name)):
                continue
            sample = _sample(layer.block(name))
            on_grid = find(sample, part.dtype, known.get(name))
            if on_grid is None:
                continue
            if not _is_elsewhere(on_grid.grid, layer.block(name)):
                continue
            grid = known[name] = on_grid.grid
            rest = codec_of((i, name))
            codes = taker(rest, codes_layout(grid, part), layer.kind, name)
            codec = GridCodec(grid, codes, rest, block_tokens)
            context = Context(part.form, i, name, 0, Origin())
            on = _coded(codec, sample, context, on_grid)
            if on <= _WORTH * _coded(rest, sample, context):
                found[i, name] = shared.setdefault(codec, codec)
    return found


def _looks_narrow(layer: Layer, name: str) -> bool:
    """Whether some neighbouring tokens in the middle of a part, of as few groups as may be, look as
    if they were on a grid. A part that lies in a file is read once for it."""
    part = layer.layout.parts[name]
    batch, heads, lines, _ = part.block_shape
    start = max(0, (lines - _WINDOW) // 2) // _WINDOW * _WINDOW
    window = layer.lines(name, batch * heads // 2, start, min(lines, start + _WINDOW))
    return bool(suspicions(window, part.dtype))


def _sample(block: Bits) -> Bits:
    """A few runs of tokens of [batch, heads, tokens, dim], each of another row, as [1, runs,
    tokens, dim]. A run begins where a group does."""
    batch, heads, lines, _ = block.shape
    count = min(lines, _LINES)
    runs, rows = lines // count - 1, batch * heads - 1
    places = {(rows * i // _PLACES, runs * i // _PLACES) for i in range(_PLACES + 1)}
    pieces = [
        block[divmod(row, heads)][run * count : (run + 1) * count] for row, run in sorted(places)
    ]
    return np.stack(pieces)[np.newaxis]


def _is_elsewhere(grid: Grid, block: Bits) -> bool:
    """Whether a grid seems to save anything in places all over [batch, heads, tokens, dim], beside
    the sample that it was found in. A part that is unlike its sample costs no long search."""
    batch, heads, lines, dim = block.shape
    count, group = min(lines, max(1, _ELSEWHERE // (_PLACES_ELSEWHERE * dim))), grid.group[0]
    random = np.random.default_rng(1)
    pieces = []
    for place in range(_PLACES_ELSEWHERE):
        row = divmod(int(random.integers(batch * heads)), heads)
        # Evenly spread, and each somewhere within its stretch.
        start = int((place + random.random()) * (lines - count + 1) / _PLACES_ELSEWHERE)
        # Groups are counted from a piece's first token: it begins one, or lies within one.
        within = start % group
        start -= min(within, max(0, within + count - group))
        pieces.append(block[row][start : start + count])
    sample = np.stack(pieces)[np.newaxis]
    return narrow(sample, grid).nbytes < sample.nbytes


def _coded(codec: Codec, block: Bits, context: Context, known: Found | None = None) -> int:
    """How many bytes the codec makes of a block and its tables. `known`: the block on its grid."""
    context = msgspec.structs.replace(context, scratch={} if known is None else {_KNOWN: known})
    made = codec.make_tables(block, context)
    tables = codec.load_tables(memoryview(made), block.shape, context)
    return len(made) + len(codec.encode(block, msgspec.structs.replace(context, tables=tables)))
