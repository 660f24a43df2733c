"""Builds the codecs' C++ without Python, for the tests of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {
    "channel": ("kernels", "part", "shapes", "tables", "kernels_scalar"),
    "predictive": ("kernels", "chain", "kernels_scalar"),
}
FLAGS = ("-std=c++17", "-g", "-Wno-psabi", f"-I{ROOT / 'codecs'}")


def options(source: str) -> list[str]:
    """What CMakeLists.txt compiles a file with besides."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = ["-fwrapv"] if source.startswith("predictive/kernels_") else []
    for name in ("AVX2", "AVX512"):
        if source.endswith(f"_{name.lower()}"):
            found = re.search(rf"set\({name}_FLAGS ([^)]*)\)", text)
            assert found is not None
            flags += found[1].split()
    if "${AVX2_FLAGS}" in flags:
        flags.remove("${AVX2_FLAGS}")
        flags += options(source.replace("_avx512", "_avx2"))
    return flags


def fuzzer(compiler: str, codec: str, folder: Path, flags: Sequence[str], x86: bool) -> Path:
    """The program fuzz_CODEC, made in `folder`; `x86`: with AVX2 and AVX-512."""
    sources = ["native/simd", *(f"{codec}/{name}" for name in SOURCES[codec])]
    if x86:
        # Longest first.
        sources = [f"{codec}/kernels_avx512", f"{codec}/kernels_avx2", *reversed(sources)]
        flags = [*flags, "-DKVZIP_X86"]

    def build(source: str) -> str:
        path = ROOT / "codecs" / f"{source}.cpp"
        target = str(folder / f"{path.stem}.o")
        command = [compiler, *FLAGS, *flags, *options(source), "-c", str(path), "-o", target]
        subprocess.run(command, check=True)
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, sources))
    program = folder / "fuzz"
    harness = str(Path(__file__).with_name(f"fuzz_{codec}.cpp"))
    command = [compiler, *FLAGS, *flags, harness, *objects, "-o", str(program)]
    subprocess.run(command, check=True)
    return program
