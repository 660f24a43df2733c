"""A store in a folder: its permissions, file systems without hard links, forks, power cuts."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
from servers import failing_server
from support import assert_same, in_a_fork, make_snapshot, random_bits

import kvzip
from kvzip import files
from kvzip.errors import FormatError, SealError, StoreError, UsageError
from kvzip.store import Store
from kvzip.store import folder as folder_of_store
from kvzip.store.bucket import Bucket
from kvzip.store.keys import block_tokens_of, document_path, hash_chain

OF = {"model": "test/model", "revision": "r1", "dtype": "bf16"}


def document(seed=1, tokens=50):
    return make_snapshot(random_bits, seed, "bf16", tokens=tokens)


def small_files(folder):
    """All but the documents."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".kvz")


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


# --- permissions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_folder", "given", "wanted"),
    [
        (0o700, None, 0o600),
        (0o755, None, 0o640),
        (0o770, None, 0o660),
        (0o2775, None, 0o660),
        (0o700, 0o644, 0o644),
        (0o755, 0o600, 0o600),
    ],
)
def test_objects_are_for_the_group_as_far_as_the_folder_is(tmp_path, of_folder, given, wanted):
    tmp_path.chmod(of_folder)
    store = Store(tmp_path, block_tokens=8, mode=given)
    for _ in range(2):  # what is written anew, too
        store.put(document(), replace=True)
        found = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert len(found) > 10
        assert {mode_of(p) for p in found} == {wanted}
        assert {mode_of(p) for p in tmp_path.rglob("*") if p.is_dir()} == {of_folder}


def test_modes_that_make_no_sense(tmp_path):
    for mode in ("rw", -1, 0o1000, True):
        with pytest.raises(UsageError, match="mode"):
            Store(tmp_path, mode=mode)
    with pytest.raises(UsageError, match="folder"):
        Store("http://localhost:1/x", mode=0o600)


# --- file systems ----------------------------------------------------------------------------


@pytest.fixture(params=["nameless", "hidden"])
def no_links(request, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    if request.param == "hidden":
        monkeypatch.setattr(files, "_NAMELESS", 0)


def test_a_store_needs_no_hard_links(tmp_path, no_links):
    store = Store(tmp_path, block_tokens=8)
    entry = store.put(document())
    assert entry.new and not store.put(document()).new
    with store.find(document().token_ids, **OF) as found:
        assert_same(found.snapshot(), document())
    assert not any(files.is_hidden(p.name) for p in tmp_path.rglob("*"))
    assert store.remove(entry.key)
    assert {p.name for p in small_files(tmp_path)} == {"store.json", "about.json"}


def test_looking_makes_nothing(tmp_path):
    store = Store(tmp_path / "new")
    assert store.find([1] * 300, **OF) is None and store.documents() == []
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError):
        store.put(tmp_path / "no-file")
    assert not (tmp_path / "new").exists()


