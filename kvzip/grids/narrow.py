"""From numbers' bits to codes and scales of a grid that is known, and what does not lie on it."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from kvzip.codecs import _native
from kvzip.dtypes import Bits
from kvzip.grids.grid import HALVES, Found, Grid, Scale
from kvzip.grids.widen import widen_codes


def narrow(bits: Bits, grid: Grid) -> Found:
    """The numbers `bits`, [..., tokens, channels], on this grid.

    What does not lie on it is an exception, so that the result widens to the same bits; that is
    tried. The format of the scales that `grid` names is only a wish: the smallest is taken
    that has them all.
    """
    front, (tokens, channels) = bits.shape[:-2], bits.shape[-2:]
    cube = np.ascontiguousarray(bits).reshape(math.prod(front), tokens, channels)
    start, stop = grid.channels
    within = np.ascontiguousarray(cube[..., start:stop])
    scales: Bits | None = None
    if grid.narrow in HALVES:
        codes = _halves(within, grid.narrow)
    else:
        codes, fp32 = fit(within, grid)
        scale, scales = _smallest_format(fp32)
        grid = msgspec.structs.replace(grid, scale=scale)
    widened = np.empty_like(within)
    widen_codes(grid, codes, scales, widened)
    # In the order in which they lie, which is by rows first, they are found fastest.
    off = np.flatnonzero(widened != within)
    row, token, channel = np.unravel_index(off, within.shape)
    positions = np.ravel_multi_index((token, row, channel), (tokens, len(within), stop - start))
    order = np.argsort(positions, kind="stable")
    rest = np.concatenate((cube[..., :start], cube[..., stop:]), axis=-1)
    return Found(
        grid,
        codes.reshape(*front, *codes.shape[1:]),
        None if scales is None else scales.reshape(*front, *scales.shape[1:]),
        rest.reshape(*front, *rest.shape[1:]),
        positions[order].astype(np.uint64),
        within.reshape(-1)[off[order]],
    )


def fit(cube: Bits, grid: Grid) -> tuple[Bits, Bits]:
    """Codes and bits of fp32 scales that explain most numbers of `cube`, [rows, tokens, channels]
    of the grid's channels, group by group."""
    rows, tokens, channels = cube.shape
    height, width = grid.group
    codes = np.empty(cube.shape, np.uint8)
    scales = np.empty((rows, -(-tokens // height), -(-channels // width)), np.uint32)
    through_fp32 = grid.rounding == "through_fp32"
    _native.grid_fit(cube, grid.wide, grid.narrow, through_fp32, height, width, codes, scales)
    return codes, scales


def _halves(cube: Bits, name: str) -> Bits:
    """Numbers of fp32 as bf16 or fp16, cut or rounded where they are none."""
    if name == "bf16":
        return (cube >> 16).astype(np.uint16)
    with np.errstate(all="ignore"):
        return cube.view(np.float32).astype(np.float16).view(np.uint16)


def _smallest_format(scales: Bits) -> tuple[Scale, Bits]:
    """The smallest format that has all of these positive fp32 numbers, and their bits in it."""
    if not np.any(scales & 0x7FFFFF):
        return "e8m0", (scales >> 23).astype(np.uint8)
    if not np.any(scales & 0xFFFF):
        return "bf16", (scales >> 16).astype(np.uint16)
    return "fp32", scales
