"""The .kvz file: a header, an index of blocks, blocks, and checksums of everything.

docs/format.md is the format, byte by byte. This module cuts a snapshot into blocks, hands them
to a codec, and reads back just the blocks that are asked for. It knows no codec by name.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import checksum, dtypes
from kvzip.choice import auto
from kvzip.codec import Codec, Coded, Context, get_codec
from kvzip.codecs._native import Output
from kvzip.container.index import ALIGNMENT, RECORD, Entry, Index, aligned, entries, entry_count
from kvzip.container.source import OpenFile, Source, Stream, is_url, open_source
from kvzip.dtypes import Bits
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    ProfileError,
    UnsupportedError,
    UsageError,
)
from kvzip.files import replacing
from kvzip.options import integer, json_value
from kvzip.profile import Profile
from kvzip.snapshot import (
    PARTS,
    Layer,
    LayerLayout,
    Layout,
    Origin,
    Part,
    Snapshot,
    batched,
)

if TYPE_CHECKING:
    from kvzip.container.on_device import DeviceSnapshot

MAGIC = b"\x89KVZ\r\n\x1a\n"
VERSION = 0
MAX_HEADER = 1 << 26
MAX_ENTRIES = 1 << 26
WRITER = "kvzip 0.1.0"

_PREAMBLE = struct.Struct("<8sHHIIIQQ")
_FIRST_READ = 48 << 10
_NOTHING = slice(0)
_ZEROS = bytes(ALIGNMENT)

T = TypeVar("T")


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file says of itself before its index; JSON, with docs/header.schema.json as schema."""

    layout: Layout
    origin: Origin
    codec: dict[str, Any]
    """The codec's name under "id", and its settings."""
    block_tokens: int
    """Tokens in a block; the last block of a layer may hold fewer."""
    writer: str
    profile: str | None = None
    """SHA-256 of the profile that the reader needs."""
    token_ids: bool = False
    """Whether the ids of all tokens follow the header."""
    token_ids_sha256: str | None = None
    """SHA-256 of the ids as little-endian uint32, when the ids themselves are withheld."""


def header_schema() -> dict[str, Any]:
    """The JSON schema of the header."""
    schema: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(msgspec.json.schema(Header)))
    return schema


def default_block_tokens(layout: Layout, codec: Codec) -> int:
    """The power of two of tokens, 256 to 4,096, whose blocks come nearest to what suits the codec.

    Smaller ones let a reader cut finer, and cost more for what each block starts with.
    """
    form = dtypes.get(layout.dtype)
    shapes = [layer.shape(part) for layer in layout.layers for part in PARTS]
    token = max((math.prod((*s[:-2], s[-1])) * form.itemsize for s in shapes), default=0)
    return 1 << min(max(round(math.log2(codec.block_bytes / max(token, 1))), 8), 12)


def _batched_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (1, *shape)


def _check_profile_kind(profile: Any) -> None:
    if profile is not None and not isinstance(profile, Profile):
        kind = type(profile).__name__
        raise ProfileError(f"a {kind} is no Profile: Profile.load reads one from a file")


def thread_count(threads: int) -> int:
    """`threads`, or the number of cores this process may use when it is 0."""
    return integer("threads (0: all cores)", threads, 0, 1024) or len(os.sched_getaffinity(0))


def _two(tokens: Any) -> tuple[int, int]:
    """A range of tokens, as a caller gives it."""
    try:
        begin, end = tokens
    except (TypeError, ValueError):
        raise UsageError(f"tokens is {tokens!r}: it must be (first, last + 1)") from None
    return integer("the first of tokens", begin), integer("the end of tokens", end)


def _cut(place: _Place, cut: LayerLayout, part: Part) -> Bits:
    """Of the numbers of a part those of a cut, in its shape."""
    if place.given is not None:
        return place.given
    begin = cut.first - place.first
    array = place.array
    if array.shape[2] != cut.stored:
        array = array[:, :, begin : begin + cut.stored]
    return array if len(cut.shape(part)) == 4 else array[0]


def _in_order(jobs: Iterable[Callable[[], T]], workers: int, ahead: int) -> Iterator[T]:
    """Results of `jobs` in their order, at most `ahead` of them running or waiting. One of the
    workers is the thread that asks: it would wait otherwise, and systems are slow to move one of
    the others to its core."""
    if workers == 1:
        for job in jobs:
            yield job()
        return
    pending: deque[tuple[Future[T], Callable[[], T]]] = deque()

    def oldest() -> T:
        for at in range(len(pending)):
            future, job = pending[at]
            if pending[0][0].done():
                break
            if future.cancel():
                pending[at] = _finished(job), job
        return pending.popleft()[0].result()

    pool = ThreadPoolExecutor(workers - 1)
    try:
        for job in jobs:
            if len(pending) >= ahead:
                yield oldest()
            pending.append((pool.submit(job), job))
        while pending:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(job: Callable[[], T]) -> Future[T]:
    """A job's result, done here and now."""
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


