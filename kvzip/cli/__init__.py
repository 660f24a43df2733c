"""The command line. Every command: ``--json`` for one JSON object on stdout, progress on stderr;
exit code 0 good, 1 failed check or damaged data, 2 wrong use. See docs/cli.md."""

from kvzip.cli.run import main

__all__ = ["main"]
