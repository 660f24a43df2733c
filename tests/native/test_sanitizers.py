"""The channel codec's C++ under AddressSanitizer and UBSan, with random and damaged streams."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["native/simd", "native/xxh3", *(f"channel/{name}" for name in ("kernels", "part", "shapes", "tables"))]
FLAGS = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-fno-sanitize-recover=all"]
FLAGS += ["-fsanitize=address,undefined", f"-I{ROOT / 'codecs'}"]


def options(source: str) -> list[str]:
    """What CMakeLists.txt compiles a file with besides."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"{source}\.cpp PROPERTIES\s+COMPILE_OPTIONS \"([^\"]*)\"", text)
    return found[1].split(";") if found else []


def test_no_stream_makes_the_kernels_read_or_write_out_of_bounds(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [*SOURCES, "channel/kernels_scalar"]
    flags = list(FLAGS)
    if platform.machine() in ("x86_64", "AMD64"):
        sources += ["channel/kernels_avx2", "channel/kernels_avx512"]
        flags.append("-DKVZIP_X86")

    def build(source: str) -> str:
        path = ROOT / "codecs" / f"{source}.cpp"
        target = str(tmp_path / f"{path.stem}.o")
        command = [compiler, *flags, *options(source), "-c", str(path), "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, reversed(sources)))
    program = str(tmp_path / "fuzz")
    harness = str(Path(__file__).with_name("fuzz_channel.cpp"))
    subprocess.run([compiler, *flags, harness, *objects, "-o", program], check=True)
    run = subprocess.run(
        [program, "5", str(random.randrange(1 << 30))], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, (run.args, run.stdout, run.stderr[-4000:])
    rounds, paths = re.fullmatch(r"(\d+) rounds, paths:(.*)\n", run.stdout).groups()
    assert int(rounds) >= 3
    assert "scalar" in paths
