"""The codecs' C++, and that of grids, with random and damaged streams: under AddressSanitizer and
UBSan, and with the kernels of other processors, run here, which write and read the same bytes as
this one's.

Those for ARM's 64-bit processors run in an emulator (Debian's g++-aarch64-linux-gnu and qemu-user);
`channel` decodes with NEON there, `predictive` does all with it on three processors that multiply
bytes in three ways, and vectors of the rest are the compiler's. Those for AVX-512 run on any
processor with AVX2, their intrinsics in plain C++ (`emulated/immintrin.h`; Debian's libsimde-dev).

All are in one file, so that what this processor writes comes from one program, which is compiled
and asked once: the one under the sanitizers, with all instruction sets that can be run here.
"""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native.building import KERNELS, PROCESSORS, SOURCES, emulation, fuzzer

from kvzip.codecs import _native

pytestmark = pytest.mark.first
# Not optimised, since the sanitizers' checks take ten times as long to compile if they are.
SANITIZED = ["-O0", "-g1", "-fno-sanitize-recover=all", "-fsanitize=address,undefined"]
EMULATED = _native.simd() in ("avx2", "vnni")
"""Whether AVX-512 is to be emulated."""
SECONDS = 1
ROUNDS = {"channel": 3, "predictive": 8, "grid": 3}


def output(codec: str, program: Path, *emulator: str) -> list[str]:
    """How many rounds a fuzzer ran and on which paths, and the digest of what they wrote."""
    command = [*emulator, str(program), "--rounds", str(ROUNDS[codec]), "7"]
    # The emulated processor has no instruction set that tests may be held to here.
    env = {name: value for name, value in os.environ.items() if name != "KVZIP_SIMD"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, (command, run.stdout, run.stderr[-4000:])
    return run.stdout.splitlines()


@pytest.fixture(scope="module", params=SOURCES)
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of all objects and programs."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def sanitized(codec, built):
    """The fuzzer under the sanitizers, with this processor's kernels; and with those for AVX-512 in
    plain C++, where it has AVX2 only. Every round compares what all of them write."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = emulation(compiler) if EMULATED and shutil.which("g++") else None
    processor = PROCESSORS.get(platform.machine())
    return fuzzer(compiler, codec, built, SANITIZED, processor, flags or ())


@pytest.fixture(scope="module")
def written(codec, sanitized):
    """What this processor ran in the rounds that others are compared in, and the digest of what it
    wrote."""
    return output(codec, sanitized)


def test_no_stream_makes_the_kernels_read_or_write_out_of_bounds(sanitized):
    command = [sanitized, str(SECONDS), str(random.randrange(1 << 30))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.args, run.stdout, run.stderr[-4000:])
    rounds, paths = re.fullmatch(r"(\d+) rounds, paths:(.*)\n", run.stdout).groups()
    assert int(rounds) >= 3
    assert "scalar" in paths


# What has kernels of its own for that processor; the rest, plain C++ there, with `test-long`.
@pytest.mark.parametrize(
    "codec",
    [
        codec if ("arm", codec) in KERNELS else pytest.param(codec, marks=pytest.mark.long)
        for codec in SOURCES
    ],
    indirect=True,
    scope="module",
)
@pytest.mark.drawn(2)
def test_another_processor_writes_and_reads_the_same_bytes(codec, written, built):
    cross = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (cross and emulator):
        pytest.skip("no g++-aarch64-linux-gnu or no qemu-user")
    other = fuzzer(cross, codec, built, ["-O1", "-static"], "arm")
    ran = f"{ROUNDS[codec]} rounds, paths: scalar neon"
    # Products of bytes are of matrices, of vectors, or plain NEON.
    for cpu in ("max", "neoverse-n1", "cortex-a53") if codec == "predictive" else ("max",):
        assert output(codec, other, emulator, "-cpu", cpu) == [ran, written[1]]


def test_avx512_writes_and_reads_the_same_bytes_where_it_is_not(codec, written):
    if not EMULATED:
        pytest.skip("no AVX2, or AVX-512 itself, which ran under the sanitizers")
    if not (shutil.which("g++") and emulation("g++")):
        pytest.skip("no g++ or no libsimde-dev")
    paths = "avx2 vnni avx512 amx" if codec == "predictive" else "avx2 avx512"
    ran = f"{ROUNDS[codec]} rounds, paths: scalar {paths}"
    assert written[0] == ran
