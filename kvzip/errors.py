"""What can go wrong, by kind. Every error a caller can meet is a :class:`KVZipError`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class KVZipError(Exception):
    """Base of all errors of this library; its message says what to do."""


class FormatError(KVZipError):
    """Not a file of this kind, an unknown version, or a header out of bounds."""


class CorruptError(KVZipError):
    """A checksum does not match, or data is cut short."""


class ProfileError(KVZipError):
    """A profile is missing, or it is not the one that the file names."""


class SealError(KVZipError):
    """The key of a sealed file is missing, or it is another one."""


class WeightsError(KVZipError):
    """A cache that was loaded was computed by other weights than the model's that uses it."""


class UnsupportedError(KVZipError):
    """A dtype, a cache layer kind or an option that the library does not handle."""


class UsageError(KVZipError, ValueError):
    """An argument that makes no sense: of the wrong kind, out of range, or beside another one."""


class CancelledError(KVZipError):
    """What was under way was cancelled by somebody."""


class StoreError(KVZipError):
    """A store does not answer, not in time, or not as it should."""


class NotStoredError(StoreError):
    """A store answers, and does not have what it is asked for."""


class DiskFullError(KVZipError):
    """A disk is full where a long run stores what it has finished; it can be gone on with."""


@contextmanager
def disk_full_told(where: object) -> Iterator[None]:
    """A full disk, the system's OSError, becomes a DiskFullError that names what was written, or
    else `where`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{error.filename or where}: the disk it is on is full. What was finished is kept: "
            "make room, and run again to go on"
        ) from error


@contextmanager
def told_as(kind: type[KVZipError], what: str) -> Iterator[None]:
    """Errors of other people's code become `kind`, in one line that begins with `what`; also a
    panic of compiled code, which is no Exception. KVZipError and MemoryError stay what they are.
    """
    try:
        yield
    except (KVZipError, MemoryError):
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise kind(f"{what}: {first_line(error)}") from error


@contextmanager
def extra_told(what: str, extra: str, kind: type[KVZipError] = KVZipError) -> Iterator[None]:
    """A package that is not installed becomes `kind`, which begins with `what` and names the extra
    of kvzip that brings it."""
    try:
        yield
    except ImportError as error:
        raise kind(f"{what}: pip install 'kvzip[{extra}]' ({error})") from None


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a library in Rust: a BaseException that cannot be imported."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, or its name."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
