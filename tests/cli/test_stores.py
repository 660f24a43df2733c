"""A store's commands: what is put is listed, found, removed and evicted."""

from __future__ import annotations

import numpy as np
import pytest
from command import run, run_json
from support import cache_like, make_snapshot

import kvzip
from kvzip.store import Store


@pytest.fixture
def documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        made = make_snapshot(cache_like, seed, "bf16", layers=1, tokens=100, dim=16)
        made.save(tmp_path / f"{seed}.safetensors")
    return [f"{seed}.safetensors" for seed in range(3)]


def test_put_list_remove_prune(documents, capsys):
    code, put = run_json(capsys, "put", *documents, "--store", "s", "--block-tokens", 32)
    assert code == 0
    keys = [d["key"] for d in put["documents"]]
    code, listed = run_json(capsys, "ls", "--store", "s")
    assert code == 0
    assert {d["key"] for d in listed["documents"]} == set(keys)
    assert listed["encoded_bytes"] == sum(d["encoded_bytes"] for d in put["documents"])
    assert {d["model"] for d in listed["documents"]} == {"test/model"}
    assert run_json(capsys, "ls", "--store", "s", "--model", "other")[1]["documents"] == []
    words = run(capsys, "ls", "--store", "s")[1]
    assert all(key in words for key in keys) and "3 documents" in words

    assert run_json(capsys, "rm", keys[0], "--store", "s") == (
        0,
        {"removed": [keys[0]], "missing": []},
    )
    code, found = run_json(capsys, "rm", keys[0], keys[1], "--store", "s")
    assert (code, found) == (1, {"removed": [keys[1]], "missing": [keys[0]]})
    code, missed = run_json(capsys, "get", "--store", "s", "--like", documents[0])
    assert (code, missed["kind"]) == (1, "absent") and "no document" in missed["error"]

    assert run_json(capsys, "prune", "--store", "s")[1]["documents"] == 1
    code, pruned = run_json(capsys, "prune", "--store", "s", "--limit-bytes", 1)
    assert (code, pruned["evicted"], pruned["documents"]) == (0, [keys[2]], 0)
    empty = {"documents": [], "encoded_bytes": 0, "profiles": [], "profile_bytes": 0}
    assert run_json(capsys, "ls", "--store", "s")[1] == empty


def test_documents_of_a_fingerprint_are_listed_by_their_models_name(tmp_path, capsys):
    made = make_snapshot(cache_like, 0, "bf16", layers=1, tokens=100, dim=16)
    made.origin = kvzip.Origin("org/m", "sha256:" + "0" * 64)
    Store(tmp_path / "s", block_tokens=32).put(made)
    for model, count in (("org/m", 1), ("other", 0)):
        found = run_json(capsys, "ls", "--store", tmp_path / "s", "--model", model)[1]
        assert [d["model"] for d in found["documents"]] == ["org/m"] * count
    with Store(tmp_path / "s").find(
        made.token_ids, model="another name", revision=made.origin.revision, dtype="bf16"
    ) as match:  # the weights are the same, whatever they are called
        assert match.tokens == 100
    assert run_json(capsys, "--version") == (0, {"version": kvzip.__version__})


def test_other_block_tokens_are_an_error(documents, capsys):
    assert run(capsys, "put", documents[0], "--store", "s", "--block-tokens", 32)[0] == 0
    code, found = run_json(capsys, "put", documents[1], "--store", "s", "--block-tokens", 64)
    assert (code, found["kind"]) == (2, "usage")
    assert "32" in found["error"] and "64" in found["error"]
    for same in ([], ["--block-tokens", 32]):
        assert run(capsys, "put", documents[1], "--store", "s", *same)[0] == 0
    with pytest.raises(kvzip.UsageError, match="blocks of 32 tokens, not 64"):
        Store("s", block_tokens=64).find([1] * 50, model="m", revision="", dtype="bf16")


