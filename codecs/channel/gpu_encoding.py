"""Parts that lie on a GPU, encoded by `channel` there: with the bytes that the CPU makes of them.

The device looks for keys before RoPE (unturn.cuh), codes streams (encode.cuh) and takes checksums.
The CPU chooses by a few tokens how a part is coded, and makes tables where a profile has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import CODED, HEADER, MAX_EXPANSION, most_tables
from kvzip.codecs.channel.gpu import KERNELS
from kvzip.codecs.channel.profile import SAMPLE, chosen_of_profile, fields, rows
from kvzip.codecs.channel.rotation import (
    TRIED,
    Sampled,
    head_of,
    in_block,
    most_missing,
    sampled,
    take_less,
)
from kvzip.codecs.common.device_angles import Kind, angles_in_runs
from kvzip.codecs.common.rotation import is_wide, rotation_of
from kvzip.codecs.native.cuda.device import Device, Kernel, up
from kvzip.codecs.native.cuda.encoding import EncodedNumbers, Numbers, Room, room_of
from kvzip.codecs.native.cuda.work import BLOCK, Target, Work, in_pieces, joined
from kvzip.dtypes import Bits

_SOURCE, _SPACE = "channel/encode.cuh", "kvzip::channel"
_UNTURN_SOURCE = "channel/unturn.cuh"
_SHARED = 128 * 136
"""`kEncodeSharedBytes` of encode.cuh."""
_PAIRS, _ROOMS = 4096, 128 << 20
"""What one block of threads looks for; and bytes of rooms of streams that are coded together, if
they are not those of one block."""
_UNTURN = np.dtype(
    [
        ("angles", "<u8"),
        ("missing", "<u8"),
        ("part", "<u4"),
        ("out", "<u4"),
        ("first_token", "<u4"),
        ("tokens", "<u4"),
        ("first_row", "<u4"),
        ("rows", "<u4"),
        ("pairs", "<u4"),
        ("rounding", "<u4"),
        ("all", "<u4"),
        ("most", "<u4"),
    ]
)
_ENCODE = np.dtype(
    [
        ("room", "<u8"),
        ("part", "<u4"),
        ("first_token", "<u4"),
        ("tokens", "<u4"),
        ("first_strip", "<u4"),
        ("strips", "<u4"),
        ("lanes", "<u4"),
        ("mantissas", "<u4"),
        ("numbers", "<u4"),
        ("row", "<u4"),
    ],
    align=True,
)
_CODED = np.dtype([("words", "<u4"), ("escapes", "<u4"), ("failed", "<u4"), ("tops", "<u4")])
_PLACE = np.dtype(
    [
        ("room", "<u8"),
        ("stream", "<u8"),
        ("lanes", "<u4"),
        ("mantissas", "<u4"),
        ("numbers", "<u4"),
        ("words", "<u4"),
        ("escapes", "<u4"),
        ("reserved", "<u4"),
    ]
)
"""`UnturnJob`, `EncodeJob`, `EncodedStream` and `PlaceJob` of device_jobs.hpp."""
_MISSING = np.dtype([("pair", "<u4"), ("keys", "<u2", 2)])
"""What stands in `MissingPairs` behind their count, which takes up as much."""


class Settings(Protocol):
    """What is asked of the codec."""

    keys: str

    def load_tables(self, data: memoryview, shape: tuple[int, ...], context: Context) -> Any: ...


def encode(
    codec: Settings, device: Device, parts: Sequence[Numbers]
) -> list[EncodedNumbers | None]:
    """As :meth:`kvzip.codec.Codec.encode_on_device`."""
    with room_of(device) as room:
        return _Encoding(codec, room, parts).run()


class _Keys(NamedTuple):
    """A part's keys before RoPE, on the device, and the pairs that have none."""

    rounding: int
    pairs: int
    target: Target
    missing: NDArray[Any]
    """Of the dtype `_MISSING`, in order."""

    def head(self, first: int, tokens: int) -> bytes:
        """What stands before a block of them."""
        there, pairs = in_block(
            self.missing["pair"], self.pairs, self.target.shape[2], first, tokens
        )
        return head_of(self.rounding, pairs, self.missing["keys"][there])


