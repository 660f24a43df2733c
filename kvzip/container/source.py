"""Bytes that can be read in ranges, whatever holds them: a file, memory, any open file object."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from kvzip.errors import (
    CancelledError,
    CorruptError,
    FormatError,
    KVZipError,
    ProfileError,
    SealError,
    StoreError,
    UsageError,
    first_line,
)
from kvzip.files import name_of
from kvzip.options import integer
from kvzip.reading import LengthOf, copied, reading, some
from kvzip.workers import Lock

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(text: str) -> bool:
    """Whether a text is a URL and not a path."""
    return _URL.match(text) is not None


class naming:
    """What is wrong with a file is told with its name, if the source knows one."""

    def __init__(self, source: Any):
        self._source = source

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if error is not None:
            name_in(error, self._source)


def name_in(error: BaseException, source: Any) -> None:
    """Have an error that tells what is wrong with a file tell it with the file's name, if the
    source knows one."""
    if isinstance(error, (CancelledError, CorruptError, FormatError, ProfileError, SealError)):
        name, words = getattr(source, "name", None), str(error)
        if name is not None and not words.startswith(name):
            for subject in ("the file ", "this "):
                if words.startswith(subject):
                    error.args = (f"{name} {words.removeprefix(subject)}",)
                    break
            else:
                error.args = (f"{name}: {words}",)


@runtime_checkable
class Source(Protocol):
    """Bytes that can be read in ranges: a file, a buffer, an object in a store."""

    size: int

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly `length` bytes from `offset` on. Both are in bounds."""
        ...


_PIECE, _ANNOUNCED = 1 << 20, 256 << 20
"""Bytes of a piece of a source that is read from end to end, and of those that it is told of at
once."""


def in_pieces(source: Source) -> Iterator[memoryview]:
    """All bytes of a source, one piece after the other; one that can fetch ahead does."""
    announce = getattr(source, "announce", None)
    for begin in range(0, source.size, _ANNOUNCED):
        end = min(begin + _ANNOUNCED, source.size)
        pieces = [(at, min(_PIECE, end - at)) for at in range(begin, end, _PIECE)]
        if announce is not None:
            announce(pieces)
        for piece in pieces:
            yield source.read(*piece)


class Closable:
    """A `Source` of ours, which is closed with the reader that has it; a caller's own is not."""

    def close(self) -> None:
        """Let go of what the source alone uses."""
        raise NotImplementedError


class Memory:
    """A buffer of bytes."""

    in_memory = True
    """What is read is where it was, and not a copy."""

    def __init__(self, data: Any):
        try:
            whole = memoryview(data).cast("B")
        except (TypeError, ValueError, BufferError) as error:
            raise UsageError(f"a buffer must be bytes side by side: {error}") from None
        # An array, and no memoryview: a Python without its lock loses count of who uses one when
        # threads cut it at once, and releases it under them.
        self._data = np.frombuffer(whole, np.uint8)
        self.size = len(self._data)

    def read(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length].data


@contextmanager
def _still_there() -> Iterator[None]:
    """What was opened and cannot be read any more (its disk or server is gone) is a StoreError."""
    try:
        yield
    except OSError as error:
        raise _not_there(error) from error


def _not_there(error: OSError) -> StoreError:
    return StoreError(f"the file cannot be read any more: {error.strerror or error}")


@contextmanager
def _readable() -> Iterator[None]:
    """What a foreign file object raises when its bytes are damaged is a CorruptError: each kind of
    compressed file has errors of its own."""
    try:
        yield
    except (KVZipError, MemoryError):
        raise
    except Exception as error:
        if _is_damage(error):
            raise CorruptError(f"the file is damaged: {first_line(error)}") from error
        if isinstance(error, (OSError, ValueError)):
            raise
        raise StoreError(f"the file cannot be read: {first_line(error)}") from error


def _is_damage(error: Exception) -> bool:
    """Whether an error says that compressed bytes or an archive make no sense."""
    # Imported here, since few need them.
    import gzip
    import lzma
    import tarfile
    import zipfile
    import zlib

    kinds = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile)
    # bz2 has no error of its own, but an OSError that is not the system's.
    of_bz2 = type(error) is OSError and error.errno is None
    # zstandard, and compression.zstd of later Pythons.
    of_zstd = type(error).__name__ == "ZstdError"
    return isinstance(error, (*kinds, tarfile.TarError)) or of_bz2 or of_zstd


