"""What the command line says of an exception: one line, an exit code, and one word.

Only what a user can cause has a line of its own. All else is a bug, and shows as one.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from cyclopts import (
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from kvzip.cli.extras import extra_with
from kvzip.cli.terminal import emit, shown
from kvzip.codec import raised_by
from kvzip.errors import (
    CorruptError,
    DiskFullError,
    FormatError,
    KVZipError,
    NotStoredError,
    ProfileError,
    SealError,
    StoreError,
    UnsupportedError,
)
from kvzip.files import GONE, is_folder_gone
from kvzip.interruption import WORDS, Terminated

T = TypeVar("T")
U = TypeVar("U")

BUG = 70
"""Exit code of a bug: EX_SOFTWARE of sysexits.h."""


class CheckFailed(Exception):
    """A check found something wrong, and the command has shown its whole result already: what is
    left is a line on stderr and exit code 1."""


class SomeFailed(CheckFailed):
    """Some of what a command was to do failed, and its result, which was shown, says which: what is
    left is a line on stderr and the exit code of the first."""

    def __init__(self, first: Failure, message: str):
        super().__init__(message)
        self.first = first


class Failure(NamedTuple):
    """How a command failed, as the person who typed it is told."""

    kind: str
    """usage, unsupported, profile, key, format, corrupt, absent, store, check, system, memory,
    interrupted, package or bug."""
    exit: int
    message: str

    def told(self) -> dict[str, object]:
        """As JSON says it."""
        return {"error": self.message, "kind": self.kind, "exit": self.exit}


class Failed(NamedTuple, Generic[T]):
    """An item that failed, and how."""

    item: T
    failure: Failure


def each(
    items: Sequence[T], do: Callable[[T], U], one_store: bool = True
) -> tuple[list[tuple[T, U]], list[Failed[T]]]:
    """What `do` gives for each of a command's items, and how the others failed. If there is only
    one, its error is raised. `one_store`: all are of the same, so that none is tried after it has
    not answered."""
    done, failed, rest = [], [], list(items)
    while rest:
        item = rest.pop(0)
        try:
            done.append((item, do(item)))
        except (KVZipError, OSError) as error:
            if len(items) == 1:
                raise
            found = failure_of(error)
            failed.append(Failed(item, found))
            silent = isinstance(error, StoreError) and not isinstance(error, NotStoredError)
            if one_store and silent:
                given_up = found._replace(message=f"not tried, since {found.message}")
                failed += [Failed(other, given_up) for other in rest]
                break
    return done, failed


def emit_with(
    result: dict[str, Any],
    failed: Sequence[Failed[Any]],
    name: str,
    count: int,
    as_json: bool,
    show: Callable[[], None],
) -> None:
    """Show the result of a command with `count` items, and which of them failed, each called
    `name` in JSON; then raise SomeFailed, if any did."""
    if not failed:
        emit(result, as_json, show)
        return
    item, first = failed[0]
    words = f"{len(failed)} of {count} failed; the first: {naming(item, first.message)}"
    each_failed = [{name: str(item)} | failure.told() for item, failure in failed]
    emit(result | {"failed": each_failed} | first._replace(message=words).told(), as_json, show)
    raise SomeFailed(first, words)


def naming(item: object, message: str) -> str:
    """What went wrong with an item, which many a message names already."""
    named = message.startswith((f"{item}: ", f"{item} "))
    return message if named else f"{item}: {message}"


def failure_of(error: BaseException) -> Failure:
    """What an exception that ended a command means to the person who typed it."""
    kind, code, message = _told(error)
    lines = (line.strip() for line in shown_lines(message))
    return Failure(kind, code, " ".join(filter(None, lines)))


def shown_lines(message: str) -> list[str]:
    """The lines of a message, each as :func:`shown` has it."""
    return [shown(line) for line in message.splitlines()]


def _told(error: BaseException) -> tuple[str, int, str]:
    """An exception's kind, exit code and message."""
    if isinstance(error, CycloptsError):
        return "usage", 2, _of_use(error)
    if isinstance(error, SomeFailed):
        return error.first.kind, error.first.exit, str(error)
    if isinstance(error, CheckFailed):
        return "check", 1, str(error)
    for kind, code, name in (
        (CorruptError, 1, "corrupt"),
        (FormatError, 1, "format"),
        (NotStoredError, 1, "absent"),
        (StoreError, 1, "store"),
        (DiskFullError, 1, "system"),
        (ProfileError, 2, "profile"),
        (SealError, 2, "key"),
        (UnsupportedError, 2, "unsupported"),
        (KVZipError, 2, "usage"),
    ):
        if isinstance(error, kind):
            return name, code, str(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        words = f"{error.object!r} is no Unicode text, and stands in a result that must be"
        return "usage", 2, words
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130, WORDS
    if isinstance(error, Terminated):
        return "interrupted", error.code, WORDS
    if isinstance(error, MemoryError):
        return "memory", 1, "not enough memory"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("kvzip"):
        extra = extra_with(error.name or "")
        words = f"this command needs more packages: pip install 'kvzip[{extra}]' ({error})"
        return "package", 2, words
    if (codec := raised_by(error)) is not None:
        words = f"this is a bug in the codec {codec!r}, which is not kvzip's own "
        words += f"({type(error).__name__}: {error}). Please report it to whoever makes that codec"
        return "bug", BUG, words
    words = f"this is a bug in kvzip ({type(error).__name__}: {error}). Please report it: "
    return "bug", BUG, words + "the command, the lines above, and what `kvzip --version` says"


def _of_use(error: CycloptsError) -> str:
    """What is wrong with a command line: cyclopts says it, but of what is missing or too much in
    words that only its own users know."""
    said = " ".join(str(error).split())
    chain = error.command_chain or ()
    command, help_ = " ".join(chain), f"({shlex.join(['kvzip', *chain, '--help'])})"
    if isinstance(error, UnknownCommandError) or (
        isinstance(error, UnknownOptionError) and "Did you mean" not in said
    ):
        return f"{said} {help_}"
    if isinstance(error, UnusedCliTokensError):
        return f"{command} has no use for {shlex.join(error.unused_tokens or [])} {help_}"
    argument = error.argument
    if not isinstance(error, MissingArgumentError) or argument is None or "Did you mean" in said:
        return said
    if (given := getattr(error, "keyword", None)) is not None:
        return f"{command} needs a value after {given} {help_}"
    if argument.field_info.is_positional:  # as its help calls it
        return f"{command} needs {argument.name.lstrip('-').upper()} {help_}"
    return f"{command} needs {' or '.join(argument.names)} {help_}"


def _of_system(error: OSError) -> tuple[str, int, str]:
    wrong_use = isinstance(
        error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
    )
    name = error.filename
    if isinstance(name, bytes):
        name = name.decode(errors="surrogateescape")
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        where = "the disk" if name is None else str(name) + ": the disk it is on"
        return "system", 1, f"{where} is full"
    if is_folder_gone(error):
        return "system", 2, GONE
    if name is not None:
        words = f"{name or repr(name)}: {error.strerror or error}"
        if isinstance(error, IsADirectoryError):
            words += ": name a file in it"
        return "system", 2 if wrong_use else 1, words
    return "system", 2 if wrong_use else 1, str(error) or type(error).__name__
