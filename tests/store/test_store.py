"""A store finds the longest prefix there is, and serves what was put or nothing."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from command import run, run_json
from hypothesis import given
from hypothesis import strategies as st
from servers import failing_server, silent_server
from support import assert_same, cache_like, examples, make_snapshot, wait_for

import kvzip
from kvzip import files
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    StoreError,
    UnsupportedError,
    UsageError,
)
from kvzip.snapshot import Layer, LayerLayout, PartLayout
from kvzip.store import Store, evicting, remote, uses
from kvzip.store.bucket import Bucket, forget_clients, open_url
from kvzip.store.keys import document_path

BLOCK = 8
OF = {"model": "test/model", "revision": "r1", "dtype": "bf16"}
_prefixes = itertools.count()


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """Where a store may be: its URL and what else `Store` takes."""
    if request.param == "folder":
        return tmp_path / "store", {}
    server = request.getfixturevalue("s3")
    return f"{server.url}/t{next(_prefixes)}", {"options": server.options}


@pytest.fixture
def opened(place):
    url, more = place
    return Store(url, block_tokens=BLOCK, **more)


def snapshot_of(ids, seed=0, **more):
    made = make_snapshot(cache_like, seed, "bf16", tokens=len(ids), dim=4, **more)
    made.token_ids = np.array(ids, np.uint32)
    return made


def tiny(ids, model="m"):
    """A document of few bytes, whose numbers depend on its ids."""
    bits = np.cumsum(np.array(ids, np.uint16), dtype=np.uint16).reshape(1, -1, 1)
    return kvzip.Snapshot.from_arrays([(bits, bits)], "bf16", ids, kvzip.Origin(model=model))


def put_tiny(where, ids, **more):
    return where.put(kvzip.encode(tiny(ids, **more), "raw", threads=1))


def find_tiny(where, ids):
    """Tokens shared and the document's ids, after a look at every number; or None."""
    found = where.find(ids, model="m", revision="", dtype="bf16")
    if found is None:
        return None
    with found:
        assert_same(found.snapshot(threads=1), whole_prefix(tiny(found.reader.token_ids), found))
        return found.tokens, found.reader.token_ids.tolist()


def whole_prefix(snapshot, found):
    with kvzip.open(kvzip.encode(snapshot, "raw", threads=1)) as reader:
        return reader.tokens(0, found.tokens)


# --- put, find, get --------------------------------------------------------------------------


def test_what_is_put_is_found_bit_for_bit(opened, place, codec, tmp_path):
    snapshot = snapshot_of(range(100, 150))
    entry = opened.put(snapshot, codec=codec, threads=1)
    assert entry.new and entry.tokens == 50
    again = Store(place[0], **place[1])  # the cut is the store's, whoever opens it
    with again.find(snapshot.token_ids, **OF) as found:
        assert (found.tokens, found.key) == (50, entry.key)
        assert_same(found.snapshot(), snapshot)
    assert not again.put(snapshot, codec=codec).new
    assert again.fetch(entry.key, tmp_path / "doc.kvz") == entry.encoded_bytes
    assert_same(kvzip.decode(tmp_path / "doc.kvz"), snapshot)
    with again.open(entry.key) as reader:
        assert np.array_equal(reader.layer(1).k, snapshot.layers[1].k)


def test_a_prompt_gets_what_it_shares_to_the_token(opened):
    ids = list(range(100, 150))
    opened.put(snapshot_of(ids), threads=1)
    for shared in (8, 9, 23, 49):
        prompt = [*ids[:shared], 7, 7, 7, 7]
        with opened.find(prompt, **OF) as found:
            assert found.tokens == shared
            assert found.snapshot().tokens == shared
    assert opened.find([*ids[:7], 7, 7, 7, 7], **OF) is None
    assert opened.find([], **OF) is None
    for other in ({"model": "m"}, {"revision": "r2"}, {"dtype": "fp16"}):
        assert opened.find(ids, **OF | other) is None


documents = st.lists(st.integers(0, 1), min_size=2, max_size=14)
steps = st.one_of(
    st.tuples(st.just("put"), documents),
    st.tuples(st.just("remove"), st.integers(0, 20)),
    st.tuples(st.just("find"), documents),
)