def delete(folder):
    """All of a store, as anybody may; a use that is still to be noted comes in between."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_what_goes_away_while_it_is_read_is_an_error_of_the_store(tmp_path):
    store = Store(tmp_path, block_tokens=8)
    entry = store.put(document())
    with store.open(entry.key) as reader:
        delete(tmp_path)
        assert_same(reader.decode(), document())  # an open file stays
        number = reader._source._file.fileno()
        broken = os.open("/proc/self/mem", os.O_RDONLY)  # reading at 0 fails as a lost server does
        os.dup2(broken, number)
        os.close(broken)
        with pytest.raises(StoreError, match="cannot be read any more"):
            reader._source.read(0, 8)
    with pytest.raises(StoreError, match="there is no document"):
        store.open(entry.key)
    assert store.find(document().token_ids, **OF) is None


@pytest.mark.parametrize("name", ["store.json", "last", "chain", "docs"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    Store(tmp_path, block_tokens=8).put(document())
    for found in [p for p in tmp_path.rglob("*") if p.is_file() and name in p.parts[-2:]]:
        found.unlink()
        os.mkfifo(found)
    with pytest.raises(StoreError, match="it is no file"):
        store = Store(tmp_path)
        list(store.documents())
        store.find(document().token_ids, **OF)
        store.remove(store.documents()[0].key)


def test_a_folder_that_goes_away_while_it_is_written_to_is_made_anew(tmp_path, monkeypatch):
    """Another process may delete all of it between any two steps."""
    store, mkdir, gone = Store(tmp_path / "store", block_tokens=8), Path.mkdir, []

    def making(path, *arguments, **options):
        if path.parent.name == "with" and not gone:
            gone.append(path)
            shutil.rmtree(tmp_path / "store", ignore_errors=True)  # others write to it meanwhile
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", making)
    store.put(document())
    assert gone
    with store.find(document().token_ids, **OF) as found:
        assert found.snapshot() == document()


def test_a_store_that_is_deleted_is_made_anew_by_who_goes_on_writing(tmp_path):
    """All of it, before any request of a put; whoever comes then finds the document."""
    for step in itertools.count():
        url, done, reached = tmp_path / str(step), itertools.count(), []
        store = Store(url, block_tokens=8)
        store.put(document())
        store._pool.each, store._pool.map = lambda do, items: [do(item) for item in items], map

        def first(do, url=url, step=step, done=done, reached=reached):
            def request(*given, **more):
                if next(done) == step:
                    delete(url)
                    reached.append(step)
                return do(*given, **more)

            return request

        for name in ("put", "get", "head"):
            setattr(store.bucket, name, first(getattr(store.bucket, name)))
        store.put(document(2))
        if not reached:
            assert step > 15
            return
        other = Store(url)
        for count in (8, 24, 50):
            with other.find(document(2).token_ids[:count], **OF) as found:
                assert found.tokens == count
        assert len(other.abouts()) == len(other.documents()) == 1


def test_a_store_that_is_made_anew_with_other_blocks(tmp_path):
    asked = Store(tmp_path / "store", block_tokens=8)
    asked.put(document())
    store = Store(tmp_path / "store")
    store.put(document())
    delete(tmp_path / "store")
    Store(tmp_path / "store", block_tokens=5).put(document())
    store.put(document(2))
    for opened in (store, Store(tmp_path / "store")):
        with opened.find(document(2).token_ids[:5], **OF) as found:
            assert found.tokens == 5
    with pytest.raises(UsageError, match="blocks of 5 tokens, not 8"):
        asked.put(document(3))


def test_documents_of_a_store_that_was_made_anew_are_no_others(tmp_path):
    """For who has read the settings of the one before."""
    store = Store(tmp_path / "store", block_tokens=8)
    key = store.put(document()).key
    delete(tmp_path / "store")
    assert Store(tmp_path / "store", block_tokens=5).put(document()).key == key
    with store.open(key) as reader:
        assert reader.decode() == document()
    assert store.fetch(key, tmp_path / "got.kvz") == reader.encoded_bytes


@pytest.mark.parametrize("settings", ['{"version":2,"block_tokens":8}', "[]", "sealed"])
def test_nothing_is_acknowledged_in_a_store_that_was_made_anew_as_another(tmp_path, settings):
    """Where nobody would find it."""
    store = Store(tmp_path / "store", block_tokens=8)
    store.put(document())
    delete(tmp_path / "store")
    if settings == "sealed":
        pytest.importorskip("cryptography")
        Store(tmp_path / "store", block_tokens=8, key=b"k" * 32).put(document())
    else:
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "store.json").write_text(settings)
    with pytest.raises((FormatError, SealError), match=r"sealed|version|no store of ours"):
        store.put(document(2))


def test_a_put_looks_at_once_at_all_that_must_be_there_in_the_end(tmp_path):
    """In a bucket each look takes a round trip."""
    store = Store(tmp_path, block_tokens=8)
    store.put(document())
    together = Barrier(4)

    def waiting(look):
        def looking(path, *more):
            together.wait(30)
            return look(path, *more)

        return looking

    store.bucket.head, store.bucket.get = waiting(store.bucket.head), waiting(store.bucket.get)
    store.put(document(2))
    assert not together.broken


@pytest.mark.parametrize("seconds", [1e14, -1e14, 2**40])
def test_a_file_of_a_year_that_there_is_not(tmp_path, seconds, monkeypatch):
    """Some file systems (tmpfs, NFS) know more of them than Python does."""
    store = Store(tmp_path, block_tokens=8)

    class Odd:
        def __init__(self, found):
            self.st_ino, self.st_size, self.st_mode = found.st_ino, found.st_size, found.st_mode
            self.st_mtime, self.st_mtime_ns = float(seconds), int(seconds) * 10**9

    entry = store.put(document())
    meta = folder_of_store._meta
    monkeypatch.setattr(folder_of_store, "_meta", lambda path, found: meta(path, Odd(found)))
    assert [d.key for d in store.documents()] == [entry.key]
    assert not store.put(document()).new
    store.prune()
    assert store.prune(0) == [entry.key]


def test_reading_takes_the_memory_of_what_is_there_and_not_of_what_may_be(tmp_path):
    """Which is slow to get: it is ten times as much time for a chunk of 8 MiB."""
    objects = Store(tmp_path).bucket
    objects.put("x", b"1234")
    tracemalloc.start()
    try:
        assert [objects.get("x", most) for most in (3, 4, 1 << 30)] == [b"", b"1234", b"1234"]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- links -----------------------------------------------------------------------------------


def reachable(folder):
    """Every folder and file of a store that has documents and what others left, by its path."""
    store = Store(folder, block_tokens=8)
    key = store.put(document()).key
    store.find(document().token_ids, **OF).reader.close()
    store.bucket.put(f"{key.partition('/')[0]}/used/{key.partition('/')[2]}", b"")
    store.bucket.put(f"{key.partition('/')[0]}/used/gone", b"")
    store.bucket.put(f"profiles/removing/{'0' * 64}/left", b"")
    return key, sorted(p.relative_to(folder) for p in folder.rglob("*"))


def test_nothing_is_written_or_deleted_where_links_lead(tmp_path):
    """In the place of each folder and file of a store there is a link to one outside, with files of
    the same names and others in it, all of them old."""
    key, paths = reachable(tmp_path / "store")
    assert len(paths) > 25
    for at in paths:
        for place in ("a", "outside"):
            shutil.rmtree(tmp_path / place, ignore_errors=True)
        shutil.copytree(tmp_path / "store", tmp_path / "a")
        instead, outside = tmp_path / "a" / at, tmp_path / "outside"
        outside.mkdir()
        shutil.move(instead, outside / "moved")
        instead.symlink_to(outside / "moved")
        if instead.is_dir():
            (outside / "moved" / "precious").write_text("precious")
        for file in [p for p in outside.rglob("*") if p.is_file()]:
            os.utime(file, (1, 1))
        before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
        store = Store(tmp_path / "a")
        for act in (
            lambda: store.find(document().token_ids, **OF).reader.close(),  # noqa: B023
            lambda: store._uses.settle(),  # noqa: B023
            lambda: store.put(document(), replace=True),  # noqa: B023
            lambda: store.put(document(2)),  # noqa: B023
            lambda: store.prune(0, profiles=True),  # noqa: B023
            lambda: store.remove(key),  # noqa: B023
        ):
            try:
                act()
            except StoreError as error:
                assert "is a link" in str(error), at
        store._uses.settle()
        assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before, at


def test_a_link_in_the_place_of_an_object_is_read_and_replaced(tmp_path):
    """As in a folder that was downloaded from a hub."""
    store = Store(tmp_path / "store", block_tokens=8)
    store.put(document())
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(small_files(tmp_path / "store")):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    store = Store(tmp_path / "store")
    with store.find(document().token_ids, **OF) as found:
        assert_same(found.snapshot(), document())
    assert not store.put(document()).new
    mark = next((tmp_path / "store").glob("*/last/*"))
    assert mark.is_file() and not mark.is_symlink()
    assert len(list((tmp_path / "blobs").iterdir())) > 10


def test_a_pipe_in_the_place_of_an_object_is_replaced(tmp_path):
    store = Store(tmp_path, block_tokens=8)
    store.put(document())
    pipes = [mark for name in ("last", "chain") for mark in tmp_path.glob(f"*/{name}/*")]
    for pipe in pipes:
        pipe.unlink()
        os.mkfifo(pipe)
    began = time.monotonic()
    store.put(document())
    assert time.monotonic() - began < files.PIPE_SECONDS / 2  # nobody waits for who reads from it
    assert len(pipes) > 5 and all(pipe.is_file() for pipe in pipes)


def test_links_and_folders_within_each_other_are_listed_once(tmp_path):
    store = Store(tmp_path, block_tokens=8)
    folder = (tmp_path / document_path(store.put(document()).key)).parent
    for name in ("a", "b"):
        (folder / name).symlink_to(".")  # followed, these would be 2^40 folders
    within = list(itertools.accumulate(["d"] * 1500, Path, initial=folder))
    try:
        for each in within[1:]:
            each.mkdir()
        began = time.monotonic()
        assert len(store.documents()) == 1
        assert time.monotonic() - began < 10
    finally:
        for each in reversed(within[1:]):  # rmtree calls itself for each
            each.rmdir()


# --- forks -----------------------------------------------------------------------------------


def test_after_a_fork_a_folder_goes_on(tmp_path):
    store = Store(tmp_path, block_tokens=8)
    store.put(document())
    store._uses._touches[store._pool.submit(time.sleep, 5)] = os.getpid()  # a note under way
    store.find(document().token_ids, **OF).reader.close()

    def use():
        with store.find(document().token_ids, **OF) as found:
            shared = found.tokens
            found.snapshot()
        new = store.put(document(2)).new
        return shared, new, len(store.documents()), len(store.prune())

    assert in_a_fork(use) == (50, True, 2, 0)
    with store.find(document(2).token_ids, **OF) as found:
        assert found.snapshot() == document(2)


@pytest.fixture
def web():
    """A server of one document."""
    blob = kvzip.encode(document(tokens=3000), "raw")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            first, last = 0, len(blob) - 1
            if "Range" in self.headers:
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                last = min(last, len(blob) - 1)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(blob)}")
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.send_header("ETag", '"a"')
            self.end_headers()
            self.wfile.write(blob[first : last + 1])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_after_a_fork_a_client_is_an_error_at_once(web):
    bucket = Bucket(web)
    assert bucket.get("doc.kvz")
    reader = bucket.open("doc.kvz")
    reader.read_ahead([(0, 3000)] * 2)
    began = time.monotonic()
    assert in_a_fork(lambda: bucket.get("doc.kvz")) == "StoreError"
    assert in_a_fork(reader.decode) == "StoreError"
    assert in_a_fork(lambda: kvzip.decode(f"{web}/doc.kvz")) == "StoreError"
    assert time.monotonic() - began < 30
    assert reader.decode() == document(tokens=3000)


# --- power cuts --------------------------------------------------------------------------------

LOST = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "short": lambda data: data[: len(data) // 2],
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "noise": lambda data: b"\xff\xfe" * len(data),
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.drawn(2)
def test_any_small_file_may_be_lost(tmp_path, how):
    """One after the other: everything is found as before, and is whole again after a put."""
    store = Store(tmp_path / "a", block_tokens=8)
    entries = [store.put(document(seed)) for seed in (1, 2)]
    for path in small_files(tmp_path / "a"):
        data, name = path.read_bytes(), path.relative_to(tmp_path / "a")
        if not data:
            continue
        place = tmp_path / "b"
        shutil.copytree(tmp_path / "a", place)
        (place / name).write_bytes(LOST[how](data))
        damaged = Store(place)
        for seed in (1, 2):
            with damaged.find(document(seed).token_ids, **OF) as found:
                assert found.tokens == 50, name
                assert found.snapshot() == document(seed)
            for count in (8, 24, 33):
                with damaged.find(document(seed).token_ids[:count], **OF) as found:
                    assert found.tokens == count, name
        for seed in (1, 2):
            Store(place).put(document(seed))
        assert (place / name).read_bytes() == data, name
        (place / name).write_bytes(LOST[how](data))
        other = Store(place)
        assert other.remove(entries[0].key)  # and nothing of it stays
        assert other.find(document(1).token_ids, **OF) is None
        key = entries[0].key.partition("/")[2]
        left = [
            p for p in place.rglob("*") if key in p.name or (p.is_file() and p.suffix != ".kvz")
        ]
        assert not [p for p in left if key in p.name]
        with other.find(document(2).token_ids, **OF) as found:
            assert found.snapshot() == document(2)
        for opened in (damaged, other):
            opened.documents()
        delete(place)


@pytest.mark.parametrize("how", LOST)
def test_settings_that_no_document_tells(tmp_path, how):
    store = Store(tmp_path, block_tokens=8)
    blob = kvzip.encode(document(), "raw", store_token_ids=False)
    entry = store.put(blob, token_ids=document().token_ids)
    path = tmp_path / "store.json"
    whole = path.read_bytes()
    path.write_bytes(LOST[how](whole))
    with pytest.raises(FormatError, match=r'write \{"version":1,"block_tokens":N\}'):
        Store(tmp_path).find(document().token_ids, **OF)
    path.write_text('{"version":1,"block_tokens":8}')  # as it says
    with Store(tmp_path).find(document().token_ids, **OF) as found:
        assert found.key == entry.key
    store.remove(entry.key)
    path.write_bytes(LOST[how](whole))
    assert Store(tmp_path, block_tokens=16).put(document()).new  # without documents it is new


def answered_first(store, answers, monkeypatch):
    """Have a store's settings answered with these, one after the other, before they are read."""
    get, left = store.bucket.get, list(answers)

    def instead(path, *most):
        return left.pop() if path == "store.json" and left else get(path, *most)

    monkeypatch.setattr(store.bucket, "get", instead)


