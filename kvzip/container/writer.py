"""Writing a .kvz file: a snapshot is cut into blocks, and a codec makes bytes of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvzip import checksum, metrics
from kvzip.codec import Codec, Context, profile_for
from kvzip.codecs import _native
from kvzip.codecs.native.cuda.arrays import target_of
from kvzip.codecs.native.cuda.device import MemoryFullError, get_device, is_cpu
from kvzip.codecs.native.cuda.encoding import Numbers
from kvzip.container.format import (
    MAX_ENTRIES,
    WRITER,
    Codecs,
    Header,
    ids_between,
    packed_header,
    packed_ids,
    packed_start,
    start_length,
)
from kvzip.container.grids import GridCodec, may_be_on_grid, may_use_grids
from kvzip.container.index import ALIGNMENT, RECORD, Entry, Key, aligned, entries, entry_count
from kvzip.container.sink import Sink
from kvzip.dtypes import Bits, DeviceBits, DType
from kvzip.errors import ProfileError, UsageError
from kvzip.layout import Layout, Origin, StoredLayout
from kvzip.options import as_json, boolean, integer, json_value
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.workers import in_order, thread_count

_TOGETHER, _AHEAD = 32 << 20, 4
"""Bytes of numbers that a device encodes together, about: enough to be busy. And how many times as
much may lie encoded before it is written."""
_SHA256 = "0" * 64
_MOST_ORIGIN = 4096
"""Bytes of JSON that the origin of a bare layout is taken to have at most."""
_MOST_OF_GRID = 400
"""Bytes of JSON that say all of a grid but its codec and the part's name, and more."""


class Encoded(NamedTuple):
    """What becomes of one entry of the index."""

    row: int
    data: bytes | memoryview
    stored_checksum: int
    raw_checksum: int

    @classmethod
    def tables(cls, row: int, data: bytes) -> Encoded:
        """Tables have no raw numbers, so that both checksums are of their bytes."""
        digest = checksum.of_bytes(data)
        return cls(row, data, digest, digest)

    @classmethod
    def block(cls, row: int, data: bytes, numbers: Bits) -> Encoded:
        """A block has a checksum of its bytes, and one of the numbers that they stand for."""
        return cls(row, data, checksum.of_bytes(data), checksum.of_numbers(numbers))

    @classmethod
    def verbatim(cls, row: int, numbers: Bits) -> Encoded:
        """A block that is stored as it is, and not copied before it is written."""
        data = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data
        digest = checksum.of_bytes(data)
        return cls(row, data, digest, digest)


