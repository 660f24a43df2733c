"""Reading whatever there is: pipes, devices, file objects and sources that do not keep to rules."""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import assert_same, make_snapshot, random_bits

import kvzip
from kvzip import files
from kvzip.container import MAGIC
from kvzip.errors import CorruptError, KVZipError, UsageError
from kvzip.reading import contents, reading
from kvzip.store import Store


@pytest.fixture
def snapshot():
    return make_snapshot(random_bits, 1, "bf16")


@pytest.fixture
def blob(snapshot):
    return kvzip.encode(snapshot)


READERS = {
    "open": "kvzip.open(path)",
    "verify": "kvzip.verify(path)",
    "snapshot": "kvzip.Snapshot.load(path)",
    "profile": "kvzip.Profile.load(path)",
    "put": "Store(sys.argv[2]).put(path)",
    "contents": "contents(path)",
}
READ = """
import re, sys, kvzip
from kvzip.store import Store
from kvzip.reading import contents
path = sys.argv[1]
for code in sys.argv[3:]:
    try: exec(code)
    except kvzip.KVZipError as error: print("told:", error)
# Not getrusage's, which a process has from the one that started it.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom", "/dev/full", "pipe"])
def test_what_has_no_end_is_told_by_how_it_begins(tmp_path, path):
    """An endless device or pipe takes neither long nor much memory."""
    endless = None
    if path == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
        endless = subprocess.Popen(
            ["sh", "-c", f"while :; do yes > {path}; done"],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    command = [sys.executable, "-c", READ, path, str(tmp_path / "store"), *READERS.values()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        if endless is not None:
            os.killpg(endless.pid, signal.SIGKILL)
            endless.wait()
    *told, megabytes = done.stdout.splitlines()
    assert len(told) == len(READERS), done.stderr
    assert all(each.startswith("told:") and path in each for each in told), told
    assert int(megabytes) < 300
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("form", ["file", "snapshot"])
def test_no_more_is_read_than_a_file_says_that_it_has(tmp_path, snapshot, blob, form):
    snapshot.save(tmp_path / "s")
    begin, load = (blob, kvzip.open) if form == "file" else (None, kvzip.Snapshot.load)
    begin = begin or (tmp_path / "s").read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "begin").write_bytes(begin)
    command = f"(cat {tmp_path}/begin; cat /dev/zero) > {pipe}"
    writer = subprocess.Popen(["sh", "-c", command], stderr=subprocess.DEVNULL)
    with pytest.raises(KVZipError, match=r"longer than it says|its header says"):
        load(pipe)
    writer.wait(10)


def test_a_pipe_is_read_once_whoever_asks_what_is_in_it(tmp_path, snapshot, blob):
    snapshot.save(tmp_path / "s")
    for i, data in enumerate((blob, (tmp_path / "s").read_bytes())):
        pipe = tmp_path / f"pipe{i}"
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_bytes, args=(data,)).start()
        store = Store(tmp_path / f"store{i}", block_tokens=8)
        entry = store.put(pipe)
        with store.open(entry.key) as reader:
            assert_same(reader.decode(), snapshot)


def test_a_pipe_into_which_nobody_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIPE_SECONDS", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="nobody writes") as error:
        kvzip.open(tmp_path / "pipe")
    assert error.value.filename == str(tmp_path / "pipe")


def test_a_number_that_is_not_open_is_named():
    number = os.open(os.devnull, os.O_RDONLY)
    os.close(number)
    with pytest.raises(OSError) as failure:
        reading(f"/dev/fd/{number}")
    assert failure.value.filename == f"/dev/fd/{number}"


def test_a_pipe_that_was_read_is_no_damaged_file(tmp_path, snapshot):
    """What learns from documents reads them several times, which a shell's <(...) does not bear."""
    snapshot.save(tmp_path / "s")
    out, into = os.pipe()
    writer = threading.Thread(target=write_all, args=(into, (tmp_path / "s").read_bytes()))
    writer.start()
    try:
        assert_same(kvzip.Snapshot.load(f"/dev/fd/{out}"), snapshot)
        with pytest.raises(OSError, match="read once") as failure:
            kvzip.Snapshot.load(f"/dev/fd/{out}")
        assert failure.value.filename == f"/dev/fd/{out}"
    finally:
        os.close(out)
        writer.join()


def write_all(number, data):
    with os.fdopen(number, "wb") as file:
        file.write(data)


