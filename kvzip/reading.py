"""Files that can be read anywhere, whatever they come from."""

from __future__ import annotations

import errno
import os
import select
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from kvzip import files
from kvzip.errors import UsageError

LengthOf = Callable[[bytearray], int | None]
"""Says of the first bytes of a file how many bytes all of it has, None if it takes more of them to
tell; raises KVZipError for what begins like no such file."""

_standard_input: int | None = None
"""The number of a copy of what came through standard input, once it was read."""


def reading(
    path: files.AnyPath, length_of: LengthOf | None = None, buffering: int = -1
) -> IO[bytes]:
    """A file open for reading, anywhere in it and through its number.

    What can be read only once, from its beginning (a pipe, a terminal, a device), is copied first,
    in memory up to 256 MiB and on disk above; of ``/dev/stdin`` the copy is kept, for who reads it
    again. With `length_of` little more is copied than what begins so may have. `buffering`: of a
    file that is not copied, as for Python's `open`. Raises OSError, which names the path, also of a
    pipe by its number in which nothing is left, and what `length_of` does.
    """
    global _standard_input
    name = files.name_of(path)
    number = files.stream_of(name)
    if number == 0 and _standard_input is not None:
        return os.fdopen(_anew(_standard_input), "rb")
    handle, kind = _open_to_read(name) if number is None else _again(number, name)
    if stat.S_ISREG(kind):
        return os.fdopen(handle, "rb", buffering)
    if stat.S_ISDIR(kind):
        os.close(handle)
        raise files.error_of(errno.EISDIR, name)
    with files.naming(name), os.fdopen(handle, "rb") as file:
        copy = copied(file, length_of)
    if number == 0:
        _standard_input = os.dup(copy.fileno())
    elif number is not None and stat.S_ISFIFO(kind) and not os.fstat(copy.fileno()).st_size:
        copy.close()  # no damaged file: a shell's <(...) that a command has read already
        words = "nothing is in this pipe, or nothing any more: what comes through it is read once"
        raise OSError(errno.ENODATA, words, name)
    return copy


def _again(number: int, name: str) -> tuple[int, int]:
    """Another number of an open file, and its kind."""
    try:
        handle = os.dup(number)
    except OSError:
        raise files.error_of(errno.EBADF, name) from None
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        with suppress(OSError):
            again = _anew(handle)
            os.close(handle)
            handle = again
    return handle, kind


def _anew(number: int) -> int:
    """Another number of an open file, which is read from its beginning. Where the system cannot
    open it anew (Linux can), both go on from there."""
    with suppress(FileNotFoundError):
        return os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    handle = os.dup(number)
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def _open_to_read(name: str) -> tuple[int, int]:
    """The number of a file, which of a pipe waits for somebody to write into it, and its kind."""
    flags = os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open(name, flags)
    except FileNotFoundError:
        files.refuse_url(name)
        raise
    try:
        kind = os.fstat(handle).st_mode
        if stat.S_ISREG(kind):  # it blocks as ever
            return handle, kind
        if stat.S_ISFIFO(kind):
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            # Nothing is there, and reading blocks: somebody has it open, and will write.
            if not poll.poll(files.PIPE_SECONDS * 1000) and _ended(handle):
                words = f"nobody writes into this pipe, for {files.PIPE_SECONDS:g} seconds"
                raise OSError(errno.ENXIO, words, name)
        os.set_blocking(handle, True)
    except BaseException:
        os.close(handle)
        raise
    return handle, kind


def _ended(handle: int) -> bool:
    """Whether nobody has an empty pipe open for writing."""
    with suppress(BlockingIOError):
        return not os.read(handle, 1)
    return False


def some(file: Any, count: int) -> memoryview:
    """The next bytes of a file object, at most `count`; none at its end. Raises UsageError when
    its `read` gives anything else."""
    found = file.read(count)
    if isinstance(found, str):
        raise UsageError("the file is open as text: open it in binary mode, 'rb'")
    if found is None:
        raise UsageError("the file has nothing to read yet (its read gave None): let it block")
    try:
        data = memoryview(found).cast("B")
    except (TypeError, ValueError):
        kind = type(found).__name__
        raise UsageError(f"the file's read gave a {kind}, and not bytes") from None
    if len(data) > count:
        raise UsageError(f"the file's read gave {len(data):,} bytes, and {count:,} were asked for")
    return data


def copied(file: Any, length_of: LengthOf | None = None) -> IO[bytes]:
    """All that is left in a file object, in memory or in a temporary file. With `length_of` little
    more than what begins so may have; raises what that does."""
    copy = _in_memory()
    held, first, most = 0, bytearray(), None
    try:
        while (most is None or held <= most) and (chunk := some(file, 1 << 20)):
            held += len(chunk)
            if length_of is not None and most is None:
                first += chunk
                most = length_of(first)
            if held > files.IN_MEMORY >= held - len(chunk):
                disk = tempfile.TemporaryFile()  # noqa: SIM115 - whoever reads closes it
                with copy as memory:
                    memory.seek(0)
                    copy = disk
                    shutil.copyfileobj(memory, disk, 1 << 20)
            copy.write(chunk)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return copy


def _in_memory() -> IO[bytes]:
    """An empty file in memory, with a number; on disk where the system has none (only Linux and
    FreeBSD have)."""
    create = getattr(os, "memfd_create", None)
    if create is None:
        return tempfile.TemporaryFile()
    return os.fdopen(create("kvzip"), "w+b")


def contents(path: files.AnyPath, most: int = 16 << 20) -> bytes:
    """All bytes of a file, which may be a pipe. Raises UsageError when there are more than `most`,
    and OSError."""
    with reading(path, lambda _: most) as file:
        large = os.fstat(file.fileno()).st_size > most
        data = b"" if large else file.read(most + 1)
    if large or len(data) > most:
        name = files.name_of(path)
        raise UsageError(f"{name} has more than {most:,} bytes, and is read as a whole: give less")
    return data


def text_in(path: files.AnyPath, most: int = 16 << 20) -> str:
    """The text in a file of UTF-8. Raises UsageError for one of anything else, and as
    :func:`contents`."""
    try:
        return contents(path, most).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{files.name_of(path)} is not UTF-8 text: {error}") from None
