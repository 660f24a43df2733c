"""XXH3-64, of bytes and of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvzip.codecs import _native
from kvzip.dtypes import Bits


def of_bytes(*data: Any) -> int:
    """XXH3-64 of buffers, one after the other."""
    return int(_native.xxh3_64(*data))


def of_numbers(array: Bits) -> int:
    """XXH3-64 of the bytes of [batch, heads, tokens, dim] numbers in C order, whatever their
    strides."""
    if array.size == 0 or array.flags.c_contiguous:
        return of_bytes(array)
    if not array[0, 0].flags.c_contiguous:
        return of_bytes(np.ascontiguousarray(array))
    return of_bytes(*(head for row in array for head in row))
