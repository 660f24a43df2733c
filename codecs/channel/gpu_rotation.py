"""Keys before RoPE on a GPU (turn.cuh): decoded keys are turned, and exceptions put in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import HEADER
from kvzip.codecs.common.rotation import is_side_by_side, is_wide
from kvzip.codecs.native.cuda.device import Device, Kernel, Memory
from kvzip.codecs.native.cuda.work import row_jobs

_SOURCE, _SPACE = "channel/turn.cuh", "kvzip::channel"
_TURN = np.dtype(
    [
        ("angles", "<u8"),
        ("part", "<u4"),
        ("first_token", "<u4"),
        ("tokens", "<u4"),
        ("first_row", "<u4"),
        ("rows", "<u4"),
        ("pairs", "<u4"),
        ("rounding", "<u4"),
        ("reserved", "<u4"),
    ]
)
_EXCEPTION = np.dtype(
    [
        ("exceptions", "<u8"),
        ("first", "<u4"),
        ("count", "<u4"),
        ("part", "<u4"),
        ("first_token", "<u4"),
        ("tokens", "<u4"),
        ("pairs", "<u4"),
        ("row", "<u4"),
        ("side_by_side", "<u4"),
    ]
)
"""`TurnJob` and `ExceptionJob` of device_jobs.hpp."""
_PAIRS, _EXCEPTIONS = 8192, 1024
"""What one block of threads does."""
_ANGLES = 1 << 16
"""Pairs' angles that are brought to a device together, those of positions that follow each
other."""
_KEPT_BYTES = 64 << 20
"""How much of a device's memory angles take up, about."""


class Turning:
    """What is to be turned once all blocks of a work are decoded."""

    def __init__(self, work: Any):
        self._work = work
        self._turn: list[NDArray[Any]] = []
        self._exceptions: list[NDArray[Any]] = []

    def add(
        self,
        rotation: _native.Rotation,
        start: int,
        blocks: NDArray[Any],
        found: NDArray[np.uint32],
    ) -> None:
        """Blocks of one part, of which token 0 stands at the position `start`; `found`: which of
        them hold keys before RoPE, how these are rounded, and how many exceptions there are."""
        for n, rounding, exceptions in found.tolist():
            block = blocks[n]
            self._add_keys(rotation, start, block, rounding)
            if not exceptions:
                continue
            jobs = np.zeros(-(-exceptions // _EXCEPTIONS), _EXCEPTION)
            jobs["exceptions"] = block["address"] + np.uint64(HEADER)
            jobs["first"] = np.arange(len(jobs)) * _EXCEPTIONS
            jobs["count"] = np.minimum(_EXCEPTIONS, exceptions - jobs["first"])
            for name, of in (("part", "part"), ("first_token", "first"), ("tokens", "tokens")):
                jobs[name] = block[of]
            jobs["pairs"], jobs["row"] = rotation.pairs, block["row"]
            jobs["side_by_side"] = is_side_by_side(rounding)
            self._exceptions.append(jobs)

    def _add_keys(self, rotation: _native.Rotation, start: int, block: Any, rounding: int) -> None:
        part, first, tokens = (int(block[name]) for name in ("part", "first", "tokens"))
        batch, heads, _ = self._work.shape(part)
        begin, end = start + first, start + first + tokens
        each = max(1, _PAIRS // rotation.pairs)
        together = max(1, _ANGLES // rotation.pairs)
        while begin < end:
            run, before = divmod(begin, together)
            stop = min(end, begin - before + together)
            angles = _angles(
                self._work.device, rotation, run * together, together, is_wide(rounding)
            )
            self._work.hold(angles)
            jobs = row_jobs(_TURN, batch * heads * (stop - begin), each)
            jobs["angles"] = angles.address + before * angles.size // together
            jobs["part"], jobs["first_token"] = part, begin - start
            jobs["tokens"], jobs["pairs"] = stop - begin, rotation.pairs
            jobs["rounding"] = rounding
            self._turn.append(jobs)
            begin = stop

    def run(self) -> None:
        """Have it done after all that is to run already."""
        if self._turn:
            self._run("channel_turn", self._turn, "jobs", "count", "parts")
        if self._exceptions:
            self._run("channel_exceptions", self._exceptions, "jobs", "count", "parts", "flags")

    def _run(self, name: str, jobs: Sequence[NDArray[Any]], *arguments: str) -> None:
        self._work.then()
        self._work.run(Kernel(_SOURCE, name, _SPACE, 128, 1, 1, 0, arguments), np.concatenate(jobs))


def _angles(
    device: Device, rotation: _native.Rotation, first: int, positions: int, wide: bool
) -> Memory:
    """The angles of positions from `first` on, on a device, bf16 or float32 [positions, 2, pairs]:
    brought there when they are first asked for, and kept until others need the room."""
    kept: dict[tuple[_native.Rotation, int, bool], Memory] = device.cache.setdefault("angles", {})
    found = kept.pop((rotation, first, wide), None)
    if found is None:
        angles_of = rotation.wide_angles_of if wide else rotation.angles_of
        angles = angles_of(first, positions).reshape(-1).view(np.uint8)
        while kept and sum(memory.size for memory in kept.values()) + angles.size > _KEPT_BYTES:
            del kept[next(iter(kept))]
        found = _brought(device, angles)
    kept[rotation, first, wide] = found  # what was asked for last stands last
    return found


def _brought(device: Device, data: NDArray[np.uint8]) -> Memory:
    """Bytes in memory of a device's, there when this returns."""
    stream = device.cache.get("angles' stream")
    if stream is None:
        stream = device.cache["angles' stream"] = device.stream()
    memory, pinned = device.allocate(data.size), device.pinned(data.size)
    pinned.array[:] = data
    device.upload(stream, memory.address, pinned.address, data.size)
    device.synchronize(device.record(stream))
    return memory
