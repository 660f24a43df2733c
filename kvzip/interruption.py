"""Signals that end the command line; and Ctrl-C, SIGTERM and SIGHUP while it is still being
imported, before there is anything that could catch them: the command says so, and ends with code
130, 143 or 129.

This is imported first of all, and does nothing unless this process is the command ``kvzip``: a
library does not own its process's signals.
"""

import os
import signal
import sys
from contextlib import suppress

WORDS = "interrupted; no file is left half written"
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals by which a process is asked to end, beside Ctrl-C."""
_STDOUT = ("-", "/dev/stdout")


def _is_command() -> bool:
    if "--multiprocessing-fork" in sys.orig_argv:  # one of its processes, with its arguments
        return False
    name = sys.argv[0].rpartition(os.sep)[2] if sys.argv else ""
    return name == "kvzip" or sys.orig_argv[1:3] == ["-m", "kvzip"]


class Terminated(SystemExit):
    """A signal that ends the process was caught: a SystemExit of 128 and its number."""

    code: int

    def __init__(self, number: int):
        super().__init__(128 + number)


def _end(number: int, frame: object) -> None:
    arguments, code = sys.argv[1:], 128 + number
    try:
        if "--json" in arguments:
            line = " ".join([*arguments, ""]).replace("=", " ")
            # The file is what stdout is for then.
            aside = any(
                f"-o{name} {out} " in line for name in ("", "ut", "utput") for out in _STDOUT
            )
            found = f'{{"error":"{WORDS}","kind":"interrupted","exit":{code}}}\n'
            os.write(2 if aside else 1, found.encode())
        os.write(2, f"kvzip: {WORDS}\n".encode())
    finally:
        os._exit(code)


def watch() -> None:
    """Let Ctrl-C and what else asks for an end end the process at once, if this is the command and
    nobody else has a say."""
    if _is_command():
        for number in (signal.SIGINT, *ENDING):
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                with suppress(ValueError):  # in another thread than the main one
                    signal.signal(number, _end)


def hand_over() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again, and the others what they were: there is somebody now
    who catches them."""
    for number in (signal.SIGINT, *ENDING):
        if signal.getsignal(number) is _end:
            own = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if own else signal.SIG_DFL)


watch()
