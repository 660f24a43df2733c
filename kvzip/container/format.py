"""The beginning of a .kvz file: its first bytes, its header, the ids of its tokens.

docs/format.md is the format, byte by byte; the index that follows is :mod:`kvzip.container.index`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import checksum
from kvzip.codec import Codec, get_codec
from kvzip.container.grids import GridCodec, find_grids, taker
from kvzip.container.index import RECORD, Key, aligned
from kvzip.errors import CorruptError, FormatError, UnsupportedError, UsageError
from kvzip.grids import Grid
from kvzip.kept import cached_property
from kvzip.layout import Layout, Origin, PartLayout, StoredLayout
from kvzip.options import json_value, same_from_json
from kvzip.parsing import from_json, json_schema
from kvzip.snapshot import Layer
from kvzip.version import __version__, check_format, newer

MAGIC = b"\x89KVZ\r\n\x1a\n"
VERSION = 1
"""The version of the format."""
MAX_HEADER = 1 << 26
"""The most bytes that a header may have."""
MAX_ENTRIES = 1 << 26
"""The most entries that an index may have."""
WRITER = f"kvzip {__version__}"
"""What a header names as the file's writer."""

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
"""In hexadecimal, and nothing else: a store makes the names of files of it."""

C = TypeVar("C", bound=Codec)
N = TypeVar("N", "OtherCodec", "OnGrid")

_PREAMBLE = struct.Struct("<8sHHIIIQQ")
_CHECKSUM = struct.Struct("<Q")


# --- the first bytes -----------------------------------------------------------------------


class Preamble(NamedTuple):
    """The first 40 bytes of a file: how long all is that comes before the blocks, and a checksum
    of it."""

    header_length: int
    entries: int
    """How many entries the index has."""
    ids_length: int
    """Bytes of token ids, between the header and the index."""
    file_length: int
    checksum: int = 0
    """XXH3-64 of everything before the blocks but for these eight bytes."""

    @classmethod
    def read(cls, first: memoryview) -> Preamble:
        """The preamble in a file's first bytes. Raises FormatError, CorruptError."""
        found = cls(*_fields(first))
        if found.header_length > MAX_HEADER:
            raise FormatError("the file's header is out of bounds")
        if found.entries > MAX_ENTRIES:
            raise FormatError("the file's index is out of bounds")
        return found

    @property
    def blocks_at(self) -> int:
        """Where the first entry lies; the bytes between the index and it are zeros."""
        index = self.entries * RECORD.itemsize
        return aligned(_PREAMBLE.size + self.header_length + self.ids_length + index)

    def taken_apart(self, start: memoryview) -> tuple[memoryview, memoryview, memoryview]:
        """Header, token ids and index, which `start` holds, everything before the blocks. Raises
        CorruptError or FormatError unless it is as it was written."""
        begin = _PREAMBLE.size
        if checksum.of_bytes(start[: begin - _CHECKSUM.size], start[begin:]) != self.checksum:
            raise CorruptError("the header or the index is damaged: its checksum does not match")
        ids = begin + self.header_length
        index = ids + self.ids_length
        end = index + self.entries * RECORD.itemsize
        if any(start[end:]):
            raise FormatError("the bytes behind the index are not zeros")
        return start[begin:ids], start[ids:index], start[index:end]


def packed_start(header: bytes, ids: bytes, index: NDArray[Any], file_length: int) -> bytes:
    """Everything that comes before the blocks; the inverse of what a reader takes apart."""
    preamble = Preamble(len(header), len(index), len(ids), file_length)
    first = _PREAMBLE.pack(MAGIC, VERSION, 0, *preamble)[: -_CHECKSUM.size]
    rest = header + ids + index.tobytes()
    rest += bytes(preamble.blocks_at - _PREAMBLE.size - len(rest))
    return first + _CHECKSUM.pack(checksum.of_bytes(first + rest)) + rest


def start_length(header: int, ids: int, entries: int) -> int:
    """How many bytes come before the blocks, for a header and ids of so many bytes."""
    return Preamble(header, entries, ids, 0).blocks_at


