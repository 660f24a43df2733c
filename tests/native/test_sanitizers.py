"""The codecs' C++ under AddressSanitizer and UBSan, with random and damaged streams."""

from __future__ import annotations

import platform
import random
import re
import shutil
import subprocess

import pytest
from native.building import PROCESSORS, SOURCES, fuzzer

FLAGS = ["-O1", "-g", "-fno-sanitize-recover=all", "-fsanitize=address,undefined"]


@pytest.mark.parametrize("codec", SOURCES)
def test_no_stream_makes_the_kernels_read_or_write_out_of_bounds(tmp_path, codec):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = fuzzer(compiler, codec, tmp_path, FLAGS, PROCESSORS.get(platform.machine()))
    run = subprocess.run(
        [program, "5", str(random.randrange(1 << 30))], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, (run.args, run.stdout, run.stderr[-4000:])
    rounds, paths = re.fullmatch(r"(\d+) rounds, paths:(.*)\n", run.stdout).groups()
    assert int(rounds) >= 3
    assert "scalar" in paths
