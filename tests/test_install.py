"""A wheel in a clean environment is the whole library; an editable install is it, too."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.first

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CODECS = sorted(PROJECT["entry-points"]["kvzip.codecs"])
USE = """
import codecs, sys
assert codecs.lookup("utf-8").name == "utf-8"
import numpy as np, kvzip
assert not {"torch", "transformers"} & set(sys.modules)
numbers = (np.random.default_rng(0).normal(size=(2, 300, 64))).astype(np.float16)
snapshot = kvzip.Snapshot.from_arrays([(numbers, -numbers)])
for name in kvzip.codec_names():
    if kvzip.get_codec(name).needs_profile:
        continue
    decoded = kvzip.decode(kvzip.encode(snapshot, name))
    assert np.array_equal(decoded.layers[0].v.view(np.float16), -numbers), name
print(*kvzip.codec_names())
"""
COMMANDS = """
import numpy as np, kvzip
from kvzip.cli import main
numbers = np.random.default_rng(0).normal(size=(2, 300, 64)).astype(np.float16)
kvzip.Snapshot.from_arrays([(numbers, -numbers)]).save("doc.safetensors")
for words in (
    "encode doc.safetensors -o doc.kvz",
    "verify doc.kvz --against doc.safetensors",
    "info doc.kvz",
    "decode doc.kvz -o again.safetensors",
    "doctor",
):
    try:
        main(words.split())
    except SystemExit as ended:
        assert not ended.code, words
assert kvzip.Snapshot.load("again.safetensors") == kvzip.Snapshot.load("doc.safetensors")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    if importlib.util.find_spec("scikit_build_core"):  # as `make` installed it: nothing is compiled
        pip += ["--no-build-isolation"]
    else:
        pip += ["--config-settings=build-dir=" + str(folder / "build")]
    subprocess.run([*pip, ROOT], check=True)
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_what_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("kvzip/codecs/channel/codec.py", "kvzip/eval/money/prices.toml", "kvzip/py.typed"):
        assert name in names
    assert any(n.startswith("kvzip/codecs/_native.") and n.endswith(".so") for n in names)
    # Kernels are compiled on the user's GPU, from these and the headers they share with C++.
    headers = {
        f"kvzip/codecs/{n}.hpp"
        for n in (
            "channel/device_jobs",
            "native/cuda/device_part",
            "native/cuda/shim",
            "predictive/device_jobs",
        )
    }
    assert headers | {"kvzip/codecs/channel/decode.cuh", "kvzip/codecs/channel/strip.cuh"} <= {
        *names
    }
    assert not [n for n in names if n.endswith(".cpp") or n.startswith("tests")]
    assert {n for n in names if n.endswith(".hpp")} == headers
    # At the root of a path these would shadow the standard library's codecs.
    assert not [n for n in names if n.startswith(("codecs/", "eval/"))]


def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path):
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, wheel], check=True)
    done = subprocess.run([python, "-c", USE], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == CODECS, done.stderr
    done = subprocess.run([python, "-c", COMMANDS], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    demo = [tmp_path / "env" / "bin" / "kvzip", "demo", "--out", tmp_path / "demo"]
    done = subprocess.run(demo, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'kvzip[" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", [ROOT, Path("/")])
def test_this_install_works_from_anywhere(where):
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=where)
    assert done.stdout.split() == CODECS, done.stderr
