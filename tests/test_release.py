"""What releases are made with, and what CI runs: pinned, audited, tried, and told what it holds."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RELEASE = ROOT / "release"
FLOWS = ["test.yml", "wheels.yml"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def wheels():
    spec = importlib.util.spec_from_file_location("wheels", RELEASE / "wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_is_of_kvzip_makes_room(tmp_path, wheels):
    wheels.make_room(tmp_path / "new" / "folder")
    for name in ("kvzip-0.1.0.tar.gz", "kvzip-0.1.0-cp311-cp311-linux_x86_64.whl", "another.txt"):
        (tmp_path / name).touch()
    wheels.make_room(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another.txt", "new"]


URL = "https://host.example/owner/kvzip"


@pytest.fixture
def published(tmp_path, wheels):
    for name in ("pyproject.toml", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    wheels.name_address(tmp_path, URL)
    return tmp_path


def test_with_an_address_all_links_lead_there(published, wheels):
    before, after = ((at / "README.md").read_text() for at in (ROOT, published))
    assert len(wheels.LINK.findall(before)) > 30 and not wheels.LINK.findall(after)
    files = re.findall(rf"\]\({URL}/(blob|raw)/HEAD/([^)#]+)(?:#[^)]*)?\)", after)
    assert len(files) == len(wheels.LINK.findall(before))
    for kind, path in files:
        assert (ROOT / path).exists()
        assert (kind == "raw") == path.endswith(".png")
    project = tomllib.loads((published / "pyproject.toml").read_text())["project"]
    urls = project.pop("urls")
    assert project == PROJECT and urls["Source"] == URL
    for name, at in urls.items():
        path = at.partition("/HEAD/")[2]
        assert at.startswith(URL) and (name in ("Source", "Issues") or (ROOT / path).exists())


def test_a_wheel_without_its_address_is_not_released(tmp_path, published, wheels):
    def wheel(urls, readme):
        text = "Metadata-Version: 2.4\nName: kvzip\n" + urls + "\n" + readme
        with zipfile.ZipFile(tmp_path / "kvzip.whl", "w") as archive:
            archive.writestr("kvzip-1.dist-info/METADATA", text)
        return tmp_path / "kvzip.whl"

    named = f"Project-URL: Issues, {URL}/issues\nProject-URL: Source, {URL}\n"
    absolute = (published / "README.md").read_text()
    wheels.check_address(wheel(named, absolute), URL)
    with pytest.raises(SystemExit, match="does not name"):
        wheels.check_address(wheel("", absolute), URL)
    with pytest.raises(SystemExit, match="leads nowhere"):
        wheels.check_address(wheel(named, (ROOT / "README.md").read_text()), URL)


def test_a_wheel_of_what_is_built_has_its_address(tmp_path, published, wheels):
    """As what builds kvzip makes a wheel of the project, but for its compiled code."""
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("what builds kvzip is not installed, which `make` does")
    (published / "LICENSE").write_text((ROOT / "LICENSE").read_text())
    built = "scikit_build_core.build as b; b.build_wheel('.', {'wheel.cmake': 'false'})"
    for name in ("kvzip", "codecs", "eval", "benchmarks", "pytest_kvzip"):
        (published / name).mkdir()
    command = [sys.executable, "-c", f"import {built}"]
    done = subprocess.run(command, cwd=published, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = published.glob("*.whl")
    wheels.check_address(wheel, URL)
    with pytest.raises(SystemExit, match="does not name"):
        wheels.check_address(wheel, URL + "s")


@pytest.mark.parametrize(
    "url", ["", "host/owner", "http://host/a", f"{URL}/", f"{URL} x", "https://host"]
)
def test_what_is_no_address_is_refused(wheels, url):
    with pytest.raises(argparse.ArgumentTypeError, match="https://HOST"):
        wheels.project_url(url)
    assert wheels.project_url(URL) == URL


class Recorded:
    """In place of what runs commands: notes them, and leaves the files that they would make."""

    def __init__(self):
        self.commands = []

    def __call__(self, *command, cwd=None, **environment):
        words = list(map(str, command))
        self.commands.append(words)

        def after(option):
            return Path(words[words.index(option) + 1])

        if "--sdist" in words:
            (after("--outdir") / "kvzip-0.2.0.tar.gz").touch()
        elif words[1:4] == ["-m", "pip", "wheel"]:
            tag = "cp312-abi3" if "-Cwheel.py-api=cp312" in words else "cp311-cp311"
            folder = after("--wheel-dir")
            folder.mkdir(parents=True)
            (folder / f"kvzip-0.2.0-{tag}-linux_{environment['KVZIP_ARCH']}.whl").touch()
        elif "auditwheel" in words:
            name = Path(words[-1]).name.replace("-linux_", "-manylinux_2_24_")
            (after("--wheel-dir") / name).touch()
        elif "cyclonedx_py" in words:
            after("-o").write_text('{"file:///somewhere/' + "x" + '"}')
        elif words[1:3] == ["-m", "venv"]:
            lib = Path(words[-1]) / "lib" / "python3.11"
            (lib / "site-packages").mkdir(parents=True, exist_ok=True)

    def of(self, *wanted):
        """The commands that have all these words."""
        return [words for words in self.commands if all(w in " ".join(words) for w in wanted)]


def test_each_wheel_is_audited_tried_and_says_what_it_holds(tmp_path, wheels, monkeypatch):
    run, out = Recorded(), tmp_path / "dist"
    monkeypatch.setattr(wheels, "run", run)
    monkeypatch.setattr(wheels, "interpreter", lambda version: f"/bin/python{version}")
    monkeypatch.setattr(wheels.os, "uname", lambda: type("", (), {"machine": "x86_64"}))
    options = ["--out", out, "--work", tmp_path / "work"]
    options += ["--emulated", "3.11=emulator py3.11", "--emulated", "3.12=emulator py3.12"]
    monkeypatch.setattr(sys, "argv", ["wheels.py", *map(str, options)])
    wheels.main()
    made = sorted(path.name for path in out.glob("*.whl"))
    assert len(made) == 4 and {name.rpartition("_2_24_")[2] for name in made} == {
        "x86_64.whl",
        "aarch64.whl",
    }
    for words in run.of("-m pip wheel"):
        assert words[-1].endswith(".tar.gz"), "a wheel is built from the sdist"
    assert len(run.of("auditwheel repair")) == 4
    for name in made:
        assert len(run.of("abi3audit --strict", name)) == ("-abi3-" in name)
        versions = wheels.RUNS_ON["3.12" if "-abi3-" in name else "3.11"]
        assert {path.name for path in out.glob(f"{name[:-4]}.python*.cdx.json")} == {
            f"{name[:-4]}.python{version}.cdx.json" for version in versions
        }
        assert len(run.of("install --quiet", f"{name}[testing]")) == len(versions) or (
            "aarch64" in name  # where there is an emulator of that version
        )
    for version in ("3.11", "3.12", "3.13", "3.14"):
        for tests in ("kvzip.testing.suite", "test_instructions.py"):
            assert run.of(f"clean-{version}/bin/python -m pytest", tests), (version, tests)
    for emulated in ("emulator py3.11", "emulator py3.12"):
        assert len(run.of(emulated, "pytest")) == 2
    # The tools, and nothing else from the network but what the wheel itself asks for.
    tools = run.of("pip install", "requirements.txt")
    assert tools and all("--require-hashes" in words for words in tools)


def pinned(path: Path) -> dict[str, list[str]]:
    """The hashes of each requirement of a file, by its name."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?==[^\s;]+", line)
        assert name, f"not pinned: {line[:80]}"
        found[name[1].lower()] = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)
    return found


