"""A store keeps the profiles that its documents need: each once, whole, and as long as one does."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import re
import shlex
import threading
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
from command import run, run_json
from hypothesis import given
from hypothesis import strategies as st
from support import assert_same, cache_like, examples, make_snapshot

import kvzip
from kvzip.errors import CorruptError, KVZipError, ProfileError, StoreError, UsageError
from kvzip.store import Store, profiles
from kvzip.store.keys import document_path

BLOCK = 8
OF = {"model": "test/model", "revision": "r1", "dtype": "bf16"}
_prefixes = itertools.count()


@pytest.fixture(params=["folder", "sealed", "s3"])
def place(request, tmp_path):
    """Where a store may be: its URL and what else `Store` takes."""
    if request.param == "folder":
        return tmp_path / "store", {}
    if request.param == "sealed":
        pytest.importorskip("cryptography")
        return tmp_path / "store", {"key": bytes(range(32))}
    server = request.getfixturevalue("s3")
    return f"{server.url}/p{next(_prefixes)}", {"options": server.options}


@pytest.fixture
def at_once(monkeypatch):
    """A profile that no document needs may go at once, and a remover is soon taken for dead."""
    monkeypatch.setattr(profiles, "_FRESH", timedelta(0))
    monkeypatch.setattr(profiles, "_PATIENCE", 0.2)


def profile_of(number):
    tensor = np.arange(number, number + 3, dtype=np.int32)
    return kvzip.Profile({"t": tensor}, {"model": "test/model"})


def snapshot_of(ids, seed=0):
    made = make_snapshot(cache_like, seed, "bf16", tokens=len(ids), dim=4)
    made.token_ids = np.array(ids, np.uint32)
    return made


def served(url, ids, **more):
    """What a reader who has no profile gets for these ids; None if nothing."""
    where = Store(url, **more)
    found = where.find(ids, **OF)
    if found is None:
        return None
    with found:
        snapshot = found.snapshot(threads=1)
    where._uses.settle()  # so that it is known what objects there are
    return snapshot


# --- a load fetches the one it needs ---------------------------------------------------------


def test_who_has_no_profile_gets_what_was_put_with_one(place):
    url, more = place
    caches = [make_snapshot(cache_like, i, "bf16", tokens=200) for i in range(3)]
    profile = kvzip.Profile.fit(caches[1:])
    where = Store(url, block_tokens=BLOCK, **more)
    entry = where.put(caches[0], codec="predictive", profile=profile)
    assert_same(served(url, caches[0].token_ids, **more), caches[0])
    other = Store(url, **more)
    with other.open(entry.key) as reader:
        assert reader.header.profile == profile.id
        assert_same(reader.decode(), caches[0])
    assert other.get_profile(profile.id) is other.get_profile(f"profiles/{profile.id}")
    assert other.get_profile(profile.id).id == profile.id


def test_over_http_too(s3):
    prefix = f"p{next(_prefixes)}"
    where = Store(f"{s3.url}/{prefix}", block_tokens=BLOCK, options=s3.options)
    snapshot = snapshot_of(range(50))
    where.put(snapshot_of(range(50)), codec="raw", profile=profile_of(1))
    entry = where.put(snapshot, codec="planes", profile=profile_of(2))
    assert_same(served(f"{s3.http}/{prefix}", range(50)), snapshot)
    with Store(f"{s3.http}/{prefix}").open(entry.key) as reader:
        assert_same(reader.decode(), snapshot)


def test_a_profile_is_stored_once_and_fetched_once(tmp_path, monkeypatch):
    where = Store(tmp_path, block_tokens=BLOCK)
    for i in range(4):
        where.put(snapshot_of(range(i, 50 + i)), codec="raw", profile=profile_of(1))
    [listed] = where.profiles()
    assert (listed.documents, listed.encoded_bytes) == (4, profile_of(1).nbytes)
    assert listed.key == f"profiles/{profile_of(1).id}"
    reader, fetched = Store(tmp_path), []
    copy = reader.bucket.copy
    monkeypatch.setattr(
        reader.bucket, "copy", lambda path, *rest: fetched.append(path) or copy(path, *rest)
    )
    matches = [reader.find(range(i, 50 + i), **OF) for i in range(4)]
    assert not fetched  # nothing is decoded yet
    for match in matches:
        with match:
            match.snapshot(threads=2)
    assert fetched == [f"profiles/{profile_of(1).id}.kvprofile"]


def test_documents_of_all_the_models_profiles_are_found(place):
    url, more = place
    where = Store(url, block_tokens=BLOCK, **more)
    for i, count in enumerate((16, 40, 24)):
        where.put(snapshot_of(range(count), i), codec="raw", profile=profile_of(i))
    assert_same(served(url, range(60), **more), snapshot_of(range(40), 1))
    where.put(snapshot_of(range(48), 9), codec="raw")
    assert served(url, range(60), **more).tokens == 48
    # Who names one gets its documents, and those that need none.
    with Store(url, **more).find(range(60), **OF, profile=profile_of(2)) as found:
        assert found.tokens == 48
    where.remove(found.key)
    with Store(url, **more).find(range(60), **OF, profile=profile_of(2)) as found:
        assert found.tokens == 24
    assert Store(url, **more).find(range(60), **OF, profile=profile_of(7)) is None


def test_a_file_that_came_without_its_profile(tmp_path, caplog):
    """Is stored, is not found, and says what is missing; until the profile is put, too."""
    where, snapshot = Store(tmp_path, block_tokens=BLOCK), snapshot_of(range(50))
    profile = profile_of(1)
    where.put(snapshot_of(range(16)), codec="raw")
    with caplog.at_level(logging.WARNING, "kvzip.store"):
        entry = where.put(kvzip.encode(snapshot, "raw", profile))
    assert caplog.text.count(profile.id) == 1
    caplog.clear()
    reader = Store(tmp_path)
    with caplog.at_level(logging.WARNING, "kvzip.store"), reader.find(range(50), **OF) as found:
        assert found.tokens == 16  # the best that can be read
    assert f"does not have profile {profile.id}" in caplog.text
    with reader.open(entry.key) as opened, pytest.raises(ProfileError) as told:
        opened.decode()
    for words in (profile.id, str(tmp_path), "kvzip put FILE.kvprofile"):
        assert words in str(told.value)
    assert where.put_profile(profile)
    assert not where.put_profile(profile)
    assert_same(served(tmp_path, range(50)), snapshot)


def test_an_error_without_a_store_says_which_profile_and_where(tmp_path):
    blob = kvzip.encode(snapshot_of(range(50)), "raw", profile_of(1))
    with pytest.raises(ProfileError) as told:
        kvzip.decode(blob)
    for words in (profile_of(1).id, "test/model", "--profile", "store"):
        assert words in str(told.value)


# --- what is damaged or hostile --------------------------------------------------------------


def damaged(data, how):
    other = bytearray(data)
    other[-1] ^= 1
    return {"cut": data[:-7], "empty": b"", "longer": data + b"x", "other": bytes(other)}[how]


@pytest.mark.parametrize("at", [0, 8, 200, -1])
def test_a_damaged_profile_of_a_sealed_store(tmp_path, at):
    pytest.importorskip("cryptography")
    key, profile = bytes(32), profile_of(1)
    where = Store(tmp_path, block_tokens=BLOCK, key=key)
    where.put(snapshot_of(range(50)), codec="raw", profile=profile)
    assert not list(tmp_path.rglob("*profile*"))  # names are sealed, too
    [path] = [
        p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size == sealed_size(profile)
    ]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="--replace"):
        Store(tmp_path, key=key).get_profile(profile.id)
    assert where.put_profile(profile, replace=True)
    assert Store(tmp_path, key=key).get_profile(profile.id).id == profile.id


def sealed_size(profile):
    from kvzip.container.sealed import seal

    return len(seal(profile.file, bytes(32), "place"))


@pytest.mark.parametrize("how", ["cut", "empty", "longer", "other"])
def test_damage_is_told_and_mended(tmp_path, how):
    where, profile = Store(tmp_path, block_tokens=BLOCK), profile_of(1)
    snapshot = snapshot_of(range(50))
    entry = where.put(snapshot, codec="raw", profile=profile)
    path = tmp_path / f"profiles/{profile.id}.kvprofile"
    path.write_bytes(damaged(profile.file, how))
    with Store(tmp_path).open(entry.key) as reader, pytest.raises(CorruptError) as told:
        reader.decode()
    assert profile.id in str(told.value) and "--replace" in str(told.value)
    with pytest.raises(CorruptError, match="damaged"):
        where.fetch(f"profiles/{profile.id}", tmp_path / "p")
    assert not (tmp_path / "p").exists()
    # One of another length is seen by whoever puts a document; the rest, by who is told of it.
    mended = where.put(snapshot, codec="raw", profile=profile, replace=how == "other")
    assert mended.new == (how == "other")
    assert path.read_bytes() == profile.file
    assert_same(served(tmp_path, range(50)), snapshot)


def test_a_server_that_sends_more_than_it_said(tmp_path, monkeypatch):
    where, profile = Store(tmp_path, block_tokens=BLOCK), profile_of(1)
    where.put_profile(profile)
    written = []

    def endless(path, sink, progress):
        while True:
            written.append(sink.write(bytes(1 << 16)))

    monkeypatch.setattr(where.bucket, "copy", endless)
    with pytest.raises(CorruptError, match="damaged"):
        where.get_profile(profile.id)
    assert not written


def test_a_profile_larger_than_memory_is_not_fetched(tmp_path):
    where, profile = Store(tmp_path, block_tokens=BLOCK), profile_of(1)
    where.put_profile(profile)
    with (tmp_path / f"profiles/{profile.id}.kvprofile").open("r+b") as file:
        file.truncate(1 << 43)  # of zeros that take no room
    with pytest.raises(ProfileError, match="more than this machine's memory"):
        where.get_profile(profile.id)


def test_what_has_the_right_hash_and_is_no_profile(tmp_path):
    where = Store(tmp_path, block_tokens=BLOCK)
    where.put_profile(profile_of(1))
    for data in (b"", b"nothing", profile_of(1).file[:-1], bytes(1000)):
        name = hashlib.sha256(data).hexdigest()
        (tmp_path / f"profiles/{name}.kvprofile").write_bytes(data)
        with pytest.raises(ProfileError, match=name):
            where.get_profile(name)


@pytest.mark.parametrize("key", ["", "x", "profiles/", "profiles/../x", "A" * 64, "0" * 63, None])
def test_what_is_no_key_of_a_profile(tmp_path, key):
    with pytest.raises(KVZipError):
        Store(tmp_path).get_profile(key)
    with pytest.raises(KVZipError):
        Store(tmp_path).put_profile(key)


# --- nothing removes one in use --------------------------------------------------------------


def test_a_needed_profile_stays(place, at_once):
    url, more = place
    where = Store(url, block_tokens=BLOCK, **more)
    needed, unneeded = profile_of(1), profile_of(2)
    entry = where.put(snapshot_of(range(50)), codec="raw", profile=needed)
    where.put_profile(unneeded)
    assert {p.key[9:]: p.documents for p in where.profiles()} == {needed.id: 1, unneeded.id: 0}
    with pytest.raises(ProfileError, match="1 document needs it"):
        where.remove(f"profiles/{needed.id}")
    assert where.prune() == []  # nobody asked for that
    assert where.prune(profiles=True) == [f"profiles/{unneeded.id}"]
    assert served(url, range(50), **more) is not None
    assert where.remove(entry.key)
    assert where.remove(f"profiles/{needed.id}")
    assert not where.remove(f"profiles/{needed.id}")
    assert where.profiles() == []
    left = [m.path for m in where.bucket.under("") if "about" not in m.path]
    assert left == ["store.json"]


def test_a_new_profile_waits_for_its_first_document(tmp_path):
    where = Store(tmp_path, block_tokens=BLOCK)
    where.put_profile(profile_of(1))
    assert where.prune(0, profiles=True) == []
    [listed] = where.profiles()
    assert listed.documents == 0


def test_the_limit_counts_profiles(tmp_path, at_once):
    snapshots = [snapshot_of(range(i, 60 + i), i) for i in range(6)]
    size = len(kvzip.encode(snapshots[0], "raw", profile_of(1)))
    beside = profile_of(1).nbytes
    where = Store(tmp_path, block_tokens=BLOCK, limit_bytes=int((4 * size + beside) * 17 / 16))
    for snapshot in snapshots:
        where.put(snapshot, codec="raw", profile=profile_of(1))
    held = sum(d.encoded_bytes for d in where.documents())
    assert held + beside <= where.limit_bytes < held + beside + 3 * size
    where.put_profile(profile_of(2))
    gone = where.prune(held + beside)
    assert f"profiles/{profile_of(2).id}" in gone  # before a document
    keys = {d.key for d in where.documents()}
    assert set(where.prune(0)) == keys | {f"profiles/{profile_of(1).id}"}
    with pytest.raises(KVZipError, match="a document and its profile of"):
        Store(tmp_path, limit_bytes=size + 10).put(snapshots[0], codec="raw", profile=profile_of(1))


@pytest.mark.parametrize("lost", [b"", b"{}", b'{"model":"x","revision":"","dtype":"bf16"}', None])
def test_a_namespace_that_does_not_say_what_it_is(tmp_path, at_once, lost):
    """After a power cut the documents themselves say what they need; if they cannot, all stays."""
    where = Store(tmp_path, block_tokens=BLOCK)
    entry = where.put(snapshot_of(range(50)), codec="raw", profile=profile_of(1))
    where.put_profile(profile_of(2))
    about = tmp_path / entry.key.split("/")[0] / "about.json"
    if lost is None:
        about.unlink()
    else:
        about.write_bytes(lost)
    assert where.prune(profiles=True) == [f"profiles/{profile_of(2).id}"]
    where.put_profile(profile_of(2))
    (tmp_path / document_path(entry.key)).write_bytes(b"")
    assert where.prune(profiles=True) == []


@pytest.mark.parametrize("damaged", [b"", b"0" * 30, bytes(64)])
def test_the_name_of_the_last_profile_is_lost(tmp_path, at_once, damaged):
    """As after a power cut: it goes with the profiles, and names another one as long as there is
    one."""
    where = Store(tmp_path, block_tokens=BLOCK)
    entries = [
        where.put(snapshot_of(range(n, 20 + n)), codec="raw", profile=profile_of(n))
        for n in range(2)
    ]
    [last] = tmp_path.rglob("profile")
    for n, left in ((1, profile_of(0).id), (0, None)):
        last.write_bytes(damaged)
        where.remove(entries[n].key)
        where.remove(f"profiles/{profile_of(n).id}")
        assert (last.read_text() if last.exists() else None) == left


steps = st.lists(
    st.tuples(st.sampled_from(["put", "remove", "remove profile", "prune"]), st.integers(0, 3)),
    max_size=14,
)


@given(steps=steps)
@examples(30)
def test_every_document_can_be_read_whatever_is_removed(steps, tmp_path_factory):
    url = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profiles, "_FRESH", timedelta(0))
        where, held = Store(url, block_tokens=BLOCK), {}
        for do, n in steps:
            if do == "put":
                known = profile_of(n % 2) if n < 3 else None
                entry = where.put(snapshot_of(range(n, 20 + n), n), codec="raw", profile=known)
                held[n] = entry.key
            elif do == "remove" and n in held:
                where.remove(held.pop(n))
            elif do == "remove profile":
                used = any(i % 2 == n % 2 for i in held if i < 3)
                try:
                    where.remove(f"profiles/{profile_of(n % 2).id}")
                except ProfileError:
                    assert used
                else:
                    assert not used or not where.profiles()
            elif do == "prune":
                where.prune(profiles=True)
        for n in held:
            assert_same(served(url, range(n, 20 + n)), snapshot_of(range(n, 20 + n), n))


class Dead(Exception):
    """A process ends here."""


def interrupted(where, at, do):
    """Have `do` called before request number `at` of a store; how many there were."""
    asked = itertools.count()
    count = [0]

    def hooked(method):
        def request(*given, **named):
            count[0] = next(asked) + 1
            if count[0] == at:
                do()
            return method(*given, **named)

        return request

    for name in ("put", "get", "head", "delete", "under", "folders"):
        setattr(where.bucket, name, hooked(getattr(where.bucket, name)))
    return count


def one_request_at_a_time(where):
    """Requests that go at once by threads go one after the other, to be counted."""
    where._pool.each = lambda do, items: [do(item) for item in items]
    where._pool.map = map


def both(url):
    """A writer and a remover on a store whose profile no document needs."""
    writer, remover = Store(url, block_tokens=BLOCK), Store(url)
    writer.put_profile(profile_of(1))
    for store in (writer, remover):
        one_request_at_a_time(store)
    return writer, remover


def put_one(writer):
    return writer.put(snapshot_of(range(20)), codec="raw", profile=profile_of(1), threads=1)


def test_a_remover_between_any_two_requests_of_a_writer(tmp_path, at_once):
    for at in itertools.count(1):
        writer, remover = both(tmp_path / str(at))
        count = interrupted(writer, at, partial(remover.prune, profiles=True))
        put_one(writer)
        assert_same(served(tmp_path / str(at), range(20)), snapshot_of(range(20)))
        if count[0] < at:
            break
    assert at > 15


def test_a_writer_between_any_two_requests_of_a_remover(tmp_path, at_once, monkeypatch):
    """It waits for the remover, which goes on when the writer is done or stands still."""
    monkeypatch.setattr(profiles, "_PATIENCE", 60.0)
    for at in itertools.count(1):
        writer, remover = both(tmp_path / str(at))
        thread = threading.Thread(target=put_one, args=[writer])

        def begin(thread=thread):
            thread.start()
            thread.join(0.2)

        count = interrupted(remover, at, begin)
        remover.prune(profiles=True)
        if count[0] < at:
            break
        thread.join(20)
        assert not thread.is_alive()
        assert_same(served(tmp_path / str(at), range(20)), snapshot_of(range(20)))
    assert at > 10


def test_a_remover_that_stands_still_at_any_request(tmp_path, at_once):
    """The writer takes it for a dead one, and then it goes on: it must not take what is needed now;
    but for right before the deletion itself, which is one request."""
    lost = []
    for at in itertools.count(1):
        writer, remover = both(tmp_path / str(at))
        count = interrupted(remover, at, partial(put_one, writer))
        remover.prune(profiles=True)
        if count[0] < at:
            break
        if not Store(tmp_path / str(at)).profiles():
            lost.append(at)
    assert at > 10 and len(lost) <= 1


def test_documents_are_counted_once_for_all_profiles_that_go(tmp_path, at_once, monkeypatch):
    where, counted = Store(tmp_path, block_tokens=BLOCK), []
    for i in range(5):
        where.put_profile(profile_of(i))
    where.put(snapshot_of(range(20)), codec="raw", profile=profile_of(9))
    count = profiles.documents
    monkeypatch.setattr(profiles, "documents", lambda o: counted.append(1) or count(o))
    assert len(where.prune(profiles=True)) == 5
    assert len(counted) <= 1 and len(where.profiles()) == 1
    assert not list(where.bucket.under("profiles/removing"))


def test_a_remover_that_dies_at_any_request(tmp_path, at_once):
    def die():
        raise Dead

    for at in itertools.count(1):
        writer, remover = both(tmp_path / str(at))
        count = interrupted(remover, at, die)
        with contextlib.suppress(Dead):
            remover.prune(profiles=True)
        put_one(writer)
        assert_same(served(tmp_path / str(at), range(20)), snapshot_of(range(20)))
        if count[0] < at:
            break
    assert at > 10


def test_a_writer_that_dies_at_any_request(tmp_path, at_once):
    def die():
        raise Dead

    for at in itertools.count(1):
        url = tmp_path / str(at)
        writer = Store(url, block_tokens=BLOCK)
        one_request_at_a_time(writer)
        count = interrupted(writer, at, die)
        with contextlib.suppress(Dead):
            put_one(writer)
        found = served(url, range(20))
        if found is not None:
            assert_same(found, snapshot_of(range(20)))
        Store(url).prune(profiles=True)
        if found is not None:
            assert_same(served(url, range(20)), snapshot_of(range(20)))
        put_one(Store(url, block_tokens=BLOCK))
        assert_same(served(url, range(20)), snapshot_of(range(20)))
        if count[0] < at:
            break
    assert at > 15


# --- the commands ----------------------------------------------------------------------------


def test_commands_that_are_told_can_be_copied(tmp_path, capsys, monkeypatch):
    """Whatever the store is called: each does what it is told for."""
    monkeypatch.chdir(tmp_path)
    url, profile = "my store's; $(touch x)", profile_of(1)
    where = Store(url, block_tokens=BLOCK)

    def told(*arguments):
        _, out, err = run(capsys, *arguments)
        [(bracket, command)] = re.findall(r"(\(?)kvzip ((?:get|put) .*)", out + err)
        return shlex.split(command.removesuffix(")") if bracket else command)

    entry = where.put(kvzip.encode(snapshot_of(range(50)), "raw", profile))
    get = "get", "--store", url, "--key", entry.key, "-o"
    profile.save("FILE.kvprofile")
    put = told(*get, "a.safetensors")  # the store has no profile
    assert put == ["put", "FILE.kvprofile", "--store", url]
    assert run(capsys, *put)[0] == 0
    asked = told(*get, "a.kvz")
    assert run(capsys, *asked)[0] == 0 and kvzip.Profile.load("FILE.kvprofile").id == profile.id
    path = tmp_path / url / f"profiles/{profile.id}.kvprofile"
    path.write_bytes(damaged(profile.file, "other"))
    again = told(*get, "a.safetensors")  # the store's is damaged
    assert "--replace" in again and run(capsys, *again)[0] == 0
    assert path.read_bytes() == profile.file


def test_the_commands(tmp_path, capsys, at_once):
    url, snapshot, profile = tmp_path / "store", snapshot_of(range(50)), profile_of(1)
    snapshot.save(tmp_path / "a.safetensors")
    profile.save(tmp_path / "a.kvprofile")
    profile_of(2).save(tmp_path / "b.kvprofile")
    (tmp_path / "a.kvz").write_bytes(kvzip.encode(snapshot, "raw", profile))
    put = ("put", "--store", url, "--block-tokens", "8")
    code, found = run_json(capsys, *put, tmp_path / "a.kvz", tmp_path / "a.kvprofile")
    assert code == 0
    key = f"profiles/{profile.id}"
    [said] = found["profiles"]
    assert (said["key"], said["new"], said["encoded_bytes"]) == (key, True, profile.nbytes)
    _, found = run_json(capsys, *put, tmp_path / "a.kvprofile", tmp_path / "b.kvprofile")
    assert [p["new"] for p in found["profiles"]] == [False, True]
    code, found = run_json(capsys, "ls", "--store", url)
    assert {p["key"][9:]: p["documents"] for p in found["profiles"]} == {
        profile.id: 1,
        profile_of(2).id: 0,
    }
    assert found["profile_bytes"] == profile.nbytes + profile_of(2).nbytes
    document = found["documents"][0]["key"]
    code, out, _ = run(capsys, "ls", "--store", url)
    assert "1 document needs it" in out and "no document here needs it" in out
    _, found = run_json(capsys, "ls", "--store", url, "--model", "other")
    assert (found["documents"], found["profiles"]) == ([], [])
    target = tmp_path / "c.safetensors"
    code, _ = run_json(capsys, "get", "--store", url, "--key", document, "-o", target)
    assert code == 0
    assert_same(kvzip.Snapshot.load(target), snapshot)
    copied = tmp_path / "c.kvprofile"
    code, found = run_json(capsys, "get", "--store", url, "--key", key, "-o", copied)
    assert (code, found["encoded_bytes"], found["model"]) == (0, profile.nbytes, "test/model")
    assert kvzip.Profile.load(copied).id == profile.id
    code, told = run_json(capsys, "info", copied)
    assert (code, told["key"], told["bytes"]) == (0, key, profile.nbytes)
    assert key in run(capsys, "info", copied)[1]
    code, _, err = run(capsys, "get", "--store", url, "--key", key, "-o", tmp_path / "c.kvz")
    assert (code, "end it in .kvprofile" in err) == (2, True)
    code, _, err = run(capsys, "rm", key, "--store", url)
    assert (code, "1 document needs it" in err) == (2, True)
    code, found = run_json(capsys, "prune", "--store", url)
    assert (found["evicted"], found["profiles"]) == ([], 2)
    code, out, _ = run(capsys, "prune", "--store", url)
    assert "2 profiles left" in out and "no document needs 1 of them (--profiles)" in out
    code, out, _ = run(capsys, "get", "--store", url, "--key", document, "-o", tmp_path / "d.kvz")
    assert f"it needs a profile: kvzip get --key {key}" in out
    code, _, err = run(capsys, "decode", tmp_path / "d.kvz", "-o", tmp_path / "d.safetensors")
    assert code == 2 and f"--key {key} -o FILE.kvprofile" in err
    code, found = run_json(capsys, "prune", "--store", url, "--profiles")
    assert found["evicted"] == [f"profiles/{profile_of(2).id}"]
    code, found = run_json(capsys, "rm", key, document, "--store", url)  # whatever the order
    assert (code, sorted(found["removed"])) == (0, sorted([key, document]))
    assert run(capsys, "rm", key, "--store", url)[0] == 1
    assert run(capsys, "rm", "profiles/x", "--store", url)[0] == 2
    assert json.loads(json.dumps(found))


def test_what_is_wrong_with_the_arguments(tmp_path):
    where = Store(tmp_path, block_tokens=BLOCK)
    with pytest.raises(UsageError):
        where.prune(profiles=1)
    with pytest.raises(UsageError):
        where.put_profile(profile_of(1), replace="yes")
    with pytest.raises(ProfileError, match="no profile"):
        where.put_profile(None)
    with pytest.raises((StoreError, KVZipError)):
        where.get_profile(5)
