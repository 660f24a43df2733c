"""codecs/_native.pyi says what the compiled module takes and gives.

nanobind's stubgen writes it from the module's own signatures, with codecs/_native.pat for what
these cannot say. After a change of a binding:

    python -m nanobind.stubgen -D -m kvzip.codecs._native -p codecs/_native.pat \
      -o codecs/_native.pyi
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nanobind.stubgen", reason="needs nanobind (of the extra test)")

CODECS = Path(__file__).parents[2] / "codecs"


def test_the_stub_is_the_modules(tmp_path: Path) -> None:
    made = tmp_path / "_native.pyi"
    command = ["-m", "nanobind.stubgen", "-D", "-m", "kvzip.codecs._native"]
    options = ["-p", str(CODECS / "_native.pat"), "-o", str(made)]
    done = subprocess.run(
        [sys.executable, *command, *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout, done.stdout  # a pattern fits nothing any more
    assert made.read_text() == (CODECS / "_native.pyi").read_text()
