"""Running a command, and what becomes of one that fails."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TextIO

from kvzip.cli import (  # noqa: F401 - each adds its commands
    claims,
    demo,
    doctor,
    documents,
    exactness,
    fleet,
    frontier,
    links,
    measures,
    profiles,
    ratios,
    reports,
    scaling,
    speed,
    stores,
    sweep,
    verdicts,
)
from kvzip.cli.app import app
from kvzip.cli.arguments import (
    refuse_closed_input,
    refuse_folders,
    refuse_overwriting,
    wants_json,
    with_streams,
    writes_stdout,
)
from kvzip.cli.failures import BUG, CheckFailed, failure_of
from kvzip.cli.terminal import as_one_line, complain, emit, results_aside
from kvzip.files import leave_nothing_behind
from kvzip.interruption import Terminated, hand_over
from kvzip.version import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    code, given = 0, sys.argv[1:] if arguments is None else arguments
    try:
        hand_over()
        _run(given)
    except BrokenPipeError:
        _forget_stdout()
        code = 1
    except BaseException as error:
        if isinstance(error, SystemExit) and not isinstance(error, Terminated):
            raise
        given = with_streams(given)
        code = _tell(error, wants_json(given), writes_stdout(given))
    sys.exit(code)


def _run(arguments: Sequence[str]) -> None:
    leave_nothing_behind()
    # torch's threads spin while they wait, unless they are told not to before it is imported.
    # Beside other work that makes a prefill take 15 times as long, and a token after it 40 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = with_streams(arguments)
    results_aside(writes_stdout(arguments))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if {*arguments} == {"--version", "--json"}:
        emit({"version": __version__}, True, lambda: None)
        return
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    refuse_closed_input(arguments)
    refuse_folders(command.__name__, arguments)
    refuse_overwriting(command.__name__, bound)
    command(*bound.args, **bound.kwargs)
    if sys.stdout is not None:
        sys.stdout.flush()


def _tell(error: BaseException, as_json: bool, aside: bool) -> int:
    """Say what went wrong, on stderr and, if asked for, as JSON; the exit code. `aside`: stdout is
    the file that is written, and the JSON goes to stderr, too."""
    kind, code, message = failure_of(error)
    found = {"error": message, "kind": kind, "exit": code}
    if code == BUG:
        found["traceback"] = "".join(traceback.format_exception(error))
    # A stderr that takes nothing changes neither the JSON nor the exit code. Where both go there,
    # the JSON is the last line.
    if aside:
        _complain(found)
    # A check that failed has shown its whole result: an error would be a second JSON object.
    if as_json and not isinstance(error, CheckFailed):
        try:
            print(as_one_line(found), flush=True, file=sys.stderr if aside else sys.stdout)
        except OSError:
            _forget_stdout()
    elif isinstance(error, OSError) and error.filename == "standard output":
        _forget_stdout()
    if not aside:
        _complain(found)
    return code


def _complain(found: Mapping[str, object]) -> None:
    """Say on stderr what went wrong, if it takes that."""
    try:
        if "traceback" in found and sys.stderr is not None:
            sys.stderr.write(str(found["traceback"]))
        complain(str(found["error"]))
    except OSError:
        _forget(sys.stderr)


def _forget_stdout() -> None:
    _forget(sys.stdout)


def _forget(stream: TextIO | None) -> None:
    """Let nothing more go to a stream that takes nothing: Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
