"""Putting into a store: what is refused makes nothing, what is killed leaves nothing for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import make_snapshot, random_bits

import kvzip
from kvzip import files
from kvzip.errors import KVZipError, StoreError, UsageError
from kvzip.store import Store, bucket
from kvzip.store.bucket import Bucket

OF = {"model": "test/model", "revision": "r1", "dtype": "bf16"}


@pytest.fixture
def snapshot():
    return make_snapshot(random_bits, 1, "bf16")


def test_what_is_refused_makes_no_store(tmp_path, snapshot):
    (tmp_path / "text").write_text("no document")
    folder, store = tmp_path / "a" / "store", Store(tmp_path / "a" / "store", block_tokens=8)
    batch = make_snapshot(random_bits, 1, "bf16", batch=2)
    short = make_snapshot(random_bits, 1, "bf16", tokens=7)
    for wrong in (
        batch,
        short,
        kvzip.encode(batch),
        kvzip.encode(short),
        make_snapshot(random_bits, 1, "bf16", ids=False),
        b"bytes",
        tmp_path / "text",
        tmp_path / "nothing",
        tmp_path,
        None,
        5,
    ):
        with pytest.raises((KVZipError, OSError)):
            store.put(wrong)
        assert not folder.parent.exists(), wrong
    small = Store(folder, limit_bytes=100)
    with pytest.raises(KVZipError, match="in a store of 100"):
        small.put(snapshot)
    assert not folder.parent.exists()


@pytest.mark.parametrize("form", ["snapshot", "file", "path"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": "nope"},
        {"codec": 5},
        {"profile": "x"},
        {"threads": "2"},
        {"threads": -1},
        {"replace": "no"},
        {"progress": 5},
        {"token_ids": "abc"},
    ],
    ids=str,
)
def test_options_are_looked_at_whatever_is_put(tmp_path, snapshot, form, wrong):
    document = kvzip.encode(snapshot, store_token_ids="token_ids" not in wrong)
    if form == "snapshot":
        if "token_ids" in wrong:
            snapshot.token_ids = None
        document = snapshot
    elif form == "path":
        (tmp_path / "a.kvz").write_bytes(document)
        document = tmp_path / "a.kvz"
    with pytest.raises(KVZipError):
        Store(tmp_path / "store", block_tokens=8).put(document, **wrong)
    assert not (tmp_path / "store").exists()


def test_options_of_the_others_are_looked_at_too(tmp_path, snapshot):
    store = Store(tmp_path, block_tokens=8)
    entry = store.put(snapshot)
    with store.open(entry.key) as reader:
        for use in (
            lambda: store.fetch(entry.key, tmp_path / "f", progress=5),
            lambda: kvzip.verify(kvzip.encode(snapshot), progress=5),
            lambda: kvzip.write(tmp_path / "f", snapshot, progress=5),
            lambda: reader.verify(progress=5),
            lambda: reader.decode(progress=5),
            lambda: kvzip.Profile.fit([snapshot], progress=5),
            lambda: Store(tmp_path / "s", make="no"),
            lambda: kvzip.Snapshot.load(tmp_path / "f", mmap="no"),
        ):
            with pytest.raises(UsageError, match=r"progress|make|mmap"):
                use()
    assert not (tmp_path / "f").exists()


PUT = """
import sys, time
from kvzip import files
from kvzip.store import Store, bucket
from kvzip.store.bucket import Bucket
from kvzip.snapshot import Snapshot
if sys.argv[3] == "hidden": files._NAMELESS = 0
def progress(done):
    print("on its way", flush=True)
    time.sleep(float(sys.argv[4]))
Store(sys.argv[2], block_tokens=8).put(Snapshot.load(sys.argv[1]), progress=progress, threads=1)
"""


@pytest.mark.parametrize("kind", ["nameless", "hidden"])
def test_what_kill_9_leaves_the_next_run_takes_away(tmp_path, snapshot, kind):
    snapshot.save(tmp_path / "s")
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-c", PUT, tmp_path / "s", tmp_path / "store", kind]

    def start(seconds):
        environment = {**os.environ, "TMPDIR": str(scratch)}
        return subprocess.Popen([*command, seconds], stdout=subprocess.PIPE, env=environment)

    killed, goes_on = start("600"), start("600")
    try:
        for process in (killed, goes_on):
            assert process.stdout.readline() == b"on its way\n"
        killed.send_signal(signal.SIGKILL)
        killed.wait(30)
        hidden = 0 if kind == "nameless" else 1
        assert len(list(scratch.iterdir())) == 2 * hidden
        assert start("0").wait(60) == 0
        assert len(list(scratch.iterdir())) == hidden  # that of who still writes
    finally:
        goes_on.kill()
        goes_on.wait(30)
        killed.kill()
    assert start("0").wait(60) == 0
    assert list(scratch.iterdir()) == []


HOLD = """
import sys, time
from kvzip.files import scratch_folder
with scratch_folder() as folder:
    (folder / "within").mkdir()
    (folder / "within" / "file").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(float(sys.argv[1]))
