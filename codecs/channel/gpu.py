"""Blocks of `channel` as jobs for a GPU (decode.cuh): a warp decodes a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.native.cuda.device import Device, Kernel
from kvzip.codecs.native.cuda.work import Full, Slot, Target, Work
from kvzip.dtypes import DType
from kvzip.errors import CorruptError

_SOURCE, _SPACE = "channel/decode.cuh", "kvzip::channel"
_HEADER = 16  # bytes before the numbers of a block that is stored as it is
_SHARED = 128 * 72 + 2 * (4 * 4 * 128 + 128)
"""`kDecodeSharedBytes` of decode.cuh."""
_JOB = np.dtype(("V", 48))
_ENCODE_SOURCE = "channel/encode.cuh"
_ENCODE_SHARED = 128 * 136
"""`kEncodeSharedBytes` of encode.cuh."""
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
_ENCODED = np.dtype([("words", "<u4"), ("escapes", "<u4"), ("failed", "<u4"), ("reserved", "<u4")])
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
"""`EncodeJob`, `EncodedStream` and `PlaceJob` of device_jobs.hpp."""


def decode(work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]) -> None:
    """As :meth:`kvzip.codec.Codec.decode_on_device`."""
    order = np.argsort(blocks["part"], kind="stable")
    blocks = blocks[order]
    starts = np.flatnonzero(np.diff(blocks["part"], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(blocks)], strict=True):
        mine = blocks[begin:end]
        part = int(mine[0]["part"])
        form, tables = contexts[part].dtype, contexts[part].tables
        batch, heads, dim = work.shape(part)
        try:
            jobs, raw = _native.channel_jobs(
                tables, mine.view(np.uint8), batch, heads, dim, form.itemsize
            )
            if len(jobs):
                work.tables(part, *_tables(work, tables))
        except ValueError as error:
            raise CorruptError(str(error)) from None
        kernel = Kernel(_SOURCE, f"channel_decode_{form.name}", _SPACE, 32, shared=_SHARED)
        work.run(kernel, jobs.view(_JOB)[:, 0])
        for block in mine[raw].tolist():
            _, address, _, _, first, tokens, _ = block
            strides = heads * tokens * dim, tokens * dim, dim
            work.copy(form.itemsize, address + _HEADER, strides, part, first, tokens)


def _tables(work: Any, tables: Any) -> tuple[int, int]:
    """Where a part's channels and tables will be on the device. There is one shape at least, and
    of a bucket what is its own stands beside what is another's."""
    found = tables.entries()
    entries = np.zeros((max(len(found), 1), 32, 2), np.uint32)
    entries[: len(found)] = found.reshape(-1, 2, 32).swapaxes(1, 2)
    return work.put(tables.channels()), work.put(entries, 256)


