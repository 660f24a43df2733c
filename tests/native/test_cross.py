"""Kernels of other processors, run here: the same bytes as this one's.

Those for ARM's 64-bit processors run in an emulator (Debian's g++-aarch64-linux-gnu and qemu-user);
`channel` decodes with NEON there, and vectors of the rest are the compiler's. Those for AVX-512 run
on any processor with AVX2, their intrinsics in plain C++ (`emulated/immintrin.h`; Debian's
libsimde-dev).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native.building import PROCESSORS, SOURCES, emulation, fuzzer

from kvzip.codecs import _native

ROUNDS = {"channel": 3, "predictive": 25}


def output(codec: str, program: Path, *emulator: str) -> list[str]:
    """How many rounds a fuzzer ran and on which paths, and the digest of what they wrote."""
    command = [*emulator, str(program), "--rounds", str(ROUNDS[codec]), "7"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, (command, run.stdout, run.stderr[-4000:])
    return run.stdout.splitlines()


@pytest.mark.parametrize("codec", SOURCES)
def test_another_processor_writes_and_reads_the_same_bytes(codec, tmp_path):
    cross, here = shutil.which("aarch64-linux-gnu-g++"), shutil.which("g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (cross and here and emulator):
        pytest.skip("no g++-aarch64-linux-gnu or no qemu-user")
    own = fuzzer(here, codec, tmp_path / "own", ["-O2"], PROCESSORS.get(platform.machine()))
    other = fuzzer(cross, codec, tmp_path / "other", ["-O2", "-static"], "arm")
    ran = f"{ROUNDS[codec]} rounds, paths: scalar neon"
    assert output(codec, other, emulator) == [ran, output(codec, own)[1]]


@pytest.mark.parametrize("codec", SOURCES)
def test_avx512_writes_and_reads_the_same_bytes_where_it_is_not(codec, tmp_path):
    if _native.simd() not in ("avx2", "avx512"):
        pytest.skip("no processor with AVX2")
    compiler = shutil.which("g++")
    flags = compiler and emulation(compiler)
    if not flags:
        pytest.skip("no g++ or no libsimde-dev")
    plain = fuzzer(compiler, codec, tmp_path / "plain", ["-O1"], None)
    emulated = fuzzer(compiler, codec, tmp_path / "emulated", ["-O1"], "x86", flags)
    ran = f"{ROUNDS[codec]} rounds, paths: scalar avx2 avx512"
    assert output(codec, emulated) == [ran, output(codec, plain)[1]]