class Writer:
    """One snapshot on its way into one file, by one codec.

    Parts that the codec does not take are stored by those that it falls back to. Raises UsageError
    for what no file can hold, ProfileError when the codec needs a profile and has none,
    UnsupportedError when a reader would not find the codec.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        codec: Codec,
        profile: Profile | None = None,
        block_tokens: int | None = None,
        store_token_ids: bool = True,
        grids: bool = True,
        device: Any = None,
    ):
        """`device`: one that encodes what lies in its memory; None, or "cpu": the CPU does all."""
        snapshot.check()
        self._device = None if is_cpu(device) else get_device(device)
        store_token_ids = boolean("store_token_ids", store_token_ids)
        grids = boolean("grids", grids)
        block_tokens = _block_tokens(block_tokens, snapshot.layout, codec)
        if codec.needs_profile and profile is None:
            raise ProfileError(
                f"codec {codec.codec_id!r} needs a profile, which kvzip fit learns: give it as "
                "profile= or --profile"
            )
        profile = profile_for(codec, profile)
        self.snapshot, self.codec, self.profile = snapshot, codec, profile
        self._codecs = Codecs.choose(codec, snapshot.layout)
        if grids and may_use_grids(codec, profile):
            self._codecs = self._codecs.on_grids(snapshot.layers, block_tokens)
        ids = snapshot.token_ids
        digest = None
        if ids is not None and not store_token_ids:
            digest = hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()
        self._ids = np.atleast_2d(ids) if ids is not None and store_token_ids else None
        self.header = Header(
            stored_layout=StoredLayout.of(snapshot.layout),
            origin=snapshot.origin,
            codec=json_value("the codec's settings", codec.get_config()),
            block_tokens=block_tokens,
            writer=WRITER,
            profile=None if profile is None else profile.id,
            token_ids=self._ids is not None,
            token_ids_sha256=digest,
            other_codecs=self._codecs.described(),
            grids=self._codecs.described_grids(),
        )
        self._packed_header = packed_header(self.header, self._codecs)
        self._packed_ids = b"" if self._ids is None else packed_ids(self._ids)
        if len(self._packed_ids) >= 2**32:
            raise UsageError(f"{len(self._packed_ids):,} bytes of token ids do not go into a file")
        count = entry_count(snapshot.layout, block_tokens)
        if count > MAX_ENTRIES:
            raise UsageError(f"{count:,} blocks do not go into a file: give a larger block_tokens")
        self._entries = list(entries(snapshot.layout, block_tokens))

    def encode(self, threads: int = 0) -> bytes:
        """The whole file in memory. `threads`: 0 for all cores."""
        # Few codecs make more of numbers than they are; then there is more memory.
        start = start_length(len(self._packed_header), len(self._packed_ids), len(self._entries))
        room = self.snapshot.raw_bytes + ALIGNMENT * len(self._entries)
        sink = _native.Output(start + room)
        self.write(sink, threads)
        blob: bytes = sink.take()
        return blob

    def write(
        self, sink: Sink, threads: int = 0, progress: Callable[[int], None] | None = None
    ) -> int:
        """Write the whole file to a seekable sink; return its length in bytes. `progress` is called
        with raw bytes as they are done."""
        timer = metrics.Timer()
        header, ids, layers = self._packed_header, self._packed_ids, self.snapshot.layout.layers
        index = np.zeros(len(self._entries), RECORD)
        offset = start_length(len(header), len(ids), len(index))
        base = sink.tell()
        sink.seek(base + offset)
        for row, data, stored, raw in self._encoded(thread_count(threads)):
            entry, length = self._entries[row], len(data)
            index[row] = entry.record(offset, length, stored, raw)
            if length:
                sink.write(data)
                offset += length
            if length % ALIGNMENT:
                zeros = bytes(-length % ALIGNMENT)
                sink.write(zeros)
                offset += len(zeros)
            if not entry.tables:
                part = layers[entry.layer].parts[entry.part]
                size = entry.tokens * part.line_bytes
                _check_readable(self._codecs[entry.key], length, size, part.form)
                if progress is not None:
                    progress(size)
        sink.seek(base)
        sink.write(packed_start(header, ids, index, offset))
        sink.seek(base + offset)
        if timer.wanted:
            codec = self.codec.codec_id
            metrics.count("encoded_bytes", self.snapshot.raw_bytes, codec=codec)
            metrics.count("written_bytes", offset, codec=codec)
            timer.done("encode_seconds", codec=codec)
        return offset

    # --- entries ---------------------------------------------------------------------------

    def _encoded(self, workers: int) -> Iterator[Encoded]:
        """All entries in the order of the file."""
        if all(codec.independent for codec in self._codecs.all):
            yield from self._parts(range(len(self._entries)), workers)
            return
        chained = [
            row for row, e in enumerate(self._entries) if not self._codecs[e.key].independent
        ]
        done = self._chains(chained, workers)
        others = self._parts(sorted(set(range(len(self._entries))) - set(chained)), workers)
        for row in range(len(self._entries)):
            yield done.pop(row) if row in done else next(others)

    def _parts(self, rows: Iterable[int], workers: int) -> Iterator[Encoded]:
        """Entries of codecs whose blocks do not need each other, a part of a layer at a time."""
        groups: list[list[int]] = []
        for row in rows:
            if self._entries[row].tables:
                groups.append([])
            groups[-1].append(row)
        # What a device encodes together is many parts.
        ahead = 2 * workers if self._device is None else min(2 * workers, _AHEAD)
        for results in in_order(self._jobs(groups), workers, ahead):
            yield from results

    def _jobs(self, groups: Iterable[list[int]]) -> Iterator[Callable[[], list[Encoded]]]:
        """What encodes parts, of which each has its rows: one by one, or those that lie on a device
        some together."""
        together: list[tuple[list[int], DeviceBits]] = []
        kind: tuple[Codec, DType] | None = None
        size = 0
        for group in groups:
            codec, bits = self._codecs[self._entries[group[0]].key], self._on_device(group[0])
            if together and (bits is None or (codec, bits.form) != kind or size >= _TOGETHER):
                yield partial(self._encode_on_device, together)
                together, size = [], 0
            if bits is None:
                yield partial(self._encode_part, group)
                continue
            kind = codec, bits.form
            together.append((group, bits))
            size += math.prod(bits.shape) * bits.form.itemsize
        if together:
            yield partial(self._encode_on_device, together)

    def _on_device(self, row: int) -> DeviceBits | None:
        """The bits of a part that the device is to encode; None where the CPU does."""
        entry = self._entries[row]
        if self._device is None or not self._codecs[entry.key].encodes_on_device:
            return None
        bits = self.snapshot.layers[entry.layer].on_device(entry.part)
        if bits is None or bits.tensor.stride(-1) != 1 or not self._device.holds(bits.tensor):
            return None
        return bits

    def _encode_on_device(self, parts: Sequence[tuple[list[int], DeviceBits]]) -> list[Encoded]:
        """Parts of one codec and format, by the device that they lie on, or else by the CPU."""
        numbers = []
        for rows, bits in parts:
            entry = self._entries[rows[0]]
            blocks = [(self._entries[row].start, self._entries[row].tokens) for row in rows[1:]]
            context = self._context(entry, None, {}, {})
            numbers.append(Numbers(target_of(bits.tensor), partial(_read, bits), blocks, context))
        codec = self._codecs[self._entries[parts[0][0][0]].key]
        results = []
        try:
            encoded = codec.encode_on_device(self._device, numbers)
        except MemoryFullError:  # models and engines take what there is
            encoded = [None] * len(parts)
        for (rows, _), found in zip(parts, encoded, strict=True):
            if found is None:
                results += self._encode_part(rows)
                continue
            results.append(Encoded.tables(rows[0], found.tables))
            for row, data, raw in zip(rows[1:], found.blocks, found.checksums, strict=True):
                results.append(Encoded(row, data, checksum.of_bytes(data), raw))
        return results

    def _chains(self, rows: Iterable[int], workers: int) -> dict[int, Encoded]:
        """Entries of a codec whose blocks need others of the same tokens, a range of tokens at a
        time."""
        done: dict[int, Encoded] = {}
        tables: dict[Key, Any] = {}
        chains: dict[int, list[int]] = {}
        for row in rows:
            entry = self._entries[row]
            if entry.tables:
                made, tables[entry.key] = self._tables(entry, self._part(entry), {})
                done[row] = Encoded.tables(row, made)
            else:
                layer = self.snapshot.layout.layers[entry.layer]
                stop = layer.span(entry.part)[0] + entry.start + entry.tokens
                chains.setdefault(stop, []).append(row)
        jobs = (partial(self._encode_chain, chain, tables) for chain in chains.values())
        for results in in_order(jobs, workers, 2 * workers):
            done |= {result.row: result for result in results}
        return done

    def _encode_part(self, rows: Sequence[int]) -> list[Encoded]:
        """One part of a layer: its tables, then its blocks."""
        entry = self._entries[rows[0]]
        codec, whole = self._codecs[entry.key], self.snapshot.layers[entry.layer].block(entry.part)
        scratch: dict[str, Any] = {}
        made, tables = self._tables(entry, whole, scratch)
        results = [Encoded.tables(rows[0], made)]
        for row in rows[1:]:
            entry = self._entries[row]
            block = _block(entry, whole)
            if codec.verbatim:
                results.append(Encoded.verbatim(row, block))
                continue
            data = codec.encode(block, self._context(entry, tables, {}, scratch))
            results.append(Encoded.block(row, data, block))
        return results

    def _encode_chain(self, rows: Sequence[int], tables: Mapping[Key, Any]) -> list[Encoded]:
        """The same tokens of layer after layer."""
        codec = self._codecs[self._entries[rows[0]].key]
        scratch: dict[str, Any] = {}
        earlier: dict[Key, Bits] = {}
        blocks = []
        for row in rows:
            entry = self._entries[row]
            block = _block(entry, self._part(entry))
            need = {k: earlier[k] for k in codec.needs(*entry.key) if k in earlier}
            blocks.append((block, self._context(entry, tables[entry.key], need, scratch)))
            earlier[entry.key] = block
        found = zip(rows, codec.encode_chain(blocks), blocks, strict=True)
        return [Encoded.block(row, data, block) for row, data, (block, _) in found]

    def _tables(self, entry: Entry, whole: Bits, scratch: dict[str, Any]) -> tuple[bytes, Any]:
        """The tables of one part of a layer as stored, and as blocks use them. `scratch`: what the
        codec may keep for the part's blocks."""
        codec = self._codecs[entry.key]
        if not codec.has_tables:
            return b"", None
        context = self._context(entry, None, {}, scratch)
        made = codec.make_tables(whole, context)
        return made, codec.load_tables(memoryview(made), whole.shape, context)

    def _part(self, entry: Entry) -> Bits:
        """All that the snapshot holds of the entry's layer and part, which stays in memory."""
        layer = self.snapshot.layers[entry.layer]
        return layer.layout.parts[entry.part].as_block(layer.part(entry.part))

    def _context(self, entry: Entry, *more: Any) -> Context:
        """The context of an entry. `more`: the fields that follow the profile."""
        layer = self.snapshot.layout.layers[entry.layer]
        part, begin = layer.parts[entry.part], layer.span(entry.part)[0] + entry.start
        ids = None
        if layer.counts_tokens and part.tokens is not None:
            ids = ids_between(self._ids, begin, begin + entry.tokens)
        origin, profile = self.snapshot.origin, self.profile
        return Context(
            part.form, entry.layer, entry.part, begin, origin, ids, profile, layer.rope, *more
        )


