"""Cosines and sines of positions on a GPU, by which kernels turn keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codecs import _native
from kvzip.codecs.native.cuda.device import Device, Memory

_TOGETHER = 1 << 16
"""Pairs whose angles are brought to a device together, those of positions that follow each
other."""
_KEPT_BYTES = 64 << 20
"""How much of a device's memory angles take up, about."""


class Angles(NamedTuple):
    """Those of some positions, [positions, 2, pairs]."""

    address: int
    positions: int
    memory: Memory
    """What they lie in; to be held as long as they are used."""


class Kind(NamedTuple):
    """Which angles of a rotation's pairs, and how they are written."""

    rotation: _native.Rotation
    wide: bool
    """Not rounded to bf16."""
    floats: bool
    """As float32, what is rounded, too; else in its own format."""

    def of(self, first: int, positions: int) -> NDArray[np.uint8]:
        """The bytes of positions from `first` on."""
        if self.wide:
            found: NDArray[np.generic] = self.rotation.wide_angles_of(first, positions)
        else:
            found = self.rotation.angles_of(first, positions)
            found = dtypes.to_float32(found, "bf16") if self.floats else found
        return np.ascontiguousarray(found).reshape(-1).view(np.uint8)


def angles(device: Device, kind: Kind, first: int, most: int) -> Angles:
    """Angles of positions from `first` on, of `most` or fewer: brought there when they are first
    asked for, and kept until others need the room."""
    together = max(1, _TOGETHER // kind.rotation.pairs)
    number, before = divmod(first, together)
    found = _kept(device, kind, number * together, together)
    address = found.address + before * found.size // together
    return Angles(address, min(most, together - before), found)


def angles_in_runs(work: Any, kind: Kind, first: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Those of `most` positions from `first` on, as far as they lie together: their address, the
    number of the first, and how many. `work` holds them."""
    begin = 0
    while begin < most:
        found = angles(work.device, kind, first + begin, most - begin)
        work.hold(found.memory)
        yield found.address, begin, found.positions
        begin += found.positions


def all_angles(device: Device, kind: Kind, first: int, positions: int) -> Angles:
    """Angles of all these positions, likewise."""
    found = angles(device, kind, first, positions)
    if found.positions < positions:
        memory = _kept(device, kind, first, positions)
        found = Angles(memory.address, positions, memory)
    return found


def _kept(device: Device, kind: Kind, first: int, positions: int) -> Memory:
    kept: dict[tuple[Kind, int, int], Memory] = device.cache.setdefault("angles", {})
    name = kind, first, positions
    found = kept.pop(name, None)
    if found is None:
        data = kind.of(first, positions)
        while kept and sum(memory.size for memory in kept.values()) + data.size > _KEPT_BYTES:
            del kept[next(iter(kept))]
        found = _brought(device, data)
    kept[name] = found  # what was asked for last stands last
    return found


def _brought(device: Device, data: NDArray[np.uint8]) -> Memory:
    """Bytes in memory of a device's, there when this returns."""
    stream = device.cache.get("angles' stream")
    if stream is None:
        stream = device.cache["angles' stream"] = device.stream()
    memory, pinned = device.allocate(data.size), device.pinned(data.size)
    pinned.array[:] = data
    device.upload(stream, memory.address, pinned.address, data.size)
    device.synchronize(device.record(stream))
    return memory
