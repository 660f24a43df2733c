"""Blocks of `channel` as jobs for a GPU (decode.cuh): a warp decodes a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import CODED, HEADER, MAX_EXPANSION
from kvzip.codecs.channel.gpu_rotation import Turning
from kvzip.codecs.channel.profile import fields
from kvzip.codecs.common.rotation import rotation_of
from kvzip.codecs.native.cuda.device import Device, Kernel, Memory, Pinned, Stream, up
from kvzip.codecs.native.cuda.work import Block, Full, Slot, Target, Work
from kvzip.dtypes import DType
from kvzip.errors import CorruptError

_SOURCE, _SPACE = "channel/decode.cuh", "kvzip::channel"
_SHARED = 128 * 72 + 2 * (4 * 4 * 128 + 128)
"""`kDecodeSharedBytes` of decode.cuh."""
_JOB = np.dtype(("V", 48))
_KERNELS = {
    (8, 7): "bf16",
    (5, 10): "fp16",
    (8, 23): "fp32",
    (4, 3): "fp8_e4m3fn",
    (5, 2): "fp8_e5m2",
}
"""What kernels are called, by bits of exponent and mantissa."""
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
_ENCODED = np.dtype([("words", "<u4"), ("escapes", "<u4"), ("failed", "<u4"), ("tops", "<u4")])
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
    if not len(blocks):
        return
    blocks = blocks[np.argsort(blocks["part"], kind="stable")]
    rows = list(map(Block._make, blocks.tolist()))
    begins: dict[int, int] = {}
    for block in rows:
        begins.setdefault(block.part, block.first)
    parts = list(begins)
    form = contexts[parts[0]].dtype  # of all, as a GPU decodes only such files
    try:
        jobs, raw, unturned, looked_up, places = _native.channel_jobs(
            [contexts[part].tables for part in parts],
            blocks.view(np.uint8),
            np.array([work.shape(part) for part in parts], np.int64),
            form.itemsize,
        )
    except ValueError as error:
        raise CorruptError(str(error)) from None
    if len(jobs):
        at = work.put(looked_up, 256)
        for part, (channels, tables) in zip(parts, places.tolist(), strict=True):
            if channels >= 0:
                work.tables(part, at + channels, at + tables)
        name = f"channel_decode_{_KERNELS[fields(form)]}"
        kernel = Kernel(_SOURCE, name, _SPACE, 32, shared=_SHARED)
        work.run(kernel, jobs.view(_JOB)[:, 0])
    for n in raw:
        work.copy_block(form.itemsize, rows[n], HEADER)
    turning = Turning(work)
    for part, some in groupby(unturned.tolist(), key=lambda found: rows[found[0]].part):
        context, dim = contexts[part], work.shape(part)[2]
        rotation = rotation_of(context, dim)
        if rotation is None or 2 * rotation.pairs > dim:
            raise CorruptError("keys before RoPE, and nothing that says how they are turned")
        start = context.start - begins[part]
        for n, rounding, exceptions in some:
            turning.add(rotation, start, rows[n], rounding, exceptions)
    turning.run()


# --- encoding --------------------------------------------------------------------------------


def encode(
    device: Device, form: DType, tables: Any, target: Target, blocks: Sequence[tuple[int, int]]
) -> list[bytes | None]:
    """Blocks of one layer's keys or values on a device, each (first token, tokens), as
    :meth:`ChannelCodec.encode` gives them, byte for byte; None for one that the caller must encode
    there: it is not shorter coded than as it is, these tables cannot code it, or more than a
    quarter of its numbers are escapes. The numbers that `target` names must have been written.
    """
    encoders = None if tables is None else _native.channel_encoders(tables)
    if encoders is None or not len(blocks):
        return [None] * len(blocks)
    jobs, counts = _encode_jobs(tables, target.shape[0], blocks)
    with device.current():
        stream = device.stream()
        rooms, coded = _code_streams(device, stream, form, tables, encoders, target, jobs)
        spans, places, total = _layout(form, target, blocks, counts, jobs, coded)
        placed = _place_streams(device, stream, places, total)
        del rooms  # what streams were copied from
    return [
        None
        if span is None
        else _block(placed.array, span, coded[span.first : span.first + span.streams])
        for span in spans
    ]


class _Span(NamedTuple):
    """A coded block: its streams, and where it stands among all blocks."""

    first: int
    streams: int
    offset: int
    size: int


def _encode_jobs(
    tables: Any, batch: int, blocks: Sequence[tuple[int, int]]
) -> tuple[NDArray[Any], list[int]]:
    """A job for each stream of the blocks, without its room, and how many streams each block
    has."""
    plans = [_native.channel_plan(tables, batch, tokens) for _, tokens in blocks]
    counts = [len(plan) for plan in plans]
    jobs = np.zeros(sum(counts), _ENCODE)
    at = 0
    for (first, tokens), plan in zip(blocks, plans, strict=True):
        mine = jobs[at : at + len(plan)]
        mine["first_token"], mine["tokens"] = first, tokens
        for i, name in enumerate(("first_strip", "strips", "lanes", "mantissas")):
            mine[name] = plan[:, i]
        at += len(plan)
    jobs["row"] = np.arange(len(jobs))
    jobs["numbers"] = jobs["strips"] * 64 * jobs["lanes"]  # at most
    return jobs, counts


def _code_streams(
    device: Device,
    stream: Stream,
    form: DType,
    tables: Any,
    encoders: NDArray[np.uint32],
    target: Target,
    jobs: NDArray[Any],
) -> tuple[Memory, NDArray[Any]]:
    """Streams, each in a room of its own on the device, which `jobs` then name, and how long they
    are."""
    numbers = jobs["numbers"].astype(np.int64)
    sizes = (
        _aligned(4 * jobs["lanes"])
        + _aligned(jobs["mantissas"] + 256)
        + _aligned(2 * numbers + numbers // 4 * 2)
    )
    ends = np.cumsum(sizes)
    rooms = device.allocate(int(ends[-1]) if len(ends) else 0)
    jobs["room"] = rooms.address + (ends - sizes).astype(np.uint64)
    size = _ENCODED.itemsize * len(jobs)
    results, back = device.allocate(size), device.pinned(size)

    def fill(work: Work) -> None:
        part = work.part(target)
        shapes = encoders if len(encoders) else np.zeros((1, 160), np.uint32)
        work.tables(part, work.put(tables.channels()), work.put(shapes, 256))
        name = f"channel_encode_{_KERNELS[fields(form)]}"
        arguments = ("jobs", "count", "parts", "results")
        work.run(Kernel(_ENCODE_SOURCE, name, _SPACE, 32, 1, 1, _ENCODE_SHARED, arguments), jobs)

    _run(device, stream, results.address, fill)
    device.download(stream, back.address, results.address, size)
    device.synchronize(device.record(stream))
    return rooms, back.array.view(_ENCODED)[: len(jobs)].copy()


def _layout(
    form: DType,
    target: Target,
    blocks: Sequence[tuple[int, int]],
    counts: Sequence[int],
    jobs: NDArray[Any],
    coded: NDArray[Any],
) -> tuple[list[_Span | None], NDArray[Any], int]:
    """Where blocks stand side by side, None for those that the caller must encode; a job that
    brings each stream of the others to its place, counted from the first block; and the bytes that
    all take up."""
    batch, heads, _, dim = target.shape
    data = 2 * (coded["words"].astype(np.int64) + coded["escapes"]) + coded["tops"]
    states = 3 * jobs["lanes"] + (jobs["lanes"] + 7) // 8
    lengths = _aligned(states) + _aligned(jobs["mantissas"]) + _aligned(data)
    places = np.zeros(len(jobs), _PLACE)
    for name in ("room", "lanes", "mantissas", "numbers"):
        places[name] = jobs[name]
    places["words"], places["escapes"] = coded["words"], coded["escapes"]
    keep = np.zeros(len(jobs), bool)
    spans: list[_Span | None] = []
    total = first = 0
    for (_, tokens), count in zip(blocks, counts, strict=True):
        mine = slice(first, first + count)
        raw = batch * heads * tokens * dim * form.itemsize
        head = up(8 + 8 * count, 16)
        size = max(head + int(lengths[mine].sum()), up(raw // MAX_EXPANSION, 16))
        if coded["failed"][mine].any() or size >= HEADER + raw or not count:
            spans.append(None)
        else:
            before = np.cumsum(lengths[mine]) - lengths[mine]
            places["stream"][mine] = total + head + before.astype(np.uint64)
            keep[mine] = True
            spans.append(_Span(first, count, total, size))
            total += up(size, 64)
        first += count
    return spans, places[keep], total


def _place_streams(device: Device, stream: Stream, places: NDArray[Any], total: int) -> Pinned:
    """Blocks side by side on the host, their streams in place and zeros around them."""
    out, host = device.allocate(total), device.pinned(total)
    places["stream"] += np.uint64(out.address)

    def fill(work: Work) -> None:
        name, arguments = "channel_place_streams", ("jobs", "count")
        work.run(Kernel(_ENCODE_SOURCE, name, _SPACE, 128, 1, 1, 0, arguments), places)

    device.clear(stream, out.address, total)
    _run(device, stream, 0, fill)
    device.download(stream, host.address, out.address, total)
    device.synchronize(device.record(stream))
    return host


def _block(placed: NDArray[np.uint8], span: _Span, coded: NDArray[Any]) -> bytes:
    """A block as it is stored: its kind, the lengths of its streams, and the streams."""
    block = placed[span.offset : span.offset + span.size].copy()
    block[0] = CODED
    lengths = np.stack([coded["words"], coded["escapes"]], axis=1)
    block[8 : 8 + 8 * span.streams] = np.ascontiguousarray(lengths).view(np.uint8).reshape(-1)
    return block.tobytes()


def _run(device: Device, stream: Stream, results: int, fill: Callable[[Work], None]) -> None:
    """Run what `fill` puts into a work, in as much memory as that needs; it is done when this
    returns."""
    slot, size = Slot(device), 1 << 16
    while True:
        slot.grow(size)
        work = Work(slot, results, 0)
        with suppress(Full):
            fill(work)
            work.finish()
            work.start(stream, stream)
            return device.synchronize(device.record(stream))
        size *= 4


def _aligned(sizes: NDArray[Any]) -> NDArray[Any]:
    """The next multiples of 16."""
    return -(-sizes.astype(np.int64) // 16) * 16
