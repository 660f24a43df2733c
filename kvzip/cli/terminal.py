"""What a command shows: its result on stdout, as JSON or in words, and progress on stderr.

A path or a name is text and nothing else: never read as markup, never wrapped, and characters that
would steer the terminal are shown as escapes.
"""

from __future__ import annotations

import errno
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kvzip.eval.quantities import clock_text
from kvzip.layout import Layout

_WIDE = 1000
"""Columns of a table where stdout is no terminal: whoever reads it there wants whole cells."""

_NARROW = 40
"""Columns that are taken to be there on any terminal: a narrower one breaks the lines itself."""


class _Console(Console):
    """Strings are printed as :func:`shown` has them, those in the cells of a table, too."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def _console(to_stderr: bool) -> Console:
    console = _Console(stderr=to_stderr, markup=False, highlight=False, emoji=False)
    console.width = max(console.width, _NARROW) if console.is_terminal else _WIDE
    return console


def help_console() -> Console:
    """Where help is printed. Of columns too narrow for its tables rich shows nothing, or never
    ends."""
    console = Console()
    console.width = max(console.width, _NARROW)
    return console


_out, _err = _console(False), _console(True)


_aside = False


def results_aside(aside: bool) -> None:
    """Whether results go to stderr, because stdout is the file that is written."""
    global _aside
    _aside = aside


# --- results, on stdout ------------------------------------------------------------------------


def emit(result: Any, as_json: bool, show: Callable[[], None]) -> None:
    """A command's result: one JSON object, or what `show` says in words; on stdout, or on stderr
    where stdout is the file that the command writes.

    Raises OSError that names standard output when it does not take what is written.
    """
    stream = sys.stderr if _aside else sys.stdout
    if stream is None:  # closed: it would be written nowhere without a word
        raise OSError(errno.EBADF, "it is closed", "standard output")
    try:
        if as_json:
            print(as_one_line(result), file=stream)
        else:
            show()
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def sizes(layout: Layout, encoded_bytes: int) -> dict[str, Any]:
    """What commands say of the size of a file that holds a cache. One without numbers has no bits a
    number."""
    return {
        "raw_bytes": layout.raw_bytes,
        "encoded_bytes": encoded_bytes,
        "ratio": layout.raw_bytes / encoded_bytes,
        "bits_per_value": 8 * encoded_bytes / layout.numbers if layout.numbers else None,
    }


def ratio_words(found: Mapping[str, Any]) -> str:
    """What `sizes` found of how small a cache became, in words."""
    if found["bits_per_value"] is None:
        return "no numbers"
    return f"ratio {found['ratio']:.3f}, {found['bits_per_value']:.2f} bits a number"


def as_one_line(result: Any) -> str:
    """A result as JSON in one line, in the characters that stdout can take. Infinities and NaN are
    null, and a name that is no Unicode text has its bytes as lone surrogates."""
    try:
        text = msgspec.json.encode(result).decode()
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        return text
    except UnicodeEncodeError:
        return json.dumps(_finite(msgspec.to_builtins(result)))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(count: int, what: str) -> str:
    """A count and what it is of: "1 document", "2,000 documents"."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def say(text: str) -> None:
    """Print lines of a result as they are, however long."""
    for line in text.split("\n"):
        (_err if _aside else _out).print(line, soft_wrap=True)


def show_table(table: Table) -> None:
    """Print a table where :func:`say` prints lines."""
    (_err if _aside else _out).print(table)