def _read(bits: DeviceBits, begin: int, end: int) -> Bits:
    """Tokens begin to end of a part in a device's memory."""
    return bits[:, :, begin:end].read()


def _block(entry: Entry, whole: Bits) -> Bits:
    """An entry's numbers, out of all of its layer's and part's; the same object where these are
    all."""
    if entry.tokens == whole.shape[2]:
        return whole
    return whole[:, :, entry.start : entry.start + entry.tokens]


def _check_readable(codec: Codec, length: int, size: int, form: DType) -> None:
    """Raise UsageError if a reader would refuse a block of `length` bytes as too short for the
    `size` bytes of its numbers: the codec's own bound is wrong then."""
    most = codec.max_decoded_size(length, form)
    if size > most:
        raise UsageError(
            f"codec {codec.codec_id!r} makes {length:,} bytes of a block of {size:,}, and says "
            f"that they stand for {most:,} at most: no reader would take that"
        )


# --- sizes ---------------------------------------------------------------------------------


def default_block_tokens(layout: Layout, codec: Codec) -> int:
    """The power of two of tokens, 256 to 4,096, whose blocks come nearest to what suits the codec.

    Smaller ones let a reader cut finer, and cost more for what each block starts with.
    """
    token = max(
        (p.line_bytes for _, _, p in layout.parts() if p.tokens is not None),
        default=0,
    )
    return 1 << min(max(round(math.log2(codec.block_bytes / max(token, 1))), 8), 12)


