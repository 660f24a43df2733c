"""What is brought to a device together and run there: stored bytes, jobs, parts, tables."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.native.cuda.device import Device, Event, Kernel, Memory, Pinned, Stream, up
from kvzip.errors import UsageError, told_as

PART = np.dtype(
    [
        ("numbers", "<u8"),
        ("channels", "<u8"),
        ("tables", "<u8"),
        ("pages", "<u8"),
        ("batch_stride", "<i8"),
        ("head_stride", "<i8"),
        ("token_stride", "<i8"),
        ("page_stride", "<i8"),
        ("page_tokens", "<u4"),
        ("batch", "<u4"),
        ("heads", "<u4"),
        ("dim", "<u4"),
    ]
)
"""`DevicePart` of device_part.hpp."""

BLOCK = np.dtype(
    [
        ("host", "<u8"),
        ("address", "<u8"),
        ("length", "<u8"),
        ("part", "<u4"),
        ("first", "<u4"),
        ("tokens", "<u4"),
        ("row", "<u4"),
    ]
)
"""A stored block: where its bytes lie on the host and on the device, and how many there are; its
part, first token in the part, and tokens; and whose flag is its own."""


class Block(NamedTuple):
    """One of `BLOCK` as Python's own numbers."""

    host: int
    address: int
    length: int
    part: int
    first: int
    tokens: int
    row: int


_COPY = np.dtype(
    [
        ("source", "<u8"),
        ("batch_stride", "<i8"),
        ("head_stride", "<i8"),
        ("token_stride", "<i8"),
        ("part", "<u4"),
        ("first_token", "<u4"),
        ("tokens", "<u4"),
        ("first_row", "<u4"),
        ("rows", "<u4"),
        ("reserved", "<u4"),
    ]
)
_DIGEST = np.dtype(
    [
        ("sums", "<u8"),
        ("bytes", "<u8"),
        ("part", "<u4"),
        ("first_token", "<u4"),
        ("tokens", "<u4"),
        ("row", "<u4"),
    ]
)
_SHORT = 240  # bytes, above which XXH3 adds up pieces of 1,024
_WARPS, _PIECES = 4, 64  # of a block of xxh3_sums, and what each is to do at least of a job
_BEHIND = 1024
_SPARE = 64 << 20
"""Scratch memory grows by as much as there is, up to this."""
_COPIED_BYTES = 32 << 10
"""What one block of threads copies."""


class Full(Exception):
    """There is no room in a slot for so many bytes; it is to be filled anew when there is."""

    def __init__(self, size: int):
        super().__init__(size)
        self.size = size


class Target(NamedTuple):
    """Where the numbers of one layer's keys or values go on a device."""

    address: int
    """The address of number [0, 0, 0, 0]."""
    strides: tuple[int, int, int]
    """Batch, heads, tokens, in numbers. The numbers of a token lie side by side."""
    shape: tuple[int, int, int, int]
    """Batch, heads, tokens, dim."""
    first: int
    """Position of token 0."""
    pages: NDArray[np.int32] | None = None
    """Where numbers lie in pages: which page has each run of `page_tokens` tokens."""
    page_tokens: int = 0
    page_stride: int = 0
    owner: Any = None

    @classmethod
    def packed(cls, address: int, shape: tuple[int, int, int, int], first: int) -> Target:
        """Numbers in C order."""
        _, heads, tokens, dim = shape
        return cls(address, (heads * tokens * dim, tokens * dim, dim), shape, first)


