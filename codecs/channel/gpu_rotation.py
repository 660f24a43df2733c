"""Keys before RoPE on a GPU (turn.cuh): decoded keys are turned, and exceptions put in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import HEADER
from kvzip.codecs.common.device_angles import Kind, angles_in_runs
from kvzip.codecs.common.rotation import is_side_by_side, is_wide
from kvzip.codecs.native.cuda.device import Kernel
from kvzip.codecs.native.cuda.work import Block, in_pieces

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


class _Keys(NamedTuple):
    """Whose keys are turned, and how."""

    part: int
    rotation: _native.Rotation
    rounding: int
    start: int
    """The position of the part's token 0."""


class Turning:
    """What is to be turned once all blocks of a work are decoded."""

    def __init__(self, work: Any):
        self._work = work
        self._runs: list[tuple[_Keys, int, int]] = []
        """Tokens begin to end of a part; blocks that follow each other are one run."""
        self._exceptions: list[tuple[int, ...]] = []

    def add(
        self, rotation: _native.Rotation, start: int, block: Block, rounding: int, exceptions: int
    ) -> None:
        """A block of keys before RoPE, rounded so, with so many exceptions; token 0 of its part
        stands at the position `start`."""
        _, address, _, part, first, tokens, row = block
        keys, begin = _Keys(part, rotation, rounding, start), first
        if self._runs and self._runs[-1][::2] == (keys, first):
            begin = self._runs.pop()[1]
        self._runs.append((keys, begin, first + tokens))
        if exceptions:
            pairs, beside = rotation.pairs, int(is_side_by_side(rounding))
            job = address + HEADER, 0, exceptions, part, first, tokens, pairs, row, beside
            self._exceptions.append(job)

    def _turns(self) -> Iterator[tuple[int, ...]]:
        """The jobs, each cut where its angles end."""
        for (part, rotation, rounding, start), begin, end in self._runs:
            batch, heads, _ = self._work.shape(part)
            kind = Kind(rotation, is_wide(rounding), floats=False)
            runs = angles_in_runs(self._work, kind, start + begin, end - begin)
            for address, at, many in runs:
                place, rows = (part, begin + at, many), batch * heads * many
                yield address, *place, 0, rows, rotation.pairs, rounding, 0

    def run(self) -> None:
        """Have it done after all that is to run already."""
        if self._runs:
            jobs = np.array(list(self._turns()), _TURN)
            jobs = in_pieces(jobs, np.maximum(1, _PAIRS // jobs["pairs"]))
            self._run("channel_turn", jobs, "jobs", "count", "parts")
        if self._exceptions:
            jobs = np.array(self._exceptions, _EXCEPTION)
            jobs = in_pieces(jobs, np.full(len(jobs), _EXCEPTIONS), "first", "count")
            self._run("channel_exceptions", jobs, "jobs", "count", "parts", "flags")

    def _run(self, name: str, jobs: NDArray[Any], *arguments: str) -> None:
        self._work.then()
        self._work.run(Kernel(_SOURCE, name, _SPACE, 128, 1, 1, 0, arguments), jobs)