def _after(before: Future[Any] | None, job: Callable[[], T], pool: ThreadPoolExecutor) -> Future[T]:
    """A job's result; begun when `before` is done, and failed if that is."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    def begin(done: Future[Any]) -> None:
        error = done.exception()
        if error is not None:
            future.set_exception(error)
            return
        with suppress(RuntimeError):  # nobody wants it any more
            pool.submit(work)

    if before is None:
        pool.submit(work)
    else:
        before.add_done_callback(begin)
    return future


class _Encoded(NamedTuple):
    """What becomes of one entry of the index, with the checksums of its bytes and of the raw
    ones."""

    row: int
    data: bytes
    stored: int
    raw: int

    @classmethod
    def of_tables(cls, row: int, data: bytes) -> _Encoded:
        digest = checksum.of_bytes(data)
        return cls(row, data, digest, digest)


# --- writing -------------------------------------------------------------------------------


class Sink(Protocol):
    """What a file is written to."""

    def write(self, data: bytes, /) -> int: ...
    def seek(self, position: int, /) -> int: ...
    def tell(self) -> int: ...


class _Encoder:
    """One snapshot on its way into one file."""

    def __init__(
        self,
        snapshot: Snapshot,
        spec: str | Codec | Mapping[str, Any],
        profile: Profile | None,
        block_tokens: int | None,
        store_token_ids: bool,
    ):
        given: Any = snapshot
        if not isinstance(given, Snapshot):
            kind = type(given).__name__
            raise UsageError(f"a {kind} is no Snapshot: Snapshot.load reads one from a file")
        _check_profile_kind(profile)
        snapshot.check()
        codec = auto.resolve(spec, snapshot.layout, None if profile is None else profile.codec)
        if block_tokens is None:
            block_tokens = default_block_tokens(snapshot.layout, codec)
        block_tokens = integer("block_tokens", block_tokens, 1, 2**31 - 1)
        if codec.needs_profile and profile is None:
            raise ProfileError(f"codec {codec.codec_id!r} needs a profile: pass profile=")
        self.snapshot, self.codec, self.profile = snapshot, codec, profile
        self.form = dtypes.get(snapshot.dtype)
        ids = snapshot.token_ids
        digest = None
        if ids is not None and not store_token_ids:
            import hashlib

            digest = hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()
        self.ids = np.atleast_2d(ids) if ids is not None and store_token_ids else None
        self.header = Header(
            layout=snapshot.layout,
            origin=snapshot.origin,
            codec=json_value("the codec's settings", codec.get_config()),
            block_tokens=block_tokens,
            writer=WRITER,
            profile=None if profile is None else profile.id,
            token_ids=self.ids is not None,
            token_ids_sha256=digest,
        )
        self.packed_header = _checked_header(self.header, codec)
        self.packed_ids = b"" if self.ids is None else _packed(self.ids)
        if len(self.packed_ids) >= 2**32:
            raise UsageError(f"{len(self.packed_ids):,} bytes of token ids do not go into a file")
        count = entry_count(snapshot.layout, block_tokens)
        if count > MAX_ENTRIES:
            raise UsageError(f"{count:,} blocks do not go into a file: give a larger block_tokens")
        self.entries = list(entries(snapshot.layout, block_tokens))

    def context(self, entry: Entry, **more: Any) -> Context:
        layer = self.snapshot.layout.layers[entry.layer]
        begin = layer.first + entry.start
        return Context(
            dtype=self.form,
            layer=entry.layer,
            part=entry.part,
            start=begin,
            origin=self.snapshot.origin,
            token_ids=_ids_of(self.ids, begin, begin + entry.tokens),
            profile=self.profile,
            **more,
        )

    def part(self, entry: Entry) -> Bits:
        """All that the snapshot holds of the entry's layer and part."""
        return batched(self.snapshot.layers[entry.layer].part(entry.part))

    def tables(self, entry: Entry, whole: Bits) -> tuple[bytes, Any]:
        """The tables of one layer's K or V as stored, and as blocks use them."""
        context = self.context(entry)
        made = self.codec.make_tables(whole, context)
        return made, self.codec.load_tables(memoryview(made), whole.shape, context)

    def encode_block(self, row: int, whole: Bits, **more: Any) -> _Encoded:
        entry = self.entries[row]
        block = _block(entry, whole)
        data = self.codec.encode(block, self.context(entry, **more))
        return _Encoded(row, data, checksum.of_bytes(data), checksum.of_numbers(block))

    def encode_part(self, rows: Sequence[int]) -> list[_Encoded]:
        """One layer's K or V: its tables, then its blocks."""
        entry = self.entries[rows[0]]
        whole = batched(self.snapshot.layers[entry.layer].once(entry.part))
        made, tables = self.tables(entry, whole)
        return [
            _Encoded.of_tables(rows[0], made),
            *(self.encode_block(row, whole, tables=tables) for row in rows[1:]),
        ]

    def encode_chain(
        self, rows: Sequence[int], tables: Mapping[tuple[int, Part], Any]
    ) -> list[_Encoded]:
        """The same tokens of layer after layer."""
        scratch: dict[str, Any] = {}
        earlier: dict[tuple[int, Part], Bits] = {}
        blocks = []
        for row in rows:
            entry = self.entries[row]
            key, block = (entry.layer, entry.part), _block(entry, self.part(entry))
            need = {k: earlier[k] for k in self.codec.needs(*key) if k in earlier}
            more = {"tables": tables[key], "earlier": need, "scratch": scratch}
            blocks.append((block, self.context(entry, **more)))
            earlier[key] = block
        found = zip(rows, self.codec.encode_chain(blocks), blocks, strict=True)
        return [
            _Encoded(row, data, checksum.of_bytes(data), checksum.of_numbers(block))
            for row, data, (block, _) in found
        ]

    def encoded(self, workers: int) -> Iterator[_Encoded]:
        """All entries in the order of the file."""
        if self.codec.independent:
            groups: list[list[int]] = []
            for row, entry in enumerate(self.entries):
                if entry.tables:
                    groups.append([])
                groups[-1].append(row)
            jobs = ((lambda g=group: self.encode_part(g)) for group in groups)
            for results in _in_order(jobs, workers, 2 * workers):
                yield from results
            return
        made: dict[int, bytes] = {}
        tables: dict[tuple[int, Part], Any] = {}
        chains: dict[int, list[int]] = {}
        for row, entry in enumerate(self.entries):
            if entry.tables:
                key = entry.layer, entry.part
                made[row], tables[key] = self.tables(entry, self.part(entry))
            else:
                stop = self.snapshot.layout.layers[entry.layer].first + entry.start + entry.tokens
                chains.setdefault(stop, []).append(row)
        done = {row: _Encoded.of_tables(row, data) for row, data in made.items()}
        jobs = ((lambda c=chain: self.encode_chain(c, tables)) for chain in chains.values())
        for results in _in_order(jobs, workers, 2 * workers):
            done |= {result.row: result for result in results}
        for row in range(len(self.entries)):
            yield done.pop(row)

    def write(self, sink: Sink, threads: int, progress: Callable[[int], None] | None) -> int:
        """Write the whole file to a seekable sink; return its length."""
        header, ids = self.packed_header, self.packed_ids
        index = np.zeros(len(self.entries), RECORD)
        end = _PREAMBLE.size + len(header) + len(ids) + index.nbytes
        offset = aligned(end)
        base = sink.tell()
        sink.seek(base + offset)
        for row, data, stored, raw in self.encoded(thread_count(threads)):
            entry = self.entries[row]
            index[row] = entry.record(offset, len(data), stored, raw)
            sink.write(data)
            sink.write(bytes(aligned(len(data)) - len(data)))
            offset += aligned(len(data))
            if progress is not None and not entry.tables:
                layer = self.snapshot.layout.layers[entry.layer]
                *outer, _, dim = layer.shape(entry.part)
                progress(math.prod(outer) * entry.tokens * dim * self.form.itemsize)
        start = _PREAMBLE.pack(MAGIC, VERSION, 0, len(header), len(index), len(ids), offset, 0)[:-8]
        rest = header + ids + index.tobytes() + bytes(aligned(end) - end)
        sink.seek(base)
        sink.write(start + struct.pack("<Q", checksum.of_bytes(start + rest)) + rest)
        sink.seek(base + offset)
        return offset


