"""Nothing that is acknowledged is lost, nothing wrong is served, and nobody waits for ever,
whatever a server, a disk and the clocks do (faults.py)."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import faults
import numpy as np
import pytest
import servers
from support import wait_for

import kvzip
from kvzip.errors import CorruptError, FormatError, StoreError
from kvzip.store import Store, evicting, profiles
from kvzip.store.bucket import Bucket, open_url
from kvzip.store.keys import document_path
from kvzip.store.urls import without_secrets

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


def test_a_document_of_other_tokens_in_the_place_of_one(tmp_path):
    """Who has a key from a lookup, as an engine's worker from its scheduler, compares no ids."""
    store = Store(tmp_path / "store", block_tokens=faults.BLOCK)
    key, other = put(store, number=0), put(store, number=1)
    where = store.bucket.folder
    whole = (where / document_path(key)).read_bytes()
    (where / document_path(key)).write_bytes((where / document_path(other)).read_bytes())
    for act in (store.open, lambda key: store.fetch(key, tmp_path / "got.kvz")):
        with pytest.raises(CorruptError, match="another document, of other tokens"):
            act(key)
    assert not (tmp_path / "got.kvz").exists()
    (where / document_path(key)).write_bytes(whole)
    store.bucket.delete(key.replace("/", "/chain/"))  # as a power cut may do
    with store.open(key) as reader:
        assert reader.token_ids.tolist() == faults.ids_of(0)


def test_an_empty_document_is_passed_over_where_a_server_is_asked_too(tmp_path):
    """A power cut may leave one; of nothing a server gives no part."""
    store = Store(tmp_path / "store", block_tokens=faults.BLOCK)
    key = put(store)
    (store.bucket.folder / document_path(key)).write_bytes(b"")
    with servers.failing_server(tmp_path / "store") as server:
        for asked in (store, Store(server.url)):
            assert asked.find(faults.ids_of(0), model="m0", **OF) is None
            for act in (asked.open, lambda key, asked=asked: asked.fetch(key, tmp_path / "got")):
                with pytest.raises(FormatError, match="is not a"):
                    act(key)


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
        where._pool.each, where._pool.map = lambda do, items: [do(item) for item in items], map

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
        assert has_chain(other, key), reached


def has_chain(store, key):
    return store.bucket.head(key.replace("/", "/chain/")) is not None


def at_step(bucket, step, act):
    """Have `act` done before a bucket's request of that number; a list of what it gave."""
    done, reached = itertools.count(), []

    def before(do):
        def instead(*given, **more):
            if next(done) == step:
                reached.append(act())
            return do(*given, **more)

        return instead

    for name in ("head", "get", "under", "put", "delete"):
        setattr(bucket, name, before(getattr(bucket, name)))
    return reached


def test_a_document_that_is_put_while_it_is_removed(tmp_path):
    """At each request of who removes it: if it is there after that, then with all that leads to
    it."""
    outcomes = set()
    for step in itertools.count():
        where, other = (Store(tmp_path / str(step), block_tokens=faults.BLOCK) for _ in range(2))
        where._pool.each = lambda do, items: [do(item) for item in items]
        key = put(where)
        reached = at_step(where.bucket, step, lambda other=other: put(other))
        where.remove(key)
        if not reached:
            assert step > 10 and outcomes == {True, False}
            return
        there = bool(other.documents())
        outcomes.add(there)
        assert faults.looked_for(other, 0, 0) == (faults.TOKENS if there else 0), step
        assert has_chain(other, key) == there, step


