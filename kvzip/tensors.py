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
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.errors import CorruptError, FormatError, StoreError
from kvzip.files import AnyPath, name_of, reading

_MAX_HEADER = 100_000_000
"""What the library `safetensors` reads at most."""


class _Entry(msgspec.Struct, frozen=True):
    """What a file's header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class TensorFile:
    """An open safetensors file, of which every read sees the bytes that were there at first.

    Opens `path`, a pipe too, and reads the header. Raises OSError when it cannot be opened,
    FormatError when it is no such file, and CorruptError when it is cut short.
    """

    def __init__(self, path: AnyPath, mapped: bool = False):
        self.name = name_of(path)
        with reading(path) as file:
            self._handle = os.dup(file.fileno())
        # Not a file object: Python warns of one that is left to the collector.
        self._close = weakref.finalize(self, os.close, self._handle)
        self._state = self._stat()
        start = 8 + (length := int.from_bytes(self._raw(0, 8), "little"))
        if length > _MAX_HEADER:
            raise FormatError(f"{self.name} is not a whole safetensors file: its header has no end")
        try:
            found = msgspec.json.decode(self._raw(8, length), type=dict[str, msgspec.Raw])
            about = found.pop("__metadata__", msgspec.Raw(b"{}"))
            self.metadata = msgspec.json.decode(about, type=dict[str, str])
            self.entries = {n: msgspec.json.decode(e, type=_Entry) for n, e in found.items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{self.name} is not a whole safetensors file: {error}") from None
        self._start, at = start, 0
        for entry in sorted(self.entries.values(), key=lambda entry: entry.data_offsets):
            begin, end = entry.data_offsets
            if begin != at or end < begin:
                raise FormatError(f"{self.name} is not a whole safetensors file: it has gaps")
            at = end
        size = self._state[0]
        if start + at != size:
            kind = CorruptError if size < start + at else FormatError
            raise kind(f"{self.name} has {size:,} bytes, and its header says {start + at:,}")
        self._map: Any = None
        if mapped:
            self._map = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)

    def _stat(self) -> tuple[int, int]:
        """The file's size and time, which change when it is written to."""
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns

    def _raw(self, offset: int, length: int) -> bytes:
        """Bytes of the header."""
        data = os.pread(self._handle, min(length, _MAX_HEADER), offset)
        if len(data) < length:
            raise CorruptError(f"{self.name} is cut short in its header")
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

        Raises CorruptError when the file was changed or cut short since it was opened, and
        StoreError when it cannot be read any more.
        """
        entry = self.entries[name]
        begin, end = entry.data_offsets
        shape = entry.shape
        if some is not None:
            begin += some.start * dtype.itemsize
            shape = (some.stop - some.start,)
        if self._map is not None:
            if begin == end:
                return np.empty(shape, dtype)
            return np.ndarray(shape, dtype, self._map, self._start + begin)
        numbers: NDArray[Any] = np.empty(shape, dtype)
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
