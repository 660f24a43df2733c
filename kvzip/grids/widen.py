"""From codes and scales back to the numbers' bits, in integer arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codecs import _native
from kvzip.dtypes import Bits
from kvzip.errors import CorruptError, UsageError
from kvzip.grids.grid import HALVES, SCALE_BITS, Found, Grid


def widen(found: Found, out: Bits | None = None, first_token: int = 0) -> Bits:
    """The bits that `found` was found in, [..., tokens, channels], written to `out` if it is given
    (of any strides).

    `found.codes` and `found.rest` may hold some neighbouring tokens only, the first of which is
    token `first_token` of the part; scales and exceptions are always those of the whole part.
    Raises CorruptError when description and arrays do not go together.
    """
    grid, codes, rest = found.grid, found.codes, found.rest
    _check(found)
    if not 0 <= first_token < 1 << 63 - max(1, codes.size).bit_length():
        raise UsageError(f"first_token {first_token}: no part has such a token")
    start, stop = grid.channels
    shape = (*codes.shape[:-1], codes.shape[-1] + rest.shape[-1])
    wide = dtypes.get(grid.wide).uint
    if out is None:
        out = np.empty(shape, wide)
    elif out.shape != shape or out.dtype != wide:
        raise UsageError(f"out is {out.dtype} {list(out.shape)}, not {wide} {list(shape)}")
    if not out.size:
        return out
    cube = _cube(out)
    rest_cube = _cube(rest)
    cube[..., :start] = rest_cube[..., :start]
    cube[..., stop:] = rest_cube[..., start:]
    narrow = cube[..., start:stop]
    try:
        scales = None if found.scales is None else _cube(found.scales)
        widen_codes(grid, _cube(codes), scales, narrow, first_token)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CorruptError(f"a grid that cannot be: {error}") from None
    _put_exceptions(found, narrow, first_token)
    if not np.may_share_memory(cube, out):
        out[...] = cube.reshape(shape)
    return out


def widen_codes(
    grid: Grid, codes: Bits, scales: Bits | None, out: Bits, first_token: int = 0
) -> None:
    """Fill `out` from codes and scales, all [rows, tokens, channels]. Raises ValueError or
    TypeError where they do not go together."""
    if scales is None:
        _widen_half(grid.narrow, codes, out)
        return
    target = out if out.strides[-1] == out.itemsize else np.empty(out.shape, out.dtype)
    _native.grid_widen(
        np.ascontiguousarray(codes),
        np.ascontiguousarray(scales),
        grid.scale or "",
        grid.narrow,
        grid.wide,
        grid.rounding == "through_fp32",
        *grid.group,
        first_token,
        target,
    )
    if target is not out:
        out[...] = target


def _widen_half(narrow: str, codes: Bits, out: Bits) -> None:
    """Fill `out`, bits of fp32, from bits of bf16 or fp16. Every value of both is one of fp32, and
    the payload of a NaN keeps its upper bits."""
    numbers = codes.astype(np.uint32)
    if narrow == "bf16":
        np.left_shift(numbers, 16, out=out)
        return
    sign = (numbers & 0x8000) << 16
    magnitude = numbers & 0x7FFF
    # The exponents' biases differ by 112; infinity and NaN have the largest exponent in both.
    out[...] = sign | ((magnitude << 13) + (np.where(magnitude >= 0x7C00, 224, 112) << 23))
    # A subnormal number is so many steps of 2^-24, which a float holds exactly.
    small = magnitude < 0x400
    steps = magnitude[small].astype(np.float32) * np.float32(2**-24)
    out[small] = sign[small] | steps.view(np.uint32)


def _put_exceptions(found: Found, out: Bits, first_token: int) -> None:
    """Overwrite the numbers of `out`, [rows, tokens, channels], that are exceptions."""
    rows, tokens, channels = out.shape
    each = rows * channels
    begin, end = np.searchsorted(
        found.positions, np.array([first_token, first_token + tokens], np.uint64) * np.uint64(each)
    )
    if begin == end:
        return
    local = (found.positions[begin:end] - np.uint64(first_token * each)).astype(np.int64)
    token, row, channel = np.unravel_index(local, (tokens, rows, channels))
    out[row, token, channel] = found.exceptions[begin:end]


def _check(found: Found) -> None:
    """Raise CorruptError where arrays are not as the description says."""
    grid, codes, rest = found.grid, found.codes, found.rest
    start, stop = grid.channels
    half = grid.narrow in HALVES
    if half != (grid.scale is None) or (half and grid.wide != "fp32"):
        raise CorruptError(f"a grid of {grid.narrow} in {grid.wide} with scales {grid.scale}")
    if codes.dtype != (np.uint16 if half else np.uint8) or codes.ndim < 2:
        raise CorruptError(f"codes of {grid.narrow} are {codes.dtype} {list(codes.shape)}")
    wide = dtypes.get(grid.wide).uint
    if rest.dtype != wide or rest.shape[:-1] != codes.shape[:-1]:
        raise CorruptError("channels beside a grid are of another shape")
    if not 0 <= start <= rest.shape[-1] or stop - start != codes.shape[-1]:
        raise CorruptError(f"channels {start} to {stop} of a grid are not those of its codes")
    if (found.scales is None) != half:
        raise CorruptError("scales are missing, or are too many")
    if grid.scale is not None and found.scales is not None:
        scales = found.scales
        if scales.dtype.itemsize * 8 != SCALE_BITS[grid.scale] or scales.dtype.kind != "u":
            raise CorruptError(f"scales of {grid.scale} are {scales.dtype}")
        if scales.shape[:-2] != codes.shape[:-2] or scales.ndim != codes.ndim:
            raise CorruptError(f"scales of shape {list(scales.shape)}")
    positions, exceptions = found.positions, found.exceptions
    if (
        positions.dtype != np.uint64
        or exceptions.dtype != wide
        or positions.ndim != 1
        or positions.shape != exceptions.shape
    ):
        raise CorruptError("exceptions without their positions, or positions without them")
    if np.any(positions[1:] <= positions[:-1]):
        raise CorruptError("exceptions out of order")


def _cube(array: Any) -> NDArray[Any]:
    """The array as [rows, tokens, channels]; a view where its strides allow one."""
    rows = math.prod(array.shape[:-2])
    cube: NDArray[Any] = array.reshape(rows, *array.shape[-2:])
    return cube
