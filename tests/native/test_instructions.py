"""The compiled module finds the instructions that the processor has, whatever compiled it.

`make wheels` runs this on the wheels, too: one that finds none is right in all that it does, only
many times slower.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvzip.codecs import _native
from kvzip.selftest import instructions

AVX2 = {"avx2", "bmi1", "bmi2", "popcnt", "abm"}
AVX512_VNNI = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
AVX512 = AVX512_VNNI | {"avx512vbmi", "avx512_vbmi2", "avx512_vpopcntdq"}
AMX = AVX512 | {"amx_tile", "amx_int8"}


def listed() -> set[str]:
    """What Linux says that the processor has, and that it keeps the registers of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(set(line.split(":")[1].split()) for line in lines if line.startswith("flags"))


def tiles_are_allowed() -> bool:
    """Whether Linux lets this process use AMX: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA."""
    return ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


LINUX_ON_X86 = sys.platform == "linux" and platform.machine() == "x86_64"
HIDING = Path(__file__).with_name("hide_avx512.cpp")


@pytest.mark.skipif(not LINUX_ON_X86, reason="not Linux on x86-64")
@pytest.mark.skipif(
    HIDING.stem in os.environ.get("LD_PRELOAD", ""), reason="some are hidden, but not from Linux"
)
def test_what_linux_lists_is_found():
    there = listed()
    wanted = {
        "scalar": True,
        "avx2": there >= AVX2,
        "vnni": there >= AVX2 | {"avx_vnni"} or there >= AVX512_VNNI,
        "avx512": there >= AVX512,
        "amx": there >= AMX and tiles_are_allowed(),
    }
    assert instructions() == [name for name, has in wanted.items() if has]


@pytest.mark.skipif(platform.machine() not in ("aarch64", "arm64"), reason="not 64-bit ARM")
def test_arm_has_neon():
    assert instructions() == ["scalar", "neon"]


@pytest.mark.skipif("KVZIP_SIMD" in os.environ, reason="KVZIP_SIMD names the one that is taken")
def test_the_best_is_taken():
    assert _native.simd() == instructions()[-1]


@pytest.mark.skipif(
    not (LINUX_ON_X86 and "cpuid_fault" in listed() and shutil.which("g++")),
    reason="cpuid cannot be forbidden, or there is no g++",
)
def test_what_is_hidden_is_not_found(tmp_path):
    """A program with a handler of its own for faults, and one that it starts."""
    library = tmp_path / f"{HIDING.stem}.so"
    flags = ("-std=c++17", "-fPIC", "-shared", "-Wl,-z,initfirst")
    subprocess.run(["g++", *flags, HIDING, "-o", library, "-ldl"], check=True)
    program = (
        "import subprocess, sys; from kvzip.selftest import instructions\n"
        "print(*instructions(), flush=True)\n"
        "if sys.argv[1:]: subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    out = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program, program],
        env={**os.environ, "LD_PRELOAD": str(library)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert set(out.splitlines()) <= {"scalar avx2", "scalar"} and out.count("\n") == 2
