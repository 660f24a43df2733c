"""What is encoded on a device, what becomes of it, and the memory that this takes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Semaphore
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs.native.cuda.device import Device, Memory, Pinned
from kvzip.codecs.native.cuda.work import Slot, Target, Work, filled
from kvzip.dtypes import Bits

MOST_ROOMS = 3
"""Encodings that go on beside each other: one on the device, while others wait for it and the CPU
does its share. More would take a device's memory and bring nothing."""


class Numbers(NamedTuple):
    """A part of a layer that lies on a device."""

    target: Target
    """Where it lies."""
    read: Callable[[int, int], Bits]
    """Gives tokens begin to end of it on the host, [batch, heads, tokens, dim]."""
    blocks: Sequence[tuple[int, int]]
    """Of each block its first token, counted from the part's, and its tokens."""
    context: Context
    """As for the part's tables."""


class EncodedNumbers(NamedTuple):
    """What is stored of it."""

    tables: bytes
    blocks: list[bytes]
    checksums: list[int]
    """The XXH3-64 of the numbers of each block."""


class Room:
    """Memory for one encoding after the other, and a queue of their work: grown where it is too
    small, and kept."""

    def __init__(self, device: Device):
        self.device, self.stream, self._slot = device, device.stream(), Slot(device)
        self._memory: dict[str, Memory] = {}
        self._pinned: dict[str, Pinned] = {}

    def memory(self, name: str, size: int) -> int:
        """The address of at least so many bytes, the same ones as of that name before."""
        if name not in self._memory or self._memory[name].size < size:
            self._memory.pop(name, None)  # before there is other memory
            self._memory[name] = self.device.allocate(size)
        return self._memory[name].address

    def run(self, results: int, fill: Callable[[Work], None], size: int = 1 << 16) -> None:
        """Have everything run that `fill` puts into a work, after all that was to run before;
        `size`: a first guess at the bytes that it puts there."""
        filled(self._slot, size, results, 0, fill).start(self.stream, self.stream)

    def fetch(self, name: str, address: int, size: int) -> NDArray[np.uint8]:
        """Bytes of the device when all has run that was to, in memory that the next call of that
        name may use again."""
        if name not in self._pinned or self._pinned[name].array.size < size:
            self._pinned.pop(name, None)
            self._pinned[name] = self.device.pinned(size)
        found = self._pinned[name]
        self.device.download(self.stream, found.address, address, size)
        self.device.synchronize(self.device.record(self.stream))
        return found.array[:size]


@contextmanager
def room_of(device: Device) -> Iterator[Room]:
    """A room that nobody else uses meanwhile; waits for one where `MOST_ROOMS` are in use. Threads
    take turns at the device: what uses it is to be within `device.current()`."""
    with device.current():
        left: Semaphore = device.cache.setdefault("rooms left", Semaphore(MOST_ROOMS))
        free: list[Room] = device.cache.setdefault("rooms", [])
    with left:
        with device.current():
            room = free.pop() if free else Room(device)
        try:
            yield room
        finally:
            with device.current():
                device.synchronize(device.record(room.stream))  # nothing may go on in it
                if not free:  # one stays, for what comes next
                    free.append(room)