class Slot:
    """Memory of the host and as much of the device, used for one work after the other."""

    def __init__(self, device: Device):
        self.device = device
        self.pinned: Pinned = device.pinned(0)
        self.memory: Memory = device.allocate(0)
        self.size = 0
        """Bytes that there is room for."""
        self.scratch: Memory = device.allocate(0)
        self.uploaded: Event | None = None
        self.done: Event | None = None

    def grow(self, size: int) -> None:
        """Make room for `size` bytes, once nothing that was begun needs what there is."""
        if self.done is not None:
            self.device.synchronize(self.done)
        self.pinned = self.device.pinned(size)
        # Kernels read on for some bytes behind what they are given.
        self.memory = self.device.allocate(size + _BEHIND)
        self.size = size

    def wait(self) -> None:
        """Until the host's memory may be filled anew."""
        if self.uploaded is not None:
            self.device.synchronize(self.uploaded)


class Work:
    """Everything that one slot is filled with, and the kernels and calls of libraries that are to
    run on it."""

    def __init__(self, slot: Slot, results: int, flags: int):
        """`results`: the device's address of a checksum (8 bytes) for each row; `flags`: of a flag
        (4 bytes)."""
        self.device, self._slot = slot.device, slot
        self._results, self._flags = results, flags
        self._used = 0
        self._direct: list[tuple[int, int, int]] = []
        self._parts: list[list[Any]] = []
        self._phases: list[dict[Kernel, list[NDArray[Any]]]] = [{}]
        self._copies: dict[tuple[int, int], list[tuple[tuple[int, ...], int]]] = {}
        """By phase and bytes of a number: jobs, and how many rows one block of threads does."""
        self._calls: dict[int, Callable[[Stream], None]] = {}
        """By phase: calls of libraries, with which it begins."""
        self._launches: list[Callable[[Stream], None]] = []
        self._scratch = 0
        self._held: list[Memory] = []

    # --- bytes -----------------------------------------------------------------------------

    def room(self, size: int, align: int = 16) -> tuple[NDArray[np.uint8], int]:
        """Memory of the host, and the device's address at which what is written there will be."""
        at = up(self._used, align)
        self._used = at + size
        if self._used > self._slot.size:
            raise Full(self._used)
        return self._slot.pinned.array[at : at + size], self._slot.memory.address + at

    def put(self, data: Any, align: int = 16) -> int:
        """The device's address at which a copy of `data` will be."""
        source = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
        flat = source.reshape(-1).view(np.uint8)
        host, address = self.room(flat.size, align)
        host[:] = flat
        return address

    def pinned(self, source: int, size: int, align: int) -> int:
        """The device's address at which a copy of `size` bytes will be that lie in pinned memory
        already, at the host's address `source`."""
        _, address = self.room(size, align)
        self._direct.append((address, source, size))
        return address

    def scratch(self, size: int) -> int:
        """The address of memory that nobody else uses until all of this has run."""
        at = up(self._scratch, 256)
        self._scratch = at + size
        if self._scratch > self._slot.scratch.size:
            if self._slot.done is not None:
                self.device.synchronize(self._slot.done)
            spare = min(self._scratch, _SPARE)
            self._slot.scratch = self.device.allocate(self._scratch + spare)
            raise Full(self._slot.size)
        return self._slot.scratch.address + at

    def hold(self, memory: Memory) -> None:
        """Memory that the kernels use is there as long as this is."""
        self._held.append(memory)

    # --- parts and jobs --------------------------------------------------------------------

    def part(self, target: Target) -> int:
        """The number of a part, by which jobs name it."""
        batch, heads, _, dim = target.shape
        pages = 0 if target.pages is None else self.put(target.pages)
        self._parts.append(
            [
                *(target.address, 0, 0, pages),
                *target.strides,
                target.page_stride,
                *(target.page_tokens or 1, batch, heads, dim),
            ]
        )
        return len(self._parts) - 1

    def again(self, part: int) -> int:
        """The number of another part in the same place, for blocks with tables of their own."""
        self._parts.append(list(self._parts[part]))
        return len(self._parts) - 1

    def tables(self, part: int, channels: int, tables: int) -> None:
        """Where the kernels find what the blocks of a part share."""
        self._parts[part][1:3] = channels, tables

    def shape(self, part: int) -> tuple[int, int, int]:
        """Batch, heads, dim of a part."""
        batch, heads, dim = self._parts[part][-3:]
        return batch, heads, dim

    def run(self, kernel: Kernel, jobs: NDArray[Any]) -> None:
        """Have a kernel run on these jobs too, at the same time as others or in any order."""
        if len(jobs):
            self._phases[-1].setdefault(kernel, []).append(jobs)

    def then(self) -> None:
        """What is to run from now on runs after what was to run before."""
        self._phases.append({})

    def call(self, call: Callable[[Stream], None]) -> None:
        """Have a library put its own work into a stream, to be done after what was to run before,
        and before what is to run from now on. It may be called again."""
        self.then()
        self._calls[len(self._phases) - 1] = call
        self.then()

    def copy(
        self,
        itemsize: int,
        source: int,
        strides: tuple[int, int, int],
        part: int,
        first: int,
        tokens: int,
    ) -> None:
        """Copy `tokens` tokens, numbers at `source` with these strides (batch, heads, tokens), to
        token `first` on of a part."""
        batch, heads, dim = self.shape(part)
        rows = batch * heads * tokens
        if not rows * dim:
            return
        each = max(1, _COPIED_BYTES // (dim * itemsize))
        job = source, *strides, part, first, tokens, 0, rows, 0
        self._copies.setdefault((len(self._phases) - 1, itemsize), []).append((job, each))

    def copy_block(self, itemsize: int, block: Block, header: int = 0) -> None:
        """Copy a block whose numbers are stored as they are, behind so many bytes."""
        _, heads, dim = self.shape(block.part)
        strides = heads * block.tokens * dim, block.tokens * dim, dim
        source = block.address + header
        self.copy(itemsize, source, strides, block.part, block.first, block.tokens)

    def checksums(self, itemsize: int, blocks: NDArray[Any]) -> None:
        """Have the XXH3-64 of each block's numbers, in C order, put where its row's is to be."""
        jobs = np.zeros(len(blocks), _DIGEST)
        for name, of in (("part", "part"), ("first_token", "first"), ("tokens", "tokens")):
            jobs[name] = blocks[of]
        jobs["row"] = blocks["row"]
        of_token = [itemsize * math.prod(self.shape(part)) for part in range(len(self._parts))]
        jobs["bytes"] = blocks["tokens"] * np.array(of_token, np.uint64)[blocks["part"]]
        source, space = "native/cuda/xxh3.cuh", "kvzip::cuda"
        arguments = ("jobs", "count", "parts", itemsize, "results")
        short = jobs["bytes"] <= _SHORT
        if short.any():
            self.run(Kernel(source, "xxh3_short", space, 32, 1, 1, 0, arguments), jobs[short])
            jobs = jobs[~short]
        if not len(jobs):
            return
        pieces = -(-jobs["bytes"].astype(np.int64) // 1024)
        ends = np.cumsum(pieces) * 64
        jobs["sums"] = self.scratch(int(ends[-1])) + (ends - pieces * 64).astype(np.uint64)
        share = max(1, int(pieces.max()) // (_WARPS * _PIECES))
        sums = Kernel(
            source, "xxh3_sums", space, 32 * _WARPS, 1, share, 0,
            ("jobs", "count", share, "parts", itemsize),
        )  # fmt: skip
        self.run(sums, jobs)
        self.then()
        self.run(Kernel(source, "xxh3_digests", space, 32, 4, 1, 0, arguments), jobs)

    # --- on their way ----------------------------------------------------------------------

    def finish(self) -> None:
        """Find room for parts and jobs, the last of all."""
        self._parts_at = (
            self.put(np.array([tuple(part) for part in self._parts], PART), 64)
            if self._parts
            else 0
        )
        for (n, itemsize), copies in self._copies.items():
            whole, each = zip(*copies, strict=True)
            kernel = Kernel("native/cuda/copy.cuh", f"copy_{itemsize}", "kvzip::cuda")
            jobs = in_pieces(np.array(list(whole), _COPY), np.array(each))
            self._phases[n].setdefault(kernel, []).append(jobs)
        for n, phase in enumerate(self._phases):
            if n in self._calls:
                self._launches.append(self._calls[n])
            for kernel, pieces in phase.items():
                jobs = joined(pieces)
                launch = partial(self._launch, kernel, self.put(jobs, 64), len(jobs))
                self._launches.append(launch)

    def start(self, upload: Stream, run: Stream) -> None:
        """Bring all of it to the device and have the kernels run."""
        device, slot = self.device, self._slot
        if slot.done is not None:
            device.wait(upload, slot.done)
        at, base, host = 0, slot.memory.address, slot.pinned.address
        for address, source, size in [*self._direct, (base + self._used, 0, 0)]:
            if address - base > at:  # what lies before it in the slot's own memory
                device.upload(upload, base + at, host + at, address - base - at)
            if size:
                device.upload(upload, address, source, size)
            at = address - base + size
        slot.uploaded = device.record(upload)
        device.wait(run, slot.uploaded)
        self.launch(run)
        slot.done = device.record(run)

    def launch(self, run: Stream) -> None:
        """Have kernels and libraries do their work on what `start` brought."""
        for launch in self._launches:
            launch(run)

    def _launch(self, kernel: Kernel, jobs: int, count: int, run: Stream) -> None:
        given = {"parts": self._parts_at, "flags": self._flags, "results": self._results}
        self.device.launch(run, kernel, count, given | {"jobs": jobs, "count": count})


def filled(slot: Slot, size: int, results: int, flags: int, fill: Callable[[Work], None]) -> Work:
    """A slot filled by `fill`, in as much memory as that needs; `size` is a first guess."""
    slot.wait()
    if slot.size < size:
        slot.grow(size)
    while True:
        work = Work(slot, results, flags)
        try:
            fill(work)
            work.finish()
        except Full as full:
            slot.grow(max(2 * slot.size, full.size))
        else:
            return work


def joined(jobs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Jobs of one kind, one behind the other. NumPy takes longer to find that they are of one kind
    than to copy them."""
    return np.frombuffer(bytearray().join(some.tobytes() for some in jobs), jobs[0].dtype)


def in_pieces(
    jobs: NDArray[Any], each: NDArray[Any], first: str = "first_row", count: str = "rows"
) -> NDArray[Any]:
    """Jobs cut into jobs of at most so many rows, of which the fields `first` and `count` say which
    a job does: `each` has a number for each job."""
    pieces = -(-jobs[count].astype(np.int64) // each)
    found, most = np.repeat(jobs, pieces), np.repeat(each, pieces)
    number = np.arange(len(found)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    before = (number * most).astype(found[first].dtype)
    found[count] = np.minimum(most, found[count] - before)
    found[first] += before
    return found


def bytes_at(host: int, length: int) -> memoryview:
    """The bytes at an address of the host."""
    return memoryview((ctypes.c_uint8 * length).from_address(host)).cast("B")


def pages_of(table: Any) -> NDArray[np.int32]:
    """A block table as int32 of one row a sequence, [batch, pages]."""
    if hasattr(table, "detach"):
        table = table.detach().cpu().numpy()
    with told_as(UsageError, "pages"):
        found = np.atleast_2d(np.asarray(table))
    if found.ndim != 2 or found.dtype.kind not in "iu":
        raise UsageError("pages: want one page number for each run of tokens, or a row a sequence")
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < 2**31:
        raise UsageError("pages: a page number is below 0 or above 2^31 - 1")
    return np.ascontiguousarray(found, np.int32)


def slot_of(device: Device, n: int) -> Slot:
    """The slot of a device's n-th work: two take turns, made when they are first asked for."""
    found: list[Slot] = device.cache.setdefault("slots", [])
    while len(found) <= n % 2:
        found.append(Slot(device))
    return found[n % 2]
