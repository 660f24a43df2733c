"""Nothing that is read can run code, and no name leads out of the folder that it is a name in."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kvzip
from kvzip.store import Store
from kvzip.store.folder import Folder
from kvzip.testing import cache_like, make_snapshot, reseal

ROOT = Path(__file__).parent.parent
SOURCES = [
    file
    for top in ("kvzip", "codecs", "eval", "benchmarks", "pytest_kvzip", "release", "docs")
    for file in sorted((ROOT / top).rglob("*.py"))
]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def imports(call: ast.Call) -> set[str]:
    """The package that a call of `importlib.import_module` names, if it names one."""
    words = [word.value for word in call.args if isinstance(word, ast.Constant)]
    return {str(word).partition(".")[0] for word in words}


def runs_what_it_reads(tree: ast.AST) -> list[str]:
    """What in a module could run code that comes from a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in UNPICKLERS]
        elif (
            isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNPICKLERS
        ):
            found.append(node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "yaml"):
            # By its bare name it would not be known below.
            found += [name.name for name in node.names if name.name in ("load", "unsafe_load")]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = {
                word.arg: word.value.value
                for word in node.keywords
                if isinstance(word.value, ast.Constant)
            }
            if called in ("eval", "exec", "compile", "__import__") or (
                (called == "torch.load" and safe.get("weights_only") is not True)
                or called in ("yaml.load", "yaml.unsafe_load", "torch.hub.load")
                or called.endswith("read_pickle")
                or (called in ("np.load", "numpy.load") and len(node.args) > 2)
                or (called.endswith("import_module") and imports(node) & UNPICKLERS)
                or safe.get("allow_pickle") is True
                or safe.get("trust_remote_code") is True
            ):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill.session import load_session",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, None, True)",
        "from torch import load",
        "importlib.import_module('pickle')",
        "pandas.read_pickle(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_what_runs_what_it_reads_is_noticed(code):
    assert runs_what_it_reads(ast.parse(code))


def test_nothing_in_the_product_runs_what_it_reads():
    assert len(SOURCES) > 200
    for file in SOURCES:
        assert runs_what_it_reads(ast.parse(file.read_bytes())) == [], file


WATCH = """
import itertools
import sys
from pathlib import Path
import numpy as np
import kvzip, msgspec
from kvzip.store import Store
from kvzip.testing import cache_like, make_snapshot

folder, outside = Path(sys.argv[1]), Path(sys.argv[2])
seen = []
def watch(event, arguments):
    if event == "pickle.find_class":
        seen.append(f"unpickles {arguments[1]}")
    elif event in ("open", "os.remove", "os.rename", "os.mkdir", "os.listdir", "os.scandir"):
        seen.extend(str(one) for one in arguments[:2] if isinstance(one, (str, bytes)))
sys.addaudithook(watch)
"""