@given(steps=st.lists(steps, max_size=12))
@examples(30)
def test_the_longest_prefix_of_all_documents(steps, tmp_path_factory):
    where = Store(tmp_path_factory.mktemp("store"), block_tokens=2)
    held: dict[str, list[int]] = {}
    for do, what in [*steps, ("find", [0] * 14), ("find", [1] * 14)]:
        if do == "put":
            entry = put_tiny(where, what)
            assert entry.new == (entry.key not in held)
            held[entry.key] = what
        elif do == "remove" and held:
            key = sorted(held)[what % len(held)]
            where.remove(key)
            del held[key]
        elif do == "find":
            shared = [common(document, what) for document in held.values()]
            best = max((n // 2 * 2 for n in shared), default=0)
            found = find_tiny(where, what)
            if best == 0:
                assert found is None
            else:
                assert found[1] in held.values()
                assert found[0] == common(found[1], what) >= best
    assert {d.key for d in where.documents()} == set(held)


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905


def test_long_prompts_take_few_rounds(tmp_path):
    where = Store(tmp_path, block_tokens=1)
    ids = np.arange(600) % 300
    put_tiny(where, ids)
    asked = []
    get = where.bucket.get
    where.bucket.get = lambda path: asked.append(path) or get(path)
    for shared in (1, 100, 345, 600):
        asked.clear()
        prompt = np.append(ids[:shared], np.full(3400, 5000))
        with where.find(prompt, model="m", revision="", dtype="bf16") as found:
            assert found.tokens == shared
        assert len(asked) <= 16 * 3 + 1


def test_with_a_profile_both_searches_go_at_once(tmp_path):
    where = Store(tmp_path, block_tokens=BLOCK)
    profile = kvzip.Profile({"t": np.arange(3, dtype=np.int32)}, {"model": "test/model"})
    where.put(snapshot_of(range(50)), codec="raw")
    best = where.put(snapshot_of(range(50)), codec="raw", profile=profile)
    both = threading.Barrier(2, timeout=20)
    search, openings, closed = where._finder._search, [], []

    def meeting(space, prompt, known, threads):
        both.wait()
        match = search(space, prompt, known, threads)
        close = match.reader.close
        match.reader.close = lambda: closed.append(known) or close()
        openings.append(known)
        if known in broken:
            raise StoreError("the store is gone")
        return match

    where._finder._search, broken = meeting, ()
    with where.find(range(50), **OF, profile=profile) as found:
        assert found.key == best.key  # of equals, the one with the profile
        assert closed == [None]
    for broken in ((profile,), (None,)):
        closed.clear()
        with pytest.raises(StoreError, match="is gone"):
            where.find(range(50), **OF, profile=profile)
        assert closed == [known for known in (profile, None) if known not in broken]
    assert len(openings) == 6


def test_who_finds_a_document_does_not_wait_until_its_use_is_noted(opened):
    put_tiny(opened, range(16))
    put, noted = opened.bucket.put, threading.Event()

    def waiting(path, *rest, **more):
        assert noted.wait(20)
        return put(path, *rest, **more)

    opened.bucket.put = waiting
    opened._uses._touched.clear()  # a document that was just put needs no note
    assert find_tiny(opened, range(16))[0] == 16
    threading.Timer(0.2, noted.set).start()
    [stored] = opened.documents()  # waits for what is under way
    assert noted.is_set() and not opened._uses._touches
    assert [m.path for m in opened.bucket.under(f"{stored.key.partition('/')[0]}/used")]


def test_uses_that_are_written_again_anyway_are_forgotten(tmp_path, monkeypatch):
    """A server that runs for months remembers no document that nobody asks for any more."""
    monkeypatch.setattr(uses, "_TOUCH_SECONDS", 0.0)
    where = Store(tmp_path, block_tokens=BLOCK)
    for i in range(4):
        put_tiny(where, [i] * 16)
    for i in range(4):
        assert find_tiny(where, [i] * 16)
    assert len(where._uses._touched) == 1


def test_over_http_what_a_server_serves_is_read(s3):
    prefix = f"t{next(_prefixes)}"
    writer = Store(f"{s3.url}/{prefix}", block_tokens=BLOCK, options=s3.options)
    snapshot = snapshot_of(range(100, 150))
    entry = writer.put(snapshot)
    reader = Store(f"{s3.http}/{prefix}")
    with reader.find([*range(100, 130), 1, 2, 3], **OF) as found:
        assert (found.tokens, found.key) == (30, entry.key)
        assert found.snapshot().tokens == 30
    with reader.find(snapshot.token_ids, **OF) as found:
        assert_same(found.snapshot(), snapshot)
    with pytest.raises(KVZipError, match="read only"):
        reader.put(snapshot)
    assert reader.find([1] * 50, **OF) is None
    with open_url(f"{s3.http}/{prefix}/{document_path(entry.key)}") as file:
        assert_same(file.decode(), snapshot)
    with pytest.raises(StoreError, match="there is no"):
        open_url(f"{s3.http}/{prefix}/nothing.kvz")
    for url, line in (("s3://host", "names no file"), ("http://", "empty host")):
        with pytest.raises(KVZipError, match=line):
            open_url(url)
    with pytest.raises(KVZipError, match="cannot use"):
        open_url(f"{s3.http}/doc.kvz", options={"allow_http": ["true"]})


def test_what_is_opened_under_one_url_shares_connections(tmp_path, monkeypatch):
    snapshot = snapshot_of(range(50))
    kvzip.write(tmp_path / "doc.kvz", snapshot)
    with failing_server(tmp_path) as server:

        def connected_for(opened: int, **options: object) -> int:
            before = server.connections
            for _ in range(opened):
                with open_url(f"{server.url}/doc.kvz", **options) as file:
                    assert_same(file.decode(), snapshot)
            return server.connections - before

        # Fewer than one each. Not _CONNECTIONS at most: a request may be made before the connection
        # of one that has just ended is free again.
        assert 1 <= connected_for(16) < 16
        # Another client where anything else is asked of it, or would be found in the environment.
        assert connected_for(1, timeout=9.0) > 0
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert connected_for(1) > 0
        forget_clients()
        assert connected_for(1) > 0


def test_documents_that_need_a_profile_are_not_for_those_who_have_another(tmp_path):
    where = Store(tmp_path, block_tokens=BLOCK)
    profile, other = (
        kvzip.Profile({"t": np.arange(n, dtype=np.int32)}, {"model": "test/model"}) for n in (3, 4)
    )
    snapshot = snapshot_of(range(50))
    entry = where.put(snapshot, codec="raw", profile=profile)
    assert where.find(range(50), **OF, profile=other) is None
    with where.find(range(50), **OF, profile=profile) as found:
        assert found.key == entry.key
        assert_same(found.snapshot(), snapshot)
    longer = where.put(snapshot_of(range(60)), codec="raw")
    with where.find(range(60), **OF, profile=profile) as found:
        assert found.key == longer.key


def test_ids_may_be_withheld(opened):
    snapshot = snapshot_of(range(50))
    blob = kvzip.encode(snapshot, "raw", store_token_ids=False)
    with pytest.raises(KVZipError, match="give them"):
        opened.put(blob)
    with pytest.raises(KVZipError, match="not those of the document"):
        opened.put(blob, token_ids=range(1, 51))
    opened.put(blob, token_ids=range(50))
    with opened.find([*range(30), 99, 98, 97], **OF) as found:
        assert found.tokens == 24  # whole blocks: nothing tells of single tokens


def test_a_state_serves_prompts_that_share_all_that_it_has_seen(opened):
    """A capture leaves a token to compute: its states are one token short of its keys."""
    made = snapshot_of(range(50))
    state = PartLayout("bf16", (3, 4), "rd")
    layout = LayerLayout({"recurrent": state}, 49, "state", state_length=49)
    layers = [*made.layers, Layer({"recurrent": np.zeros((3, 4), np.uint16)}, layout)]
    opened.put(kvzip.Snapshot(layers, "bf16", made.token_ids, made.origin))
    for prompt in (range(60), range(50), range(49), [*range(49), 99, 98]):
        with opened.find(prompt, **OF) as found:
            assert found.tokens == 49
            assert found.snapshot().layers[-1].kind == "state"
    for prompt in (range(48), [*range(48), 99, 98]):
        assert opened.find(prompt, **OF) is None


def test_a_sliding_window_serves_what_it_holds(opened):
    def of(first, ids, window=10):
        made = snapshot_of(ids)
        layers = [made.layers[0]]
        k, v = (array[:, first:] for array in made.layers[1])
        layout = LayerLayout.of_kv(k.shape, v.shape, "bf16", len(ids), "sliding", window)
        return kvzip.Snapshot(
            [*layers, Layer.of_kv(k, v, layout)], "bf16", made.token_ids, made.origin
        )

    opened.put(of(40, list(range(50))))
    assert opened.find([*range(30), 99], **OF) is None
    with opened.find([*range(50), 99], **OF) as found:
        assert found.tokens == 50
    whole = opened.put(of(0, [*range(40), *range(90, 100)]))
    with opened.find([*range(30), 99], **OF) as found:
        assert (found.tokens, found.key) == (30, whole.key)


def test_what_cannot_be_found_again_is_not_stored(opened):
    with pytest.raises(UnsupportedError, match="batch"):
        opened.put(make_snapshot(cache_like, 1, "bf16", batch=2))
    with pytest.raises(KVZipError, match="no token ids"):
        opened.put(make_snapshot(cache_like, 1, "bf16", ids=False))
    with pytest.raises(KVZipError, match="7 tokens"):
        opened.put(snapshot_of(range(7)))
    with pytest.raises(KVZipError, match="name its model"):
        opened.put(tiny(range(50), model=""))
    with pytest.raises(FormatError):
        opened.put(b"something else")
    assert opened.documents() == []


# --- damage ----------------------------------------------------------------------------------


def doc_path(where, entry) -> Path:
    return where.bucket.folder / document_path(entry.key)


def test_damage_is_never_stored_nor_served(tmp_path):
    where = Store(tmp_path / "store", block_tokens=BLOCK)
    snapshot = snapshot_of(range(50))
    blob = bytearray(kvzip.encode(snapshot, "channel"))
    blob[-1] ^= 1
    with pytest.raises(CorruptError):
        where.put(bytes(blob))
    assert where.documents() == []
    entry = where.put(snapshot)
    path = doc_path(where, entry)
    for damaged in (b"", path.read_bytes()[:-1], b"\0" * entry.encoded_bytes):
        path.write_bytes(damaged)
        assert where.find(range(50), **OF) is None
        assert where.put(snapshot).new  # a header that makes no sense is written anew
        with where.find(range(50), **OF) as found:
            assert_same(found.snapshot(), snapshot)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with where.find(range(50), **OF) as found, pytest.raises(CorruptError):
        found.snapshot()
    with pytest.raises(CorruptError):
        where.fetch(entry.key, tmp_path / "copy.kvz")
    assert not (tmp_path / "copy.kvz").exists()
    assert not where.put(snapshot).new
    assert where.put(snapshot, replace=True).new
    assert path.read_bytes() == good


@pytest.mark.parametrize("limit", [-1, float("nan"), 1.5, "x", "3", True, [], -(2**70)])
def test_prune_with_a_limit_that_makes_no_sense_removes_nothing(tmp_path, limit):
    where = Store(tmp_path, block_tokens=BLOCK)
    put_tiny(where, list(range(24)))
    with pytest.raises(UsageError, match="limit_bytes"):
        where.prune(limit)
    assert len(where.documents()) == 1


class Died(BaseException):
    """The writer's end."""


@pytest.mark.parametrize("act", ["put", "remove"])
def test_a_writer_may_die_at_any_step(tmp_path, monkeypatch, act):
    """Whatever is found after is whole; others are found as before; doing it again, or `prune`
    for an eviction, ends what was begun."""
    monkeypatch.setattr(evicting, "_STALE", timedelta(0))
    ids, sibling = list(range(24)), [*range(16), *range(90, 98)]
    for step in range(1000):
        where = Store(tmp_path / str(step), block_tokens=BLOCK)
        kept = put_tiny(where, sibling)
        if act == "remove":
            entry = put_tiny(where, ids)
        done = itertools.count()
        with monkeypatch.context() as patch:
            for name in ("put", "delete"):
                patch.setattr(where.bucket, name, dying(getattr(where.bucket, name), done, step))
            try:
                put_tiny(where, ids) if act == "put" else where.remove(entry.key)
                finished = True
            except Died:
                finished = False
        after = Store(tmp_path / str(step))
        shared, _ = find_tiny(after, ids)
        assert shared >= 16  # the sibling's part, at least
        assert find_tiny(after, sibling) == (24, sibling)
        if act == "put":
            put_tiny(after, ids)
            assert find_tiny(after, ids) == (24, ids)
            assert len(after.documents()) == 2
        else:
            if kept.key in after.prune():
                raise AssertionError
            if after.bucket.head(document_path(entry.key)) is None:
                assert find_tiny(after, ids) == (16, sibling)
                left = [p for p in (tmp_path / str(step)).rglob("*") if entry.key[33:] in p.name]
                assert left == []
            assert find_tiny(after, sibling) == (24, sibling)
        if finished:
            assert step > 7
            return


def dying(do, done, step):
    def instead(*arguments, **more):
        if next(done) == step:
            raise Died
        return do(*arguments, **more)

    return instead


def test_written_anew_while_it_is_evicted(tmp_path, monkeypatch):
    """At every step of an eviction a writer puts the same document: it is then found as a whole,
    or gone as a whole."""
    ids = list(range(24))
    for step in range(1000):
        where, writer = (Store(tmp_path / str(step), block_tokens=BLOCK) for _ in range(2))
        where._pool.each = lambda do, items: [do(item) for item in items]
        key = put_tiny(where, ids).key
        done = itertools.count()
        delete = where.bucket.delete
        reached = []

        def then_put(path, done=done, step=step, delete=delete, writer=writer, reached=reached):
            if next(done) == step:
                put_tiny(writer, ids)
                reached.append(path)
            delete(path)

        monkeypatch.setattr(where.bucket, "delete", then_put)
        where.remove(key)
        found = find_tiny(writer, ids)
        if writer.bucket.head(document_path(key)) is None:
            assert found is None
        else:
            assert found == (24, ids)
        if not reached:
            assert step > 5
            return


def test_what_dead_writers_leave_is_cleared_away(tmp_path, monkeypatch):
    where = Store(tmp_path, block_tokens=BLOCK)
    entry = put_tiny(where, range(24))
    part = tmp_path / files._hidden_name()
    with part.open("wb") as file:
        file.write(b"half")
        fcntl.flock(file, fcntl.LOCK_EX)
        assert where.prune() == [] and part.exists()  # it is still being written
    assert where.prune() == [] and not part.exists()
    assert doc_path(where, entry).exists()
    assert find_tiny(where, range(24)) == (24, list(range(24)))


# --- writers that are killed -----------------------------------------------------------------


def crash(place, operations):
    """See crash.py; what happened."""
    url, more = place
    script = Path(__file__).parent / "crash.py"
    command = [script, url, operations, 0, json.dumps(more.get("options", {}))]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = json.loads(done.stdout)
    assert min(found["puts"], found["gets"]) >= operations // 2
    assert found["killed_within_a_put"] >= operations // 20
    return found


@pytest.mark.drawn(2)
def test_killed_writers_lose_and_damage_nothing(place):
    crash(place, 60)


@pytest.mark.long
def test_killed_writers_lose_and_damage_nothing_in_a_thousand(place):
    assert crash(place, 1000)["acknowledged"] >= 200


# --- size ------------------------------------------------------------------------------------


def test_what_is_put_again_was_used_now(tmp_path):
    old = [put_tiny(Store(tmp_path, block_tokens=BLOCK), [i] * 16).key for i in range(3)]
    for days, key in enumerate(reversed(old), 1):
        then = time.time() - 86400 * days
        os.utime(tmp_path / document_path(key), (then, then))
    where = Store(tmp_path)
    assert [d.key for d in where.documents()] == old
    assert not put_tiny(where, [0] * 16).new
    assert find_tiny(where, [0] * 16)
    assert [d.key for d in where.documents()] == [*old[1:], old[0]]


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(uses, "_TOUCH_SECONDS", 0.0)
    probe = Store(tmp_path, block_tokens=BLOCK)
    size = put_tiny(probe, [0] * 16).encoded_bytes
    limit = int(4.5 * size)
    where = Store(tmp_path, limit_bytes=limit)
    for i in range(1, 4):
        time.sleep(0.01)
        put_tiny(where, [i] * 16)
    time.sleep(0.01)
    assert find_tiny(where, [0] * 16)  # used: now the second is the oldest
    time.sleep(0.01)
    put_tiny(where, [4] * 16)
    assert [find_tiny(where, [i] * 16) is not None for i in range(5)] == [True, False, *[True] * 3]
    for i in range(5, 12):
        put_tiny(where, [i] * 16)
        assert find_tiny(where, [i] * 16)
        assert sum(d.encoded_bytes for d in where.documents()) <= limit
    with pytest.raises(KVZipError, match="in a store of"):
        Store(tmp_path, limit_bytes=size - 1).put(tiny([3] * 99))


def left_of(where, key):
    """The objects that have a document's name."""
    return [m.path for m in where.bucket.under("") if key.partition("/")[2] in m.path]


def test_a_use_that_is_noted_late_leaves_nothing(place, monkeypatch):
    """A reader finds a document and notes that when it is gone."""
    url, more = place
    where, reader = (Store(url, block_tokens=BLOCK, **more) for _ in range(2))
    key = put_tiny(where, [1] * 16).key
    gone, put = threading.Event(), reader.bucket.put

    def late(path, *arguments, **more):
        assert "/used/" not in path or gone.wait(60)
        return put(path, *arguments, **more)

    monkeypatch.setattr(reader.bucket, "put", late)
    assert find_tiny(reader, [1] * 16)
    assert where.remove(key)
    gone.set()
    reader._uses.settle()
    assert left_of(where, key) == []


def test_prune_clears_away_uses_of_what_is_gone(place, monkeypatch):
    url, more = place
    where = Store(url, block_tokens=BLOCK, **more)
    kept, key = (put_tiny(where, [i] * 16).key for i in range(2))
    assert find_tiny(Store(url, **more), [0] * 16)
    where.remove(key)
    space, name = key.split("/")
    where.bucket.put(f"{space}/used/{name}", b"")  # by a reader that died then
    assert where.prune() == [] and left_of(where, key)  # it may yet take it away itself
    monkeypatch.setattr(evicting, "_STALE", timedelta(0))
    time.sleep(1.1)  # a bucket knows seconds
    assert where.prune() == []
    assert left_of(where, key) == [] and left_of(where, kept)


def test_files_of_others_are_no_documents(tmp_path):
    """NFS keeps a file that is deleted while somebody reads it, under a name of its own."""
    where = Store(tmp_path, block_tokens=BLOCK)
    keys = [put_tiny(where, [i] * 16).key for i in range(3)]
    space = tmp_path / keys[0].partition("/")[0]
    others = [space / kind / name for kind in ("docs", "chain") for name in (".nfs0a1", ".x.kvz")]
    for path in others:
        path.write_bytes(b"x")
        os.utime(path, (1e9, 1e9))
    assert {d.key for d in where.documents()} == {*keys}
    assert where.prune() == []
    assert where.prune(0) == keys
    assert all(path.exists() for path in others)


def test_eviction_from_a_bucket(s3):
    where = Store(f"{s3.url}/t{next(_prefixes)}", block_tokens=BLOCK, options=s3.options)
    first = put_tiny(where, [*[7] * 8, *[1] * 8])
    put_tiny(where, [*[7] * 8, *[2] * 8])
    time.sleep(1.01)  # S3 tells times in whole seconds
    where._uses._touched.clear()
    assert find_tiny(where, [*[7] * 8, *[1] * 8])[0] == 16  # used: now the second is the oldest
    assert where.prune(int(1.5 * first.encoded_bytes)) != [first.key]
    assert [d.key for d in where.documents()] == [first.key]
    for last in (1, 2):
        assert find_tiny(where, [*[7] * 8, *[last] * 8])[0] == 24 - 8 * last


# --- ranges ----------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """(offset, length) of every request for a range."""
    asked = []
    get = remote.Remote._get

    def note(self, offset, length):
        asked.append((offset, length))
        return get(self, offset, length)

    monkeypatch.setattr(remote.Remote, "_get", note)
    return asked


def big(tokens=2048):
    return make_snapshot(cache_like, 3, "bf16", layers=4, heads=2, tokens=tokens, dim=64)


@pytest.mark.parametrize("codec", ["raw", "channel"])
def test_a_part_costs_its_own_bytes(s3, counted, codec):
    where = Store(f"{s3.url}/t{next(_prefixes)}", options=s3.options)
    snapshot = big()
    entry = where.put(kvzip.encode(snapshot, codec, block_tokens=256))
    with where.open(entry.key) as reader:
        opening = sum(length for _, length in counted)
        assert opening <= 1 << 16
        counted.clear()
        assert np.array_equal(reader.layer(2).v, snapshot.layers[2].v)
        assert sum(length for _, length in counted) <= entry.encoded_bytes / 4 * 1.1
        counted.clear()
        assert reader.tokens(0, 200).tokens == 200
        assert sum(length for _, length in counted) <= entry.encoded_bytes / 8 * 1.3


@pytest.mark.parametrize("tokens", [1, 5, 10, 20, 2048])
def test_the_first_bytes_come_in_one_round_trip(s3, counted, tokens):
    """By requests beside each other, also where there is less to be had than they ask for."""
    bucket = Bucket(f"{s3.url}/t{next(_prefixes)}", options=s3.options)
    snapshot = big(tokens)
    bucket.put("doc.kvz", kvzip.encode(snapshot, "raw"))
    counted.clear()
    with bucket.open("doc.kvz") as reader:
        assert wait_for(lambda: len(counted) == 4)  # the last may be sent when the file is open
        assert sorted(counted) == [(at, 12 << 10) for at in range(0, 48 << 10, 12 << 10)]
        assert np.array_equal(reader.layer(3).k, snapshot.layers[3].k)


def test_an_object_that_changes_while_it_is_opened_is_an_error(s3, monkeypatch):
    """The first bytes are never of two versions."""
    where = Store(f"{s3.url}/t{next(_prefixes)}", options=s3.options)
    entry = where.put(kvzip.encode(big(), "raw"))
    other = make_snapshot(cache_like, 4, "bf16", layers=4, heads=2, tokens=2048, dim=64)
    get, changed = remote.Remote._get, threading.Event()

    def second_changes(self, offset, length):
        found = get(self, offset, length)
        if not offset:  # all others wait for this one
            where.bucket.put(document_path(entry.key), kvzip.encode(other, "raw"), create=False)
            changed.set()
        return found

    def waits(self, offset, length):
        if offset:
            changed.wait(10)
        return second_changes(self, offset, length)

    monkeypatch.setattr(remote.Remote, "_get", waits)
    with pytest.raises(StoreError, match=r"changed while it was read|cannot read"):
        where.open(entry.key)


def test_tables_never_go_alone():
    ranges = [(0, 2_000), (2_000, 500_000), (502_000, 1_000), (503_000, 500_000), (1 << 20, 9)]
    slow = SlowObject(bytes(2 << 20), 0.0, 1e9)
    ahead = remote.ReadAhead(slow, ranges)
    for at, length in ranges:
        assert len(ahead.take(at, length)) == length
    assert sorted(slow.asked) == [(0, 503_000), (503_000, 500_000), (1 << 20, 9)]


def test_small_blocks_are_not_one_request_of_all():
    """Or all of a long document would lie in memory, and its first layer come last."""
    slow = SlowObject(bytes(8 << 20), 0.0, 1e9)
    ranges = [(at, 4096) for at in range(0, 8 << 20, 4096)]
    ahead = remote.ReadAhead(slow, ranges)
    for at, length in ranges:
        assert len(ahead.take(at, length)) == length
    assert max(length for _, length in slow.asked) <= remote._MOST
    assert slow.asked[0] == (0, remote._LEAST)


def test_announced_ranges_come_ahead_in_few_requests(s3, counted):
    where = Store(f"{s3.url}/t{next(_prefixes)}", options=s3.options)
    snapshot = big()
    entry = where.put(kvzip.encode(snapshot, "channel", block_tokens=256))
    with where.open(entry.key, threads=1) as reader:
        counted.clear()
        reader.read_ahead([(0, 2048)] * 4)
        for i in range(4):
            assert np.array_equal(reader.layer(i).k, snapshot.layers[i].k)
        assert len(counted) <= 16  # of 64 blocks
        assert np.array_equal(reader.layer(0).k, snapshot.layers[0].k)  # once more, unannounced


def test_a_window_bounds_what_waits(s3, counted, monkeypatch):
    for bound in ("_LEAST", "_MOST"):
        monkeypatch.setattr(remote, bound, 100_000)
    monkeypatch.setattr(remote, "_WINDOW", 200_000)
    where = Store(f"{s3.url}/t{next(_prefixes)}", options=s3.options)
    snapshot = big()
    entry = where.put(kvzip.encode(snapshot, "raw", block_tokens=256))
    with where.open(entry.key, threads=1) as reader:
        counted.clear()
        reader.read_ahead([(0, 2048)] * 4)
        time.sleep(0.3)
        assert 0 < sum(length for _, length in counted) <= 400_000
        for i in (3, 0, 2, 1):  # in any order, too
            assert np.array_equal(reader.layer(i).k, snapshot.layers[i].k)


def test_a_closed_reader_fetches_nothing_more(tmp_path, counted, monkeypatch):
    """What was announced and not read is let go of, though somebody keeps the reader."""
    for bound in ("_LEAST", "_MOST"):
        monkeypatch.setattr(remote, bound, 10_000)
    snapshot = big()
    kvzip.write(tmp_path / "doc.kvz", snapshot, "raw", block_tokens=16)
    with failing_server(tmp_path) as server:
        reader = open_url(f"{server.url}/doc.kvz")
        reader.read_ahead([(0, 2048)] * 4)
        ahead = weakref.ref(reader._source._ahead)
        reader.close()
        assert wait_for(lambda: ahead() is None)
        assert sum(length for _, length in counted) < reader.encoded_bytes / 2
        assert np.array_equal(reader.layer(0).k, snapshot.layers[0].k)  # no file was open


class SlowObject:
    """Bytes that take `wait` seconds to begin with, then come at `rate` bytes a second, which the
    requests under way share."""

    def __init__(self, data, wait, rate):
        self.data, self.wait, self.rate = data, wait, rate
        self.asked, self.link = [], threading.Lock()
        self.pool = ThreadPoolExecutor(remote._CONNECTIONS)

    def fetch(self, offset, length):
        self.asked.append((offset, length))
        time.sleep(self.wait)
        with self.link:
            time.sleep(length / self.rate)
        return memoryview(self.data)[offset : offset + length]


def in_turn(wait, rate, total=16 << 20, block=64 << 10):
    """Sizes of the requests for a file that is read from its beginning to its end."""
    slow = SlowObject(np.random.default_rng(0).bytes(total), wait, rate)
    ranges = [(at, block) for at in range(0, total, block)]
    ahead = remote.ReadAhead(slow, ranges)
    for at, length in ranges:
        assert ahead.take(at, length) == slow.data[at : at + length]
    assert ahead.take(0, block) is None  # taken before
    assert sum(length for _, length in slow.asked) == total
    return [length for _, length in sorted(slow.asked)]


def test_requests_are_small_at_both_ends_and_larger_between():
    sizes = in_turn(wait=1e-4, rate=200e6)
    assert max(sizes[:4]) <= remote._LEAST
    assert max(sizes[-2:]) <= remote._LEAST
    assert max(sizes) > remote._LEAST


def test_requests_grow_where_the_wait_is_long():
    """A request is to take several times as long as the wait for its first byte."""
    near, far = in_turn(wait=1e-4, rate=200e6), in_turn(wait=20e-3, rate=200e6)
    assert len(far) < len(near)
    assert max(far) > 2 * max(near)


def test_an_object_that_changes_is_an_error(s3):
    where = Store(f"{s3.url}/t{next(_prefixes)}", options=s3.options)
    entry = where.put(kvzip.encode(big(), "raw"))
    with where.open(entry.key) as reader:
        other = make_snapshot(cache_like, 4, "bf16", layers=4, heads=2, tokens=2048, dim=64)
        where.bucket.put(document_path(entry.key), kvzip.encode(other, "raw"), create=False)
        with pytest.raises(StoreError):
            reader.layer(3)


@pytest.mark.parametrize("conditions", [True, False])
@pytest.mark.parametrize("weak", [True, False])
def test_a_file_of_a_web_server_that_changes_is_an_error(tmp_path, weak, conditions):
    """Whatever it does with versions: one that stays is read."""
    made = kvzip.encode(big(), "raw")
    (tmp_path / "a.kvz").write_bytes(made)
    with failing_server(tmp_path) as server:
        server.weak, server.conditions = weak, conditions
        assert kvzip.decode(f"{server.url}/a.kvz") == big()
        with kvzip.open(f"{server.url}/a.kvz") as reader:
            (tmp_path / "b.kvz").write_bytes(made)
            os.utime(tmp_path / "b.kvz", (1, 1))
            (tmp_path / "b.kvz").rename(tmp_path / "a.kvz")
            with pytest.raises(StoreError, match=r"changed while it was read|412"):
                reader.layer(3)


# --- stores that do not answer -----------------------------------------------------------------


def test_a_store_that_is_down_or_silent_is_an_error_in_time():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with silent_server() as silent:
            for url in (down, silent):
                began = time.monotonic()
                with pytest.raises(StoreError):
                    Store(url, timeout=0.3, retries=1).find([1] * 50, **OF)
                assert time.monotonic() - began < 5
    s3 = Store("s3://nowhere", timeout=0.3, retries=0, options={"endpoint": down, "region": "a"})
    with pytest.raises(StoreError):
        s3.put(tiny(range(300)))
    for url in ("gopher://x", "s3://"):
        with pytest.raises(KVZipError):
            Store(url)


def test_threads_share_a_store(opened):
    found, failed = [], []

    def work(n):
        try:
            for i in range(6):
                ids = [i] * 8 + [n % 3] * 8
                put_tiny(opened, ids)
                found.append(find_tiny(opened, ids) == (16, ids))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and all(found) and len(found) == 36
    assert len(opened.documents()) == len({(i, n) for i in range(6) for n in range(3)})


# --- the command line --------------------------------------------------------------------------


def test_put_and_get(tmp_path, capsys):
    snapshot = snapshot_of(range(50))
    doc, kvz, where = (tmp_path / n for n in ("doc.safetensors", "doc.kvz", "store"))
    snapshot.save(doc)
    kvz.write_bytes(kvzip.encode(snapshot, "planes"))
    code, out = run_json(capsys, "put", doc, kvz, "--store", where, "--block-tokens", 8)
    assert code == 0 and [d["new"] for d in out["documents"]] == [True, True]
    assert "was there already" in run(capsys, "put", doc, "--store", where)[1]
    back = tmp_path / "back.safetensors"
    code, got = run_json(capsys, "get", "--store", where, "--like", doc, "-o", back)
    assert (code, got["tokens"], got["document_tokens"]) == (0, 50, 50)
    assert_same(kvzip.Snapshot.load(back), snapshot)
    (tmp_path / "ids.json").write_text(json.dumps([*range(20), 99, 98]))
    asked = ["get", "--store", where, "--ids", tmp_path / "ids.json", "--model", "test/model"]
    code, got = run_json(capsys, *asked, "--revision", "r1", "-o", back)
    assert (code, got["tokens"]) == (0, 20)
    assert kvzip.Snapshot.load(back).tokens == 20
    code, got = run_json(capsys, "get", "--store", where, "--key", got["key"], "-o", kvz)
    assert code == 0 and kvzip.verify(kvz).encoded_bytes == got["encoded_bytes"]
    code, got = run_json(capsys, *asked, "--revision", "r2")
    assert code == 1 and "no document" in got["error"]
    for wrong in (
        ["get", "--store", where],
        ["get", "--store", where, "--ids", tmp_path / "ids.json"],
        ["get", "--store", where, "--key", "nonsense"],
        ["get", "--store", where, "--like", doc, "-o", tmp_path / "x.bin"],
        ["get", "--store", tmp_path / "nothing", "--like", doc],
        ["put", tmp_path / "nothing", "--store", where],
    ):
        assert run(capsys, *wrong)[0] == 2, wrong
