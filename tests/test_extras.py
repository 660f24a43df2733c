"""What needs a package that is not installed names the extra that brings it."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvzip
from kvzip.cli import extras
from kvzip.metrics import prometheus
from kvzip.store import Store

ROOT = Path(__file__).parent.parent
SEALED = bytes(32)


def told() -> list[tuple[str, str, str]]:
    """Each `with extra_told(what, extra)`: its file, the extra, and a package that is imported."""
    found = []
    for file in sorted(
        f for top in ("kvzip", "eval", "codecs") for f in (ROOT / top).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.With):
                continue
            call = node.items[0].context_expr
            if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "extra_told"):
                continue
            for inner in (each for line in node.body for each in ast.walk(line)):
                names = [alias.name for alias in getattr(inner, "names", [])]
                if isinstance(inner, ast.ImportFrom):
                    names = [inner.module or ""]
                for name in names if isinstance(inner, (ast.Import, ast.ImportFrom)) else []:
                    found.append((str(file.relative_to(ROOT)), call.args[1].value, name))
    return found


def test_the_extra_that_is_named_brings_the_package():
    assert len(told()) > 8
    for file, extra, module in told():
        if module.startswith("kvzip"):  # which imports what the extra brings
            assert extra in extras.PURPOSE, file
            continue
        top = module.partition(".")[0].replace("_", "-").replace("cuda", "cuda-core")
        brought = [extras._name(wanted) for wanted in extras._wanted(extra)]
        assert top in brought, (file, extra, module)


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("cryptography", "encryption", lambda s: kvzip.encode(s, key=SEALED)),
        ("prometheus_client", "metrics", lambda s: prometheus()),
        ("torch", "hf", lambda s: s.tensors()),
    ],
)
def test_whoever_lacks_a_package_is_told_the_extra(module, extra, use, monkeypatch):
    # In their places, not taken out: what is put back comes last, and the interpreter, which ends
    # with the last modules first, would end torch before what refers to its storages.
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    snapshot = kvzip.Snapshot.from_arrays([(np.zeros((1, 4, 2), np.uint16),) * 2], "bf16")
    with pytest.raises(kvzip.KVZipError, match=rf"pip install 'kvzip\[{extra}\]'"):
        use(snapshot)


@pytest.mark.parametrize("url", ["s3://bucket/store", "https://host/store"])
def test_a_bucket_without_its_client_names_the_extra(url, monkeypatch):
    find = importlib.util.find_spec
    lacking = lambda name: None if name == "obstore" else find(name)  # noqa: E731
    monkeypatch.setattr("kvzip.store.bucket.find_spec", lacking)
    with pytest.raises(kvzip.KVZipError, match=r"pip install 'kvzip\[store\]'"):
        Store(url)


def test_tests_of_ones_own_name_the_extra():
    code = "import sys; sys.modules['hypothesis'] = None; import kvzip.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "pip install 'kvzip[testing]'" in done.stderr
