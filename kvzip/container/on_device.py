"""Decoding on a GPU: only stored bytes cross to it, and numbers are written where they are wanted.

A document goes through in pieces of some megabytes. While one is decoded, the next one crosses, and
the one after is read into pinned memory and made into jobs. Each has memory of its own (a slot), of
which there are as many as can be under way. Flags and checksums come back once, at the end; a block
that does not pass is decoded again on the CPU, which says what is wrong with it. Where a library
that a codec calls does not do its part, the CPU decodes all that was asked for.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip import metrics
from kvzip.codec import Context
from kvzip.codecs.native.cuda.device import (
    Device,
    LeftToCPU,
    Memory,
    Pinned,
    Stream,
    get_device,
)
from kvzip.codecs.native.cuda.work import BLOCK, Slot, Target, Work, filled, slot_of
from kvzip.container import plan
from kvzip.container.blocks import SMALL, Blocks
from kvzip.container.decoding import check_block
from kvzip.container.device_targets import (
    Targets,
    given_targets,
    new_targets,
    paged_targets,
)
from kvzip.container.index import ALIGNMENT, Key
from kvzip.container.plan import Request
from kvzip.errors import CorruptError, KVZipError, UnsupportedError
from kvzip.layout import KV, LayerLayout, Layout, Origin
from kvzip.workers import Workers

FIRST, PIECE = 8 << 20, 32 << 20
"""Stored bytes that go together, at first, so that decoding begins early, and at most: each piece
takes up to twice as many as the one before, since each costs the CPU something, whatever is in
it."""

_WIDENED = 4
"""Raw bytes that a piece may have for each of those: most codecs decode to memory beside first."""

_SHARE = 2 << 20
"""Bytes that one thread brings into pinned memory at a time. Alone it is slower than PCIe."""
_bringers = Workers(4, "kvzip-bring")
_log = logging.getLogger("kvzip.gpu")

TOGETHER = 8192
"""Tokens whose blocks need each other and that go through the layers together: enough for a GPU to
be busy, and few enough for what it keeps of them."""

OnCPU = Callable[[Sequence[int], Sequence[tuple[Any, Any]] | None], None]
"""Decodes what is wanted of layers on the CPU, into arrays, a pair a layer, or into new memory."""


class Group(NamedTuple):
    """Rows of the index that are decoded in their order, and what their codec keeps meanwhile."""

    rows: list[int]
    scratch: dict[str, Any]
    done: int = 0
    """How many of them earlier requests have decoded."""


Groups = dict[tuple[Device, int], Group]
"""By the device and the first row: how far earlier requests decoded blocks that others need."""


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


class _Contexts(dict[int, Context]):
    """Contexts by the numbers of parts; or of blocks, each made when it is first asked for."""

    def __init__(self, make: Callable[[int], Context] | None = None):
        super().__init__()
        self._make = make

    def __missing__(self, number: int) -> Context:
        if self._make is None:
            raise KeyError(number)
        found = self[number] = self._make(number)
        return found


# --- decoding ----------------------------------------------------------------------------------


class DeviceDecoding:
    """One request on its way out of a file, into a device's memory."""

    def __init__(
        self,
        blocks: Blocks,
        request: Request,
        device: Device,
        targets: Targets,
        streams: Sequence[Any],
        decode_on_cpu: OnCPU,
        groups: Groups,
    ):
        """`streams`: what is in these by now comes before, as :meth:`Device.stream_of` has them."""
        self.blocks, self.request, self.device, self.targets = blocks, request, device, targets
        self._decode_on_cpu = decode_on_cpu
        self._alone = blocks.codec.independent
        self._by_device = blocks.decoded_on(device)
        self._sound = self._by_device and blocks.codec.needs_sound_bytes(device)
        self._before = [device.stream_of(stream) for stream in streams]
        self._tables: dict[Key, Any] = {}
        self._scratch: dict[str, Any] = {}
        self._groups, self._kept = self._planned(groups), groups
        self._rows = [row for group in self._groups for row in group.rows[group.done :]]
        """Rows of the index; the place of a row here is that of its flag and checksum."""
        self._done = self._told = 0
        """Raw bytes that are decoded, and that `progress` was told of."""

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Decode all of it; it is there when this returns. Raises CorruptError."""
        device = self.device
        with device.current():
            streams = device.cache.get("streams")
            if streams is None:
                streams = device.cache["streams"] = [device.stream() for _ in range(3)]
            upload, *runs = streams
            for before in map(device.record, self._before):
                for stream in runs:
                    device.wait(stream, before)
            try:
                if not self._by_device or not self._run_kernels(upload, runs, progress):
                    self._bring(upload, runs, progress)
            except BaseException:
                self._end(streams)
                raise

    def _end(self, streams: Sequence[Stream]) -> None:
        """Wait for what was begun, which may not go on writing."""
        for stream in streams:
            self.device.synchronize(self.device.record(stream))

    def _tell(self, progress: Callable[[int], None] | None, size: int) -> None:
        """So many more raw bytes are done; of those that were told before the CPU began anew,
        nobody is told again."""
        self._done += size
        if progress is not None and self._done > self._told:
            progress(self._done - self._told)
        self._told = max(self._told, self._done)

    # --- by kernels ------------------------------------------------------------------------

    def _planned(self, kept: Groups) -> list[Group]:
        """What is to be decoded, in order. Where blocks need others, all that are needed, from
        where an earlier request of earlier layers has left off."""
        blocks, index = self.blocks, self.blocks.index
        by_part = plan.rows_by_part(blocks.layout, index, self.request)
        if self._alone:
            return [Group(list(itertools.chain.from_iterable(by_part.values())), {})]
        together: list[list[int]] = []
        tokens = 0
        for chain in plan.chains(index, by_part, blocks.needs):
            part = blocks.part(index.key[chain[0]])
            tokens += part.block_shape[0] * index.tokens[chain[0]]
            if not together or tokens > TOGETHER:
                together.append([])
                tokens = part.block_shape[0] * index.tokens[chain[0]]
            together[-1] += chain
        return [self._resumed(sorted(rows), kept) for rows in together]

    def _resumed(self, rows: list[int], kept: Groups) -> Group:
        done = kept.pop((self.device, rows[0]), None)
        index = self.blocks.index
        if done is None or not plan.goes_on(index, rows, done.rows, self.request):
            return Group(rows, {})
        return Group(rows, done.scratch, len(done.rows))

    def _run_kernels(
        self, upload: Stream, runs: Sequence[Stream], progress: Callable[[int], None] | None
    ) -> bool:
        """Whether the device has done it, and not left it to the CPU."""
        try:
            self._decode_by_kernels(upload, runs, progress)
        except LeftToCPU as reason:
            _log.debug("the CPU decodes what a GPU was to decode: %s", reason)
            self._end([upload, *runs])
            self._done = 0
            return False
        return True

    def _decode_by_kernels(
        self, upload: Stream, runs: Sequence[Stream], progress: Callable[[int], None] | None
    ) -> None:
        device, count = self.device, len(self._rows)
        if not count:
            return
        results, back = self._results(12 * count)
        device.clear(runs[0], results.address, 12 * count)
        cleared = device.record(runs[0])
        for stream in runs[1:]:
            device.wait(stream, cleared)
        at = 0
        for n, (group, rows, size) in enumerate(self._pieces()):
            slot = slot_of(device, n)
            numbers = np.arange(at, at + len(rows), dtype=np.uint32)
            fill = partial(self._fill_with_blocks, rows=rows, numbers=numbers, group=group)
            work = self._filled(slot, size, results.address, fill)
            group.scratch.update(self._scratch)
            # Blocks that need each other are in one stream, so that they come in their order.
            work.start(upload, runs[n % len(runs) if self._alone else 0])
            at += len(rows)
            self._tell(progress, self.request.raw_bytes(self.blocks.index, rows))
        for stream in runs[1:]:
            device.wait(runs[0], device.record(stream))
        device.download(runs[0], back.address, results.address, 12 * count)
        device.synchronize(device.record(runs[0]))
        self._check(back.array[: 8 * count].view("<u8"), back.array[8 * count :].view("<u4"))
        last = len(self.blocks.layout.layers) - 1
        for group in self._groups:
            if not self._alone and self.blocks.index.key[group.rows[-1]][0] < last:
                self._kept[device, group.rows[0]] = group

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

    def _filled(self, slot: Slot, size: int, results: int, fill: Callable[[Work], None]) -> Work:
        """A slot filled by `fill` with `size` stored bytes, and what belongs to them."""
        return filled(
            slot, size + size // 4 + (1 << 20), results, results + 8 * len(self._rows), fill
        )

    def _pieces(self) -> Iterator[tuple[Group, list[int], int]]:
        """Rows of a group that go together, and how many bytes they are. Where blocks need
        others, all rows go together, so that there is work for all of a GPU at a time."""
        index, alone = self.blocks.index, self._alone
        length, key = index.length, index.key
        most = min(FIRST, PIECE)
        for group in self._groups:
            rows: list[int] = []
            size = raw = 0
            for row in group.rows[group.done :]:
                more = length[row] + ALIGNMENT
                decoded = index.tokens[row] * self.blocks.part(key[row]).line_bytes
                full = size + more > most or raw + decoded > _WIDENED * most
                if rows and full and (alone or key[row] != key[rows[-1]]):
                    yield group, rows, size
                    rows, size, raw = [], 0, 0
                    most = min(2 * most, PIECE)
                rows.append(row)
                size += more
                raw += decoded
            if rows:
                yield group, rows, size

    def _fill_with_blocks(
        self, work: Work, rows: Sequence[int], numbers: NDArray[np.uint32], group: Group
    ) -> None:
        """Put in stored bytes, parts and jobs of these rows. Blocks of which not all is wanted are
        decoded beside, and copied from there."""
        index = self.blocks.index
        blocks = np.zeros(len(rows), BLOCK)
        blocks["host"], blocks["address"] = self._read(work, rows)
        blocks["length"] = [index.length[row] for row in rows]
        blocks["tokens"] = [index.tokens[row] for row in rows]
        blocks["row"] = numbers
        scratch = dict(group.scratch)  # if there is too little room, all of this comes again

        def context(row: int) -> Context:
            return self.blocks.context(row, self._tables[index.key[row]], {}, scratch)

        contexts = _Contexts() if self._alone else _Contexts(lambda n: context(self._rows[n]))
        apart: list[tuple[int, Target]] = []
        part, first = [], []
        for key, some in itertools.groupby(rows, key=index.key.__getitem__):
            begin, end = self._inside(key)
            whole: int | None = None
            for row in some:
                position = index.position[row]
                if begin <= position and position + index.tokens[row] <= end:
                    target = self.targets[key][0]
                    whole = work.part(target) if whole is None else whole
                    part.append(whole)
                    first.append(position - target.first)
                else:
                    beside = self._beside(work, row)
                    part.append(work.part(beside))
                    first.append(0)
                    if key in self.targets:
                        apart.append((row, beside))
                if self._alone and part[-1] not in contexts:
                    contexts[part[-1]] = context(row)
        blocks["part"], blocks["first"] = part, first
        try:
            self.blocks.codec.decode_on_device(work, blocks, contexts)
        except (CorruptError, UnsupportedError):
            self._blame(rows)
            raise
        self._scratch = scratch
        work.then()
        work.checksums(self.blocks.form.itemsize, blocks)
        for row, beside in apart:
            end = index.position[row] + index.tokens[row]
            self._copy(work, index.key[row], beside.address, beside.strides, beside.first, end)

    def _inside(self, key: Key) -> tuple[int, int]:
        """Between which positions there is place for whole blocks where their part goes."""
        if key not in self.targets:
            return 0, 0  # only others need it
        target, *others = self.targets[key]
        end = target.first + target.shape[2]
        if target.pages is None:
            return target.first, end
        return (0, 0) if others else (max(target.first, self.request.cuts[key[0]].first), end)

    def _beside(self, work: Work, row: int) -> Target:
        """Memory for one block."""
        (layer, part), tokens = self.blocks.index.key[row], self.blocks.index.tokens[row]
        batch, heads, _, dim = self.blocks.part((layer, part)).block_shape
        address = work.scratch(batch * heads * tokens * dim * self.blocks.form.itemsize)
        shape = batch, heads, tokens, dim
        return Target.packed(address, shape, self.blocks.index.position[row])

    def _copy(
        self,
        work: Work,
        key: Key,
        source: int,
        strides: tuple[int, int, int],
        first: int,
        last: int,
    ) -> None:
        """Have the wanted tokens of a part copied to where they go, out of numbers at `source` that
        hold the positions from `first` up to `last`."""
        size, wanted, targets = (
            self.blocks.form.itemsize,
            self.request.cuts[key[0]],
            self.targets[key],
        )
        begin, end = max(first, wanted.first), min(last, wanted.cumulative_length)
        if end <= begin:
            return
        source += (begin - first) * strides[2] * size
        for n, target in enumerate(targets):
            row = source + (n * strides[0] * size if len(targets) > 1 else 0)
            work.copy(size, row, strides, work.part(target), begin - target.first, end - begin)

    def _read(self, work: Work, rows: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bring rows, and the tables of their parts, into the work; where they lie on the host and
        will on the device. Rows that follow each other in the file are read at once."""
        index = self.blocks.index
        needed: list[int] = []
        for key, some in itertools.groupby(rows, key=index.key.__getitem__):
            if key not in self._tables:
                needed.append(index.rows[key].start)
            needed += some
        places: dict[int, tuple[int, int]] = {}
        for begin, length, run in index.runs(needed, self.blocks.source.size):
            host, address = self._span(work, begin, length)
            try:
                most = self.blocks.source.size if self._sound else SMALL
                stored = index.stored(host.data, begin, run, most)
            except ValueError as error:
                if self._sound:
                    raise LeftToCPU(f"stored bytes are damaged: {error}") from None
                self._blame([row for row in rows if row in run or index.tables_row(row) in run])
                raise CorruptError(str(error)) from None
            base = host.ctypes.data
            for row in run:
                before = index.offset[row] - begin
                places[row] = base + before, address + before
                if row == index.tables_row(row):
                    self._load_tables(row, stored[row])
        hosts, addresses = zip(*(places[row] for row in rows), strict=True)
        return hosts, addresses

    def _load_tables(self, row: int, data: memoryview) -> None:
        key = self.blocks.index.key[row]
        try:
            self._tables[key] = self.blocks.load_tables(row, data)
        except CorruptError:
            self._blame([row + 1])  # the first block that needs them
            raise

    def _span(self, work: Work, offset: int, length: int) -> tuple[NDArray[np.uint8], int]:
        """Bytes of the file on the host, and where they will be on the device."""
        self.blocks.check_cancelled()
        metrics.count("read_bytes", length, codec=self.blocks.codec.codec_id)
        source = self.blocks.source
        if getattr(source, "in_memory", False):
            data = np.frombuffer(source.read(offset, length), np.uint8)
            if length and self.device.is_pinned(data.ctypes.data, length):
                return data, work.pinned(data.ctypes.data, length, ALIGNMENT)
        host, address = work.room(length, ALIGNMENT)
        read_into = getattr(source, "read_into", None)
        if read_into is None:
            data = np.frombuffer(source.read(offset, length), np.uint8)

        def bring(begin: int) -> None:
            some = slice(begin, begin + _SHARE)
            if read_into is None:
                host[some] = data[some]
            else:
                read_into(offset + begin, host[some].data)

        if length <= _SHARE:
            bring(0)
        else:
            _bringers.each(bring, range(0, length, _SHARE))
        return host, address

    def _check(self, checksums: NDArray[np.uint64], flags: NDArray[np.uint32]) -> None:
        """Raise CorruptError for the first block that is damaged."""
        expected = [self.blocks.index.raw_checksum[row] for row in self._rows]
        bad = np.flatnonzero((flags != 0) | (checksums != np.array(expected, np.uint64)))
        if bad.size:
            row = self._rows[int(bad[0])]
            self._blame([row])
            raise KVZipError(
                f"the device decodes entry {row} of the index wrong, and the CPU does not: "
                "its memory or the library is at fault"
            )

    def _blame(self, rows: Sequence[int]) -> None:
        """Raise the CorruptError that tells what is wrong with these rows, if the CPU finds
        anything: with blocks that need others, in all that was asked for."""
        if self._alone:
            for row in rows:
                check_block(self.blocks, row)
        else:
            self._decode_on_cpu(self.request.layers, None)

    # --- by the CPU ------------------------------------------------------------------------

    def _bring(
        self, upload: Stream, runs: Sequence[Stream], progress: Callable[[int], None] | None
    ) -> None:
        """Decode layers on the CPU, into pinned memory, and bring them to the device."""
        device = self.device
        sizes = {
            i: sum(part.nbytes for part in cut.parts.values())
            for i, cut in self.request.cuts.items()
        }
        groups: list[list[int]] = []
        for i in self.request.cuts:
            if not groups or sum(sizes[j] for j in groups[-1]) + sizes[i] > PIECE:
                groups.append([])
            groups[-1].append(i)
        last = None
        for n, group in enumerate(groups):
            size = sum(sizes[i] for i in group)
            slot = slot_of(device, n)
            work = self._filled(slot, size, 0, partial(self._fill_by_cpu, layers=group))
            work.start(upload, runs[0])
            last = slot.done
            self._tell(progress, size)
        if last is not None:
            device.synchronize(last)

    def _fill_by_cpu(self, work: Work, layers: Sequence[int]) -> None:
        """Put in the numbers of these layers, decoded, and have them copied to where they go."""
        form, cuts = self.blocks.form, self.request.cuts
        keys = [(i, part) for i in layers for part in KV]
        arrays, addresses = [], []
        for i, part in keys:
            shape = cuts[i].parts[part].shape
            host, address = work.room(math.prod(shape) * form.itemsize, ALIGNMENT)
            arrays.append(host.view(form.uint).reshape(shape))
            addresses.append(address)
        self._decode_on_cpu(layers, list(zip(arrays[::2], arrays[1::2], strict=True)))
        for (i, part), address in zip(keys, addresses, strict=True):
            _, heads, tokens, dim = cuts[i].parts[part].block_shape
            strides = heads * tokens * dim, tokens * dim, dim
            self._copy(work, (i, part), address, strides, cuts[i].first, cuts[i].cumulative_length)