def _block_tokens(given: Any, layout: Layout, codec: Codec) -> int:
    """The tokens in a block that a caller gave, or the default. Raises UsageError."""
    found = default_block_tokens(layout, codec) if given is None else given
    return integer("block_tokens", found, 1, 2**31 - 1)


def largest_size(shapes: Layout | Snapshot, codec: Codec, block_tokens: int | None = None) -> int:
    """An upper bound of a file's length in bytes, for a snapshot or for any snapshot of a layout
    whose origin has at most 4 KiB as JSON."""
    snapshot = shapes if isinstance(shapes, Snapshot) else None
    layout: Layout = shapes.layout if isinstance(shapes, Snapshot) else shapes
    if not isinstance(layout, Layout):
        raise UsageError(f"the layout is {layout!r}: it must be a Layout or a Snapshot")
    block_tokens = _block_tokens(block_tokens, layout, codec)
    codecs, stored = Codecs.choose(codec, layout), StoredLayout.of(layout)
    settings = json_value("the codec's settings", codec.get_config())
    header = Header(
        stored,
        Origin() if snapshot is None else snapshot.origin,
        settings,
        block_tokens,
        WRITER,
        profile=_SHA256,
        token_ids_sha256=_SHA256,
        other_codecs=codecs.described(),
    )
    header_length = len(as_json("the header", header)) + (_MOST_ORIGIN if snapshot is None else 0)
    of_grid = _MOST_OF_GRID + 2 * len(repr(settings)) if may_use_grids(codec, None) else None
    known: dict[tuple[int, ...], tuple[int, int, int]] = {}  # most layers are alike
    count = size = 0
    for i, number in enumerate(stored.layers):
        layer = stored.distinct[number]
        stored_by = {name: codecs[i, name] for name in layer.parts}
        same = number, *map(id, stored_by.values())
        if same not in known:
            alone = Layout(layout.dtype, (layer,))
            known[same] = _largest_layer(alone, stored_by, block_tokens, of_grid)
        words, rows, length = known[same]
        header_length, count, size = header_length + words, count + rows, size + length
    ids = math.prod(layout.ids_shape)
    if snapshot is not None and snapshot.token_ids is not None:
        ids = snapshot.token_ids.size
    return start_length(header_length, 4 * ids, count) + size


def _largest_layer(
    layout: Layout, stored_by: Mapping[str, Codec], block_tokens: int, of_grid: int | None
) -> tuple[int, int, int]:
    """An upper bound of what the header says of the grids of a layer, which is all of the layout;
    how many entries the layer has; and an upper bound of their bytes. `of_grid`: bytes of what the
    header says of a part's grid, but for the part's name; None where no part is on one."""
    words = count = size = 0
    (layer,) = layout.layers
    for entry in entries(layout, block_tokens):
        name = entry.part
        part, codec = layer.parts[name], stored_by[name]
        on_grid = of_grid is not None and may_be_on_grid(part)
        if entry.tables:
            most = codec.max_tables_size(part.block_shape, part.form)
            if of_grid is not None and on_grid:
                words += of_grid + 6 * len(name)
                most = max(most, GridCodec.most_tables(codec, part, layer.kind, name))
        else:
            raw = entry.tokens * part.line_bytes
            most = codec.max_encoded_size(raw)
            most = max(most, 1 + raw) if on_grid else most
        count, size = count + 1, size + aligned(most)
    return words, count, size