def test_a_document_is_found_without_listing_whatever_is_removed_at_once(tmp_path):
    """Three begin alike. At each request of who removes the first, the second is removed, which is
    the next to be named by what they have in common."""
    for step in itertools.count():
        where, other = (Store(tmp_path / str(step), block_tokens=faults.BLOCK) for _ in range(2))
        where._pool.each = lambda do, items: [do(item) for item in items]
        first, second, _ = sorted(put(where, number=number) for number in range(3))
        for mark in where.bucket.folder.glob("*/last/*"):
            if len(list((mark.parent.parent / "with" / mark.name).iterdir())) == 3:
                mark.write_text(first.partition("/")[2])
        reached = at_step(where.bucket, step, lambda other=other, key=second: other.remove(key))
        where.remove(first)
        if not reached:
            assert step > 10
            return
        web = Store(tmp_path / str(step))
        web.bucket.listable = False
        for count in (faults.BLOCK, faults.TOKENS // 2):  # the common beginning is two blocks
            with web.find(faults.ids_of(0)[:count], model="m0", **OF) as match:
                assert match.tokens == count, step
        space, named = first.partition("/")[0], web.bucket.folder.glob("*/last/*")
        for name in {mark.read_text() for mark in named}:
            assert web.bucket.head(document_path(f"{space}/{name}")), step


def test_what_a_server_does_not_list_is_not_cleared_away(tmp_path, ahead, monkeypatch):
    store = Store(tmp_path, block_tokens=faults.BLOCK)
    put(store)
    under = store.bucket.under
    hides = lambda prefix: (m for m in under(prefix) if not m.path.endswith(".kvz"))  # noqa: E731
    monkeypatch.setattr(store.bucket, "under", hides)
    assert store.documents() == [] and store.prune() == []
    monkeypatch.undo()
    assert faults.looked_for(store, 0, 0) == faults.TOKENS


class Endless(BaseHTTPRequestHandler):
    """Gives a gigabyte for whatever it is asked for, and says of parts that they are as asked."""

    protocol_version = "HTTP/1.1"
    sent = 0

    def do_GET(self):
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(1 << 30))
        if asked:
            self.send_header("Content-Range", f"bytes {asked}/{1 << 40}")
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        for _ in range(1 << 10):
            type(self).sent += self.wfile.write(bytes(1 << 20))

    def handle(self):
        with suppress(OSError):
            super().handle()

    def log_message(self, *_):
        pass


def test_no_more_is_taken_than_was_asked_for():
    """What a server gives beyond that stays on the way."""
    with servers.serving(Endless) as url:
        bucket = Bucket(f"{url}/store", timeout=60, retries=0)
        assert bucket.get("store.json") == b""
        with pytest.raises(StoreError, match=r"more of x\.kvz in .* than it is asked for"):
            kvzip.open(f"{url}/store/x.kvz")
        with pytest.raises(StoreError, match="than it is asked for"):
            bucket.read_range("x", 0, 1 << 20, None)
        assert wait_for(lambda: Endless.sent) and Endless.sent < 100 << 20


def test_a_small_object_that_is_not_small_is_none(tmp_path):
    """A file of zeros that take no room."""
    store = Store(tmp_path, block_tokens=faults.BLOCK)
    put(store)
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".kvz"]:
        with path.open("r+b") as file:
            file.truncate(1 << 43)
        assert store.bucket.get(str(path.relative_to(tmp_path))) == b""
    put(Store(tmp_path, block_tokens=faults.BLOCK))
    assert faults.looked_for(Store(tmp_path), 0, 0) == faults.TOKENS


@pytest.mark.parametrize("sealed", [False, True])
def test_an_object_may_take_longer_than_one_request(tmp_path, sealed):
    """Where an answer has 2 MB a second, all of a document would take longer than the time-out, and
    its pieces do not."""
    key = {"key": b"k" * 32} if sealed else {}
    bits = np.random.default_rng(0).integers(0, 1 << 16, (2, 1, 2048, 1024), np.uint16)
    made = kvzip.Snapshot.from_arrays([tuple(bits)], "bf16", [0] * 2048, kvzip.Origin("m"))
    entry = Store(tmp_path, **key).put(made, codec="raw", threads=1)
    assert entry.encoded_bytes > 8 << 20
    with servers.failing_server(tmp_path) as server:
        server.rate = 2 << 20
        store = Store(server.url, timeout=2.5, retries=0, **key)
        assert store.fetch(entry.key, tmp_path / "got.kvz") == entry.encoded_bytes
    assert kvzip.decode(tmp_path / "got.kvz") == made


@pytest.mark.parametrize("ahead", [False, True])
def test_a_block_may_take_longer_than_one_request(tmp_path, ahead):
    bits = np.random.default_rng(0).integers(0, 1 << 16, (2, 1, 4096, 1024), np.uint16)
    made = kvzip.Snapshot.from_arrays([tuple(bits)], "bf16")
    kvzip.write(tmp_path / "a.kvz", made, "raw", block_tokens=4096)
    with servers.failing_server(tmp_path) as server:
        server.rate = 2 << 20  # of each answer: a block takes four seconds
        with open_url(f"{server.url}/a.kvz", timeout=3.5, retries=0) as reader:
            if ahead:
                reader.read_ahead([(0, 4096)])
            assert reader.decode() == made


def test_a_long_answer_is_told_in_no_time():
    began = time.monotonic()
    assert without_secrets("a" * 1_000_000) == "a" * 1_000_000
    assert without_secrets("+a" * 9 + "://user:word@x/y?sig=1 b") == "+a" * 9 + "://x/y?... b"
    assert time.monotonic() - began < 10


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
