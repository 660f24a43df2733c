"""Files of tensors (safetensors), read piece by piece: the header first, and tensors when asked.

The format is 8 bytes of length, a JSON header, and the tensors' bytes without a gap. The library
`safetensors` maps whole files, and a mapped file that is cut short ends the process that reads it.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.errors import CorruptError, FormatError, StoreError, UsageError
from kvzip.files import AnyPath, name_of
from kvzip.parsing import from_json
from kvzip.reading import reading

MAX_HEADER = 100_000_000
"""Bytes of a header that the library `safetensors` reads at most."""


class KvzGivenError(FormatError):
    """A .kvz file was given where one of tensors belongs."""


class _Entry(msgspec.Struct, frozen=True):
    """What a file's header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Header(NamedTuple):
    """What a file's header says."""

    metadata: dict[str, str]
    entries: dict[str, _Entry]
    start: int
    """Where the tensors begin."""
    end: int
    """How many bytes the file has."""

    @classmethod
    def of(cls, name: str, first: Any) -> _Header | None:
        """The header in the first bytes of the file of that name; None if it needs more of them.
        Raises FormatError."""
        if len(first) < 8:
            return None
        start = 8 + int.from_bytes(first[:8], "little")
        if bytes(first[:3]) == b"\x89KV":  # those of kvzip.container, sealed ones too
            raise KvzGivenError(f"{name} is a .kvz file: kvzip decode makes a snapshot of it")
        if len(first) > 8 and first[8] != ord("{"):
            raise FormatError(
                f"{name} is no safetensors file: snapshots (kvzip capture) and profiles are"
            )
        if start > 8 + MAX_HEADER:
            raise FormatError(f"{name} is not a whole safetensors file: its header has no end")
        if len(first) < start:
            return None
        try:
            found = from_json(first[8:start], dict[str, msgspec.Raw])
            about = found.pop("__metadata__", msgspec.Raw(b"{}"))
            metadata = from_json(memoryview(about), dict[str, str])
            entries = {n: from_json(memoryview(e), _Entry) for n, e in found.items()}
        except (CorruptError, FormatError) as error:
            raise FormatError(f"{name} is not a whole safetensors file: {error}") from None
        at = 0
        for entry in sorted(entries.values(), key=lambda entry: entry.data_offsets):
            begin, end = entry.data_offsets
            if begin != at or end < begin:
                raise FormatError(f"{name} is not a whole safetensors file: it has gaps")
            at = end
        return cls(metadata, entries, start, start + at)


def whole_length(name: str, first: bytearray) -> int | None:
    """How many bytes a file of that name has that begins so; None if it takes more bytes to tell.
    Raises FormatError for what is no safetensors file."""
    header = _Header.of(name, first)
    return None if header is None else header.end


def check_header(what: str, header: bytes) -> None:
    """Raise UsageError for a header, the JSON alone, that is longer than readers take."""
    if len(header) > MAX_HEADER:
        raise UsageError(
            f"{what} would need {len(header):,} bytes to describe, and {MAX_HEADER:,} can be read"
        )


class TensorFile:
    """An open safetensors file, of which every read sees the bytes that were there at first.

    Opens `path`, a pipe too, or takes a `file` of that path that is open and has a number, and
    reads the header. Raises OSError when it cannot be opened, FormatError when it is no such file,
    and CorruptError when it is cut short.
    """

    def __init__(self, path: AnyPath, mapped: bool = False, file: IO[bytes] | None = None):
        self.name = name_of(path)
        with nullcontext(file) if file else reading(path, partial(whole_length, self.name)) as one:
            self._handle = os.dup(one.fileno())
        # Not a file object: Python warns of one that is left to the collector.
        self._close = weakref.finalize(self, os.close, self._handle)
        self._state = self._stat()
        first = self._raw(9)
        header = _Header.of(self.name, first)
        if header is None:
            header = _Header.of(self.name, self._raw(8 + int.from_bytes(first[:8], "little")))
        assert header is not None, "it has as many bytes as it said that it needs"
        self.metadata, self.entries, self._start, end = header
        size = self._state[0]
        if end != size:
            kind = CorruptError if size < end else FormatError
            raise kind(f"{self.name} has {size:,} bytes, and its header says {end:,}")
        self._map: Any = None
        if mapped:
            self._map = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)

    def _stat(self) -> tuple[int, int]:
        """The file's size and time, which change when it is written to."""
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns

    def _raw(self, length: int) -> bytes:
        """The first bytes of the file."""
        data = os.pread(self._handle, length, 0)
        if len(data) < length:
            raise CorruptError(f"{self.name} is no safetensors file, or cut short in its header")
        return data

    def has(self, name: str, kind: str, shape: Sequence[int], itemsize: int) -> bool:
        """Whether there is a tensor of that kind ("BF16") and shape."""
        entry = self.entries.get(name)
        return (
            entry is not None
            and (entry.dtype, entry.shape) == (kind, tuple(shape))
            and entry.data_offsets[1] - entry.data_offsets[0] == math.prod(shape) * itemsize
        )

    def read(self, name: str, dtype: np.dtype[Any], some: slice | None = None) -> NDArray[Any]:
        """A tensor's numbers, which cannot be written to, as `dtype`; of `some`, a slice with both
        its ends, only these of them, in C order.

        Raises CorruptError when the file was changed or cut short since it was opened,
        StoreError when it cannot be read any more, and FormatError for a shape that no array has.
        """
        entry = self.entries[name]
        begin, end = entry.data_offsets
        shape = entry.shape
        if some is not None:
            begin += some.start * dtype.itemsize
            shape = (some.stop - some.start,)
        try:
            if self._map is not None and begin != end:
                return np.ndarray(shape, dtype, self._map, self._start + begin)
            numbers: NDArray[Any] = np.empty(shape, dtype)
        except (ValueError, OverflowError):
            raise FormatError(f"{self.name}: no array has the shape of {name}") from None
        if self._map is not None:
            return numbers
        self._fill(numbers.reshape(-1).view(np.uint8).data, self._start + begin)
        numbers.flags.writeable = False
        return numbers

    def whole(self) -> bytes:
        """The bytes of the whole file; raises what :meth:`read` does."""
        data = bytearray(self._state[0])
        self._fill(memoryview(data), 0)
        return bytes(data)

    def _fill(self, room: memoryview, offset: int) -> None:
        """Read the bytes from `offset` on."""
        at = 0
        try:
            while at < len(room):
                got = os.preadv(self._handle, [room[at : at + (1 << 30)]], offset + at)
                if not got:
                    raise CorruptError(f"{self.name} became shorter while it was read")
                at += got
            if self._stat() != self._state:
                raise CorruptError(f"{self.name} was changed while it was read")
        except OSError as error:
            words = f"{self.name} cannot be read any more: {error.strerror or error}"
            raise StoreError(words) from error
