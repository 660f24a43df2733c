"""The command line. Every command: ``--json`` for one JSON object on stdout, progress on stderr;
exit code 0 good, 1 failed check or damaged data, 2 wrong use. See docs/cli.md."""

import signal
import threading

# What is imported here takes a while, and Ctrl-C meanwhile is no error to show a traceback of.
_quiet = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _quiet:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from kvzip.cli.run import main  # noqa: E402

if _quiet:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["main"]
