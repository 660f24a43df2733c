"""A sealed store does what any store does, and nothing of what is in it is in sight."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from support import cache_like

import kvzip
from kvzip.errors import KVZipError, SealError, UsageError
from kvzip.store import Store

pytest.importorskip("cryptography")
KEY, OTHER = bytes(range(32)), bytes(32)
OF = {"model": "secret/model", "revision": "r1", "dtype": "bf16"}
BLOCK = 16


def document(seed=0, tokens=100):
    rng = np.random.default_rng(seed)
    pairs = [(cache_like(rng, "bf16", (2, tokens, 16)),) * 2 for _ in range(2)]
    ids = rng.integers(0, 5000, tokens)
    origin = kvzip.Origin(model="secret/model", revision="r1", text="a name")
    return kvzip.Snapshot.from_arrays(pairs, "bf16", ids, origin)


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    if request.param == "folder":
        return tmp_path / "store", {}
    server = request.getfixturevalue("s3")
    return f"{server.url}/sealed-{tmp_path.name}", {"options": server.options}


def test_documents_are_put_found_listed_and_removed(place, tmp_path):
    url, more = place
    store = Store(url, block_tokens=BLOCK, key=KEY, **more)
    one, two = document(1), document(2)
    first, second = store.put(one), store.put(two)
    assert first.new and not store.put(one).new
    for snapshot, entry in ((one, first), (two, second)):
        with Store(url, key=kvzip.Key(KEY), **more).find(snapshot.token_ids, **OF) as match:
            assert match.key == entry.key and match.tokens == 100
            assert match.snapshot() == snapshot
    assert {d.key for d in store.documents()} == {first.key, second.key}
    assert [about.called for about in store.abouts().values()] == ["secret/model"]
    # What is fetched is the document as it was put.
    assert store.fetch(first.key, tmp_path / "got.kvz") == first.encoded_bytes
    assert kvzip.decode(tmp_path / "got.kvz") == one
    assert store.remove(first.key) and store.find(one.token_ids, **OF) is None
    assert store.prune(0) == [second.key] and not store.documents()


def test_nothing_is_in_sight(tmp_path):
    snapshot = document()
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    key = Store(plain, block_tokens=BLOCK).put(snapshot).key
    assert Store(sealed, block_tokens=BLOCK, key=KEY).put(snapshot).key == key
    files = [p for p in sealed.rglob("*") if p.is_file()]
    assert len(files) == len([p for p in plain.rglob("*") if p.is_file()])
    names = {part for p in plain.rglob("*") for part in p.relative_to(plain).parts}
    hidden = {part for p in sealed.rglob("*") for part in p.relative_to(sealed).parts}
    assert names & hidden == {"store.json"}
    for path in files:
        data = path.read_bytes()
        assert not data or data.startswith(b"\x89KVS")
        assert b"secret" not in data and KEY not in data


def uses(tmp_path, snapshot, profile, key):
    """All that may be the first use of a store in which a document has this key."""
    needed = f"profiles/{profile.id}"
    return {
        "find": lambda store: store.find(snapshot.token_ids, **OF),
        "put": lambda store: store.put(snapshot),
        "put replace": lambda store: store.put(snapshot, replace=True),
        "put_profile": lambda store: store.put_profile(profile),
        "open": lambda store: store.open(key),
        "get_profile": lambda store: store.get_profile(needed),
        "fetch": lambda store: store.fetch(key, tmp_path / "fetched"),
        "fetch profile": lambda store: store.fetch(needed, tmp_path / "fetched"),
        "remove": lambda store: store.remove(key),
        "remove profile": lambda store: store.remove(needed),
        "abouts": lambda store: store.abouts(),
        "documents": lambda store: store.documents(),
        "profiles": lambda store: store.profiles(),
        "prune": lambda store: store.prune(0, profiles=True),
    }


def test_a_wrong_key_or_none_is_an_error_and_changes_nothing(tmp_path):
    snapshot, profile = document(), kvzip.Profile({}, {"model": "m"})
    for name, own in (("sealed", KEY), ("plain", None)):
        url = tmp_path / name
        made = Store(url, block_tokens=BLOCK, key=own)
        entry = made.put(snapshot, codec="raw", profile=profile)
        before = {p: p.read_bytes() for p in url.rglob("*") if p.is_file()}
        others = (KEY,) if own is None else (None, OTHER, kvzip.Key(OTHER, "a"), lambda _: OTHER)
        for key in others:
            for what, use in uses(tmp_path, snapshot, profile, entry.key).items():
                with pytest.raises(SealError, match="seal"):
                    use(Store(url, key=key))
                    pytest.fail(what)
        assert before == {p: p.read_bytes() for p in url.rglob("*") if p.is_file()}
        assert not (tmp_path / "fetched").exists()


def test_objects_that_were_swapped_are_not_served(tmp_path):
    one, two = document(1), document(2)
    url = tmp_path / "store"
    store = Store(url, block_tokens=BLOCK, key=KEY)
    keys = [store.put(one).key, store.put(two).key]
    big = sorted((p for p in url.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)[-2:]
    data = [p.read_bytes() for p in big]
    for path, other in zip(big, data[::-1], strict=True):
        path.write_bytes(other)
    again = Store(url, key=KEY)
    for key in keys:
        with pytest.raises(SealError, match="place"):
            again.open(key)
    assert again.find(one.token_ids, **OF) is None


def test_every_damaged_object_is_a_miss_or_an_error(tmp_path):
    snapshot, url = document(), tmp_path / "store"
    Store(url, block_tokens=BLOCK, key=KEY).put(snapshot)
    for path in sorted(p for p in url.rglob("*") if p.is_file() and p.stat().st_size):
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
            if damaged == b"" and path.name == "store.json":
                continue  # what a power cut leaves is written anew, and said
            path.write_bytes(damaged)
            try:
                match = Store(url, key=KEY).find(snapshot.token_ids, **OF)
                if match is not None:
                    with match:
                        assert match.snapshot() == snapshot
            except KVZipError:
                pass
        path.write_bytes(whole)
    with Store(url, key=KEY).find(snapshot.token_ids, **OF) as match:
        assert match.snapshot() == snapshot


def test_names_that_are_moved_lead_to_no_other_document(tmp_path):
    """Documents that withhold their ids, and somebody without the key who gives each one's marks to
    the other, and empties what names a document: these are files without bytes, or may be."""
    url, documents = tmp_path / "store", [document(seed) for seed in (1, 2)]
    store = Store(url, block_tokens=BLOCK, key=KEY)
    for each in documents:
        blob = kvzip.encode(each, "raw", store_token_ids=False)
        store.put(blob, token_ids=each.token_ids)
    find = lambda ids: Store(url, key=KEY).find(ids, **OF)  # noqa: E731
    for each in documents:
        for count in (BLOCK, 3 * BLOCK + 1, 100):
            with find(each.token_ids[:count]) as match:  # without ids, to the block
                assert match.snapshot().tokens == count // BLOCK * BLOCK
    marks = [p for p in url.rglob("*") if len(p.relative_to(url).parts) == 4]
    names = {mark.name for mark in marks}
    assert len(names) == 2
    for mark in marks:
        (mark.parent / (names - {mark.name}).pop()).touch()
        mark.unlink()
    pointers = {mark.parent.name for mark in marks}
    for path in url.rglob("*"):
        if path.is_file() and path.name in pointers:
            path.write_bytes(b"")
    assert [find(each.token_ids) for each in documents] == [None, None]
    for chain in [p for p in url.rglob("*") if p.name in names and p.stat().st_size]:
        chain.unlink()  # then it is told from names alone
    assert [find(each.token_ids) for each in documents] == [None, None]


def test_settings_that_a_power_cut_took_are_written_anew_and_sealed(tmp_path):
    snapshot, url = document(), tmp_path / "store"
    Store(url, block_tokens=BLOCK, key=KEY).put(snapshot)
    (url / "store.json").write_bytes(b"")
    with Store(url, key=KEY).find(snapshot.token_ids, **OF) as match:
        assert match.tokens == 100
    assert (url / "store.json").read_bytes().startswith(b"\x89KVS")


def _the_key(name):
    return KEY


def test_a_key_is_not_pickled(tmp_path):
    for key in (KEY, kvzip.Key(KEY), {"": KEY}):
        with pytest.raises(UsageError, match="not pickled"):
            pickle.dumps(Store(tmp_path / "store", key=key))
    store = Store(tmp_path / "store", block_tokens=BLOCK, key=_the_key)
    store.put(document())
    data = pickle.dumps(store)
    assert KEY not in data and pickle.loads(data).documents()


def test_a_moved_store_is_the_same_store(tmp_path):
    snapshot = document()
    Store(tmp_path / "a", block_tokens=BLOCK, key=KEY).put(snapshot)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert Store(tmp_path / "b", key=KEY).find(snapshot.token_ids, **OF) is not None
