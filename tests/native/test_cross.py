"""Kernels compiled for ARM's 64-bit processors and run in an emulator: the same bytes as here.

Their vectors are NEON's there. The compiler and the emulator are Debian's g++-aarch64-linux-gnu and
qemu-user.
"""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest
from native.building import SOURCES, fuzzer

ROUNDS = {"channel": 3, "predictive": 25}


@pytest.mark.parametrize("codec", SOURCES)
def test_another_processor_writes_and_reads_the_same_bytes(codec, tmp_path):
    cross, here = shutil.which("aarch64-linux-gnu-g++"), shutil.which("g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (cross and here and emulator):
        pytest.skip("no g++-aarch64-linux-gnu or no qemu-user")
    x86 = platform.machine() in ("x86_64", "AMD64")
    outputs = []
    for compiler, flags, vectors, runner in (
        (here, ["-O2"], x86, []),
        (cross, ["-O2", "-static"], False, [emulator]),
    ):
        built = fuzzer(compiler, codec, tmp_path / f"build{len(outputs)}", flags, vectors)
        command = [*runner, str(built), "--rounds", str(ROUNDS[codec]), "7"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, (command, run.stdout, run.stderr[-4000:])
        outputs.append(run.stdout.splitlines())
    (_, digest_here), (paths_there, digest_there) = outputs
    assert digest_here == digest_there
    assert paths_there.startswith(f"{ROUNDS[codec]} rounds, paths: scalar")
