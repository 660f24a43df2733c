"""Decoding on a GPU: only stored bytes cross to it, and numbers are written where they are wanted.

A document goes through in pieces of some megabytes. While one is decoded, the next one crosses, and
the one after is read into pinned memory and made into jobs. Each has memory of its own (a slot), of
which there are as many as can be under way. Flags and checksums come back once, at the end; a block
that does not pass is decoded again on the CPU, which says what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Codec, Context
from kvzip.codecs.native.cuda.arrays import View, cut, empty, view_of
from kvzip.codecs.native.cuda.device import Device, Memory, Pinned, Stream, get_device
from kvzip.codecs.native.cuda.work import BLOCK, Full, Slot, Target, Work, pages_of, slots
from kvzip.container.index import ALIGNMENT, Index, aligned
from kvzip.dtypes import DType
from kvzip.errors import CorruptError, KVZipError, UsageError
from kvzip.snapshot import PARTS, LayerLayout, Layout, Origin, Part

PIECE = 16 << 20
"""Stored bytes that go together: enough for a link to be at full speed and for a GPU to be busy,
and few enough that decoding begins early."""

_ZEROS = bytes(ALIGNMENT)

_Key = tuple[int, Part]


@dataclass(frozen=True)
class DeviceLayer:
    """Keys and values of one layer on a device, in the layer's own shape, and its layout."""

    k: Any
    v: Any
    layout: LayerLayout

    def __iter__(self) -> Iterator[Any]:
        return iter((self.k, self.v))


class DeviceSnapshot:
    """What was decoded on a device: torch tensors of the numbers' dtype, or the caller's own
    arrays; without torch, arrays of bits with ``__dlpack__`` and ``__cuda_array_interface__``.

    ``layers[i].k`` and ``.v`` have the shapes of a Snapshot's; of a paged cache they are None.
    """

    def __init__(
        self,
        layers: Sequence[DeviceLayer],
        dtype: str,
        token_ids: NDArray[Any] | None,
        origin: Origin,
    ):
        self.layers, self.token_ids, self.origin = list(layers), token_ids, origin
        self.layout = Layout(dtype, tuple(layer.layout for layer in layers))

    @property
    def dtype(self) -> str:
        """The numbers' format."""
        return self.layout.dtype

    @property
    def tokens(self) -> int:
        """True length of the sequence."""
        return self.layout.tokens

    def tensors(self) -> list[tuple[Any, Any]]:
        """One (K, V) pair a layer, in the layers' shapes."""
        return [(layer.k, layer.v) for layer in self.layers]


@dataclass(frozen=True)
class Document:
    """What decoding on a device needs of an open file."""

    layout: Layout
    form: DType
    codec: Codec
    index: Index
    source: Any
    """A `kvzip.container.Source`."""
    tables: Callable[[_Key, memoryview], Any]
    """The tables of a part from their bytes. Raises CorruptError."""
    context: Callable[[int, Any], Context]
    """The context of a row, from the row and its tables."""
    blame: Callable[[int], None]
    """Decodes a row on the CPU. Raises CorruptError."""
    decode: Callable[[Sequence[int], Sequence[tuple[Any, Any]]], object]
    """Decodes what is wanted of layers on the CPU, into arrays."""
    extents: Callable[
        [Sequence[int], Mapping[int, LayerLayout]], tuple[list[tuple[int, ...]], list[int]]
    ]
    """Shapes of memory for cuts of layers, and from which position on, as the reader has it."""


# --- where numbers go --------------------------------------------------------------------------


def _target(view: View, first: int, owner: Any) -> Target:
    shape, strides = view.shape, view.strides
    if len(shape) == 3:
        shape, strides = (1, *shape), (0, *strides)
    b, h, t, _ = strides
    batch, heads, tokens, dim = shape
    return Target(view.address, (b, h, t), (batch, heads, tokens, dim), first, owner=owner)


def given_targets(
    device: Device,
    form: DType,
    cuts: Mapping[int, LayerLayout],
    out: Sequence[tuple[Any, Any]],
) -> dict[_Key, list[Target]]:
    """Arrays that the caller gave, of the shapes of the cuts, in their order."""
    _check_pairs(out, cuts)
    targets: dict[_Key, list[Target]] = {}
    for (i, layer), pair in zip(cuts.items(), out, strict=True):
        for part, array in zip(PARTS, pair, strict=True):
            view = view_of(array, device, form)
            if view.shape != layer.shape(part):
                raise UsageError(
                    f"out for layer {i}: {part} has shape {view.shape}, not {layer.shape(part)}"
                )
            targets[i, part] = [_target(view, layer.first, array)]
    return targets


