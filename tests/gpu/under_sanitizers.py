"""The kernels for GPUs, through the shim under AddressSanitizer and UBSan, on good files and damaged
ones: `LD_PRELOAD=libasan.so python under_sanitizers.py SECONDS SEED`.

Each file is decoded by the CPU, too, and what comes out, numbers or an error, is the same. Prints
how many rounds there were, and which kernels ran.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np

import kvzip
from kvzip.benchmarks.predictable import predictable
from kvzip.codecs.native.cuda.device import Memory
from kvzip.codecs.native.cuda.shim_device import ShimDevice
from kvzip.testing import cache_like, make_snapshot, reseal

FLAGS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class Sanitized(ShimDevice):
    """Its memory ends where it says: what is read or written behind that is noticed."""

    def allocate(self, size: int) -> Memory:
        whole = np.full(size + 256, 0xA5, np.uint8)
        at = -whole.ctypes.data % 256
        array = np.full(size + at, 0xA5, np.uint8) if at else whole[:size]
        return Memory(array.ctypes.data + (-array.ctypes.data % 256), size, array)


def outcome(blob: bytes, profile: kvzip.Profile | None, **how: object) -> object:
    """The numbers, or the error's words."""
    try:
        return kvzip.decode(blob, profile, threads=1, **how)
    except kvzip.KVZipError as error:
        return type(error), str(error)


def files(draw: random.Random) -> tuple[bytes, kvzip.Profile | None]:
    pass