def _fields(first: Any) -> tuple[int, ...]:
    """What the preamble says behind magic, version and flags. Raises FormatError, CorruptError."""
    if bytes(first[: len(MAGIC)]) != MAGIC[: len(first)] or not len(first):
        more = ""
        if b'"kvprofile"' in bytes(first[8:64]):  # as Profile.save writes it
            more = ": it is a profile, which is given as profile= or --profile"
        elif bytes(first[8:10]) == b'{"':  # how a safetensors file begins
            more = ": it may be a snapshot, of which kvzip encode makes one"
        raise FormatError(f"this is not a .kvz file{more}")
    if len(first) < _PREAMBLE.size:
        raise CorruptError("the file is cut short in its first bytes")
    _, version, flags, *rest = _PREAMBLE.unpack_from(first)
    check_format("the file", version, VERSION, "encode the snapshot anew")
    if flags:
        raise FormatError(newer(f"the file has the flags {flags:#06x}"))
    return tuple(rest)


def stated_length(data: Any) -> int:
    """The length in bytes that a .kvz file states in its first 40 bytes, for files that lie in a
    larger buffer. Raises FormatError, CorruptError."""
    return Preamble(*_fields(data)).file_length


def whole_length(first: bytearray) -> int | None:
    """The length that a file states in its first bytes, None if it takes more of them to tell.
    Raises FormatError for what is no .kvz file."""
    if len(first) < _PREAMBLE.size and first[: len(MAGIC)] == MAGIC[: len(first)]:
        return None
    return max(stated_length(first), _PREAMBLE.size)


# --- the header ----------------------------------------------------------------------------


class OtherCodec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A codec beside the file's own, and what it stores."""

    codec: dict[str, Any]
    """The codec's name under "id", and its settings."""
    parts: tuple[tuple[int, str], ...]
    """The parts that it stores: a layer's number, and the part's name."""


class OnGrid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A grid, and the parts whose numbers are on it."""

    grid: Grid
    codec: dict[str, Any]
    """The codec of the narrow codes; what is not on the grid, the part's own codec stores."""
    parts: tuple[tuple[int, str], ...]
    """A layer's number, and the part's name."""


class Header(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, dict=True
):
    """What a file says of itself before its index; JSON, with docs/header.schema.json as schema."""

    stored_layout: StoredLayout = msgspec.field(name="layout")
    origin: Origin
    codec: dict[str, Any]
    """The codec's name under "id", and its settings."""
    block_tokens: int
    """Tokens in a block; the last block of a layer may hold fewer."""
    writer: str
    profile: Sha256 | None = None
    """SHA-256 of the profile that the reader needs."""
    token_ids: bool = False
    """Whether the ids of all tokens follow the header."""
    token_ids_sha256: Sha256 | None = None
    """SHA-256 of the ids as little-endian uint32, when the ids themselves are withheld."""
    other_codecs: tuple[OtherCodec, ...] = ()
    """What stores the parts that `codec` does not take."""
    grids: tuple[OnGrid, ...] = ()
    """Which parts are stored in a narrower format."""

    @cached_property
    def layout(self) -> Layout:
        """The layout of the cache."""
        return self.stored_layout.layout()


def header_schema() -> dict[str, Any]:
    """The JSON schema of the header."""
    return json_schema(Header)