def decode(
    blocks: Blocks,
    request: Request,
    device: Any,
    out: Sequence[Any] | None,
    pages: Any,
    stream: Any,
    progress: Callable[[int], None] | None,
    decode_on_cpu: OnCPU,
    groups: Groups,
) -> DeviceSnapshot:
    """What is wanted of a file, decoded on a device; as :meth:`kvzip.container.Reader.decode`.

    `decode_on_cpu` serves parts that have no kernels; `groups` is kept from request to request, and
    memory of the device with it. Raises UnsupportedError for layers that are
    not keys and values of one format.
    """
    if not blocks.layout.plain:
        raise UnsupportedError(
            "files are decoded on a GPU whose layers are all keys and values of one format, which "
            "this is not: decode it without device=, and copy"
        )
    device, cuts = get_device(device), request.cuts
    pairs: Sequence[tuple[Any, Any]]
    streams = [stream]
    with device.current():
        if out is None:
            pairs, targets = new_targets(device, blocks, request)
            if stream is not None:
                # It is torch's current stream that may still use their memory for others.
                streams.append(None)
        elif pages is None:
            pairs, targets = given_targets(device, blocks.form, cuts, out)
        else:
            pairs = [(None, None)] * len(request.layers)
            targets = paged_targets(device, blocks.form, cuts, out, pages)
        decoding = DeviceDecoding(blocks, request, device, targets, streams, decode_on_cpu, groups)
        decoding.run(progress)
    layers = [DeviceLayer(k, v, cuts[i]) for i, (k, v) in zip(request.layers, pairs, strict=True)]
    ids, origin = blocks.ids_up_to(cuts.values()), blocks.header.origin
    return DeviceSnapshot(layers, blocks.layout.dtype, ids, origin)