@pytest.mark.parametrize("name", ["requirements", "ci", "contract"])
def test_what_is_installed_is_pinned_by_its_bytes(name):
    """Where wheels are built, and where CI tests: there, all that the extras name but torch, whose
    builds for CPUs and for CUDA are unlike, and nvCOMP, which needs a GPU and is not installed."""
    found = pinned(RELEASE / f"{name}.txt")
    assert len(found) > 20
    assert all(found.values()), [name for name, hashes in found.items() if not hashes]
    inputs = "requirements.in" if name == "requirements" else "building.in"
    wanted = (RELEASE / inputs).read_text().splitlines()
    extras = PROJECT["optional-dependencies"]
    for extra in {"ci": sorted({*extras} - {"nvcomp"}), "contract": ["testing"]}.get(name, []):
        wanted += extras[extra] + PROJECT["dependencies"]
    for line in wanted:
        wanted_name = re.match(r"[\w-]+", line)
        if wanted_name and wanted_name[0] not in ("kvzip", "torch"):
            assert wanted_name[0].lower() in found, line


def steps(name: str) -> list[dict]:
    """What a workflow of CI does, all its jobs one after the other."""
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    assert flow["permissions"] == {"contents": "read"}
    return [step for job in flow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", FLOWS)
def test_what_a_workflow_takes_from_others_is_pinned_by_its_commit(name):
    taken = [step["uses"] for step in steps(name) if "uses" in step]
    assert taken
    for action in taken:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action), action