def _block(entry: Entry, whole: Bits) -> Bits:
    """An entry's numbers, of all of its layer's and part's."""
    return whole[:, :, entry.start : entry.start + entry.tokens]


def _checked_header(header: Header, codec: Codec) -> bytes:
    """The header as it is stored. Raises UsageError unless a reader will get the same from it,
    and UnsupportedError if it will not find the codec."""
    data = msgspec.json.encode(header)
    if len(data) > MAX_HEADER:
        raise UsageError(f"the header would have {len(data):,} bytes, above {MAX_HEADER:,}")
    try:
        found = msgspec.json.decode(data, type=Header)
    except msgspec.MsgspecError as error:
        raise UsageError(f"the header could not be read again: {error}") from None
    if found != header:
        raise UsageError("the header would be read as another one")
    if (known := get_codec(found.codec)).get_config() != codec.get_config():
        raise UnsupportedError(f"{codec!r} would be read as {known!r}")
    return data


def _ids_of(ids: NDArray[Any] | None, start: int, stop: int) -> NDArray[Any] | None:
    if ids is None or (start == 0 and stop == ids.shape[1]):
        return ids
    return ids[:, start:stop]


def _packed(ids: NDArray[Any]) -> bytes:
    """Token ids in as few bytes each, 1 to 4, as the greatest needs."""
    width = max(1, -(-int(ids.max(initial=0)).bit_length() // 8))
    return ids.astype("<u4").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()


def _unpacked(data: memoryview, shape: tuple[int, ...]) -> NDArray[Any]:
    """The token ids of `shape`, uint32."""
    count = math.prod(shape)
    width, rest = divmod(len(data), max(count, 1))
    if rest or not (1 <= width <= 4 if count else width == 0):
        raise FormatError("the token ids do not fit the number of tokens")
    if width != 3:
        return np.frombuffer(data, f"<u{max(width, 1)}").astype(np.uint32).reshape(shape)
    ids = np.zeros((count, 4), np.uint8)
    ids[:, :width] = np.frombuffer(data, np.uint8).reshape(count, width)
    return ids.view("<u4").astype(np.uint32, copy=False).reshape(shape)


def encode(
    snapshot: Snapshot,
    codec: str | Codec | Mapping[str, Any] = "channel",
    profile: Profile | None = None,
    threads: int = 0,
    *,
    block_tokens: int | None = None,
    store_token_ids: bool = True,
) -> bytes:
    """A snapshot as the bytes of a .kvz file.

    `codec`: a name, a name with settings ("zstd:level=9"), a config, a Codec, or "auto": what loads
    soonest over a link (:mod:`kvzip.choice.auto`; "auto:gbps=10"). `profile`: what
    a codec has learned of the model; the reader needs the same. `threads`: 0 for all cores.
    `block_tokens`: tokens in a block, the smallest unit a reader decodes; by default what makes
    blocks of a size that suits the codec. `store_token_ids=False`
    stores a hash of the token ids instead of the ids.
    """
    encoder = _Encoder(snapshot, codec, profile, block_tokens, store_token_ids)
    room = max_encoded_size(snapshot, encoder.codec, block_tokens=encoder.header.block_tokens)
    sink = Output(room)
    encoder.write(sink, threads, None)
    blob: bytes = sink.take()
    return blob


def write(
    path: str | os.PathLike[str],
    snapshot: Snapshot,
    codec: str | Codec | Mapping[str, Any] = "channel",
    profile: Profile | None = None,
    threads: int = 0,
    *,
    block_tokens: int | None = None,
    store_token_ids: bool = True,
    progress: Callable[[int], None] | None = None,
) -> int:
    """As :func:`encode`, into a file that appears whole or not at all; its length in bytes.

    Memory is bounded by a few layers. `progress` is called with raw bytes as they are done.
    """
    encoder = _Encoder(snapshot, codec, profile, block_tokens, store_token_ids)
    with replacing(path) as file:
        return encoder.write(file, threads, progress)


def max_encoded_size(
    layout: Layout | Snapshot,
    codec: str | Codec | Mapping[str, Any] = "channel",
    *,
    block_tokens: int | None = None,
) -> int:
    """An upper bound of the file's length in bytes, for callers that allocate first.

    `layout`: a snapshot, or a Layout with the dtype and the shapes of all layers. From a bare
    Layout the bound holds for an origin of up to 4 KiB as JSON.
    """
    codec = get_codec(codec)
    snapshot = layout if isinstance(layout, Snapshot) else None
    shapes: Layout = layout.layout if isinstance(layout, Snapshot) else layout
    form = dtypes.get(shapes.dtype)
    if block_tokens is None:
        block_tokens = default_block_tokens(shapes, codec)
    block_tokens = integer("block_tokens", block_tokens, 1, 2**31 - 1)
    size = _PREAMBLE.size + entry_count(shapes, block_tokens) * RECORD.itemsize
    header = Header(
        shapes,
        snapshot.origin if snapshot else Origin(),
        json_value("the codec's settings", codec.get_config()),
        block_tokens,
        WRITER,
        profile="0" * 64,
        token_ids_sha256="0" * 64,
    )
    batch = max((s.k[0] if len(s.k) == 4 else 1 for s in shapes.layers), default=1)
    ids = (
        snapshot.token_ids.size
        if snapshot and snapshot.token_ids is not None
        else batch * shapes.tokens
    )
    size = aligned(size + len(msgspec.json.encode(header)) + 4 * ids + (0 if snapshot else 4096))
    for entry in entries(shapes, block_tokens):
        shape = shapes.layers[entry.layer].shape(entry.part)
        if entry.tables:
            size += aligned(codec.max_tables_size(_batched_shape(shape), form))
        else:
            numbers = entry.tokens * int(np.prod((*shape[:-2], shape[-1]), dtype=np.int64))
            size += aligned(codec.max_encoded_size(numbers * form.itemsize))
    return size


# --- reading -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Info:
    """What is known of a file before a block is decoded."""

    header: Header
    encoded_bytes: int
    raw_bytes: int
    numbers: int

    @property
    def ratio(self) -> float:
        """Raw bytes over the bytes of the whole file."""
        return self.raw_bytes / self.encoded_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits of the whole file over how many numbers it holds."""
        return 8 * self.encoded_bytes / max(self.numbers, 1)


# A file has many of these two. They are part of no cycle: the collector need not look at them.


class _Place(msgspec.Struct, gc=False):
    """Where a part's numbers go: [batch, heads, tokens, dim], from one position on."""

    array: Bits
    first: int
    given: Bits | None = None
    """The array in the layer's own shape, where it is what was asked for and nothing else."""


class _Target(Coded, gc=False):
    """A block on its way out of a file."""

    row: int
    tables: memoryview
    """As they are stored."""
    beside: Bits | None = None
    """Where those of its numbers belong that were asked for, if not in `out` itself."""
    cut: slice = _NOTHING
    """Which of the block's tokens those are."""


class _Request(NamedTuple):
    """Layers to decode, what is wanted of each, and where it goes."""

    wanted: Sequence[int]
    cuts: Mapping[int, LayerLayout]
    places: Mapping[tuple[int, Part], _Place]


_Job = Callable[[], Sequence[int]]
"""Decodes rows of the index and returns them."""
_Tables = dict[tuple[int, Part], tuple[memoryview, Any]]
"""By layer and part the tables, as they are stored and as blocks use them."""


class _Chain(NamedTuple):
    """How far the blocks of one token range are decoded, and what the next one may need."""

    at: int
    done: dict[tuple[int, Part], Bits]
    scratch: dict[str, Any]


class Reader:
    """An open .kvz file; reads and decodes what is asked for, and nothing else."""

    _thorough = False
    """Whether stored bytes are checked even where the numbers decoded from them are."""

    def __init__(self, source: Source, profile: Profile | None = None, threads: int = 0):
        _check_profile_kind(profile)
        self._source, self._profile, self._threads = source, profile, thread_count(threads)
        self._chains: dict[int, _Chain] = {}
        self._read_index()

    def _read_index(self) -> None:
        size = self._source.size
        first = self._source.read(0, min(size, _FIRST_READ))
        if bytes(first[: len(MAGIC)]) != MAGIC[: len(first)] or not len(first):
            raise FormatError("this is not a .kvz file")
        if len(first) < _PREAMBLE.size:
            raise CorruptError("the file is cut short in its first bytes")
        _, version, flags, header_length, count, ids_length, length, digest = _PREAMBLE.unpack_from(
            first
        )
        if version != VERSION:
            raise FormatError(
                f"the file has format version {version}; this is a reader of version {VERSION}"
            )
        if flags or header_length > MAX_HEADER:
            raise FormatError("the file's header is out of bounds")
        if length != size:
            problem = "cut short" if size < length else "longer than it says"
            raise CorruptError(f"the file is {problem}: {size:,} bytes of {length:,}")
        ids_at = _PREAMBLE.size + header_length
        index_at = ids_at + ids_length
        index_end = index_at + count * RECORD.itemsize
        end = aligned(index_end)
        if end > size:
            raise FormatError("the file's index is out of bounds")
        start = first[:end] if end <= len(first) else self._source.read(0, end)
        if checksum.of_bytes(start[: _PREAMBLE.size - 8], start[_PREAMBLE.size :]) != digest:
            raise CorruptError("the header or the index is damaged: its checksum does not match")
        if any(start[index_end:end]):
            raise FormatError("the bytes behind the index are not zeros")
        try:
            self.header = msgspec.json.decode(start[_PREAMBLE.size : ids_at], type=Header)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"the header makes no sense: {error}") from None
        self.layout = self.header.layout
        if self.header.block_tokens < 1:
            raise FormatError("the header makes no sense: block_tokens is below 1")
        self._form = dtypes.get(self.layout.dtype)
        try:
            self._codec = get_codec(self.header.codec)
        except UsageError as error:
            raise FormatError(f"the header makes no sense: {error}") from None
        records = start[index_at:index_end]
        self._index = Index(records, end, size, self.layout, self.header.block_tokens)
        self._index.check_sizes(self.layout, self._codec)
        self.token_ids = self._token_ids(start[ids_at:index_at])

    def _token_ids(self, data: memoryview) -> NDArray[Any] | None:
        if not self.header.token_ids:
            if len(data):
                raise FormatError("there are token ids that the header does not tell of")
            return None
        shape = self.layout.layers[0].k if self.layout.layers else (1,)
        rows = (shape[0],) if len(shape) == 4 else ()
        return _unpacked(data, (*rows, self.layout.tokens))

    # --- what it is ------------------------------------------------------------------------

    @cached_property
    def info(self) -> Info:
        return Info(self.header, self._source.size, self.layout.raw_bytes, self.layout.numbers)

    @property
    def codec(self) -> Codec:
        return self._codec

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.layout.layers)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that `open` opened."""
        _close(self._source)

    def check_stored(self) -> None:
        """Read the whole file and compare the checksums of its bytes, without decoding."""
        for row in range(len(self._index)):
            self._check_stored(row, self._stored(row))

    def read_ahead(self, spans: Sequence[tuple[int, int]]) -> None:
        """Tell the source what decoding positions ``spans[i]`` of layer i, layer after layer,
        will read, if it is one that can fetch ahead (`announce`)."""
        announce = getattr(self._source, "announce", None)
        if announce is None:
            return
        rows: set[int] = set()
        for i, span in enumerate(spans):
            cuts = {i: self.layout.layers[i].cut(*span)}
            chains = [self._rows([i], cuts)] if self._codec.independent else self._plan([i], cuts)
            for row in itertools.chain(*chains):
                rows |= {row, self._index.rows[self._index.key[row]].start}
        announce([self._index.span(row) for row in sorted(rows)])

    # --- decoding --------------------------------------------------------------------------

    def layer(self, i: int) -> Layer:
        """Keys and values of layer i, every token it holds."""
        found: Snapshot = self.decode(layers=[i])
        return found.layers[0]

    def tokens(self, start: int, stop: int) -> Snapshot:
        """All layers, with what they hold of positions start to stop."""
        found: Snapshot = self.decode(tokens=(start, stop))
        return found

    def decode(
        self,
        out: Sequence[tuple[Any, Any]] | None = None,
        layers: Sequence[int] | None = None,
        tokens: tuple[int, int] | None = None,
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        device: Any = None,
        stream: Any = None,
        pages: Any = None,
    ) -> Any:
        """Layers (default: all) and positions (default: all) of the file, bit-exact; a Snapshot.

        `out`: one (K, V) pair of writable arrays or CPU tensors for each layer asked for, of the
        layers' shapes (with `tokens`, of the cut shapes), any strides; filled and used instead of
        new memory. Layers of the result are in the order asked for. `progress` is called with
        raw bytes as they are done.

        `device`: "cuda", "cuda:1" or a torch device, to decode there, into new tensors or into
        `out`, tensors of that device; the result is a DeviceSnapshot (docs/gpu.md). It is there
        when this returns. `stream`: the stream whose earlier work comes first (default: torch's
        current one). `pages`: of a paged cache, which page has each run of positions, [pages] or
        [batch, pages]; `out` is then K and V of each layer, [pages, tokens of a page, heads, dim],
        in any strides but that the numbers of a head lie side by side.

        Raises CorruptError when any block read is damaged, ProfileError when the file needs a
        profile and has not got it, UnsupportedError without such a device.
        """
        if device is not None and str(device) != "cpu":
            return self._decode_on_device(
                device, out, layers, tokens, threads, progress, stream, pages
            )
        if pages is not None:
            raise UsageError("pages: only with device=")
        request = self._request(layers, tokens, out)
        workers = thread_count(threads) if threads is not None else self._threads
        jobs = self._jobs(request, workers)
        at_once = min(self._at_once(workers), len(jobs) or 1)
        for done in _in_order((job for _, job in jobs), at_once, 2 * workers):
            if progress is not None:
                progress(sum(self._asked(row, request.cuts) for row in done))
        return self._snapshot(request)

    def _decode_on_device(
        self,
        device: Any,
        out: Sequence[tuple[Any, Any]] | None,
        layers: Sequence[int] | None,
        tokens: tuple[int, int] | None,
        threads: int | None,
        progress: Callable[[int], None] | None,
        stream: Any,
        pages: Any,
    ) -> DeviceSnapshot:
        """As `decode`, on a device."""
        if pages is not None and out is None:
            raise UsageError("pages: only with out=, the cache that they are pages of")
        from kvzip.container import (
            on_device,  # here, since few need it and it takes a while to import
        )

        wanted, cuts = self._cuts(layers, tokens)
        document = on_device.Document(
            layout=self.layout,
            form=self._form,
            codec=self._codec,
            index=self._index,
            source=self._source,
            tables=self._loaded,
            context=self._context,
            blame=lambda row: self._fill([self._target(row, {}, {})]),
            decode=lambda layers, out: self.decode(out, layers, tokens, threads),
            extents=self._extents,
        )
        found = on_device.decode(document, device, wanted, cuts, out, pages, stream, progress)
        ids, origin = self._ids_up_to(cuts), self.header.origin
        return on_device.DeviceSnapshot(found, self.layout.dtype, ids, origin)

    def in_turn(
        self,
        requests: Iterable[tuple[Sequence[int], tuple[int, int]]],
        threads: int | None = None,
    ) -> Generator[Snapshot, None, None]:
        """For each (layers, positions) in turn what :meth:`decode` gives. The next one's is begun
        while one is waited for or used, so that threads do not wait for each other in between:
        tokens whose layers are done go on to the next layers. What is closed before its end leaves
        the rest, and does not wait for what is begun."""
        workers = thread_count(threads) if threads is not None else self._threads
        pool, wait = ThreadPoolExecutor(self._at_once(workers)), True
        last: dict[int | None, Future[Any]] = {}
        begun: deque[tuple[_Request, list[Future[Any]]]] = deque()

        def finished() -> Snapshot:
            request, futures = begun.popleft()
            for future in futures:
                future.result()
            return self._snapshot(request)

        try:
            for layers, tokens in requests:
                request = self._request(layers, tokens)
                futures = []
                for chain, job in self._jobs(request, workers):
                    future = _after(last.get(chain), job, pool)
                    if chain is not None:
                        last[chain] = future
                    futures.append(future)
                begun.append((request, futures))
                if len(begun) > 1:
                    yield finished()
            while begun:
                yield finished()
        except GeneratorExit:
            wait = False
            raise
        finally:
            pool.shutdown(wait, cancel_futures=True)

    def _request(
        self,
        layers: Sequence[int] | None,
        tokens: tuple[int, int] | None,
        out: Sequence[tuple[Any, Any]] | None = None,
    ) -> _Request:
        wanted, cuts = self._cuts(layers, tokens)
        return _Request(wanted, cuts, self._places(wanted, cuts, out))

    def _cuts(
        self, layers: Sequence[int] | None, tokens: tuple[int, int] | None
    ) -> tuple[list[int], dict[int, LayerLayout]]:
        """The layers that are asked for, and what of each."""
        self._check_profile()
        wanted = (
            list(range(len(self))) if layers is None else [self._layer_number(i) for i in layers]
        )
        begin, end = (0, self.layout.tokens) if tokens is None else _two(tokens)
        if not 0 <= begin <= end <= self.layout.tokens:
            raise UsageError(f"tokens {begin}:{end} are not within 0:{self.layout.tokens}")
        whole = {i: self.layout.layers[i] for i in wanted}
        cuts = whole if tokens is None else {i: w.cut(begin, end) for i, w in whole.items()}
        return wanted, cuts

    def _at_once(self, workers: int) -> int:
        """How many jobs there may be at a time: one of a codec that has threads of its own."""
        return 1 if self._codec.independent and self._codec.threaded else workers

    def _jobs(self, request: _Request, workers: int) -> list[tuple[int | None, _Job]]:
        """What decodes a request. A job's number, if it has one: those of the same number in other
        requests go on from each other."""
        wanted, cuts, places = request
        tables: _Tables = {}
        if not self._codec.independent:
            return [
                (chain[0], partial(self._decode_chain, chain, cuts, places, tables))
                for chain in self._plan(wanted, cuts)
            ]
        rows = self._rows(wanted, cuts)
        # A few to a job: handing over a job takes as long as a block of the fastest codec.
        size, inside = max(1, min(16, len(rows) // (4 * workers))), 1
        if self._codec.threaded:
            # One job after the other: they decode what comes as it comes.
            size, inside = 64, workers
        groups = [rows[at : at + size] for at in range(0, len(rows), size)]
        return [
            (None, partial(self._decode_rows, group, places, tables, inside)) for group in groups
        ]

    def _snapshot(self, request: _Request) -> Snapshot:
        """What was asked for, once it is decoded."""
        wanted, cuts, places = request
        result = []
        for i in wanted:
            cut = cuts[i]
            k, v = _cut(places[i, "k"], cut, "k"), _cut(places[i, "v"], cut, "v")
            result.append(Layer(k, v, cut))
        return Snapshot(result, self.layout.dtype, self._ids_up_to(cuts), self.header.origin)

    def _ids_up_to(self, cuts: Mapping[int, LayerLayout]) -> NDArray[Any] | None:
        """The ids of all positions up to the end of cuts, since layers hold positions, too."""
        if self.token_ids is None:
            return None
        end = max((cut.cumulative_length for cut in cuts.values()), default=0)
        # Without layers there is no batch.
        return self.token_ids[..., :end] if cuts else self.token_ids.reshape(-1)[:0]

    def _layer_number(self, i: int) -> int:
        i = integer("a layer's number", i)
        if not -len(self) <= i < len(self):
            raise UsageError(f"there is no layer {i}: the file has {len(self)}")
        return i % len(self)

    def _check_profile(self) -> None:
        need, have = self.header.profile, getattr(self._profile, "id", None)
        if need is not None and need != have:
            found = "none was given" if have is None else f"the one given is {have}"
            raise ProfileError(f"the file was written with profile {need}; {found}")

    def _places(
        self,
        wanted: Sequence[int],
        cuts: Mapping[int, LayerLayout],
        out: Sequence[tuple[Any, Any]] | None,
    ) -> dict[tuple[int, Part], _Place]:
        """Where the numbers of each part go: into `out`, or into memory for the whole blocks that
        hold them, of which the result is a view, unless it is the smaller part of them."""
        places: dict[tuple[int, Part], _Place] = {}
        if out is not None:
            if len(out) != len(wanted):
                raise UsageError(f"out has {len(out)} layers, not {len(wanted)}")
            dtype = self.layout.dtype
            for i, (k, v) in zip(wanted, out, strict=True):
                cut = cuts[i]
                first = cut.first
                for part, given, shape in zip(PARTS, (k, v), (cut.k, cut.v), strict=True):
                    array, _ = dtypes.as_bits(given, dtype)
                    if array.shape != shape or not array.flags.writeable:
                        raise UsageError(f"out for layer {i}: want a writable array of {shape}")
                    places[i, part] = _Place(batched(array), first, array)
            return places
        # One piece of memory for all: a large one gets large pages, and faults less often.
        shapes, firsts = self._extents(wanted, cuts)
        sizes = list(map(math.prod, shapes))
        try:
            memory = np.empty(sum(sizes), self._form.uint)
        except MemoryError:
            raise KVZipError(f"not enough memory for {sum(sizes):,} numbers") from None
        at = 0
        for n, (shape, numbers) in enumerate(zip(shapes, sizes, strict=True)):
            array = memory[at : at + numbers].reshape(shape)
            places[wanted[n // 2], PARTS[n % 2]] = _Place(array, firsts[n // 2])
            at += numbers
        return places

    def _extents(
        self, wanted: Sequence[int], cuts: Mapping[int, LayerLayout]
    ) -> tuple[list[tuple[int, ...]], list[int]]:
        """Of memory for the layers, K then V of each: shapes, [batch, heads, tokens, dim]; and the
        first position that each layer is to have there."""
        shapes, firsts = [], []
        for i in wanted:
            layer, cut, size = self.layout.layers[i], cuts[i], self.header.block_tokens
            first, end = cut.first, cut.cumulative_length
            if cut is not layer:
                whole = max(layer.first, first // size * size)
                after = min(layer.cumulative_length, -(-end // size) * size)
                if 2 * cut.stored >= after - whole:  # less is not worth keeping all for
                    first, end = whole, after
            firsts.append(first)
            for part in PARTS:
                *outer, _, dim = _batched_shape(layer.shape(part))
                shapes.append((*outer, end - first, dim))
        return shapes, firsts

    def _rows(self, wanted: Sequence[int], cuts: Mapping[int, LayerLayout]) -> list[int]:
        """Rows of the blocks to decode, where none needs another."""
        rows: list[int] = []
        for i in wanted:
            cut = cuts[i]
            whole = cut is self.layout.layers[i]
            for part in PARTS:
                blocks = self._index.rows[i, part][1:]
                rows += blocks if whole else self._within(blocks, cut.first, cut.cumulative_length)
        return rows

    def _plan(self, wanted: Sequence[int], cuts: Mapping[int, LayerLayout]) -> list[list[int]]:
        """Rows of the blocks to decode where blocks need others, as chains: rows of one chain in
        order, chains in any."""
        needed: dict[tuple[int, Part], None] = {}

        def require(key: tuple[int, Part]) -> None:
            if key not in needed:
                for other in self._codec.needs(*key):
                    require(other)
                needed[key] = None

        for i in wanted:
            for part in PARTS:
                require((i, part))
        chains: dict[int, list[int]] = {}
        begin = min((c.first for c in cuts.values()), default=0)
        end = max((c.cumulative_length for c in cuts.values()), default=0)
        for key in sorted(needed):
            for row in self._within(self._index.rows[key][1:], begin, end):
                # Blocks of a chain end at the same token, wherever their layers begin.
                stop = self._index.position[row] + self._index.tokens[row]
                chains.setdefault(stop, []).append(row)
        return list(chains.values())

    def _within(self, rows: Iterable[int], begin: int, end: int) -> list[int]:
        """Those of the blocks that hold any of these positions."""
        position, tokens = self._index.position, self._index.tokens
        return [r for r in rows if position[r] < end and position[r] + tokens[r] > begin]

    def _tables(self, key: tuple[int, Part]) -> tuple[memoryview, Any]:
        """A part's tables as they are stored and as blocks use them."""
        row = self._index.rows[key].start
        data = self._stored(row)
        try:
            return data, self._loaded(key, data)
        except CorruptError as error:
            self._check_stored(row, data)
            raise CorruptError(f"{self._name(row)}: {error}") from None

    def _loaded(self, key: tuple[int, Part], data: memoryview) -> Any:
        """A part's tables as blocks use them."""
        i, part = key
        begin = self._index.position[self._index.rows[key].start]
        context = Context(self._form, i, part, begin, self.header.origin, None, self._profile)
        shape = _batched_shape(self.layout.layers[i].shape(part))
        return self._codec.load_tables(data, shape, context)

    def _context(self, row: int, tables: Any) -> Context:
        """The context of a block."""
        (layer, part), begin = self._index.key[row], self._index.position[row]
        ids = _ids_of(self._ids_by_row, begin, begin + self._index.tokens[row])
        origin, profile = self.header.origin, self._profile
        return Context(self._form, layer, part, begin, origin, ids, profile, tables)

    @cached_property
    def _ids_by_row(self) -> NDArray[Any] | None:
        return None if self.token_ids is None else np.atleast_2d(self.token_ids)

    def _stored(self, row: int) -> memoryview:
        """The stored bytes of an entry. The numbers' checksum tells whether they are good, that of
        the stored bytes, what is to blame. Taking both always would cost an eighth of the fastest
        codec's time. Neither is of the zeros behind them, which are looked at here."""
        length = self._index.length[row]
        taken = self._source.read(*self._index.span(row))
        data = taken[:length]
        if bytes(taken[length:]) != _ZEROS[: len(taken) - length]:
            raise CorruptError(
                f"{self._name(row)}: it is damaged: the bytes behind it are not zeros"
            )
        if self._thorough:
            self._check_stored(row, data)
        return data

    def _check_stored(self, row: int, data: memoryview) -> None:
        if checksum.of_bytes(data) != self._index.stored_checksum[row]:
            raise CorruptError(f"{self._name(row)} is damaged: its checksum does not match")

    def _blame(self, target: _Target) -> None:
        """Raise CorruptError if it is stored bytes that are wrong."""
        self._check_stored(self._index.rows[self._index.key[target.row]].start, target.tables)
        self._check_stored(target.row, target.data)

    def _name(self, row: int) -> str:
        index = self._index
        layer, part = index.key[row]
        start = index.position[row]
        what = "the tables of " if row == index.rows[layer, part].start else ""
        return f"{what}layer {layer} {part}, tokens {start}:{start + index.tokens[row]}"

    def _target(
        self, row: int, places: Mapping[tuple[int, Part], _Place], tables: _Tables
    ) -> _Target:
        """Everything to decode a block, straight into place if there is place for all of it."""
        index = self._index
        key, begin, tokens = index.key[row], index.position[row], index.tokens[row]
        layer, part = key
        out = beside = None
        cut = _NOTHING
        place = places.get(key)
        if place is not None:
            array = place.array
            offset, room = begin - place.first, array.shape[2]
            if room == tokens and not offset:
                out = array
            elif offset >= 0 and offset + tokens <= room:
                out = array[:, :, offset : offset + tokens]
            elif offset + tokens > 0 and offset < room:
                cut = slice(max(0, -offset), min(tokens, room - offset))
                beside = array[:, :, offset + cut.start : offset + cut.stop]
        if out is None:
            shape = _batched_shape(self.layout.layers[layer].shape(part))
            out = np.empty((*shape[:2], tokens, shape[3]), self._form.uint)
        found = tables.get(key)
        if found is None:
            found = tables[key] = self._tables(key)
        stored, loaded = found
        context = self._context(row, loaded)
        return _Target(self._stored(row), out, context, row, stored, beside, cut)

    def _asked(self, row: int, cuts: Mapping[int, LayerLayout]) -> int:
        """How many raw bytes of a block were asked for."""
        layer, part = self._index.key[row]
        if layer not in cuts:
            return 0
        cut, begin = cuts[layer], self._index.position[row]
        end = min(begin + self._index.tokens[row], cut.cumulative_length)
        *outer, _, dim = cut.shape(part)
        return max(0, end - max(begin, cut.first)) * math.prod(outer) * dim * self._form.itemsize

    def _fill(self, targets: Iterable[_Target], threads: int = 1) -> None:
        """Decode blocks and check them."""
        work: list[_Target] = []
        unprepared: list[CorruptError] = []

        def blocks() -> Iterator[Coded]:
            try:
                for target in targets:
                    work.append(target)
                    yield target
            except CorruptError as error:
                unprepared.append(error)
                raise

        try:
            found = self._codec.decode_many(blocks(), threads)
        except CorruptError as error:
            if unprepared:
                raise
            if len(work) > 1:
                for target in [*work, *targets]:
                    self._fill([target])  # one of them tells more
                return
            self._blame(work[0])
            raise CorruptError(f"{self._name(work[0].row)}: {error}") from None
        expected = [self._index.raw_checksum[target.row] for target in work]
        if found != expected:
            wrong = next(t for t, a, b in zip(work, found, expected, strict=True) if a != b)
            self._blame(wrong)
            raise CorruptError(
                f"{self._name(wrong.row)} decodes to other numbers than were encoded"
            )
        for target in work:
            if target.beside is not None:
                target.beside[...] = target.out[:, :, target.cut]

    def _decode_rows(
        self,
        rows: Sequence[int],
        places: Mapping[tuple[int, Part], _Place],
        tables: _Tables,
        threads: int,
    ) -> Sequence[int]:
        """Decode blocks that need no other; return them."""
        self._fill((self._target(row, places, tables) for row in rows), min(threads, len(rows)))
        return rows

    def _decode_chain(
        self,
        rows: Sequence[int],
        cuts: Mapping[int, LayerLayout],
        places: Mapping[tuple[int, Part], _Place],
        tables: _Tables,
    ) -> Sequence[int]:
        """Decode blocks of which each may need those before it; return them."""
        chain = self._resume(rows, cuts)
        for row in rows[chain.at :]:
            key = self._index.key[row]
            earlier = {k: chain.done[k] for k in self._codec.needs(*key) if k in chain.done}
            target = self._target(row, places, tables)
            target.context.earlier, target.context.scratch = earlier, chain.scratch
            self._fill([target])
            chain.done[key] = target.out
            for old in [k for k in chain.done if self._last_use.get(k, 0) <= row]:
                del chain.done[old]
        self._chains[rows[0]] = chain._replace(at=len(rows))
        return rows

    @cached_property
    def _last_use(self) -> dict[tuple[int, Part], int]:
        """The last row whose block needs that part of a layer."""
        last = {}
        for row, (layer, part) in enumerate(self._index.key):
            for key in self._codec.needs(layer, part):
                last[key] = row
        return last

    def _resume(self, rows: Sequence[int], cuts: Mapping[int, LayerLayout]) -> _Chain:
        """Where to begin with a chain: after what was decoded before, when only layers that come
        after are wanted. So layer after layer costs no more than all at once."""
        chain = self._chains.pop(rows[0], None)
        if chain is None or any(self._index.key[r][0] in cuts for r in rows[: chain.at]):
            return _Chain(0, {}, {})
        return chain


