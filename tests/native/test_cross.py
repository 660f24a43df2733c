"""Kernels compiled for ARM's 64-bit processors and run in an emulator: the same bytes as here.

The compiler and the emulator are Debian's g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
from native.building import CHANNEL, build

PROGRAMS = {"fuzz_channel": CHANNEL}
"""Programs of this folder that print a digest of what they encoded, and their sources."""

ROUNDS = ["--rounds", "3", "7"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_another_processor_writes_and_reads_the_same_bytes(program, tmp_path):
    cross, here = shutil.which("aarch64-linux-gnu-g++"), shutil.which("g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (cross and here and emulator):
        pytest.skip("no g++-aarch64-linux-gnu or no qemu-user")
    outputs = []
    for compiler, flags, runner in [(here, [], []), (cross, ["-static"], [emulator])]:
        folder = tmp_path / f"build{len(outputs)}"
        folder.mkdir()
        built = build(compiler, program, PROGRAMS[program], ["-O2", *flags], folder)
        command = [*runner, str(built), *ROUNDS]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, (command, run.stdout, run.stderr[-4000:])
        outputs.append(run.stdout.splitlines())
    (_, digest_here), (paths_there, digest_there) = outputs
    assert digest_here == digest_there
    assert paths_there.startswith("3 rounds, paths: scalar")
