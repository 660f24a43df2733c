"""Kernels compiled for ARM's 64-bit processors and run in an emulator: the same bytes as here.

`channel` decodes with NEON there; vectors of the rest are the compiler's. The compiler and the
emulator are Debian's g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest
from native.building import PROCESSORS, SOURCES, fuzzer

ROUNDS = {"channel": 3, "predictive": 25}
PATHS = {"channel": " scalar neon", "predictive": " scalar neon"}


@pytest.mark.parametrize("codec", SOURCES)
def test_another_processor_writes_and_reads_the_same_bytes(codec, tmp_path):
    cross, here = shutil.which("aarch64-linux-gnu-g++"), shutil.which("g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (cross and here and emulator):
        pytest.skip("no g++-aarch64-linux-gnu or no qemu-user")
    outputs = []
    for compiler, flags, processor, runner in (
        (here, ["-O2"], PROCESSORS.get(platform.machine()), []),
        (cross, ["-O2", "-static"], "arm", [emulator]),
    ):
        built = fuzzer(compiler, codec, tmp_path / f"build{len(outputs)}", flags, processor)
        command = [*runner, str(built), "--rounds", str(ROUNDS[codec]), "7"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, (command, run.stdout, run.stderr[-4000:])
        outputs.append(run.stdout.splitlines())
    (_, digest_here), (paths_there, digest_there) = outputs
    assert digest_here == digest_there
    assert paths_there == f"{ROUNDS[codec]} rounds, paths:{PATHS[codec]}"