def encode(
    device: Device, form: DType, tables: Any, target: Target, blocks: Sequence[tuple[int, int]]
) -> list[bytes | None]:
    """Blocks of one layer's keys or values on a device, each (first token, tokens), as
    :meth:`ChannelCodec.encode` gives them, byte for byte; None for one that the caller must encode
    there: it is not shorter coded than as it is, these tables cannot code it, or more than a
    quarter of its numbers are escapes. The numbers that `target` names must have been written.
    """
    batch, heads, _, dim = target.shape
    encoders = None if tables is None else _native.channel_encoders(tables)
    if encoders is None or not len(blocks):
        return [None] * len(blocks)
    plans = [_native.channel_plan(tables, batch, tokens) for _, tokens in blocks]
    jobs = np.zeros(sum(map(len, plans)), _ENCODE)
    at = 0
    for (first, tokens), plan in zip(blocks, plans, strict=True):
        mine = jobs[at : at + len(plan)]
        mine["first_token"], mine["tokens"] = first, tokens
        for i, name in enumerate(("first_strip", "strips", "lanes", "mantissas")):
            mine[name] = plan[:, i]
        at += len(plan)
    jobs["row"] = np.arange(len(jobs))
    jobs["numbers"] = jobs["strips"] * 64 * jobs["lanes"]  # at most
    sizes = (
        _aligned(4 * jobs["lanes"])
        + _aligned(jobs["mantissas"] + 256)
        + _aligned(2 * jobs["numbers"].astype(np.int64) + jobs["numbers"] // 4 * 2)
    )
    ends = np.cumsum(sizes)
    with device.current():
        rooms = device.allocate(int(ends[-1]) if len(ends) else 0)
        jobs["room"] = rooms.address + (ends - sizes).astype(np.uint64)
        results, back = device.allocate(16 * len(jobs)), device.pinned(16 * len(jobs))
        stream = device.stream()

        def run(fill: Any, given: int) -> None:
            slot = Slot(device)
            size = 1 << 16
            while True:
                slot.grow(size)
                work = Work(slot, given, 0)
                with suppress(Full):
                    fill(work)
                    work.finish()
                    work.start(stream, stream)
                    return device.synchronize(device.record(stream))
                size *= 4

        def code(work: Work) -> None:
            part = work.part(target)
            shapes = encoders if len(encoders) else np.zeros((1, 160), np.uint32)
            work.tables(part, work.put(tables.channels()), work.put(shapes, 256))
            arguments = ("jobs", "count", "parts", "results")
            name = f"channel_encode_{form.name}"
            kernel = Kernel(_ENCODE_SOURCE, name, _SPACE, 32, 1, 1, _ENCODE_SHARED, arguments)
            work.run(kernel, jobs)

        run(code, results.address)
        device.download(stream, back.address, results.address, 16 * len(jobs))
        device.synchronize(device.record(stream))
        coded = back.array.view(_ENCODED)[: len(jobs)].copy()

        # Where streams stand in their blocks, and blocks side by side.
        data = 2 * (coded["words"].astype(np.int64) + coded["escapes"])
        lengths = _aligned(4 * jobs["lanes"]) + _aligned(jobs["mantissas"]) + _aligned(data)
        spans: list[tuple[int, int, int, int] | None] = []  # first job, jobs, where, bytes
        places = np.zeros(len(jobs), _PLACE)
        keep = np.zeros(len(jobs), bool)
        total = at = 0
        for (_, tokens), plan in zip(blocks, plans, strict=True):
            whose = slice(at, at + len(plan))
            at += len(plan)
            raw = batch * heads * tokens * dim * form.itemsize
            head = int(_aligned(np.array(8 + 8 * len(plan))))
            least = int(_aligned(np.array(raw // 1024)))
            size = max(head + int(lengths[whose].sum()), least)
            if coded["failed"][whose].any() or size >= _HEADER + raw or not len(plan):
                spans.append(None)
                continue
            before = np.cumsum(lengths[whose]) - lengths[whose]
            places["stream"][whose] = total + head + before.astype(np.uint64)
            keep[whose] = True
            spans.append((whose.start, len(plan), total, size))
            total += -(-size // 64) * 64
        out, host = device.allocate(total), device.pinned(total)
        for name in ("room", "lanes", "mantissas", "numbers"):
            places[name] = jobs[name]
        places["words"], places["escapes"] = coded["words"], coded["escapes"]
        places["stream"] += np.uint64(out.address)

        def place(work: Work) -> None:
            kernel = Kernel(
                _ENCODE_SOURCE, "channel_place_streams", _SPACE, 128, 1, 1, 0, ("jobs", "count")
            )
            work.run(kernel, places[keep])

        device.clear(stream, out.address, total)
        run(place, 0)
        device.download(stream, host.address, out.address, total)
        device.synchronize(device.record(stream))
    found: list[bytes | None] = []
    for span in spans:
        if span is None:
            found.append(None)
            continue
        first, count, where, size = span
        block = host.array[where : where + size].copy()
        block[0] = 1
        pairs = np.stack([coded["words"], coded["escapes"]], axis=1)[first : first + count]
        block[8 : 8 + 8 * count] = np.ascontiguousarray(pairs).view(np.uint8).reshape(-1)
        found.append(block.tobytes())
    return found


def _aligned(size: NDArray[Any]) -> NDArray[Any]:
    return -(-size.astype(np.int64) // 16) * 16
