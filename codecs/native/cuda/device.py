"""Where kernels run: a GPU, or the shim that runs the same sources on a CPU to test them.

A kernel is named by the file that holds it. It takes an array of jobs, how many there are, and more
of what `Kernel.arguments` names.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.errors import KVZipError, UnsupportedError
from kvzip.files import replacing

SOURCES = Path(__file__).resolve().parents[2]
"""The folder of all codecs: sources include each other from here."""


def up(size: int, multiple: int) -> int:
    """The next multiple, or the size itself if it is one."""
    return -(-size // multiple) * multiple


class Kernel(NamedTuple):
    """A kernel of one of the sources, and how it is launched."""

    source: str
    """Path below the codecs' folder."""
    name: str
    space: str
    """The C++ namespace that it is in."""
    threads: int = 128
    """Threads of a block."""
    jobs: int = 1
    """Jobs that a block does."""
    blocks: int = 1
    """Blocks that do a job together."""
    shared: int = 0
    """Bytes of dynamic shared memory of a block."""
    arguments: tuple[str | int, ...] = ("jobs", "count", "parts", "flags")
    """Addresses of "jobs", "parts" (DevicePart of device_part.hpp), "flags" (of 4 bytes) and
    "results" (of 8 bytes), those two for each row; the "count" of jobs; other numbers of 32 bits as
    they are."""

    def grid(self, count: int) -> int:
        """How many blocks do that many jobs."""
        return -(-count // self.jobs) * self.blocks

    def values(self, given: Mapping[str, int]) -> list[tuple[int, bool]]:
        """The arguments, and of each whether it is an address."""
        return [
            (given[a], a != "count") if isinstance(a, str) else (a, False) for a in self.arguments
        ]


class MemoryFullError(KVZipError):
    """A device has too little memory left."""


class LeftToCPU(Exception):
    """What a device was to decode is for the CPU; the message says why."""


class Memory:
    """Memory of a device: `size` bytes from `address` on, as long as the object lives."""

    def __init__(self, address: int, size: int, owner: Any):
        self.address, self.size, self.owner = address, size, owner


class Pinned:
    """Memory of the host that a device copies from and to while other work goes on."""

    def __init__(self, array: NDArray[np.uint8], owner: Any = None):
        self.array, self.owner = array, owner
        self.address = array.ctypes.data


Stream = Any
"""A queue of work of a device: what its methods take and give."""
Event = Any
"""A place in a stream."""


class Device(ABC):
    """Memory and kernels of one device. Its calls are for one thread at a time: see `lock`."""

    kind: ClassVar[str]
    architecture: str

    def __init__(self) -> None:
        self.lock = RLock()
        self.cache: dict[Any, Any] = {}
        """What is kept from one use to the next, by whoever uses the device."""

    @contextmanager
    def current(self) -> Iterator[None]:
        """Everything below is to be called within this, by the thread that calls."""
        with self.lock:
            yield

    # --- memory ----------------------------------------------------------------------------

    @abstractmethod
    def allocate(self, size: int) -> Memory:
        """Fresh memory, at a multiple of 256. Raises MemoryFullError."""

    @abstractmethod
    def pinned(self, size: int) -> Pinned:
        """Fresh memory of the host."""

    @abstractmethod
    def holds(self, tensor: Any) -> bool:
        """Whether a torch tensor lies in this device's memory."""

    @abstractmethod
    def is_pinned(self, address: int, size: int) -> bool:
        """Whether `size` bytes of the host, at least one, can be copied from without a stop on the
        way."""

    @abstractmethod
    def reaches(self, address: int) -> bool:
        """Whether kernels may write to what is at an address: to memory of another device they
        would not get, and after that nothing would run any more, torch's kernels neither."""

    @abstractmethod
    def upload(self, stream: Stream, address: int, source: int, size: int) -> None:
        """Copy `size` bytes from the host's address `source` to the device's `address`."""

    @abstractmethod
    def download(self, stream: Stream, target: int, address: int, size: int) -> None:
        """Copy `size` bytes from the device's `address` to the host's address `target`."""

    @abstractmethod
    def clear(self, stream: Stream, address: int, size: int) -> None:
        """Set `size` bytes to zero."""

    # --- order -----------------------------------------------------------------------------

    @abstractmethod
    def stream(self) -> Stream:
        """A new queue, beside all others."""

    @abstractmethod
    def stream_of(self, given: Any) -> Stream:
        """The queue that a caller named: an integer handle, what has ``__cuda_stream__`` or
        ``cuda_stream``, or None for the one that the caller's framework uses now."""

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """A place in the queue after all that is in it."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """What is put into the queue from now on waits for the event."""

    @abstractmethod
    def synchronize(self, event: Event) -> None:
        """Wait, here and now, until the event has come to pass."""

    # --- kernels ---------------------------------------------------------------------------

    @abstractmethod
    def launch(self, stream: Stream, kernel: Kernel, count: int, given: Mapping[str, int]) -> None:
        """Run a kernel on `count` jobs; `given`: what its arguments name."""


def sources(path: str) -> dict[str, str]:
    """The text of a source and of all that it includes of ours, by their paths."""
    found: dict[str, str] = {}
    left = [path]
    while left:
        name = left.pop()
        if name in found:
            continue
        text = found[name] = (SOURCES / name).read_text()
        for line in text.splitlines():
            if line.startswith('#include "'):
                left.append(line.split('"')[1])
    return found


@cache
def source_hash(path: str) -> str:
    """SHA-256 of a source and all that it includes of ours."""
    digest = hashlib.sha256()
    for name, text in sorted(sources(path).items()):
        for piece in (name, text):
            digest.update(len(piece).to_bytes(8, "little") + piece.encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where what is compiled on this machine is kept: ``KVZIP_CACHE``, or below the user's own."""
    given = os.environ.get("KVZIP_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvzip"


def keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; not if there is no place for it."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)


def is_cpu(spec: Any) -> bool:
    """Whether a caller names no GPU: None, "cpu", or torch's device of that kind."""
    return spec is None or str(spec).partition(":")[0] == "cpu"


def get_device(spec: Any) -> Device:
    """The device called `spec`: "cuda", "cuda:1", a torch device, an ordinal, or a Device itself.

    Raises UnsupportedError when there is no such device, or nothing to use it with.
    """
    if isinstance(spec, Device):
        return spec
    if isinstance(spec, int):
        ordinal: int | None = spec
    else:
        kind, _, number = str(spec).partition(":")
        if kind != "cuda" or not (number == "" or number.isdecimal()):
            raise UnsupportedError(f'device {spec!r}: use "cpu", "cuda" or "cuda:0"')
        ordinal = int(number) if number else None
    from kvzip.codecs.native.cuda.gpu import cuda_device

    found: Device = cuda_device(ordinal)
    return found