class Codecs:
    """The codecs of a file: its own, those of the parts that it does not take, and those of the
    parts that are on grids."""

    def __init__(
        self,
        own: Codec,
        others: Mapping[Key, Codec],
        grids: Mapping[Key, GridCodec] = MappingProxyType({}),
    ):
        self.own, self._others, self.grids = own, others, grids
        self._by_key: dict[Key, Codec] = {**others, **grids}

    def __getitem__(self, key: Key) -> Codec:
        return self._by_key.get(key, self.own)

    @cached_property
    def all(self) -> list[Codec]:
        """Each of them once."""
        return list({id(codec): codec for codec in (self.own, *self._by_key.values())}.values())

    @cached_property
    def threaded(self) -> bool:
        """Whether all of them decode blocks that need no other, with threads of their own."""
        return all(c.independent and c.threaded for c in self.all)

    @classmethod
    def choose(cls, codec: Codec, layout: Layout) -> Codecs:
        """`codec` for the parts that it takes, and for each other part the first of the codecs that
        it falls back to. Raises UnsupportedError when none of them takes it."""
        others: dict[Key, Codec] = {}
        for i, name, part in layout.parts():
            found = taker(codec, part, layout.layers[i].kind, name)
            if found is not codec:
                others[i, name] = _same(found, others.values())
        return cls(codec, others)

    def on_grids(self, layers: Sequence[Layer], block_tokens: int) -> Codecs:
        """These, but for the parts of these layers that are on grids. A block has `block_tokens`
        tokens."""
        grids = find_grids(layers, self.__getitem__, block_tokens)
        return Codecs(self.own, self._others, grids)

    @classmethod
    def of_header(cls, header: Header) -> Codecs:
        """The codecs that a header names. Raises UsageError, UnsupportedError."""
        own, layers = get_codec(header.codec), header.layout.layers
        if not header.other_codecs and not header.grids:
            stored = header.stored_layout
            for number, layer in enumerate(stored.distinct):
                for name, part in layer.parts.items():
                    if not own.takes(part, layer.kind, name):
                        raise _not_taken(own, stored.layers.index(number), name, part)
            return cls(own, {})
        others = {}
        for key, (other, _) in _by_part(header.layout, header.other_codecs).items():
            others[key] = other
        grids: dict[Key, GridCodec] = {}
        made: dict[tuple[int, int], GridCodec] = {}
        for key, (codes, on) in _by_part(header.layout, header.grids).items():
            rest = others.get(key, own)
            if (id(on), id(rest)) not in made:
                made[id(on), id(rest)] = GridCodec(on.grid, codes, rest)
            grids[key] = made[id(on), id(rest)]
        found = cls(own, others, grids)
        taken: set[tuple[int, int, str]] = set()
        for i, layer in enumerate(layers):
            for name, part in layer.parts.items():
                codec = found[i, name]
                same = id(codec), id(layer), name
                if same in taken:
                    continue
                taken.add(same)
                if not codec.takes(part, layer.kind, name):
                    raise _not_taken(codec, i, name, part)
        return found

    def described(self) -> tuple[OtherCodec, ...]:
        """The codecs beside the file's own, as a header names them."""
        return tuple(
            OtherCodec(json_value("the codec's settings", codec.get_config()), keys)
            for codec, keys in _parts_by_codec(self._others)
        )

    def described_grids(self) -> tuple[OnGrid, ...]:
        """The grids, as a header names them."""
        return tuple(
            OnGrid(c.grid, json_value("the codec's settings", c.codes.get_config()), keys)
            for c, keys in _parts_by_codec(self.grids)
        )


def _not_taken(codec: Codec, layer: int, name: str, part: PartLayout) -> UsageError:
    return UsageError(
        f"codec {codec.codec_id!r} does not take layer {layer} {name}, which is "
        f"{part.dtype} {list(part.shape)}"
    )


def _by_part(layout: Layout, named: Sequence[N]) -> dict[Key, tuple[Codec, N]]:
    """For each part that these name the codec that they name, and which of them it is. Raises
    UsageError for a part that there is not, or that is named twice."""
    found: dict[Key, tuple[Codec, N]] = {}
    for one in named:
        codec = get_codec(one.codec)
        for i, name in one.parts:
            layers = layout.layers
            if not 0 <= i < len(layers) or name not in layers[i].parts or (i, name) in found:
                raise UsageError(f"there is no layer {i} {name!r}, or it has two codecs")
            found[i, name] = codec, one
    return found


def _parts_by_codec(codecs: Mapping[Key, C]) -> list[tuple[C, tuple[Key, ...]]]:
    """Each of the codecs with the parts that it stores."""
    parts: dict[C, list[Key]] = {}
    for key, codec in codecs.items():
        parts.setdefault(codec, []).append(key)
    return [(codec, tuple(keys)) for codec, keys in parts.items()]


def _same(codec: Codec, known: Iterable[Codec]) -> Codec:
    """The codec that is known already and equal, or this one."""
    return next((other for other in known if other == codec), codec)


