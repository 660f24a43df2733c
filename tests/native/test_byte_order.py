"""On a processor of the other byte order kvzip is not built, and says why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native.building import ROOT


def test_a_big_endian_target_is_refused(tmp_path):
    """Debian's g++-s390x-linux-gnu; nothing is compiled but what tells the byte order."""
    compiler = shutil.which("s390x-linux-gnu-g++")
    beside = Path(sys.executable).with_name("cmake")
    cmake = str(beside) if beside.exists() else shutil.which("cmake")
    if not (compiler and cmake):
        pytest.skip("no g++-s390x-linux-gnu or no cmake")
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_SYSTEM_NAME=Linux"]
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode
    assert "kvzip is for little-endian processors" in run.stderr
