"""The same bytes from another processor: aarch64, whose vectors are NEON, under an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest
from native_build import fuzzer

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def test_predictive_gives_the_same_bytes(tmp_path):
    """Models of random numbers, many of them nonsense: whatever they predict, all agree on it."""
    native = shutil.which("g++")
    if native is None or shutil.which(CROSS) is None or shutil.which(EMULATOR) is None:
        pytest.skip(f"needs g++, {CROSS} and {EMULATOR}")
    x86 = platform.machine() in ("x86_64", "AMD64")
    here = fuzzer(native, "predictive", tmp_path / "here", ["-O2"], x86)
    there = fuzzer(CROSS, "predictive", tmp_path / "there", ["-O2", "-static"], x86=False)

    def digest(command: list[str]) -> str:
        run = subprocess.run([*command, "0", "5", "25"], capture_output=True, text=True, check=True)
        return run.stdout.splitlines()[-1]

    assert digest([EMULATOR, str(there)]) == digest([str(here)])