def paged_targets(
    device: Device,
    form: DType,
    cuts: Mapping[int, LayerLayout],
    out: Sequence[tuple[Any, Any]],
    pages: Any,
) -> dict[_Key, list[Target]]:
    """The same of a paged cache, one target for each row of the batch.

    `out`: of each layer K and V as [pages, tokens of a page, heads, dim], any strides but for dim.
    `pages`: which page holds each run of positions, [pages] or [batch, pages].
    """
    table = pages_of(pages)
    _check_pairs(out, cuts)
    targets: dict[_Key, list[Target]] = {}
    for (i, layer), pair in zip(cuts.items(), out, strict=True):
        for part, array in zip(PARTS, pair, strict=True):
            *batch, heads, _, dim = layer.shape(part)
            rows = batch[0] if batch else 1
            view = view_of(array, device, form)
            if len(view.shape) != 4 or view.shape[2:] != (heads, dim):
                raise UsageError(
                    f"out for layer {i}: {part} has shape {view.shape}, not "
                    f"[pages, tokens of a page, {heads}, {dim}]"
                )
            if len(table) != rows:
                raise UsageError(f"pages has {len(table)} rows, the file's batch {rows}")
            count, size = view.shape[:2]
            begin, end = layer.first // max(size, 1), -(-layer.cumulative_length // max(size, 1))
            used = table[:, begin:end]
            if layer.stored and (not size or used.shape[1] < end - begin):
                raise UsageError(
                    f"pages has {table.shape[1]} pages of {size} tokens a row, too few for "
                    f"{layer.cumulative_length} positions"
                )
            if used.size and int(used.max()) >= count:
                raise UsageError(f"pages names page {used.max()}; out for layer {i} has {count}")
            if len(np.unique(used)) != used.size:
                raise UsageError("pages names a page twice")
            stride, token, head, _ = view.strides
            shape = (1, heads, layer.cumulative_length, dim)
            targets[i, part] = [
                Target(view.address, (0, head, token), shape, 0, row, size, stride, array)
                for row in table
            ]
    return targets


def _check_pairs(out: Sequence[tuple[Any, Any]], cuts: Mapping[int, LayerLayout]) -> None:
    if len(out) != len(cuts):
        raise UsageError(f"out has {len(out)} layers, not {len(cuts)}")


def _check_apart(targets: Mapping[_Key, Sequence[Target]]) -> None:
    """Raise UsageError if parts that hold anything begin in the same place."""
    begins = [t[0].address for t in targets.values() if math.prod(t[0].shape)]
    if len(set(begins)) != len(begins):
        raise UsageError("out has the same memory twice")


# --- decoding ----------------------------------------------------------------------------------