@pytest.mark.parametrize(
    "url",
    ["memory://x", "file://localhost/x", "file://x", "s3:/b/x", "s3:b", "", "nfs://h/x", "s3://",
     "http://127.0.0.1:1/x", "http://", "http://[", "x://"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["put", "get", "ls", "rm", "prune"])
def test_a_url_that_names_no_store_is_an_error(documents, capsys, tmp_path, url, command):
    more = {"put": documents, "get": ["--like", documents[0]], "rm": [f"{'a' * 32}/b"]}
    before = set(tmp_path.rglob("*"))
    code, found = run_json(capsys, command, *more.get(command, []), "--store", url)
    assert code in (1, 2) and found["kind"] in ("usage", "store")
    assert set(tmp_path.rglob("*")) == before


def test_a_store_is_made_when_something_is_stored(documents, capsys, tmp_path):
    for wrong in ("none.safetensors", "text"):
        (tmp_path / "text").write_text("no snapshot")
        assert run(capsys, "put", wrong, "--store", "new")[0] in (1, 2)
        assert not (tmp_path / "new").exists()
    empty = Store(tmp_path / "new")
    assert empty.find([1] * 500, model="m", revision="", dtype="bf16") is None
    assert empty.documents() == [] and empty.prune() == []
    with pytest.raises(kvzip.StoreError, match="no document"):
        empty.open(f"{'a' * 32}/b")
    assert not (tmp_path / "new").exists()
    assert run(capsys, "put", documents[0], "--store", "new", "--block-tokens", 32)[0] == 0


@pytest.mark.parametrize("option", ["--model", "--revision", "--dtype"])
def test_what_a_document_says_itself_is_not_said_again(documents, capsys, tmp_path, option):
    """Else it would be another document's, without a word."""
    store = ["--store", tmp_path / "store", "--block-tokens", "64"]
    key = run_json(capsys, "put", documents[0], *store)[1]["documents"][0]["key"]
    for named in (["--like", documents[0]], ["--key", key]):
        given = ["get", "--store", tmp_path / "store", *named]
        assert run(capsys, *given)[0] == 0
        code, _, err = run(capsys, *given, option, "fp16")
        assert code == 2 and option in err


@pytest.mark.parametrize("wrong", [["a"], [0.5], [-1], [2**32], [None], "words"])
def test_ids_that_are_none(documents, tmp_path, wrong):
    store = Store(tmp_path / "s", block_tokens=1)
    store.put(documents[0])
    with pytest.raises(kvzip.KVZipError):
        store.find(wrong, model="m", revision="", dtype="bf16")
    blob = kvzip.encode(kvzip.Snapshot.load(documents[1]), store_token_ids=False)
    with pytest.raises(kvzip.KVZipError):
        store.put(blob, token_ids=wrong)


@pytest.mark.parametrize("wrong", [None, 5, np.zeros(3), object(), "no file", b"no document"])
def test_documents_that_are_none(tmp_path, wrong):
    with pytest.raises((kvzip.KVZipError, FileNotFoundError)):
        Store(tmp_path / "s").put(wrong)


@pytest.mark.parametrize(
    "settings",
    [{"timeout": 0}, {"timeout": "x"}, {"timeout": float("nan")}, {"retries": -1}, {"retries": 1.5},
     {"retries": 2**70}, {"block_tokens": 0}, {"block_tokens": "many"}, {"block_tokens": 0.5},
     {"limit_bytes": 0}, {"limit_bytes": True}],
)  # fmt: skip
def test_settings_that_make_no_sense(tmp_path, settings):
    with pytest.raises(kvzip.UsageError, match=next(iter(settings))):
        Store(tmp_path, **settings)


@pytest.mark.parametrize(
    "options",
    [{"endpoint": "localhost:9000"}, {"endpoint": "http://"}, {"endpoint": "ftp://x"},
     {"endpoint": "http://a b"}, {"endpoint": "http://h:99999"}, {"endpoint": 5},
     {"region": "a\nb"}, {"access_key_id": "a\r"}, {"timeout": "x"}, {"no_such": "x"}, {5: "x"},
     {"conditional_put": "x"}, "text", 5],
)  # fmt: skip
def test_options_that_the_client_does_not_take(options, monkeypatch):
    with pytest.raises(kvzip.KVZipError) as caught:
        Store("s3://bucket/x", options=options, timeout=1, retries=0).bucket.get("x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_without_its_scheme(documents, capsys, monkeypatch, name):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "x")
    monkeypatch.setenv(name, "localhost:9000")
    code, found = run_json(capsys, "put", documents[0], "--store", "s3://b/x")
    assert (code, found["kind"]) == (2, "usage")
    assert name in found["error"] and "http://" in found["error"]


def test_of_several_documents_those_that_are_good_are_stored(documents, capsys, tmp_path):
    (tmp_path / "text").write_text("no document")
    given = [documents[0], "none", "text", documents[1], "/dev/zero"]
    code, found = run_json(capsys, "put", *given, "--store", "s", "--block-tokens", 32)
    assert [d["file"] for d in found["documents"]] == [documents[0], documents[1]]
    assert [(d["file"], d["kind"]) for d in found["failed"]] == [
        ("none", "system"),
        ("text", "format"),
        ("/dev/zero", "format"),
    ]
    assert code == 2 == found["failed"][0]["exit"]  # of the first
    assert len(Store(tmp_path / "s").documents()) == 2
    code, out, err = run(capsys, "put", *given, "--store", "s")
    assert code == 2 and "3 of 5 failed" in err and out.count("was there already") == 2
    # What is alone fails as it always did.
    code, found = run_json(capsys, "put", "none", "--store", "s")
    assert code == 2 and found["kind"] == "system" and "none" in found["error"]


def test_a_store_that_does_not_answer_is_asked_once(documents, capsys):
    url = "http://127.0.0.1:1/x"
    code, found = run_json(capsys, "rm", "a/b", "a/c", "a/d", "--store", url)
    assert code == 1 and found["removed"] == []
    assert [d["key"] for d in found["failed"]] == ["a/b", "a/c", "a/d"]
    assert [d["error"].startswith("not tried") for d in found["failed"]] == [False, True, True]


def test_nothing_is_removed_if_one_is_no_key(documents, capsys):
    _, put = run_json(capsys, "put", documents[0], "--store", "s", "--block-tokens", 32)
    key = put["documents"][0]["key"]
    code, found = run_json(capsys, "rm", key, "nope", "--store", "s")
    assert code == 2 and "no key" in found["error"]
    assert run_json(capsys, "ls", "--store", "s")[1]["documents"]


SEVERAL = {
    "put": ["--store", "s"],
    "fit": ["-o", "p"],
    "entropy": [],
    "bench": ["--codecs", "raw"],
    "report": [],
    "eval figures": [],
    "eval exactness": ["--model", "none"],
}


@pytest.mark.parametrize("command", SEVERAL)
@pytest.mark.parametrize("wrong", ["none", "text", ".", "/dev/zero", "https://h/x"])
def test_json_comes_whichever_input_fails(documents, capsys, tmp_path, command, wrong):
    (tmp_path / "text").write_text("no document")
    code, found = run_json(capsys, *command.split(), documents[0], wrong, *SEVERAL[command])
    assert code in (1, 2) and ("error" in found or found["failed"])


def test_a_capture_that_is_refused_makes_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a text")
    code, found = run_json(
        capsys, "capture", "--model", "./none", "--text", "text", "-o", "new/folder"
    )
    assert code in (1, 2) and "error" in found
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_sealed_files_and_stores(documents, tmp_path, capsys):
    pytest.importorskip("cryptography")
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "other").write_text("ab" * 32 + "\n")
    key, other = ("--key-file", "key"), ("--key-file", "other")
    assert run(capsys, "encode", documents[0], "-o", "doc.kvz", *key)[0] == 0
    assert b"test/model" not in (tmp_path / "doc.kvz").read_bytes()
    code, verified = run_json(capsys, "verify", "doc.kvz", "--against", documents[0], *key)
    assert code == 0 and verified["files"][0]["same"]
    assert run_json(capsys, "info", "doc.kvz", *key)[1]["model"] == "test/model"
    assert run(capsys, "decode", "doc.kvz", "-o", "back.safetensors", *key)[0] == 0
    assert kvzip.Snapshot.load("back.safetensors") == kvzip.Snapshot.load(documents[0])
    for given in ((), other):
        code, failed = run_json(capsys, "info", "doc.kvz", *given)
        assert (code, failed["kind"]) == (2, "key") and "doc.kvz" in failed["error"]

    code, put = run_json(capsys, "put", *documents, "--store", "s", "--block-tokens", 32, *key)
    assert code == 0 and all(d["new"] for d in put["documents"])
    code, _ = run_json(capsys, "get", "--store", "s", "--like", documents[1], "-o", "x.kvz", *key)
    assert code == 0 and kvzip.decode("x.kvz") == kvzip.Snapshot.load(documents[1])
    assert len(run_json(capsys, "ls", "--store", "s", *key)[1]["documents"]) == 3
    for given in ((), other):
        code, failed = run_json(capsys, "get", "--store", "s", "--like", documents[1], *given)
        assert (code, failed["kind"]) == (2, "key")
    assert run(capsys, "rm", put["documents"][0]["key"], "--store", "s", *key)[0] == 0
    assert run(capsys, "prune", "--store", "s", "--limit-bytes", "1", *key)[0] == 0


def test_a_key_file_that_holds_no_key(documents, tmp_path, capsys):
    for data in (b"", b"x" * 31, b"ab" * 16, b"zz" * 32, bytes(2000)):
        (tmp_path / "key").write_bytes(data)
        code, failed = run_json(
            capsys, "encode", documents[0], "-o", "doc.kvz", "--key-file", "key"
        )
        assert (code, failed["kind"]) == (2, "usage") and not (tmp_path / "doc.kvz").exists()