class _Coding(NamedTuple):
    """How the streams of a part are to be coded."""

    part: int
    """Its number among all parts."""
    target: Target
    tables: Any
    stored: bytes
    """The tables as the file has them."""
    encoders: NDArray[np.uint32]
    keys: _Keys | None


class _Span(NamedTuple):
    """A block, and its streams among those that are coded together."""

    coding: _Coding
    first: int
    tokens: int
    streams: slice


class _Block(NamedTuple):
    """Where a block stands among all that are coded together; nowhere if it is stored as it is."""

    span: _Span
    offset: int | None
    size: int


class _Encoding:
    def __init__(self, codec: Settings, room: Room, parts: Sequence[Numbers]):
        self._codec, self._room, self._parts = codec, room, parts
        self._device = room.device

    def run(self) -> list[EncodedNumbers | None]:
        tried = {n: few for n, part in enumerate(self._parts) if (few := self._tried(part))}
        with self._device.current():
            keys, checksums = self._first(tried)
        codings = []
        for n in range(len(self._parts)):
            coding = self._coding(n, keys.get(n), tried.get(n))
            if coding is not None:
                codings.append(coding)
        encoded: list[EncodedNumbers | None] = [None] * len(self._parts)
        if not codings:
            return encoded
        stored: dict[int, list[bytes]] = {coding.part: [] for coding in codings}
        for jobs, spans in self._jobs(codings):
            with self._device.current():
                blocks, streams, placed = self._coded(codings, jobs, spans)
            for block in blocks:
                n = block.span.coding.part
                if streams["failed"][block.span.streams].any():
                    stored.pop(n, None)  # as far as it can be coded, the CPU codes it
                if n in stored:
                    stored[n].append(self._stored(block, streams, placed))
        for coding in codings:
            if coding.part in stored:
                done = EncodedNumbers(coding.stored, stored[coding.part], checksums[coding.part])
                encoded[coding.part] = done
        return encoded

    # --- keys before RoPE ------------------------------------------------------------------

    def _tried(self, part: Numbers) -> Sampled | None:
        """What a few tokens tell of keys before RoPE; None where they are not to be had, or would
        take more."""
        context = part.context
        if self._codec.keys != "before_rope" or rotation_of(context, part.target.shape[3]) is None:
            return None
        tokens = part.target.shape[2]
        begin = max(0, tokens - TRIED)
        few = sampled(part.read(begin, tokens), replace(context, start=context.start + begin))
        if few is None or not take_less(few, _pairs(part, few), context.dtype):
            return None
        return few

    def _first(self, tried: dict[int, Sampled]) -> tuple[dict[int, _Keys], list[list[int]]]:
        """Keys before RoPE of those parts, but for those of which too many pairs have none; and of
        each part its blocks' checksums."""
        room, parts = self._room, self._parts
        before: dict[int, Target] = {}
        lists: dict[int, tuple[int, int]] = {}
        size = counts = 0
        for n, few in tried.items():
            bytes_of = _size(parts[n]) * parts[n].context.dtype.itemsize
            most = most_missing(_pairs(parts[n], few))
            before[n] = Target.packed(size, parts[n].target.shape, parts[n].target.first)
            size += up(bytes_of, 256)
            lists[n], counts = (counts, most), counts + _MISSING.itemsize * (1 + most)
        if tried:
            at = room.memory("before", size)
            before = {
                n: target._replace(address=at + target.address) for n, target in before.items()
            }
            at = room.memory("missing", counts)
            lists = {n: (at + offset, most) for n, (offset, most) in lists.items()}
            for address, _ in lists.values():
                self._device.clear(room.stream, address, _MISSING.itemsize)
        blocks = sum(len(part.blocks) for part in parts)
        digests = room.memory("digests", 8 * blocks)

        def fill(work: Work) -> None:
            records: list[tuple[int, ...]] = []
            jobs: list[tuple[int, ...]] = []
            for n, part in enumerate(parts):
                number = work.part(part.target)
                for first, tokens in part.blocks:
                    records.append((0, 0, 0, number, first, tokens, len(records)))
                if n in tried:
                    out = work.part(before[n])
                    jobs += self._searches(work, n, tried[n], number, out, lists[n])
            if jobs:
                searches = np.array(jobs, _UNTURN)
                searches = in_pieces(searches, np.maximum(1, _PAIRS // searches["pairs"]))
                arguments = ("jobs", "count", "parts")
                kernel = Kernel(_UNTURN_SOURCE, "channel_unturn", _SPACE, 128, 1, 1, 0, arguments)
                work.run(kernel, searches)
            # A work takes checksums of numbers of one width.
            table = np.array(records, BLOCK)
            work.checksums(parts[0].context.dtype.itemsize, table)

        room.run(digests, fill)
        found = room.fetch("digests", digests, 8 * blocks).view("<u8").tolist()
        checksums, done = [], 0
        for part in parts:
            checksums.append(found[done : done + len(part.blocks)])
            done += len(part.blocks)
        keys = {}
        for n, few in tried.items():
            missing = self._missing(*lists[n])
            if missing is not None:
                keys[n] = _Keys(few.rounding, few.rotation.pairs, before[n], missing)
        return keys, checksums

    def _searches(
        self, work: Work, n: int, few: Sampled, part: int, out: int, missing: tuple[int, int]
    ) -> Iterator[tuple[int, ...]]:
        """Jobs that look for a part's keys before RoPE, each as far as angles lie together."""
        batch, heads, tokens, _ = self._parts[n].target.shape
        start, pairs = self._parts[n].context.start, few.rotation.pairs
        kind = Kind(few.rotation, is_wide(few.rounding), floats=True)
        for address, begin, many in angles_in_runs(work, kind, start, tokens):
            yield (
                *(address, missing[0], part, out, begin, many, 0, batch * heads * many),
                *(pairs, few.rounding, tokens, missing[1]),
            )

    def _missing(self, address: int, most: int) -> NDArray[Any] | None:
        """The pairs for which nothing was found; None if they are too many."""
        each = _MISSING.itemsize
        count = int(self._room.fetch("count", address, each).view("<u4")[0])
        if count > most:
            return None
        if not count:
            return np.empty(0, _MISSING)
        found = self._room.fetch("missing", address + each, count * each).view(_MISSING)
        return found[np.argsort(found["pair"])]

    # --- tables ----------------------------------------------------------------------------

    def _coding(self, n: int, keys: _Keys | None, few: Sampled | None) -> _Coding | None:
        """How a part is coded; None if the CPU is to do it."""
        part = self._parts[n]
        context, shape = part.context, part.target.shape
        if not _size(part):
            return None
        stored = self._of_profile(part, None if keys is None else few)
        if stored is None:
            if shape[2] <= SAMPLE:
                return None  # they may be smaller without tables, which only coding tells
            stored = _native.channel_tables(self._whole(part, keys), *fields(context.dtype))
            if not stored or len(stored) > most_tables(_size(part) * context.dtype.itemsize):
                return None
        elif not stored:
            keys = None  # as cached
        tables = self._codec.load_tables(memoryview(stored), shape, context)
        encoders = None if tables is None else _native.channel_encoders(tables)
        if encoders is None:
            return None
        target = part.target if keys is None else keys.target
        return _Coding(n, target, tables, stored, encoders, keys)

    def _of_profile(self, part: Numbers, few: Sampled | None) -> bytes | None:
        """As `chosen_of_profile`."""
        if part.context.profile is None:
            return None
        cached = rows(part.read(0, min(SAMPLE, part.target.shape[2])))
        before: Bits | None = None
        if few is not None:
            before = cached.copy()
            # Those that have none are as they are, however many.
            few.rotation.unturn(cached, part.context.start, few.rounding, before, before.size)
        return chosen_of_profile(cached, before, part.context)

    def _whole(self, part: Numbers, keys: _Keys | None) -> Bits:
        """All numbers of a part that are to be coded, on the host."""
        if keys is None:
            return rows(part.read(0, part.target.shape[2]))
        form = part.context.dtype
        with self._device.current():
            size = _size(part) * form.itemsize
            found = self._room.fetch("numbers", keys.target.address, size)
        return found.view(form.uint).reshape(part.target.shape)

    # --- streams ---------------------------------------------------------------------------

    def _coded(
        self, codings: Sequence[_Coding], jobs: NDArray[Any], spans: Sequence[_Span]
    ) -> tuple[list[_Block], NDArray[Any], NDArray[np.uint8]]:
        """Blocks of these parts; what became of their streams, of the dtype `_CODED`; and the bytes
        of those that are stored coded, side by side, but for what stands before streams."""
        streams = self._run_streams(codings, jobs)
        blocks, places, total = self._laid_out(spans, jobs, streams)
        out = self._room.memory("blocks", total)
        places["stream"] += np.uint64(out)
        self._device.clear(self._room.stream, out, total)

        def fill(work: Work) -> None:
            name, arguments = "channel_place_streams", ("jobs", "count")
            work.run(Kernel(_SOURCE, name, _SPACE, 128, 1, 1, 0, arguments), places)

        self._room.run(0, fill)
        return blocks, streams, self._room.fetch("blocks", out, total)

    def _jobs(self, codings: Sequence[_Coding]) -> Iterator[tuple[NDArray[Any], list[_Span]]]:
        """Jobs for streams, each with its room, counted from where all are, its part being the
        number of its coding; and whose these are. As many together as there is to be room for."""
        jobs: list[NDArray[Any]] = []
        spans: list[_Span] = []
        at = size = 0
        for number, coding in enumerate(codings):
            plans: dict[int, tuple[NDArray[Any], int]] = {}
            for first, tokens in self._parts[coding.part].blocks:
                if tokens not in plans:
                    plans[tokens] = _planned(coding, number, tokens)
                plan, need = plans[tokens]
                if spans and size + need > _ROOMS:
                    yield joined(jobs), spans
                    jobs, spans, at, size = [], [], 0, 0
                mine = plan.copy()
                mine["first_token"] = first
                mine["room"] += np.uint64(size)
                mine["row"] += np.uint32(at)
                jobs.append(mine)
                spans.append(_Span(coding, first, tokens, slice(at, at + len(plan))))
                at, size = at + len(plan), size + need
        if spans:
            yield joined(jobs), spans

    def _run_streams(self, codings: Sequence[_Coding], jobs: NDArray[Any]) -> NDArray[Any]:
        """Code streams, each in its room, of which `jobs` then have the addresses."""
        last = int(jobs["room"][-1] + _room_sizes(jobs[-1:])[0]) if len(jobs) else 0
        jobs["room"] += np.uint64(self._room.memory("rooms", last))
        size = _CODED.itemsize * len(jobs)
        results = self._room.memory("streams", size)
        arguments = ("jobs", "count", "parts", "results")

        def fill(work: Work) -> None:
            for number in np.unique(jobs["part"]).tolist():
                coding = codings[number]
                part = work.part(coding.target)
                shapes = coding.encoders
                shapes = shapes if len(shapes) else np.zeros((1, 160), np.uint32)
                work.tables(part, work.put(coding.tables.channels()), work.put(shapes, 256))
                mine = jobs[jobs["part"] == number]
                mine["part"] = part
                name = KERNELS[fields(self._parts[coding.part].context.dtype)]
                name = f"channel_encode_{name}"
                work.run(Kernel(_SOURCE, name, _SPACE, 32, 1, 1, _SHARED, arguments), mine)

        self._room.run(results, fill, 1 << 18)
        return self._room.fetch("streams", results, size).view(_CODED).copy()

    def _laid_out(
        self, spans: Sequence[_Span], jobs: NDArray[Any], streams: NDArray[Any]
    ) -> tuple[list[_Block], NDArray[Any], int]:
        """Where blocks stand side by side; a job that brings each stream of them to its place,
        counted from the first block; and the bytes that all take up."""
        data = 2 * (streams["words"].astype(np.int64) + streams["escapes"]) + streams["tops"]
        states = 3 * jobs["lanes"] + (jobs["lanes"] + 7) // 8
        lengths = _aligned(states) + _aligned(jobs["mantissas"]) + _aligned(data)
        places = np.zeros(len(jobs), _PLACE)
        for name in ("room", "lanes", "mantissas", "numbers"):
            places[name] = jobs[name]
        places["words"], places["escapes"] = streams["words"], streams["escapes"]
        keep = np.zeros(len(jobs), bool)
        blocks = []
        total = 0
        for span in spans:
            mine, raw = span.streams, self._raw_bytes(span)
            count = mine.stop - mine.start
            head = up(8 + 8 * count, 16)
            size = max(head + int(lengths[mine].sum()), up(raw // MAX_EXPANSION, 16))
            if streams["failed"][mine].any() or size >= HEADER + raw:
                blocks.append(_Block(span, None, raw))
                continue
            before = np.cumsum(lengths[mine]) - lengths[mine]
            places["stream"][mine] = total + head + before.astype(np.uint64)
            keep[mine] = True
            blocks.append(_Block(span, total, size))
            total += up(size, 64)
        return blocks, places[keep], total

    def _stored(self, block: _Block, streams: NDArray[Any], placed: NDArray[np.uint8]) -> bytes:
        """A block as it is stored."""
        span = block.span
        part, keys = self._parts[span.coding.part], span.coding.keys
        if block.offset is not None:
            head = b"" if keys is None else keys.head(span.first, span.tokens)
            if len(head) + block.size <= HEADER + self._raw_bytes(span):
                coded = placed[block.offset : block.offset + block.size]
                coded[0] = CODED
                lengths = np.stack([streams[name][span.streams] for name in ("words", "escapes")])
                about = np.ascontiguousarray(lengths.T).view(np.uint8).reshape(-1)
                coded[8 : 8 + len(about)] = about
                return b"".join((head, coded.data))
        return bytes(HEADER) + part.read(span.first, span.first + span.tokens).tobytes()

    def _raw_bytes(self, span: _Span) -> int:
        """Bytes of a block's numbers."""
        batch, heads, _, dim = span.coding.target.shape
        itemsize = self._parts[span.coding.part].context.dtype.itemsize
        return batch * heads * span.tokens * dim * itemsize


def _size(part: Numbers) -> int:
    """How many numbers a part has."""
    return math.prod(part.target.shape)


def _pairs(part: Numbers, few: Sampled) -> int:
    """How many pairs of its keys are turned."""
    return _size(part) // part.target.shape[3] * few.rotation.pairs


def _planned(coding: _Coding, number: int, tokens: int) -> tuple[NDArray[Any], int]:
    """Jobs for the streams of a block of so many tokens, of the coding of that number, as for the
    first block of all; and the bytes of all their rooms."""
    plan = _native.channel_plan(coding.tables, coding.target.shape[0], tokens)
    jobs = np.zeros(len(plan), _ENCODE)
    jobs["part"], jobs["tokens"], jobs["row"] = number, tokens, np.arange(len(plan))
    for i, name in enumerate(("first_strip", "strips", "lanes", "mantissas")):
        jobs[name] = plan[:, i]
    jobs["numbers"] = jobs["strips"] * 64 * jobs["lanes"]  # at most
    sizes = _room_sizes(jobs)
    jobs["room"] = np.cumsum(sizes) - sizes
    return jobs, int(sizes.sum())


def _room_sizes(jobs: NDArray[Any]) -> NDArray[np.int64]:
    """The bytes of each stream's room (`EncodeJob`)."""
    numbers = jobs["numbers"].astype(np.int64)
    found: NDArray[np.int64] = (
        _aligned(4 * jobs["lanes"])
        + _aligned(jobs["mantissas"] + 256)
        + _aligned(2 * numbers + numbers // 4 * 2)
    )
    return found


def _aligned(sizes: NDArray[Any]) -> NDArray[Any]:
    """The next multiples of 16."""
    return -(-sizes.astype(np.int64) // 16) * 16
