"""The command line as tests call it, in this process."""

from __future__ import annotations

import json

import pytest

from kvzip.cli import main


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return exit_.value.code, out.out, out.err


def run_json(capsys, *arguments):
    """Exit code and result of a command with --json."""
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)
