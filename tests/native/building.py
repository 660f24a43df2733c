"""Codecs' C++ built alone, without Python, with the program of tests/native that runs it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {
    "channel": [
        f"channel/{name}"
        for name in (
            "kernels",
            "block_coder",
            "shape_clustering",
            "stored_tables",
            "alias_tables",
            "device_tables",
            "kernels_scalar",
        )
    ]
    + ["native/rotation"],
    "predictive": [
        f"predictive/{name}" for name in ("kernels", "chain", "profile_model", "kernels_scalar")
    ],
    "grid": ["native/grid", "native/grid_fit", "native/grid_suspicions"],
}
PROCESSORS = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}
KERNELS = {
    ("x86", codec): [f"{codec}/kernels_avx2", f"{codec}/kernels_avx512"]
    for codec in ("channel", "predictive")
} | {
    ("arm", "channel"): ["channel/kernels_neon"],
    ("arm", "predictive"): ["predictive/kernels_neon"]
    + [f"predictive/products_{unit}" for unit in ("dotprod", "i8mm")],
}
KERNELS["x86", "predictive"] += [
    f"predictive/products_{unit}" for unit in ("vnni", "avx512_vnni", "amx")
]
KERNELS["x86", "channel"] += ["native/rotation_avx2", "native/rotation_avx512"]
"""Files that are built for one kind of processor only."""
FLAGS = (
    "-std=c++17",
    "-Wno-psabi",
    "-Wno-subobject-linkage",
    "-ffp-contract=off",
    f"-I{ROOT / 'codecs'}",
)


def options(source: str) -> list[str]:
    """What CMakeLists.txt compiles a file with besides."""
    text = (ROOT / "CMakeLists.txt").read_text()
    sets = {name: words.split() for name, words in re.findall(r"set\((\w+_FLAGS) ([^)]*)\)", text)}
    unit = re.search("(?:kernels|rotation|products)_(.*)", source)
    words = list(sets.get(f"{unit[1].upper()}_FLAGS", [])) if unit else []
    while words and (inner := re.fullmatch(r"\$\{(\w+)\}", words[0])):
        words[:1] = sets[inner[1]]
    return [*["-fwrapv"] * source.startswith("predictive/kernels_"), *words]


def emulation(compiler: str) -> list[str] | None:
    """Flags with which AVX-512's intrinsics are plain C++, for processors without; none where SIMDe
    is missing, whose header they need (Debian's libsimde-dev)."""
    command = [compiler, "-E", "-x", "c++", "-include", "simde/x86/avx512.h", os.devnull]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    # Functions' own targets are left out.
    header = Path(__file__).with_name("emulated")
    return [f"-I{header}", "-Dtarget(features)=unused", *options("kernels_avx2")]


def fuzzer(
    compiler: str,
    codec: str,
    folder: Path,
    flags: Sequence[str],
    processor: str | None,
    emulated: Sequence[str] = (),
) -> Path:
    """The program fuzz_CODEC, made in `folder`, with the kernels of a "x86" or "arm" processor, or
    with none but plain C++. With the flags of `emulation`, AVX-512 is emulated. Objects that were
    compiled in the same way for another program in this folder are taken as they are."""
    sources = ["native/simd", "native/xxh3", *SOURCES[codec]]
    defined = []
    if processor is not None:
        sources += KERNELS.get((processor, codec), [])
        defined = [f"-DKVZIP_{'X86' if processor == 'x86' else 'NEON'}"]
    program = f"fuzz_{codec}"
    # What is compiled with the same flags is one file, which takes half the time.
    alone = [
        source
        for source in sources
        if re.search("^native/(simd|xxh3)$|/(kernels|products)_", source)
    ]
    files = {source: ROOT / "codecs" / f"{source}.cpp" for source in alone}
    files[program] = folder / f"{program}.cpp"
    parts = [f"{source}.cpp" for source in sources if source not in alone]
    parts.append(str(Path(__file__).with_name(files[program].name)))
    folder.mkdir(parents=True, exist_ok=True)
    files[program].write_text("".join(f'#include "{part}"\n' for part in parts))

    def compiled(source: str) -> str:
        own = [*flags, *options(source)]
        if emulated and source in alone and not re.search("/kernels_(scalar|avx2)$", source):
            # Neither optimised nor checked, which takes minutes to compile.
            wrapped = [flag for flag in own if flag == "-fwrapv"]
            own = ["-O0", *wrapped, *emulated]
        command = [compiler, *FLAGS, *defined, *own, "-c", str(files[source])]
        target = folder / f"{sha256(repr(command).encode()).hexdigest()[:32]}.o"
        if not target.exists():
            subprocess.run([*command, "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, reversed(files)))
    made_of = sha256(repr((compiler, objects)).encode()).hexdigest()[:8]
    linked = folder / f"{program}-{made_of}"
    subprocess.run([compiler, *flags, *objects, "-o", str(linked)], check=True)
    return linked