def shown(text: object) -> str:
    """Text in which characters that do not print (control characters, what turns the direction of
    writing, bytes of a name that are no text) stand as escapes."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in found)


# --- progress and errors, on stderr -----------------------------------------------------------


def complain(message: str) -> None:
    """Say in one line what went wrong."""
    _err.print("kvzip:", style="bold red", end=" ")
    _err.print(message, soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[Callable[..., None]]:
    """A sign that something is being done; yields a function that says what, and how much of all
    the work is done by then (0 to 1), where that is known."""
    lines = Lines()
    if not _err.is_terminal:
        # What is done at once says nothing.
        waiting = threading.Timer(lines.EVERY, lines.step, [what])
        waiting.daemon = True
        waiting.start()

        def line(name: str, share: float | None = None) -> None:
            waiting.cancel()
            lines.step(name, share)

        try:
            yield line
        finally:
            waiting.cancel()
        return
    with _err.status(Text(what)) as status:

        def step(name: str, share: float | None = None) -> None:
            status.update(Text(shown(name) + lines.left(share)))

        yield step


@contextmanager
def bar(what: str, total: int, in_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left; yields a function that moves it on."""
    if not _err.is_terminal:
        lines, done = Lines(), 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            lines.tell(what, done, total, in_bytes)

        yield advance
        return
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for work of several steps; yields a function of (what, done, total)."""
    if not _err.is_terminal:
        yield Lines().tell
        return
    about = TextColumn("{task.description}", markup=False)
    columns = (about, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(shown(what), total=total)
            progress.update(tasks[what], completed=done)

        yield tell


@contextmanager
def stages(
    what: str,
) -> Iterator[tuple[Callable[..., None], Callable[[str, int, int], None]]]:
    """First :func:`working`, then :func:`steps` from its first call on; yields the functions of
    both."""
    with ExitStack() as preparing, ExitStack() as counting:
        step = preparing.enter_context(working(what))
        counts: Callable[[str, int, int], None] | None = None

        def tell(what: str, done: int, total: int) -> None:
            nonlocal counts
            if counts is None:
                preparing.close()
                counts = counting.enter_context(steps())
            counts(what, done, total)

        yield step, tell


class _Count(NamedTuple):
    """A count, and from when and where on its steps tell how long one takes."""

    began: float
    start: int
    at: float
    """When it came to `done`."""
    done: int

    def moved(self, now: float, done: int) -> _Count:
        """The count as it is now. What was there from a run before is counted at once, and tells
        nothing of steps that take ten times as long."""
        if done == self.done:
            return self
        steps, before = done - self.done, self.done - self.start
        if before and (now - self.at) / steps > 10 * (self.at - self.began) / before:
            return _Count(self.at, self.done, now, done)
        return _Count(self.began, self.start, now, done)


class Lines:
    """Progress where there is no terminal to draw on: lines on stderr, each with the time since
    the beginning and, where it can be known, about how much is left.

    A step is a line. A count has a line every few seconds, so that what is done at once
    says nothing.
    """

    EVERY = 5.0
    """Seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began = self._said = clock()
        self._first: tuple[float, float] | None = None
        self._share = 0.0
        self._counted: dict[str, _Count] = {}
        """Counts may take turns."""

    def step(self, what: str, share: float | None = None) -> None:
        self._say(what + self.left(share))

    def left(self, share: float | None) -> str:
        """What is left of the work when a share of it is done, by the time since a share was first
        known; nothing where there is nothing to go by. A share that falls is one of other work,
        which begins."""
        if share is None:
            return ""
        now = self._clock()
        if self._first is None or share < self._share:
            self._first = (now, share)
        self._share = share
        began, start = self._first
        if share <= start or share >= 1:
            return ""
        return f", about {clock_text((now - began) * (1 - share) / (share - start))} left"

    def tell(self, what: str, done: int, total: int, in_bytes: bool = False) -> None:
        now = self._clock()
        count = self._counted.get(what)
        if count is None or done < count.done:  # the same once more
            count = _Count(self._said, 0, self._said, 0)
        self._counted[what] = count = count.moved(now, done)
        if now - self._said < self.EVERY:
            return
        words = f"{done:,} of {total:,}"
        if in_bytes:
            words = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
        if count.start < done < total:
            seconds = (now - count.began) * (total - done) / (done - count.start)
            words += f", about {clock_text(seconds)} left"
        self._say(f"{what}: {words}")

    def _say(self, line: str) -> None:
        self._said = self._clock()
        _err.print(f"[{clock_text(self._said - self._began)}] {line}", soft_wrap=True)