class Decoding:
    """One document, or what is wanted of it, on its way to a device."""

    def __init__(
        self,
        document: Document,
        device: Device,
        cuts: Mapping[int, LayerLayout],
        rows: Mapping[_Key, Sequence[int]],
        targets: Mapping[_Key, Sequence[Target]],
        stream: Any,
    ):
        self.document, self.device = document, device
        self.cuts, self.rows, self.targets = cuts, rows, targets
        self._caller = device.stream_of(stream)
        self._tables: dict[_Key, Any] = {}
        self._order: list[int] = [row for part in rows.values() for row in part]
        """Rows of the index; the place of a row here is that of its flag and checksum."""

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Decode all of it; it is there when this returns. Raises CorruptError."""
        device = self.device
        with device.current():
            streams = device.cache.get("streams")
            if streams is None:
                streams = device.cache["streams"] = [device.stream() for _ in range(3)]
            upload, *runs = streams
            before = device.record(self._caller)
            for stream in runs:
                device.wait(stream, before)
            try:
                if self.document.codec.on_device:
                    self._decode(upload, runs, progress)
                else:
                    self._bring(upload, runs, progress)
            except BaseException:  # what was begun may not go on writing
                for stream in streams:
                    device.synchronize(device.record(stream))
                raise

    # --- by kernels ------------------------------------------------------------------------

    def _decode(
        self, upload: Stream, runs: Sequence[Stream], progress: Callable[[int], None] | None
    ) -> None:
        device, count = self.device, len(self._order)
        if not count:
            return
        results, back = self._results(12 * count)
        device.clear(runs[0], results.address, 12 * count)
        cleared = device.record(runs[0])
        for stream in runs[1:]:
            device.wait(stream, cleared)
        at = 0
        for n, (rows, size) in enumerate(self._pieces()):
            slot = slots(device)[n % 2]
            numbers = np.arange(at, at + len(rows), dtype=np.uint32)
            plan = partial(self._plan, rows=rows, numbers=numbers)
            work = self._filled(slot, size, results.address, plan)
            work.start(upload, runs[n % len(runs)])
            at += len(rows)
            if progress is not None:
                progress(sum(self._raw_bytes(row) for row in rows))
        for stream in runs[1:]:
            device.wait(runs[0], device.record(stream))
        device.download(runs[0], back.address, results.address, 12 * count)
        device.synchronize(device.record(runs[0]))
        self._check(back.array[: 8 * count].view("<u8"), back.array[8 * count :].view("<u4"))

    def _results(self, size: int) -> tuple[Memory, Pinned]:
        """Memory for checksums and flags, on the device and where they come back to."""
        kept = self.device.cache.get("results")
        if kept is None or kept[0].size < size:
            room = max(size, 1 << 16)
            kept = self.device.cache["results"] = (
                self.device.allocate(room),
                self.device.pinned(room),
            )
        return kept[0], Pinned(kept[1].array[:size], kept[1])

    def _filled(self, slot: Slot, size: int, results: int, plan: Callable[[Work], None]) -> Work:
        """A slot filled by `plan`, in as much memory as that needs; `size` is a first guess."""
        slot.wait()
        flags = results + 8 * len(self._order)
        least = size + size // 4 + (1 << 20)
        if slot.size < least:
            slot.grow(least)
        while True:
            work = Work(slot, results, flags)
            try:
                plan(work)
                work.finish()
            except Full as full:
                slot.grow(max(2 * slot.size, full.size))
            else:
                return work

    def _pieces(self) -> Iterator[tuple[list[int], int]]:
        """Rows that go together, and how many bytes they are."""
        length = self.document.index.length
        rows: list[int] = []
        size = 0
        for row in self._order:
            more = length[row] + ALIGNMENT
            if rows and size + more > PIECE:
                yield rows, size
                rows, size = [], 0
            rows.append(row)
            size += more
        if rows:
            yield rows, size

    def _plan(self, work: Work, rows: Sequence[int], numbers: NDArray[np.uint32]) -> None:
        """Stored bytes, parts and jobs of these rows. Blocks of which not all is wanted are decoded
        beside, and copied from there."""
        document, index = self.document, self.document.index
        hosts, addresses = self._read(work, rows)
        blocks = np.zeros(len(rows), BLOCK)
        blocks["host"], blocks["address"] = hosts, addresses
        blocks["length"] = [index.length[row] for row in rows]
        blocks["tokens"] = [index.tokens[row] for row in rows]
        blocks["row"] = numbers
        contexts: dict[int, Context] = {}
        whole: dict[_Key, int] = {}
        copies: list[Callable[[], None]] = []
        part, first = blocks["part"], blocks["first"]
        for n, row in enumerate(rows):
            key = index.key[row]
            targets = self.targets[key]
            begin, tokens = index.position[row] - targets[0].first, index.tokens[row]
            inside = begin >= 0 and begin + tokens <= targets[0].shape[2]
            if targets[0].pages is not None:
                inside = inside and len(targets) == 1
                inside = inside and index.position[row] >= self.cuts[key[0]].first
            if inside:
                if key not in whole:
                    whole[key] = work.part(targets[0])
                    contexts[whole[key]] = document.context(row, self._tables[key])
                part[n], first[n] = whole[key], begin
            else:
                beside = self._beside(work, key, tokens)
                part[n] = work.part(beside)
                contexts[int(part[n])] = document.context(row, self._tables[key])
                copies += self._copies(work, beside, int(part[n]), key, row)
        try:
            document.codec.decode_on_device(work, blocks, contexts)
        except CorruptError:
            for row in rows:
                document.blame(row)
            raise
        work.then()
        work.checksums(document.form.itemsize, blocks)
        for copy in copies:
            copy()

    def _beside(self, work: Work, key: _Key, tokens: int) -> Target:
        """Memory for one block of a part."""
        *batch, heads, _, dim = self.document.layout.layers[key[0]].shape(key[1])
        shape = (batch[0] if batch else 1, heads, tokens, dim)
        address = work.scratch(math.prod(shape) * self.document.form.itemsize)
        return Target(address, (heads * tokens * dim, tokens * dim, dim), shape, 0)

    def _copies(
        self, work: Work, beside: Target, number: int, key: _Key, row: int
    ) -> Iterator[Callable[[], None]]:
        """What copies the wanted tokens of a block from beside into place."""
        index, layer, size = self.document.index, self.cuts[key[0]], self.document.form.itemsize
        position, tokens = index.position[row], index.tokens[row]
        begin = max(position, layer.first)
        end = min(position + tokens, layer.cumulative_length)
        if end <= begin:
            return
        targets = self.targets[key]
        for n, target in enumerate(targets):
            source = beside.address + (begin - position) * beside.strides[2] * size
            if len(targets) > 1:
                source += n * beside.strides[0] * size
            part = work.part(target)

            def copy(source: int = source, part: int = part, first: int = target.first) -> None:
                work.copy(size, source, beside.strides, part, begin - first, end - begin)

            yield copy

    def _read(self, work: Work, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Bring rows, and the tables of their parts, into the work; where they lie on the host and
        will on the device. Rows that follow each other in the file are read at once."""
        document, index = self.document, self.document.index
        needed: list[int] = []
        for row in rows:
            key = index.key[row]
            if key not in self._tables and index.rows[key].start not in needed:
                needed.append(index.rows[key].start)
            needed.append(row)
        hosts: dict[int, int] = {}
        addresses: dict[int, int] = {}
        at = 0
        while at < len(needed):
            begin = end = index.offset[needed[at]]
            ends = []
            for row in needed[at:]:
                if index.offset[row] != end:
                    break
                end += aligned(index.length[row])
                ends.append(end)
            stop = at + len(ends)
            host, address = self._span(work, begin, end - begin)
            data, base = host.data, host.ctypes.data
            for row, row_end in zip(needed[at:stop], ends, strict=True):
                place = index.offset[row] - begin
                after = place + index.length[row]
                hosts[row], addresses[row] = base + place, address + place
                behind = bytes(data[after : row_end - begin])
                key = index.key[row]
                first = row == index.rows[key].start
                if behind != _ZEROS[: len(behind)]:  # as the CPU demands
                    document.blame(self.rows[key][0] if first else row)
                if first:
                    self._load_tables(key, data[place:after])
            at = stop
        return [hosts[row] for row in rows], [addresses[row] for row in rows]

    def _load_tables(self, key: _Key, data: memoryview) -> None:
        try:
            self._tables[key] = self.document.tables(key, data)
        except CorruptError:
            self.document.blame(self.rows[key][0])
            raise

    def _span(self, work: Work, offset: int, length: int) -> tuple[NDArray[np.uint8], int]:
        """Bytes of the file on the host, and where they will be on the device."""
        source = self.document.source
        if getattr(source, "in_memory", False):
            data = np.frombuffer(source.read(offset, length), np.uint8)
            if length and self.device.is_pinned(data.ctypes.data):
                return data, work.pinned(data.ctypes.data, length, ALIGNMENT)
        host, address = work.room(length, ALIGNMENT)
        read_into = getattr(source, "read_into", None)
        if read_into is None:
            host[:] = np.frombuffer(source.read(offset, length), np.uint8)
        else:
            read_into(offset, host.data)
        return host, address

    def _check(self, checksums: NDArray[np.uint64], flags: NDArray[np.uint32]) -> None:
        """Raise CorruptError for the first block that is damaged."""
        expected = [self.document.index.raw_checksum[row] for row in self._order]
        bad = np.flatnonzero((flags != 0) | (checksums != np.array(expected, np.uint64)))
        if bad.size:
            row = self._order[int(bad[0])]
            self.document.blame(row)
            raise KVZipError(
                f"the device decodes entry {row} of the index wrong, and the CPU does not: "
                "its memory or the library is at fault"
            )

    def _raw_bytes(self, row: int) -> int:
        """How many raw bytes of a block are wanted."""
        index = self.document.index
        layer, part = index.key[row]
        wanted, position = self.cuts[layer], index.position[row]
        end = min(position + index.tokens[row], wanted.cumulative_length)
        *outer, _, dim = wanted.shape(part)
        tokens = max(0, end - max(position, wanted.first))
        return tokens * math.prod(outer) * dim * self.document.form.itemsize

    # --- by the CPU ------------------------------------------------------------------------

    def _bring(
        self, upload: Stream, runs: Sequence[Stream], progress: Callable[[int], None] | None
    ) -> None:
        """Decode layers on the CPU, into pinned memory, and bring them to the device."""
        form, device = self.document.form, self.device
        sizes = {
            i: sum(math.prod(layer.shape(part)) for part in PARTS) * form.itemsize
            for i, layer in self.cuts.items()
        }
        groups: list[list[int]] = []
        for i in self.cuts:
            if not groups or sum(sizes[j] for j in groups[-1]) + sizes[i] > PIECE:
                groups.append([])
            groups[-1].append(i)
        last = None
        for n, group in enumerate(groups):
            size = sum(sizes[i] for i in group)
            slot = slots(device)[n % 2]
            work = self._filled(slot, size, 0, partial(self._decode_on_host, layers=group))
            work.start(upload, runs[0])
            last = slot.done
            if progress is not None:
                progress(size)
        if last is not None:
            device.synchronize(last)

    def _decode_on_host(self, work: Work, layers: Sequence[int]) -> None:
        form = self.document.form
        out = []
        copies: list[tuple[int, tuple[int, int, int], _Key]] = []
        for i in layers:
            pair = []
            for part in PARTS:
                shape = self.cuts[i].shape(part)
                host, address = work.room(math.prod(shape) * form.itemsize, ALIGNMENT)
                pair.append(host.view(form.uint).reshape(shape))
                *_, heads, tokens, dim = shape
                copies.append((address, (heads * tokens * dim, tokens * dim, dim), (i, part)))
            out.append((pair[0], pair[1]))
        self.document.decode(layers, out)
        for address, strides, key in copies:
            cut_ = self.cuts[key[0]]
            targets = self.targets[key]
            for n, target in enumerate(targets):
                source = address + (n * strides[0] * form.itemsize if len(targets) > 1 else 0)
                part_number = work.part(target)
                begin = cut_.first - target.first
                work.copy(form.itemsize, source, strides, part_number, begin, cut_.stored)