def packed_header(header: Header, codecs: Codecs) -> bytes:
    """The header as it is stored. Raises UsageError unless a reader will get the same from it,
    and UnsupportedError if it will not find a codec."""
    data = same_from_json("the header", header)
    if len(data) > MAX_HEADER:
        raise UsageError(f"the header would have {len(data):,} bytes, above {MAX_HEADER:,}")
    known, own = Codecs.of_header(header), codecs.own
    if known.own.get_config() != own.get_config():
        raise UnsupportedError(f"{own!r} would be read as {known.own!r}")
    return data


def unpacked_header(data: memoryview) -> tuple[Header, Codecs]:
    """The header in these bytes, and the codecs that it names. Raises FormatError,
    UnsupportedError."""
    try:
        header = from_json(data, Header)
        if header.block_tokens < 1:
            raise UsageError("block_tokens is below 1")
        return header, Codecs.of_header(header)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}{_by_another(data)}") from None
    except (CorruptError, FormatError, UsageError) as error:
        raise FormatError(f"the header makes no sense: {error}{_by_another(data)}") from None


class _Written(msgspec.Struct):
    """What is looked at in a header that has something which is not known here."""

    writer: str = ""


def _by_another(header: memoryview) -> str:
    """Which other version of the library wrote a header that cannot be read, if it says so."""
    try:
        writer = from_json(header, _Written).writer
    except (CorruptError, FormatError):
        return ""
    if writer in ("", WRITER):
        return ""
    return f"; it was written by {writer[:40]!r}, and this is {WRITER}: a newer kvzip may read it"


class PartInfo(msgspec.Struct, frozen=True):
    """What the parts of one name, in layers of one kind, take up in a file."""

    kind: str
    part: str
    dtype: str
    codec: str
    """The name of the codec that stores them, or their codes."""
    grid: str | None
    """The grid that they are stored on."""
    unused_grid: str | None
    """A grid that was found in a sample of them and does not pay: they are stored without it."""
    before_rope: bool
    """Whether they are keys that are stored as they were before RoPE."""
    layers: int
    """How many layers have such a part."""
    raw_bytes: int
    encoded_bytes: int
    """Tables and blocks, with the zeros between them."""


@dataclass(frozen=True)
class Info:
    """What is known of a file before a block is decoded."""

    header: Header
    encoded_bytes: int
    raw_bytes: int
    numbers: int
    parts: tuple[PartInfo, ...]
    """What takes up how much, in the order in which it comes first."""

    @property
    def ratio(self) -> float:
        """Raw bytes over the bytes of the whole file."""
        return self.raw_bytes / self.encoded_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits of the whole file over how many numbers it holds."""
        return 8 * self.encoded_bytes / max(self.numbers, 1)


# --- token ids -----------------------------------------------------------------------------


def packed_ids(ids: NDArray[Any]) -> bytes:
    """Token ids in as few bytes each, 1 to 4, as the greatest needs."""
    width = max(1, -(-int(ids.max(initial=0)).bit_length() // 8))
    return ids.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()


def unpacked_ids(data: memoryview, header: Header) -> NDArray[Any] | None:
    """The token ids that a file holds, uint32 [tokens] or [batch, tokens], or None when it holds
    none. Raises FormatError."""
    if not header.token_ids:
        if len(data):
            raise FormatError("there are token ids that the header does not tell of")
        return None
    shape = header.layout.ids_shape
    count = math.prod(shape)
    width, rest = divmod(len(data), max(count, 1))
    if rest or not (1 <= width <= 4 if count else width == 0):
        raise FormatError("the token ids do not fit the number of tokens")
    if width != 3:
        return np.frombuffer(data, f"<u{max(width, 1)}").astype(np.uint32).reshape(shape)
    ids = np.zeros((count, 4), np.uint8)
    ids[:, :width] = np.frombuffer(data, np.uint8).reshape(count, width)
    return ids.view("<u4").astype(np.uint32, copy=False).reshape(shape)


def ids_between(ids: NDArray[Any] | None, start: int, stop: int) -> NDArray[Any] | None:
    """The ids [batch, tokens] of positions start to stop, or None when there are none."""
    if ids is None or (start == 0 and stop == ids.shape[1]):
        return ids
    return ids[:, start:stop]