def test_workflows_install_nothing_else():
    ran = [line for name in FLOWS for s in steps(name) for line in s.get("run", "").splitlines()]
    pips = [command for command in ran if command.startswith("pip ")]
    assert len(pips) == 5
    for command in pips:
        assert "--no-deps" in command
        assert "--require-hashes" in command or " ." in command or "dist/" in command
        assert " ." not in command or "--no-build-isolation" in command
    for step in steps("test.yml"):
        if step.get("run") in (".ci/run", "make docs"):
            assert step["env"] == {"PINNED": "release/ci.txt"}
    assert "--require-hashes --no-deps -r $(PINNED)" in (ROOT / "Makefile").read_text()


def test_workflows_run_what_people_run():
    ran = [step.get("run", "") for step in steps("test.yml")]
    assert {".ci/run", "make docs", "kvzip doctor"} <= {*ran}
    assert any("kvzip.testing.suite" in command for command in ran)
    ran = [step.get("run", "") for step in steps("wheels.yml")]
    assert any(command.startswith("make wheels") for command in ran)
    assert any("wheel.py-api=cp312" in command for command in ran)
    makefile = (ROOT / "Makefile").read_text()
    for command in (line for each in ran for line in each.splitlines()):
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in makefile
    assert "make lint" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_nothing_is_built_where_kvzip_cannot_be_imported():
    """A Python for Windows has no fcntl, by which files are locked."""
    assert "\nimport fcntl\n" in (ROOT / "kvzip" / "files.py").read_text()
    for name in FLOWS:
        assert "windows" not in (ROOT / ".github" / "workflows" / name).read_text().lower()
    assert "if(WIN32)\n  message(FATAL_ERROR" in (ROOT / "CMakeLists.txt").read_text()
    systems = [found for found in PROJECT["classifiers"] if found.startswith("Operating System")]
    assert systems == ["Operating System :: POSIX :: Linux"]


def test_the_sdist_holds_all_that_is_built(tmp_path):
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("what builds kvzip is not installed, which `make` does")
    hook = "import scikit_build_core.build as b, sys; print(b.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", hook, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    command = ["git", "-C", str(ROOT), "ls-files"]
    known = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    if not any(known):
        pytest.skip("there is no git here")
    tops = ("kvzip", "codecs", "eval", "benchmarks", "pytest_kvzip", "tests", "release", "docs")
    wanted = {name for name in known if name.split("/")[0] in tops}
    wanted |= {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
    assert len(wanted) > 900
    assert wanted <= names, sorted(wanted - names)[:9]


def test_what_is_released_is_told():
    """The first version of the changelog is the one that is built; and all name the same."""
    first = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == PROJECT["version"]
    minor = PROJECT["version"].rpartition(".")[0]
    assert f"(today {minor})" in (ROOT / "SECURITY.md").read_text()
