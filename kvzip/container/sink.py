"""What a file is written to, and memory of a caller's as such."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvzip.dtypes import Bits, as_bits
from kvzip.errors import UnsupportedError, UsageError
from kvzip.overlap import overlap


class Sink(Protocol):
    """What a file is written to."""

    def write(self, data: bytes | memoryview, /) -> int: ...
    def seek(self, position: int, /) -> int: ...
    def tell(self) -> int: ...


class Memory:
    """A sink over a caller's memory, from its first byte on.

    `out`: a writable buffer, array or CPU tensor of bytes side by side, none of which holds
    `numbers`. `bound`: the function that says how many are needed. Raises UsageError for another,
    and when more is written than there is room for.
    """

    def __init__(self, out: Any, numbers: Iterable[Bits], bound: str):
        self._bytes, self._bound = _writable(out), bound
        self._at = 0
        if any(overlap(self._bytes, part, otherwise=True) for part in numbers):
            raise UsageError("out is memory of the numbers that are to be encoded")

    def write(self, data: bytes | memoryview, /) -> int:
        stop = self._at + len(data)
        if stop > len(self._bytes):
            raise UsageError(
                f"out has {len(self._bytes):,} bytes, and more are needed: {self._bound} says how "
                "many at most"
            )
        self._bytes[self._at : stop] = np.frombuffer(data, np.uint8)  # without Python's lock
        self._at = stop
        return len(data)

    def seek(self, position: int, /) -> int:
        self._at = position
        return position

    def tell(self) -> int:
        return self._at

    def first(self, length: int) -> memoryview:
        """So many bytes from the beginning on."""
        return self._bytes[:length].data


def _writable(out: Any) -> NDArray[np.uint8]:
    try:
        whole: Any = as_bits(out, "bytes")[0] if _is_tensor(out) else out
        found = np.frombuffer(memoryview(whole).cast("B"), np.uint8)
    except (TypeError, ValueError, BufferError, UnsupportedError) as error:
        raise UsageError(f"out must be a buffer of bytes side by side: {error}") from None
    if not found.flags.writeable:
        raise UsageError("out cannot be written to")
    return found


def _is_tensor(out: Any) -> bool:
    return hasattr(out, "__dlpack__") and not isinstance(out, np.ndarray)
