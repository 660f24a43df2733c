"""Ctrl-C while the command line is still being imported, before there is anything that could catch
it: the command says so, and ends with code 130.

This is imported first of all, and does nothing unless this process is the command ``kvzip``: a
library does not own its process's signals.
"""

import os
import signal
import sys
from contextlib import suppress

WORDS = "interrupted; what was finished is kept"
_STDOUT = ("-", "/dev/stdout")


def _is_command() -> bool:
    name = sys.argv[0].rpartition(os.sep)[2] if sys.argv else ""
    return name == "kvzip" or sys.orig_argv[1:3] == ["-m", "kvzip.cli"]


def _end(number: int, frame: object) -> None:
    arguments = sys.argv[1:]
    try:
        if "--json" in arguments:
            line = " ".join([*arguments, ""]).replace("=", " ")
            # The file is what stdout is for then.
            aside = any(
                f"-o{name} {out} " in line for name in ("", "ut", "utput") for out in _STDOUT
            )
            found = f'{{"error":"{WORDS}","kind":"interrupted","exit":130}}\n'
            os.write(2 if aside else 1, found.encode())
        os.write(2, f"kvzip: {WORDS}\n".encode())
    finally:
        os._exit(130)


def watch() -> None:
    """Let Ctrl-C end the process at once, if this is the command and nobody else has a say."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # in another thread than the main one
            signal.signal(signal.SIGINT, _end)


def hand_over() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again: there is one now who catches it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


watch()
