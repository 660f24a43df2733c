"""Nothing that is acknowledged is lost, nothing wrong is served, and nobody waits for ever,
whatever a server, a disk and the clocks do (faults.py)."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import faults
import pytest

from kvzip.errors import CorruptError
from kvzip.store import Store, evicting, profiles
from kvzip.store.keys import document_path

OF = {"revision": "r", "dtype": "bf16"}


def test_many_clients_on_a_server_that_fails():
    found = faults.run(clients=60, seconds=1)
    assert found["wrong"] == []
    assert found["did"]["found"] >= 10 and found["did"]["errors"]
    assert len(found["faults"]) > 5


def put(store, model=0, number=0):
    return store.put(faults.document(model, number), codec="raw", threads=1).key


def test_a_document_of_another_model_in_the_place_of_one(tmp_path):
    """Of the same tokens: what a server gives that takes one request for another. (In a sealed
    store whatever was moved is an error.)"""
    store = Store(tmp_path / "store", block_tokens=faults.BLOCK)
    key, other = put(store, 0), put(store, 1)
    where = store.bucket.folder
    (where / document_path(key)).write_bytes((where / document_path(other)).read_bytes())
    assert store.find(faults.ids_of(0), model="m0", **OF) is None
    for act in (store.open, lambda key: store.fetch(key, tmp_path / "got.kvz")):
        with pytest.raises(CorruptError, match="another document, of model m1, r, bf16"):
            act(key)
    assert not (tmp_path / "got.kvz").exists()
    assert faults.looked_for(store, 1, 0) == faults.TOKENS


@pytest.fixture
def ahead(monkeypatch):
    """Whoever prunes has a clock that is hours ahead of the writers'."""
    for module, bound in ((evicting, "_STALE"), (profiles, "_FRESH")):
        monkeypatch.setattr(module, bound, timedelta(hours=-3))


def test_a_document_that_is_put_while_somebody_prunes_by_another_clock(tmp_path, ahead):
    """At each request of who prunes, which finds what a dead writer left of the same document, the
    whole of it is put; it is found then, and after."""
    for step in itertools.count():
        where, writer = (Store(tmp_path / str(step), block_tokens=faults.BLOCK) for _ in range(2))
        where._pool.each = lambda do, items: [do(item) for item in items]
        where.bucket.delete(document_path(put(where)))
        done, reached = itertools.count(), []

        def then_put(do, done=done, step=step, writer=writer, reached=reached):
            def instead(*given, **more):
                if next(done) == step:
                    reached.append(put(writer))
                return do(*given, **more)

            return instead

        for name in ("head", "get", "under", "folders", "put", "delete"):
            setattr(where.bucket, name, then_put(getattr(where.bucket, name)))
        where.prune(profiles=True)
        if not reached:
            assert step > 20
            return
        assert faults.looked_for(writer, 0, 0) == faults.TOKENS, step
        assert len(writer.documents()) == 1, step


def test_a_document_that_is_removed_while_it_is_put(tmp_path):
    """At each request of who writes it, until the last, somebody removes it: when `put` returns,
    it is there, or it was removed after that."""
    for step in itertools.count():
        where, other = (Store(tmp_path / str(step), block_tokens=faults.BLOCK) for _ in range(2))
        key, done, reached = put(where), itertools.count(), []
        where = Store(tmp_path / str(step))
        where._pool.each = lambda do, items: [do(item) for item in items]

        def after(do, done=done, step=step, key=key, other=other, reached=reached):
            def instead(*given, **more):
                if next(done) == step:
                    other.remove(key)
                    reached.append(given)
                return do(*given, **more)

            return instead

        for name in ("head", "get", "put"):
            setattr(where.bucket, name, after(getattr(where.bucket, name)))
        put(where)
        if not reached:
            assert step > 10
            return
        assert faults.looked_for(other, 0, 0) == faults.TOKENS, reached


def test_what_a_server_does_not_list_is_not_cleared_away(tmp_path, ahead, monkeypatch):
    store = Store(tmp_path, block_tokens=faults.BLOCK)
    put(store)
    under = store.bucket.under
    hides = lambda prefix: (m for m in under(prefix) if not m.path.endswith(".kvz"))  # noqa: E731
    monkeypatch.setattr(store.bucket, "under", hides)
    assert store.documents() == [] and store.prune() == []
    monkeypatch.undo()
    assert faults.looked_for(store, 0, 0) == faults.TOKENS


FULL = """
import faults, kvzip, sys
from pathlib import Path
from kvzip.store import Store
store, put, full = Store(sys.argv[1], block_tokens=faults.BLOCK), [], []
def fill(numbers):
    for number in numbers:
        try:
            store.put(faults.document(0, number), codec="raw", threads=1)
        except kvzip.StoreError as error:
            assert "the disk is full" in str(error), error
            full.append(number)
        else:
            put.append(number)
fill(range(200))
assert len(put) > 5 and len(full) > 5, (put, full)
for number in put:
    assert faults.looked_for(store, 0, number) == faults.TOKENS, number
assert not [file for file in Path(sys.argv[1]).iterdir() if file.is_file() and file.name[0] == "."]
room = sum(each.encoded_bytes for each in store.documents()) // 2
gone = len(store.prune(room))
again = full[: gone // 2]
full.clear()
fill(again)
assert gone and not full, full
for number in again:
    assert faults.looked_for(store, 0, number) == faults.TOKENS, number
"""


def test_a_disk_that_fills_loses_nothing(tmp_path):
    """A disk of 300 kB, which is a filesystem in memory of a namespace of its own."""
    mount = f"mount -t tmpfs -o size=300k kvzip {tmp_path} && exec "
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} true"], check=False).returncode
    ):
        pytest.skip("no filesystem can be mounted here")
    program = [sys.executable, "-c", FULL, str(tmp_path)]
    command = ["unshare", "-rm", "sh", "-c", mount + shlex.join(program)]
    beside = os.environ | {"PYTHONPATH": str(Path(faults.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=beside)
    assert done.returncode == 0, done.stderr