def watched(code: str, *folders: Path) -> list[str]:
    """The paths that a program touches, and what it unpickles."""
    program = WATCH + textwrap.dedent(code) + "\nprint(*seen, sep='\\n')"
    command = [sys.executable, "-c", program, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


HOSTILE = """
snapshot = make_snapshot(cache_like, 1, "bf16", tokens=128)
store = Store(folder / "store", block_tokens=64)
store.put(snapshot)
kvzip.write(outside / "x.kvz", snapshot)
kvzip.write(outside / "docs" / "x.kvz", snapshot)
seen.clear()
names = ["../../outside/x", "../../../outside/docs/x", str(outside / "x"), "..", "x/../../y"]
for name, end in itertools.product([*names, "a\\0b"], ["", "\\nend"]):
    for mark in (folder / "store").glob("*/last/*"):
        mark.write_text(name)
    for chain in (folder / "store").glob("*/chain/*"):
        chain.write_text(name + end)
    store = Store(folder / "store")
    match = store.find(snapshot.token_ids, model="test/model", revision="r1", dtype="bf16")
    assert match is None or match.snapshot() == snapshot
    store.documents(), store.prune()
    for act in (store.open, store.remove, lambda key: store.fetch(key, folder / "got.kvz")):
        for key in (name, "a/" + name, name + "/x"):
            try:
                act(key)
            except kvzip.KVZipError:
                pass
            else:
                assert act == store.remove
    for found in store.documents():
        assert store.remove(found.key)
    store.put(snapshot)
assert (outside / "x.kvz").exists() and (outside / "docs" / "x.kvz").exists()
"""


def test_no_name_in_a_store_leads_out_of_it(tmp_path):
    outside = tmp_path / "outside"
    (outside / "docs").mkdir(parents=True)
    touched = watched(HOSTILE, tmp_path, outside)
    ours = [path for path in touched if "store/" in path]
    assert len(ours) > 20
    for path in touched:
        assert not path.startswith(str(outside)), path
        resolved = str(Path(path.replace("\0", "")).resolve())
        if path.startswith(str(tmp_path)):
            assert resolved.startswith((str(tmp_path / "store"), str(tmp_path / "got"))) or (
                resolved == str(tmp_path)
            ), path


def test_no_name_in_a_file_leads_out_of_a_store(tmp_path):
    """A store makes a file's name of the profile's that a header names."""
    snapshot = make_snapshot(cache_like, 1, "bf16", tokens=128)
    profile = kvzip.Profile.fit([snapshot], codec="channel")
    blob = bytearray(kvzip.encode(snapshot, "channel", profile))
    at, path = blob.index(profile.id.encode()), tmp_path / "doc.kvz"
    for name in ("../" * 3 + "outside", "/" + str(tmp_path / "x")[1:], "a\\\\..", "A", "\\u0000"):
        blob[at : at + 64] = (name + "/" * 64).encode()[:62] + b"ab"
        path.write_bytes(reseal(blob))
        store = Store(tmp_path / "a" / "store", block_tokens=64)
        for act in (kvzip.open, kvzip.decode, store.put):
            with pytest.raises(kvzip.KVZipError, match="profile"):
                act(path)
    assert {one.name for one in tmp_path.rglob("*") if one.is_file()} == {"doc.kvz"}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a/../b", ".."])
def test_a_folder_touches_nothing_outside(tmp_path, name):
    outside = tmp_path / "x"
    outside.write_bytes(b"mine")
    objects = Folder(tmp_path / "store", "store", make=True)
    for path in (name, str(outside)):
        for act in (
            objects.get,
            objects.head,
            objects.delete,
            objects.open,
            lambda path: objects.put(path, b"yours", create=False),
            lambda path: list(objects.under(path)),
        ):
            with pytest.raises(kvzip.StoreError, match="leads out"):
                act(path)
    assert outside.read_bytes() == b"mine" and [*tmp_path.iterdir()] == [outside]


EVERYTHING = """
snapshot = make_snapshot(cache_like, 1, "bf16", tokens=300)
snapshot.save(folder / "doc.safetensors")
profile = kvzip.Profile.fit([snapshot], codec="channel")
profile.save(folder / "a.kvprofile")
profile = kvzip.Profile.load(folder / "a.kvprofile")
snapshot = kvzip.Snapshot.load(folder / "doc.safetensors")
for name in kvzip.codec_names():
    if not kvzip.get_codec(name).needs_profile:
        kvzip.write(folder / "doc.kvz", snapshot, name, profile if name == "channel" else None)
        assert kvzip.decode(folder / "doc.kvz", profile if name == "channel" else None) == snapshot
store = Store(folder / "store")
store.put(snapshot)
assert store.find(snapshot.token_ids, model="test/model", revision="r1", dtype="bf16")
"""


def test_nothing_is_unpickled(tmp_path):
    touched = watched(EVERYTHING, tmp_path, tmp_path)
    assert [path for path in touched if path.endswith("doc.kvz")]
    assert not [line for line in touched if line.startswith("unpickles")]