def _name_of(file: Any) -> str | None:
    """The name that a file object says it has; an unnamed one has none, or a number."""
    name = getattr(file, "name", None)
    return name if isinstance(name, str) and name else None


class OpenFile(Closable):
    """A file of the operating system's; threads may read it at once."""

    def __init__(self, file: IO[bytes], owned: bool, name: str | None = None):
        self._file, self._owned = file, owned
        self.name = name or _name_of(file)
        """What errors call it, if anything."""
        self.size = os.fstat(file.fileno()).st_size

    def state(self) -> tuple[int, int]:
        """The file's size and time, which change when it is written to."""
        with _still_there():
            found = os.fstat(self._number())
        return found.st_size, found.st_mtime_ns

    def read(self, offset: int, length: int) -> memoryview:
        data = self._some(offset, length)
        while len(data) < length:  # a read may stop early at 2 GiB
            more = self._some(offset + len(data), length - len(data))
            if not more:
                raise CorruptError(f"the file ended at byte {offset + len(data)} while being read")
            data += more
        return memoryview(data)

    def read_into(self, offset: int, room: memoryview) -> None:
        """Fill `room` with the bytes from `offset` on."""
        done = 0
        while done < len(room):
            with _still_there():
                more = os.preadv(self._number(), [room[done:]], offset + done)
            if not more:
                raise CorruptError(f"the file ended at byte {offset + done} while being read")
            done += more

    def _some(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._number(), length, offset)
        except OSError as error:
            raise _not_there(error) from error

    def _number(self) -> int:
        try:
            return self._file.fileno()  # by now it may be another file's, if this one is closed
        except ValueError:
            raise UsageError("the file is closed, so nothing more can be read from it") from None

    def close(self) -> None:
        if self._owned:
            self._file.close()


class Unchanging(Closable):
    """A file that must stay as it was: what was found out about it, by looking at some of its
    bytes, holds for all others. One that is written to meanwhile is a CorruptError.

    Bytes in memory, and what says nothing of its changes, are taken as they come.
    """

    def __init__(self, source: Source):
        self._source, self.size = source, source.size
        self.name = getattr(source, "name", None)
        self._state = self._now()

    def _now(self) -> tuple[int, int] | None:
        return self._source.state() if isinstance(self._source, OpenFile) else None

    def read(self, offset: int, length: int) -> memoryview:
        data = self._source.read(offset, length)
        if self._now() != self._state:
            error = CorruptError("the file was changed while it was read")
            name_in(error, self)
            raise error
        return data

    def close(self) -> None:
        if isinstance(self._source, Closable):
            self._source.close()


class Stream(Closable):
    """A file object that can seek, of any kind: a member of an archive, a compressed file."""

    def __init__(self, file: Any, owned: bool):
        self._file, self._owned, self._lock = file, owned, Lock()
        self._process = os.getpid()
        self.name = _name_of(file)
        """What errors call it, if anything."""
        self.size = self._file.seek(0, os.SEEK_END)
        if not isinstance(self.size, int):  # some return nothing
            self.size = integer("where a file object ends, by its tell(),", self._file.tell(), 0)

    def read(self, offset: int, length: int) -> memoryview:
        if self._process != os.getpid() and not isinstance(self._file, io.BytesIO):
            raise UsageError(
                "the file was opened before this process was forked, and has one position for "
                "both processes: open it again, or give a path"
            )
        pieces, left = [], length
        with self._lock, _still_there(), _readable():
            try:
                self._file.seek(offset)
                while left:
                    piece = some(self._file, left)
                    if not piece:
                        at = offset + length - left
                        raise CorruptError(f"the file ended at byte {at} while being read")
                    pieces.append(piece)
                    left -= len(piece)
            except UsageError:
                raise
            except ValueError:
                raise UsageError(
                    "the file is closed, so nothing more can be read from it"
                ) from None
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def close(self) -> None:
        if self._owned:
            self._file.close()