def stated_length(data: Any) -> int:
    """The length that a .kvz file states in its first bytes, for files that lie in a larger
    buffer. Raises FormatError, CorruptError."""
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise FormatError("this is not a .kvz file")
    if len(data) < _PREAMBLE.size:
        raise CorruptError("the file is cut short in its first bytes")
    return int(_PREAMBLE.unpack_from(data)[6])


def open(file: Any, profile: Profile | None = None, threads: int = 0) -> Reader:
    """Open a .kvz file: a path, a URL (``https://``, signed ones too, ``s3://``, ``file://``),
    bytes or another buffer, any binary file object (a member of an archive, a compressed file), a
    tensor of uint8, or a `Source`.

    Reads the header and the index. Raises FormatError, CorruptError, or the OSError of the path;
    UsageError for what cannot be read; StoreError for a URL that does not answer.
    """
    if isinstance(file, str) and is_url(file):
        from kvzip.store.bucket import open_url

        return open_url(file, profile, threads)
    source = open_source(file)
    try:
        return Reader(source, profile, threads)
    except BaseException:
        _close(source)
        raise


def _close(source: Source) -> None:
    """Close what was opened to be read, and nothing that a caller opened."""
    if isinstance(source, (OpenFile, Stream)):
        source.close()


def decode(
    file: Any,
    profile: Profile | None = None,
    threads: int = 0,
    *,
    out: Sequence[tuple[Any, Any]] | None = None,
    layers: Sequence[int] | None = None,
    tokens: tuple[int, int] | None = None,
    device: Any = None,
    stream: Any = None,
    pages: Any = None,
) -> Any:
    """The snapshot in a .kvz file, bit-exact; `file` as for :func:`open`, the rest, and the result,
    as for :meth:`Reader.decode`."""
    with open(file, profile, threads) as reader:
        return reader.decode(out, layers, tokens, device=device, stream=stream, pages=pages)


def info(file: Any) -> Info:
    """What a .kvz file says of itself, without decoding a block."""
    with open(file) as reader:
        return reader.info


def verify(
    file: Any,
    profile: Profile | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Info:
    """Check every checksum and decode everything, one layer in memory at a time.

    Returns what :func:`info` does; raises CorruptError, FormatError or ProfileError.
    """
    with open(file, profile, threads) as reader:
        reader._thorough = True
        for i in range(len(reader)):
            reader.decode(layers=[i], progress=progress)
        return reader.info
