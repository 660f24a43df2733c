"""What engines' settings say of a store is used whole: its key, and how long to wait for it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("obstore")

from servers import silent_server

import kvzip
from kvzip.errors import KVZipError, SealError, StoreError, UsageError
from kvzip.load.place import Place, folder_name
from kvzip.load.sglang import Settings as OfSGLang
from kvzip.load.vllm.settings import profile_from, settings_from, tier_settings_from
from kvzip.store import Store

KEY = bytes(range(1, 33)).hex()


@pytest.fixture
def named(monkeypatch) -> str:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("KVZIP_KEY", KEY)
    monkeypatch.setenv("ANOTHER", KEY[::-1])
    return "env:KVZIP_KEY"


@pytest.mark.parametrize("opened", [Place.objects, Place.store], ids=["objects", "store"])
def test_another_key_is_an_error_at_once(tmp_path, named, opened):
    url = str(tmp_path)
    first = Place(url, named)
    assert opened(Place(url))  # where nothing is yet, anybody may begin
    first.objects()
    opened(first)
    for other in (None, "env:ANOTHER"):
        with pytest.raises(SealError, match=re.escape(url)) as caught:
            opened(Place(url, other))
        assert KEY not in str(caught.value)
    with pytest.raises(UsageError, match="no variable 'NOWHERE'"):
        opened(Place(url, "env:NOWHERE"))
    assert KEY not in repr(first) + str(first.key())


def test_a_plain_store_is_not_taken_for_a_sealed_one(tmp_path, named):
    Store(tmp_path).bucket.put("store.json", b'{"version":1,"block_tokens":256}')
    with pytest.raises(SealError, match="no sealed store"):
        Place(str(tmp_path), named).store()


def test_objects_of_a_place_are_sealed(tmp_path, named):
    objects = Place(str(tmp_path), named).objects()
    objects.put("a/name", b"some words")
    assert Place(str(tmp_path), named).objects().get("a/name") == b"some words"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    for path in files:
        assert b"some words" not in path.read_bytes() and "name" not in str(path.name)


@pytest.mark.parametrize("settings", [settings_from, tier_settings_from])
def test_a_profile_is_waited_for_as_the_settings_say(settings):
    """A store that takes a connection and says nothing: the settings' own timeout ends it."""
    with silent_server() as url:
        told = settings({"url": url, "timeout": 0.5, "retries": 0, "profile": "0" * 64})
        began = time.monotonic()
        with pytest.raises(StoreError):
            profile_from(told.profile, told.store)
        assert time.monotonic() - began < 10


def test_all_adapters_open_stores_in_one_place():
    for path in Path(kvzip.__file__).with_name("load").rglob("*.py"):
        opens = re.findall(r"\b(?:Store|open_bucket|open_url)\(", path.read_text())
        assert bool(opens) == (path.name == "place.py"), path
    for kind in (
        OfSGLang,
        type(settings_from({"url": "x"})),
        type(tier_settings_from({"url": "x"})),
    ):
        assert issubclass(kind, Place)


@pytest.mark.parametrize("settings", [settings_from, tier_settings_from])
def test_a_key_among_the_settings_is_refused_and_not_shown(settings):
    for wrong in ({"key": KEY}, {"key_form": "env:X"}, {"key_from": 5}):
        with pytest.raises(KVZipError, match=next(iter(wrong))) as caught:
            settings({"url": "x", **wrong})
        assert KEY not in str(caught.value)


def test_names_of_folders_fit_on_disks(tmp_path, named):
    for text in ("Qwen/Qwen3-4B", "..", "." * 300, "/models/" + "deep/" * 60, "ü" * 60):
        name = folder_name(text)
        assert "/" not in name and name not in (".", "..") and len(name) <= 100
        for key in (None, named):
            folder = tmp_path / ("plain" if key is None else "sealed")
            assert Place(str(folder), key).objects().put(f"{name}/x", b"y")
    assert folder_name("Qwen/Qwen3-4B") == "Qwen%2FQwen3-4B"
    assert folder_name("a" * 200) != folder_name("a" * 201)