def test_settings_that_come_damaged_once_are_read_again(tmp_path, monkeypatch):
    """And nothing is written in their place by who looks for a document and sees none, since a
    server lists what it likes."""
    Store(tmp_path, block_tokens=8).put(document())
    whole = (tmp_path / "store.json").read_bytes()
    for times in (1, 2, 9):
        store = Store(tmp_path)
        answered_first(store, [whole[:5]] * times, monkeypatch)
        monkeypatch.setattr(store.bucket, "folders", list)
        found = store.find(document().token_ids, **OF)
        assert (found is not None) == (times < 9)
        assert (tmp_path / "store.json").read_bytes() == whole


def test_settings_that_a_server_denies_are_not_replaced(tmp_path, monkeypatch):
    Store(tmp_path, block_tokens=8).put(document(tokens=300))
    whole = (tmp_path / "store.json").read_bytes()
    for times in range(1, 6):
        store = Store(tmp_path)
        answered_first(store, [None] * times, monkeypatch)
        try:
            store.put(document(2, tokens=300))
        except StoreError as error:
            assert "does not keep what is written" in str(error)
        assert (tmp_path / "store.json").read_bytes() == whole


def test_settings_of_a_web_server_that_are_damaged(tmp_path):
    Store(tmp_path, block_tokens=8).put(document())
    (tmp_path / "store.json").write_bytes(b"{")
    with failing_server(tmp_path) as server:
        with pytest.raises(FormatError, match="damaged, and no document tells"):
            Store(server.url).find(document().token_ids, **OF)
        with Store(server.url, block_tokens=8).find(document().token_ids, **OF) as found:
            assert found.tokens == 50


def test_settings_of_another_version_are_no_power_cut(tmp_path):
    for text in ('{"version":2,"block_tokens":8}', '{"version":2,"more":1}', "[]", '"x"'):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(FormatError):
            Store(tmp_path).find([1] * 300, **OF)
        assert (tmp_path / "store.json").read_text() == text


def test_the_tokens_of_a_block_are_found_from_a_mark():
    ids = np.arange(100, dtype=np.uint32)
    for count in (1, 7, 99, 100):
        assert block_tokens_of(ids, hash_chain(ids, count)[:1]) == count
        assert block_tokens_of(ids + np.uint32(1), hash_chain(ids, count)) is None


def test_a_key_is_no_path():
    with pytest.raises(kvzip.KVZipError):
        document_path("../x")
