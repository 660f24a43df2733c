"""What public functions are given that is no path, file, function or model is a UsageError."""

from __future__ import annotations

import io

import pytest
from support import make_snapshot, random_bits

import kvzip
from kvzip.identity.checkpoint import checkpoint_fingerprint
from kvzip.store import Store

NO_PATHS = ["a\0b", b"a\0b", "\ud800", None, 1.5, object(), io.BytesIO(b"x"), ["a"]]


@pytest.mark.parametrize("path", NO_PATHS, ids=lambda path: repr(path)[:12])
def test_what_is_no_path(path):
    snapshot = make_snapshot(random_bits, 1, "bf16")
    profile = kvzip.Profile({}, {})
    for use in (
        snapshot.save,
        kvzip.Snapshot.load,
        profile.save,
        kvzip.Profile.load,
        lambda path: kvzip.write(path, snapshot),
    ):
        with pytest.raises(kvzip.KVZipError):
            use(path)


@pytest.mark.parametrize("path", ["~nobody-of-that-name/m", "a\0b", "\ud800"])
def test_what_is_no_checkpoint(path):
    for use in (kvzip.fingerprint, checkpoint_fingerprint):
        with pytest.raises(kvzip.KVZipError):
            use(path)


def test_links_that_lead_nowhere_are_no_documents(tmp_path):
    store = Store(tmp_path, block_tokens=8)
    key = store.put(make_snapshot(random_bits, 1, "bf16")).key
    for folder in (tmp_path, tmp_path / key.partition("/")[0] / "docs"):
        (folder / "loop").symlink_to("loop")
        (folder / "gone").symlink_to("nowhere")
    assert [document.key for document in store.documents()] == [key]
    assert store.prune() == []


@pytest.mark.parametrize("password", ["p@ss", "p@s@s", "p"])
def test_no_password_is_told(password):
    with pytest.raises(kvzip.KVZipError) as error:
        kvzip.open(f"https://user:{password}@localhost:1/x?y=secret")
    for word in ("user", password if len(password) > 1 else "user", "ss@", "s@", "secret"):
        assert word not in str(error.value)


def test_what_is_no_function(tmp_path):
    with pytest.raises(kvzip.UsageError, match="progress"):
        kvzip.write(tmp_path / "a", make_snapshot(random_bits, 1, "bf16"), progress=5)
    assert not list(tmp_path.iterdir())


def test_what_is_no_model():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from support import readme_model

    from kvzip.load.hf import load_batch_or_prefill, load_cache, load_or_prefill

    model, snapshot = readme_model(), make_snapshot(random_bits, 1, "bf16")
    for wrong in (None, model.config, torch.nn.DataParallel(model), torch.nn.Linear(2, 2), "x"):
        with pytest.raises(kvzip.UsageError, match="no model"):
            load_or_prefill(snapshot, wrong, [[5, 6]])
        with pytest.raises(kvzip.UsageError, match="no model"):
            load_batch_or_prefill([snapshot], wrong, [[5, 6]])
    for wrong in (None, model, "x"):
        with pytest.raises(kvzip.UsageError, match="no config"):
            snapshot.to_cache(wrong)
        with pytest.raises(kvzip.UsageError, match="no config"):
            load_cache(snapshot, wrong, prompt=snapshot.token_ids)


NO_SETTINGS = {
    "regions": [None, 1.5, "many", b"x", {}, [1.5], object(), 10**5000, [10**5000]],
    "max_bytes": [1.5, "x", -1, [1], -(10**5000)],
    "token_table": [None, 1, "x"],
    "group": [1.5, "x", [2], 10**5000],
    "calibration": [0.5, "x", True],
    "resume": [0, "a\0b", ["a"]],
    "held_out": [1],
}


@pytest.mark.parametrize("name", NO_SETTINGS)
def test_what_no_profile_is_learned_with(name):
    for wrong in NO_SETTINGS[name]:
        for codec in ("predictive", "channel"):
            with pytest.raises(kvzip.KVZipError):
                kvzip.Profile.fit(
                    [make_snapshot(random_bits, 1, "bf16")], None, codec, **{name: wrong}
                )


@pytest.mark.parametrize("given", [None, 5, "documents", b"documents", [None], [[]]])
def test_what_no_profile_is_learned_from(given):
    for codec in ("predictive", "channel"):
        with pytest.raises(kvzip.KVZipError):
            kvzip.Profile.fit(given, codec=codec)


def test_a_store_refuses_options_rather_than_find_nothing(tmp_path):
    store, snapshot = Store(tmp_path, block_tokens=8), make_snapshot(random_bits, 1, "bf16")
    store.put(snapshot)
    origin = snapshot.origin
    for threads in (None, -1, "2", 1.5, 10**6, 10**5000):
        with pytest.raises(kvzip.UsageError, match="threads"):
            store.find(
                snapshot.token_ids,
                model=origin.model,
                revision=origin.revision,
                dtype=snapshot.dtype,
                threads=threads,
            )


def test_what_is_no_folder_is_no_store(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for make in (True, False):
        with pytest.raises(kvzip.UsageError, match="is not a folder"):
            Store(tmp_path / "file", make=make)
    Store(tmp_path / "new")
    assert not (tmp_path / "new").exists()