"""


def test_folders_for_a_while_go_too(tmp_path):
    def start(seconds):
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", HOLD, seconds]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)

    killed, goes_on = start("600"), start("600")
    try:
        mine, other = (p.stdout.readline().decode().strip() for p in (killed, goes_on))
        killed.kill()
        killed.wait(30)
        assert Path(mine).exists()
        assert start("0").wait(30) == 0
        assert [str(path) for path in tmp_path.iterdir()] == [other]
    finally:
        goes_on.kill()
        goes_on.wait(30)
    assert start("0").wait(30) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_that_is_renamed_stays(tmp_path):
    with files.scratch_folder(tmp_path) as folder:
        (folder / "a").touch()
        folder.rename(tmp_path / "kept")
    assert (tmp_path / "kept" / "a").exists()
    with pytest.raises(RuntimeError), files.scratch_folder(tmp_path):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch, snapshot):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OSError) as error:
        Store(tmp_path / "store", block_tokens=8).put(snapshot)
    assert str(error.value.filename).startswith(str(tmp_path / "nowhere"))


# --- what a server answers -----------------------------------------------------------------------


ANSWERS = {
    (404, "NoSuchBucket"): "no such bucket",
    (403, "AccessDenied"): "give no permission",
    (403, "InvalidAccessKeyId"): "AWS_ACCESS_KEY_ID",
    (403, "SignatureDoesNotMatch"): "AWS_SECRET_ACCESS_KEY",
    (400, "ExpiredToken"): "AWS_SESSION_TOKEN",
    (301, "PermanentRedirect"): "another region",
    (400, "AuthorizationHeaderMalformed"): "another region.*eu-west-1",
    (400, "SomethingElse"): "A sentence of the server's .400 SomethingElse.",
    (403, ""): "give no permission",
    (401, ""): "no keys",
    (507, ""): "disk is full",
}


@pytest.mark.parametrize(("status", "code"), ANSWERS)
def test_what_a_bucket_answers_is_told_in_words(status, code, snapshot):
    from http.server import BaseHTTPRequestHandler

    from servers import serving

    body = ""
    if code:
        body = (
            f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>A sentence of the server'
            "'s.</Message><Region>eu-west-1</Region></Error>"
        )

    class Answers(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, *_):
            pass

    with serving(Answers) as url:
        options = {"endpoint": url, "access_key_id": "a", "secret_access_key": "hush"}
        store = Store("s3://bucket/x", options=options, retries=0, timeout=5, block_tokens=8)
        for use in (
            lambda: store.put(snapshot),
            lambda: store.find(snapshot.token_ids, **OF),
            lambda: store.open("a/b"),
            store.documents,
            lambda: store.prune(0),
        ):
            with pytest.raises(StoreError, match=ANSWERS[status, code]) as error:
                use()
            words = str(error.value)
            assert "<" not in words and "hush" not in words and "s3://bucket/x" in words


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_large_object_may_take_longer_than_a_request(kind, tmp_path, monkeypatch):
    """It goes in parts, few at a time: each has the time-out, on a link that needs it for two."""
    from servers import slow_bucket

    monkeypatch.setattr(bucket, "_ONE_REQUEST", 400_000)
    monkeypatch.setattr(bucket, "_PART", 100_000)
    data = os.urandom(1_234_567)
    (tmp_path / "data").write_bytes(data)
    with slow_bucket(rate=500_000) as server, (tmp_path / "data").open("rb") as file:
        objects = Bucket("s3://b/x", options=server.options, timeout=2, retries=0)
        assert objects.put("large", data if kind == "bytes" else file)
        assert list(server.objects.values()) == [data] and server.requests == 13
        assert not objects.put("large", data)  # it is there
        assert objects.put("small", data[:300_000]) and server.requests == 14


OWN_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_KEY",
    "abfss": "AZURE_STORAGE_ACCOUNT_KEY",
}


@pytest.mark.parametrize("scheme", OWN_KEYS)
def test_keys_are_asked_for_by_the_names_that_their_store_has(scheme):
    from kvzip.store.answers import told

    none = (
        "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 3s, "
        "after 2 retries - HTTP error: error sending request"
    )
    wrong = "Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>"
    for text in (none, wrong):
        words = told(RuntimeError(text), scheme)
        assert OWN_KEYS[scheme] in words and "{" not in words
        for other in {*OWN_KEYS.values()} - {OWN_KEYS[scheme]}:
            assert other not in words
    assert "open to all" in told(RuntimeError(none), scheme)
