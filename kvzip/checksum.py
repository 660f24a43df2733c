"""XXH3-64, of bytes and of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from kvzip.dtypes import Bits


def of_bytes(data: Any) -> int:
    """XXH3-64 of a buffer."""
    return int(xxhash.xxh3_64_intdigest(data))


def of_numbers(array: Bits) -> int:
    """XXH3-64 of the bytes of [batch, heads, tokens, dim] numbers in C order, whatever their
    strides."""
    if array.size == 0:
        return of_bytes(b"")
    if array.flags.c_contiguous:
        return of_bytes(array.data)
    if not array[0, 0].flags.c_contiguous:
        return of_numbers(np.ascontiguousarray(array))
    state = xxhash.xxh3_64()
    for row in array:
        for head in row:
            state.update(head.data)
    return int(state.intdigest())