def test_who_has_opened_a_pipe_is_waited_for(tmp_path, monkeypatch, snapshot, blob):
    monkeypatch.setattr(files, "PIPE_SECONDS", 0.2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write():
        with pipe.open("wb") as file:
            time.sleep(1)
            file.write(blob)

    writer = threading.Thread(target=write)
    writer.start()
    with kvzip.open(pipe) as reader:
        assert_same(reader.decode(), snapshot)
    writer.join()


def test_all_of_a_file_as_long_as_that_is_little(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    assert contents(tmp_path / "a", 1000) == bytes(1000)
    with pytest.raises(UsageError, match="more than 999 bytes"):
        contents(tmp_path / "a", 999)


# --- file objects ------------------------------------------------------------------------------


class Odd(io.BytesIO):
    """A file object whose `read` is another one's."""

    def __init__(self, data, change, seeks=True):
        super().__init__(data)
        self._change, self._seeks = change, seeks

    def seekable(self):
        return self._seeks

    def read(self, count=-1):
        return self._change(super().read, count)

    def __buffer__(self, flags):
        raise TypeError


class OddSource:
    """A `Source` whose `read` is another one's."""

    def __init__(self, data, change):
        self.size, self._data, self._change = len(data), data, change

    def read(self, offset, length):
        return self._change(lambda count: self._data[offset : offset + count], length)


WORK = {
    "short": lambda read, count: read(min(count, 7) if count > 0 else count),
    "bytearray": lambda read, count: bytearray(read(count)),
    "memoryview": lambda read, count: memoryview(read(count)),
    "array": lambda read, count: np.frombuffer(read(count), np.uint8),
}
FAIL = {
    "str": lambda read, count: read(count).decode("latin1"),
    "None": lambda read, count: None,
    "more": lambda read, count: read(count) + b"more",
    "int": lambda read, count: 5,
    "list": lambda read, count: list(read(count)),
}


@pytest.mark.parametrize("seeks", [True, False])
@pytest.mark.parametrize("change", WORK)
def test_file_objects_that_give_bytes_in_their_own_way(snapshot, blob, change, seeks):
    with kvzip.open(Odd(blob, WORK[change], seeks)) as reader:
        assert_same(reader.decode(), snapshot)


@pytest.mark.parametrize("seeks", [True, False])
@pytest.mark.parametrize("change", FAIL)
def test_file_objects_that_give_something_else(blob, change, seeks):
    with pytest.raises(KVZipError, match=r"read gave|as text|longer than it says"):
        kvzip.open(Odd(blob, FAIL[change], seeks))


@pytest.mark.parametrize("change", [*WORK, *FAIL])
def test_sources_are_held_to_what_they_must_give(snapshot, blob, change):
    source = OddSource(blob, (WORK | FAIL)[change])
    if change in ("bytearray", "memoryview", "array"):
        assert_same(kvzip.decode(source), snapshot)
    else:
        with pytest.raises(UsageError, match="the source's read gave"):
            kvzip.open(source)


@pytest.mark.parametrize("size", [-1, 1.5, "x", None])
def test_a_source_without_a_size(size):
    source = OddSource(b"", None)
    source.size = size
    with pytest.raises(UsageError, match="size"):
        kvzip.open(source)


# --- URLs where a path is wanted ---------------------------------------------------------------


@pytest.mark.parametrize("url", ["https://u:secret@h/x?sig=secret", "s3://b/x", "file:///x"])
def test_what_takes_paths_says_who_takes_urls(tmp_path, monkeypatch, snapshot, url):
    monkeypatch.chdir(tmp_path)
    profile = kvzip.Profile({}, {})
    for use in (
        kvzip.Snapshot.load,
        kvzip.Profile.load,
        snapshot.save,
        profile.save,
        lambda url: kvzip.write(url, snapshot),
        Store(tmp_path / "s").put,
        lambda url: Store(tmp_path / "s").fetch("a/b", url),
        reading,
    ):
        with pytest.raises(UsageError, match=re.escape("kvzip.open, decode, info")) as error:
            use(url)
        assert "secret" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_path_that_looks_like_a_url_is_one(tmp_path, monkeypatch, snapshot):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "b").mkdir(parents=True)
    snapshot.save("s3://b/x")
    assert_same(kvzip.Snapshot.load("s3://b/x"), snapshot)


# --- little is read -----------------------------------------------------------------------------


def test_beginnings_alone_are_told_as_cut_short(tmp_path, blob):
    for length in (1, len(MAGIC), 39, 40, 200):
        with pytest.raises(CorruptError):
            kvzip.open(Odd(blob[:length], lambda read, count: read(count), seeks=False))


def test_memory_stays_small_where_nothing_fits():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(KVZipError):
        kvzip.open("/dev/zero")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