class Foreign:
    """A `Source` of somebody else's, which is held to what one must do."""

    def __init__(self, given: Source):
        self._given = given
        self.size = integer("a source's size", given.size, 0)
        self.name = _name_of(given)
        """What errors call it, if anything."""
        for more in ("announce", "in_memory", "read_into"):
            if hasattr(given, more):
                setattr(self, more, getattr(given, more))

    def read(self, offset: int, length: int) -> memoryview:
        with _readable():
            found = self._given.read(offset, length)
        try:
            data = memoryview(found).cast("B")
        except (TypeError, ValueError):
            kind = type(found).__name__
            raise UsageError(f"the source's read gave a {kind}, and not bytes") from None
        if len(data) != length:
            raise UsageError(f"the source's read gave {len(data):,} bytes, and not {length:,}")
        return data


def open_source(given: Any, length_of: LengthOf | None = None) -> Source:
    """The bytes that a caller names: by a path, as a buffer, a file object, a tensor of uint8, or a
    `Source`.

    A file object is read from its beginning. What cannot seek (a pipe, a response) is copied first,
    in memory up to 256 MiB and on disk above; with `length_of` no more than what begins so may
    have. Raises UsageError for anything else, OSError, and what `length_of` does.
    """
    if isinstance(given, (bytes, memoryview)):  # first, as they are soonest told
        return Memory(given)
    if isinstance(given, (str, os.PathLike)):
        return _of_path(given, length_of)
    if hasattr(given, "seek") and hasattr(given, "read") and not _is_buffer(given):
        return _of_file(given, length_of, owned=False)
    if _is_buffer(given):
        return Memory(given)
    if isinstance(given, Source):
        return Foreign(given)
    if hasattr(given, "read"):
        return _of_file(given, length_of, owned=False)
    if hasattr(given, "__dlpack__"):
        return Memory(_bytes_of_tensor(given))
    if hasattr(given, "open"):  # a file in an archive or a package, as zipfile.Path
        with _readable():
            file = given.open("rb")
        return _of_file(file, length_of, owned=True)
    raise UsageError(
        f"a {type(given).__name__} cannot be read: give a path, a URL, bytes, or a binary file"
    )


class Named(NamedTuple):
    """What is not open yet, and its name."""

    name: str | None


def _of_path(path: str | os.PathLike[str], length_of: LengthOf | None) -> Source:
    name = name_of(path)
    with naming(Named(name)):
        file = reading(name, length_of, buffering=0)
    return OpenFile(file, owned=True, name=name)


def _of_file(file: Any, length_of: LengthOf | None, *, owned: bool) -> Source:
    with naming(Named(_name_of(file))), _readable():
        return _opened(file, length_of, owned)


def _opened(file: Any, length_of: LengthOf | None, owned: bool) -> Source:
    try:
        if isinstance(file, io.TextIOBase):
            raise UsageError("the file is open as text: open it in binary mode, 'rb'")
        plain = getattr(file, "file", file)  # what a temporary file wraps
        raw = getattr(plain, "raw", plain)
        if isinstance(raw, io.FileIO) and stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            if not raw.readable():
                raise UsageError("the file is open for writing only")
            return OpenFile(file, owned)
        seekable = getattr(file, "seekable", None)
        if hasattr(file, "seek") and (seekable is None or seekable()):
            return Stream(file, owned)
        copy = copied(file, length_of)
    except ValueError as error:
        if owned:
            file.close()
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the file cannot be read: {error}") from None
    except BaseException:
        if owned:
            file.close()
        raise
    if owned:
        file.close()
    return OpenFile(copy, owned=True, name=_name_of(file))


def _is_buffer(given: Any) -> bool:
    try:
        memoryview(given).release()
    except TypeError:
        return False
    except (BufferError, ValueError):
        return True
    return True


def _bytes_of_tensor(tensor: Any) -> Any:
    try:
        found = np.from_dlpack(tensor)
    except Exception as error:
        raise UsageError(f"a tensor must be uint8 in the processor's memory: {error}") from None
    if found.dtype.itemsize != 1 or not found.flags.c_contiguous:
        raise UsageError(f"a tensor must be uint8, without gaps, not {found.dtype}")
    return found
