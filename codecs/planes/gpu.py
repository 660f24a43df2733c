"""Planes put together on a GPU (merge.cuh). The general coder's part is done on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvzip.codecs.native.cuda.device import Kernel

_MERGE = np.dtype(
    [
        ("planes", "<u8"),
        ("number", "<u8"),
        ("part", "<u4"),
        ("first_token", "<u4"),
        ("batch", "<u4"),
        ("head", "<u4"),
        ("first_channel", "<u4"),
        ("from", "<u4"),
        ("to", "<u4"),
        ("channel_step", "<u4"),
        ("token_step", "<u4"),
        ("reserved", "<u4"),
    ]
)
_CHANNELS = 32  # of a job: a warp's lanes
_TOKENS = 256


def merge(
    work: Any,
    planes: Sequence[int],
    *,
    bits: bool,
    by_channel: bool,
    itemsize: int,
    part: int,
    first: int,
    tokens: int,
) -> None:
    """Have planes at these addresses, the highest first, put together into `tokens` tokens of a
    part from token `first` on. `by_channel`: the numbers' order is [batch, heads, dim, tokens]."""
    batch, heads, dim = work.shape(part)
    if not batch * heads * dim * tokens:
        return
    channels, starts = np.arange(0, dim, _CHANNELS), np.arange(0, tokens, _TOKENS)
    rows = np.arange(batch * heads)
    row, channel, start = (
        a.reshape(-1) for a in np.meshgrid(rows, channels, starts, indexing="ij")
    )
    jobs = np.zeros(len(row), _MERGE)
    jobs["planes"] = work.put(np.array(planes, "<u8"))
    jobs["number"] = row * (dim * tokens)
    jobs["part"], jobs["first_token"] = part, first
    jobs["batch"], jobs["head"] = row // heads, row % heads
    jobs["first_channel"] = channel
    jobs["from"], jobs["to"] = start, np.minimum(start + _TOKENS, tokens)
    jobs["channel_step"], jobs["token_step"] = (tokens, 1) if by_channel else (1, dim)
    name = f"merge_{'bit' if bits else 'byte'}_{itemsize}"
    work.run(Kernel("planes/merge.cuh", name, "kvzip::planes"), jobs)
