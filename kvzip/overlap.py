"""Whether arrays share memory."""

from __future__ import annotations

import numpy as np

from kvzip.codecs import _native
from kvzip.dtypes import Bits
from kvzip.errors import UsageError

_MOST_WORK = 10_000
"""Steps that are taken at most to find it out."""


def overlap(a: Bits, b: Bits, otherwise: bool) -> bool:
    """Whether a byte of one array is the other's, too; `otherwise` where strides that no cache has
    make it too hard to tell."""
    try:
        # numpy takes any number of steps, and its stub two.
        return np.shares_memory(a, b, max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return otherwise


def check_apart(arrays: list[Bits]) -> None:
    """Raise UsageError if a number of one array lies where another number does. Nothing but
    their addresses is looked at."""
    for group in _native.close_to_each_other(arrays):
        near = [arrays[number] for number in group]
        if any(
            _overlaps_itself(array)
            or any(overlap(array, other, otherwise=False) for other in near[:i])
            for i, array in enumerate(near)
        ):
            raise UsageError("out has the same memory twice")


def _overlaps_itself(array: Bits) -> bool:
    """Whether two numbers of an array lie at one place."""
    if array.flags.c_contiguous:
        return False
    reach = array.itemsize
    axes = [(abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1]
    for stride, size in sorted(axes):
        if stride < reach:
            break
        reach = stride * (size - 1) + reach
    else:
        return False  # each axis steps over all that the finer ones reach
    places = np.zeros(1, np.int64)
    for stride, size in axes:
        places = (places[:, None] + stride * np.arange(size)).reshape(-1)
    return bool((np.diff(np.sort(places)) < array.itemsize).any())
