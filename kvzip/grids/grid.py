"""What is said of a grid, and the arrays that numbers become on it."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.dtypes import Bits

Wide = Literal["bf16", "fp16", "fp32"]
Narrow = Literal[
    "fp4_e2m1",
    "int4",
    "fp8_e5m2",
    "fp8_e5m2fnuz",
    "fp8_e4m3fn",
    "fp8_e4m3fnuz",
    "int8",
    "bf16",
    "fp16",
]
Scale = Literal["e8m0", "bf16", "fp32"]
Rounding = Literal["once", "through_fp32"]

SCALE_BITS: dict[str, int] = {"e8m0": 8, "bf16": 16, "fp32": 32}
WIDE: tuple[Wide, ...] = get_args(Wide)
HALVES: tuple[Narrow, ...] = ("bf16", "fp16")
"""Narrow formats that need no scale; their wide format is fp32."""


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How wide numbers come from narrow ones; JSON and MessagePack can hold it."""

    wide: Wide
    """The format of the numbers."""
    narrow: Narrow
    """The format of the codes."""
    channels: tuple[int, int]
    """The first of the channels that are codes and the one behind the last. The others are stored
    wide."""
    scale: Scale | None = None
    """The format of the scales; None where codes need none."""
    group: tuple[int, int] = (1, 1)
    """Tokens and channels that share a scale. The last group along an axis may be smaller."""
    rounding: Rounding = "once"
    """Whether a product is rounded once, or to fp32 and then to the wide format."""

    def __str__(self) -> str:
        tokens, channels = self.group
        scaled = f" x {self.scale} for {tokens} x {channels}" if self.scale else ""
        return f"{self.narrow}{scaled}"


class Found(msgspec.Struct, frozen=True):
    """A part as codes, scales and what does not fit.

    A part is [..., tokens, channels]; its `rows` are the indices of all axes before those two.
    """

    grid: Grid
    codes: Bits
    """uint8 (uint16 of a format of 16 bits), the part's shape but for the channels left out. A code
    of 4 bits lies in the lower half of its byte, and the upper half is zero."""
    scales: Bits | None
    """Bits of the scales, [..., groups of tokens, groups of channels]; uint8, uint16 or uint32."""
    rest: Bits
    """The other channels' numbers, as they were, [..., tokens, channels left out]."""
    positions: NDArray[np.uint64]
    """Where the exceptions are among the codes, in order, counted token by token: the index of
    [tokens, rows, channels of the codes]."""
    exceptions: Bits
    """The wide bits of the numbers at `positions`."""

    def cut(self, start: int, stop: int) -> Found:
        """Tokens `start` to `stop`, with the scales of all groups that hold any of them; the
        exceptions are counted from `start` on."""
        height = self.grid.group[0]
        each = math.prod(self.codes.shape) // max(1, self.codes.shape[-2])
        bounds = np.array([start * each, stop * each], np.uint64)
        first, last = np.searchsorted(self.positions, bounds)
        scales = self.scales
        if scales is not None:
            scales = scales[..., start // height : -(-stop // height), :]
        return Found(
            self.grid,
            self.codes[..., start:stop, :],
            scales,
            self.rest[..., start:stop, :],
            self.positions[first:last] - bounds[0],
            self.exceptions[first:last],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays as they are, with no codec."""
        arrays: list[NDArray[Any]] = [self.codes, self.rest, self.positions, self.exceptions]
        if self.scales is not None:
            arrays.append(self.scales)
        return sum(array.nbytes for array in arrays)