def decode(
    document: Document,
    device: Any,
    wanted: Sequence[int],
    cuts: Mapping[int, LayerLayout],
    out: Sequence[tuple[Any, Any]] | None,
    pages: Any,
    stream: Any,
    progress: Callable[[int], None] | None,
) -> list[DeviceLayer]:
    """Decode cuts of layers on a device; as `kvzip.container.Reader.decode`."""
    device, form, index = get_device(device), document.form, document.index
    arrays: dict[_Key, Any] = {}
    with device.current():
        if out is None:
            shapes, firsts = document.extents(wanted, cuts)
            targets: dict[_Key, list[Target]] = {}
            for n, shape in enumerate(shapes):
                key = wanted[n // 2], PARTS[n % 2]
                array, view = empty(device, shape, form)
                target = _target(view, firsts[n // 2], array)
                layer = cuts[key[0]]
                begin, batched = layer.first - target.first, len(layer.shape(key[1])) == 4
                arrays[key], targets[key] = (
                    cut(array, begin, begin + layer.stored, batched),
                    [target],
                )
        elif pages is None:
            targets = given_targets(device, form, cuts, out)
        else:
            targets = paged_targets(device, form, cuts, out, pages)
        _check_apart(targets)
        rows = {}
        for i, layer in cuts.items():
            begin, end = layer.first, layer.cumulative_length
            for part in PARTS:
                rows[i, part] = [
                    row
                    for row in index.rows[i, part][1:]
                    if index.position[row] < end and index.position[row] + index.tokens[row] > begin
                ]
        Decoding(document, device, cuts, rows, targets, stream).run(progress)
    if pages is not None:
        return [DeviceLayer(None, None, cuts[i]) for i in wanted]
    if out is not None:
        return [DeviceLayer(*pair, cuts[i]) for i, pair in zip(wanted, out, strict=True)]
    return [DeviceLayer(arrays[i, "k"], arrays[i, "v"], cuts[i]) for i in wanted]
