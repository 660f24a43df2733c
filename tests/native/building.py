"""Kernels built alone, without Python, with a program of tests/native that runs them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a program needs of codecs/, besides kernels of the processor's own.
CHANNEL = ("native/simd", "native/xxh3") + tuple(
    f"channel/{name}" for name in ("kernels", "kernels_scalar", "part", "shapes", "tables")
)
CHANNEL_X86 = ("channel/kernels_avx2", "channel/kernels_avx512")
FLAGS = ("-std=c++17", "-Wno-psabi", "-ffp-contract=off", f"-I{ROOT / 'codecs'}")


def options(source: str) -> list[str]:
    """What CMakeLists.txt compiles a file with besides."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"{source}\.cpp PROPERTIES\s+COMPILE_OPTIONS \"([^\"]*)\"", text)
    return found[1].split(";") if found else []


def build(
    compiler: str, program: str, sources: Sequence[str], flags: Sequence[str], folder: Path
) -> Path:
    """Compile `sources` of codecs/ and tests/native/`program`.cpp, and link them in `folder`."""
    files = {source: ROOT / "codecs" / f"{source}.cpp" for source in sources}
    files[program] = Path(__file__).with_name(f"{program}.cpp")

    def compiled(source: str) -> str:
        target = str(folder / f"{files[source].stem}.o")
        command = [compiler, *FLAGS, *flags, *options(source), "-c", str(files[source])]
        subprocess.run([*command, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, reversed(files)))
    linked = folder / program
    subprocess.run([compiler, *flags, *objects, "-o", str(linked)], check=True)
    return linked
