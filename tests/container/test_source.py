"""Whatever can be read can be opened, and what cannot be read says so."""
# ruff: noqa: SIM115 - whoever gets a file here closes it

from __future__ import annotations

import array
import bz2
import gzip
import http.server
import io
import lzma
import mmap
import os
import pathlib
import random
import tarfile
import tempfile
import threading
import zipfile

import numpy as np
import pytest
from support import assert_same, cache_like, make_snapshot

import kvzip


@pytest.fixture(scope="module")
def snapshot():
    return make_snapshot(cache_like, 5, "bf16", layers=3, tokens=700, dim=32)


@pytest.fixture(scope="module")
def blob(snapshot):
    return kvzip.encode(snapshot, "channel", block_tokens=256)


class Drip(io.RawIOBase):
    """A stream that cannot seek and gives a few bytes at a time."""

    def __init__(self, data):
        self._left = data

    def readable(self):
        return True

    def readinto(self, buffer):
        count = min(len(buffer), 1000, len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


class Foreign:
    """Read and seek alone, as a stranger's file object has them; few bytes at a time."""

    def __init__(self, data):
        self._file = io.BytesIO(data)
        self.size = len(data)

    def seek(self, *where):
        self._file.seek(*where)

    def tell(self):
        return self._file.tell()

    def read(self, count=-1):
        return self._file.read(min(count, 999) if count > 0 else count)


class Ranged:
    """A `Source` of a caller's own."""

    def __init__(self, data):
        self._data, self.size = data, len(data)

    def read(self, offset, length):
        return memoryview(self._data)[offset : offset + length]


def in_file(make):
    def made(blob, folder):
        make(folder / "x", blob)
        return folder / "x"

    return made


def zip_of(path, blob):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/side.kvz", blob)


def tar_of(path, blob):
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("a")
        entry.size = len(blob)
        archive.addfile(entry, io.BytesIO(blob))


def fifo(blob, folder):
    os.mkfifo(folder / "fifo")
    threading.Thread(target=(folder / "fifo").write_bytes, args=(blob,)).start()
    return folder / "fifo"


def pipe(blob):
    reading, writing = os.pipe()

    def write():
        with os.fdopen(writing, "wb") as file:
            file.write(blob)

    threading.Thread(target=write).start()
    return os.fdopen(reading, "rb")


def after_some(file):
    file.read(7)
    return file


def written(file, blob):
    file.write(blob)
    file.flush()
    return file


def path_of(blob, folder):
    (folder / "x").write_bytes(blob)
    return folder / "x"


def mapped(path):
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def tensor(blob):
    import torch

    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


WAYS = {
    "path": path_of,
    "text path": lambda b, f: str(path_of(b, f)),
    "named pipe": fifo,
    "bytes": lambda b, f: b,
    "bytearray": lambda b, f: bytearray(b),
    "memoryview": lambda b, f: memoryview(b),
    "array": lambda b, f: array.array("B", b),
    "numpy": lambda b, f: np.frombuffer(b, np.uint8),
    "memmap": lambda b, f: np.memmap(path_of(b, f), mode="r"),
    "signed numbers": lambda b, f: np.frombuffer(b, np.int8),
    "mmap": lambda b, f: mapped(path_of(b, f)),
    "tensor": lambda b, f: tensor(b),
    "BytesIO": lambda b, f: io.BytesIO(b),
    "BytesIO, read from": lambda b, f: after_some(io.BytesIO(b)),
    "file": lambda b, f: path_of(b, f).open("rb"),
    "file, read from": lambda b, f: after_some(path_of(b, f).open("rb")),
    "unbuffered file": lambda b, f: path_of(b, f).open("rb", buffering=0),
    "file to change": lambda b, f: path_of(b, f).open("r+b"),
    "temporary file": lambda b, f: written(tempfile.TemporaryFile(), b),
    "named temporary file": lambda b, f: written(tempfile.NamedTemporaryFile(), b),
    "spooled file": lambda b, f: written(tempfile.SpooledTemporaryFile(1 << 30), b),
    "gzip": lambda b, f: gzip.open(io.BytesIO(gzip.compress(b))),
    "bz2": lambda b, f: bz2.open(io.BytesIO(bz2.compress(b))),
    "lzma": lambda b, f: lzma.open(io.BytesIO(lzma.compress(b))),
    "gzip of a file": lambda b, f: gzip.open(path_of(gzip.compress(b), f)),
    "buffered gzip": lambda b, f: io.BufferedReader(gzip.open(io.BytesIO(gzip.compress(b)))),
    "zip member": lambda b, f: zipfile.ZipFile(in_file(zip_of)(b, f)).open("in/side.kvz"),
    "zip path": lambda b, f: zipfile.Path(str(in_file(zip_of)(b, f)), "in/side.kvz"),
    "tar member": lambda b, f: tarfile.open(in_file(tar_of)(b, f)).extractfile("a"),
    "drip": lambda b, f: Drip(b),
    "buffered drip": lambda b, f: io.BufferedReader(Drip(b)),
    "pipe": lambda b, f: pipe(b),
    "foreign": lambda b, f: Foreign(b),
    "source": lambda b, f: Ranged(b),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [1, 2])
def test_whatever_can_be_read_can_be_opened(blob, snapshot, tmp_path, way, threads):
    with kvzip.open(WAYS[way](blob, tmp_path), threads=threads) as reader:
        assert_same(reader.decode(), snapshot)
        assert np.array_equal(reader.layer(2).k, snapshot.layers[2].k)
        assert np.array_equal(reader.layer(0).v, snapshot.layers[0].v)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_cut_short_is_an_error_in_any_form(blob, tmp_path, way):
    with pytest.raises(kvzip.CorruptError, match="cut short"):
        kvzip.open(WAYS[way](blob[:-1], tmp_path))


def damaged(pack, data):
    """What is packed, with a flipped bit or an end too early, at many places. A zip archive's own
    records at its end stay, or it could not be opened."""
    rng, packed = random.Random(0), bytearray(pack(data))
    records = 100 if pack is zipped else 0
    for _ in range(20):
        at = rng.randrange(len(packed) - records)
        packed[at] ^= 1 << rng.randrange(8)
        yield bytes(packed)
        packed[at] = pack(data)[at]
    for share in () if records else (0.1, 0.5, 0.9):
        yield bytes(packed[: int(share * len(packed))])


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", data)
    return file.getvalue()


class Pipe(io.RawIOBase):
    """What can only be read on."""

    def __init__(self, file):
        self.read = file.read

    def readable(self):
        return True


PACKED = {
    "gzip": (gzip.compress, lambda data: gzip.open(io.BytesIO(data))),
    "gzip as a pipe": (gzip.compress, lambda data: Pipe(gzip.open(io.BytesIO(data)))),
    "bz2": (bz2.compress, lambda data: bz2.open(io.BytesIO(data))),
    "lzma": (lzma.compress, lambda data: lzma.open(io.BytesIO(data))),
    "zip member": (zipped, lambda data: zipfile.ZipFile(io.BytesIO(data)).open("a")),
    "zip path": (zipped, lambda data: zipfile.Path(io.BytesIO(data), "a")),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.drawn(2)
def test_a_damaged_compressed_file_is_a_corrupt_one(blob, snapshot, kind):
    pack, opened = PACKED[kind]
    refused = 0
    for data in damaged(pack, blob):
        try:
            file = opened(data)
        except zipfile.BadZipFile:  # the caller's own
            continue
        try:
            with kvzip.open(file) as reader:
                assert_same(reader.decode(), snapshot)  # a time of day, say
        except kvzip.CorruptError:
            refused += 1
    assert refused > 10


def test_a_file_object_that_fails_later(blob):
    class Failing(Foreign):
        error = None

        def read(self, count=-1):
            if self.error is not None:
                raise self.error
            return super().read(count)

    for error, kind in (
        (EOFError("ended"), kvzip.CorruptError),
        (OSError(5, "Input/output error"), kvzip.StoreError),
        (RuntimeError("the server is gone"), kvzip.StoreError),
    ):
        file = Failing(blob)
        with kvzip.open(file) as reader:
            file.error = error
            with pytest.raises(kind):
                reader.decode()


def test_errors_name_the_file(blob, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.kvz"
    for data, words in (
        (b"text", "a.kvz is not a .kvz file"),
        (blob[:-1], "a.kvz is cut short"),
        (blob[:9] + b"\xff" + blob[10:], "a.kvz is of format version"),
        (blob[:60] + b"\xff" + blob[61:], "a.kvz: the header or the index is damaged"),
        (blob[:-1000] + bytes(1000), "a.kvz: (the tables of )?layer . [kv].* damaged"),
    ):
        path.write_bytes(data)
        for given in ("a.kvz", path, path.open("rb")):
            with pytest.raises((kvzip.FormatError, kvzip.CorruptError), match=words) as told:
                kvzip.verify(given)
            assert str(told.value).count("a.kvz") == 1
        with pytest.raises((kvzip.FormatError, kvzip.CorruptError)) as told:
            kvzip.verify(data)
        assert "a.kvz" not in str(told.value)


@pytest.mark.parametrize("way", ["file", "BytesIO", "gzip", "zip member", "temporary file"])
def test_who_opens_a_file_closes_it(blob, tmp_path, way):
    file = WAYS[way](blob, tmp_path)
    with kvzip.open(file) as reader:
        pass
    assert not file.closed
    reader.decode()
    file.close()
    with pytest.raises(kvzip.UsageError, match="closed"):
        reader.decode()


@pytest.mark.parametrize("way", ["path", "zip path", "named pipe"])
def test_a_reader_closes_what_it_opened(blob, snapshot, tmp_path, way):
    before = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    with kvzip.open(WAYS[way](blob, tmp_path)) as reader:
        pass
    other = (tmp_path / "other").open("w+b")  # may get the number of the one that is closed
    other.write(b"\0" * len(blob))
    other.flush()
    with pytest.raises(kvzip.UsageError, match="closed"):
        reader.decode()
    other.close()
    for _ in range(5):
        with pytest.raises(kvzip.CorruptError):
            (tmp_path / "short").write_bytes(blob[:100])
            kvzip.open(tmp_path / "short")
    assert len(list(pathlib.Path("/proc/self/fd").iterdir())) <= before + 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda f: 5, "a int cannot be read"),
        (lambda f: None, "a NoneType cannot be read"),
        (lambda f: object(), "a object cannot be read"),
        (lambda f: io.StringIO("text"), "binary mode"),
        (lambda f: (f / "x").open(), "binary mode"),
        (lambda f: (f / "y").open("wb"), "writing only"),
        (lambda f: np.zeros((4, 4))[:, ::2], "side by side"),
        (lambda f: "a\0b", "no path"),
        (lambda f: "gopher://host/x.kvz", "gopher"),
        (lambda f: "s3:/bucket/x.kvz", "No such file"),
    ],
)
def test_what_cannot_be_read_says_so(tmp_path, wrong, says):
    (tmp_path / "x").write_text("text")
    with pytest.raises((kvzip.UsageError, FileNotFoundError), match=says):
        kvzip.open(wrong(tmp_path))


def test_tensors_that_are_no_bytes():
    import torch

    for wrong in (torch.zeros(8), torch.zeros(8, 8, dtype=torch.uint8)[:, ::2]):
        with pytest.raises(kvzip.UsageError, match="a tensor must be uint8"):
            kvzip.open(wrong)


# --- URLs ------------------------------------------------------------------------------------


@pytest.fixture
def server(blob):
    """A web server with the file at one path and query only; yields its address and what was
    asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in ("/a%20b/c%2Bd.kvz?X-Sig=a%2Fb%3D&x=1", "/plain.kvz", "/e%20f.kvz"):
                self.send_error(403)
                return
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = blob[int(first) : int(last) + 1]
            self.send_response(206)
            stop = int(first) + len(part) - 1
            self.send_header("Content-Range", f"bytes {first}-{stop}/{len(blob)}")
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", asked
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    "path", ["/plain.kvz", "/a%20b/c%2Bd.kvz?X-Sig=a%2Fb%3D&x=1", "/e%20f.kvz", "/e%20f.kvz#part"]
)
def test_urls_are_asked_for_as_they_stand(server, snapshot, path):
    url, asked = server
    assert_same(kvzip.decode(url + path), snapshot)
    assert kvzip.info(url + path).header.origin == snapshot.origin
    assert kvzip.verify(url + path).header.layout == snapshot.layout
    assert set(asked) == {path.partition("#")[0]}


def test_what_gives_access_is_in_no_message(server):
    import traceback

    url = server[0].replace("http://", "http://me:SECRET@") + "/no.kvz?X-Sig=SECRET"
    with pytest.raises(kvzip.StoreError) as caught:
        kvzip.open(url)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert "/no.kvz?..." in str(caught.value)


def test_files_by_url(tmp_path, blob, snapshot):
    (tmp_path / "a b%.kvz").write_bytes(blob)
    assert_same(kvzip.decode((tmp_path / "a b%.kvz").as_uri()), snapshot)
    with pytest.raises(kvzip.StoreError, match="there is no file://"):
        kvzip.open((tmp_path / "none.kvz").as_uri())


@pytest.mark.parametrize("codec", ["raw", "channel"])
@pytest.mark.parametrize("tokens", [20, 200])
def test_damage_is_told_wherever_a_file_is_read(tmp_path, codec, tokens):
    """Neighbouring entries are read together or not, by what they are read from; each is looked
    at."""
    snapshot = make_snapshot(cache_like, 6, "bf16", layers=3, tokens=tokens, dim=32)
    blob = bytearray(kvzip.encode(snapshot, codec, block_tokens=64))
    path, rng = tmp_path / "a.kvz", random.Random(1)
    path.write_bytes(blob)
    assert_same(kvzip.decode(path), snapshot)
    with kvzip.open(bytes(blob)) as reader:
        spans = [
            (*reader.index.span(row), reader.index.key[row][0]) for row in range(len(reader.index))
        ]
    for offset, size, layer in spans:
        if not size:
            continue
        at, bit = offset + rng.randrange(size), 1 << rng.randrange(8)
        blob[at] ^= bit
        with path.open("r+b") as file:
            file.seek(at)
            file.write(blob[at : at + 1])
        for source in (bytes(blob), path, io.BytesIO(blob), Foreign(bytes(blob))):
            for threads in (1, 2):
                with pytest.raises(kvzip.CorruptError, match=f"layer {layer} "):
                    kvzip.decode(source, threads=threads)
            with kvzip.open(source) as reader:
                for i in range(len(reader)):
                    if i != layer:
                        reader.layer(i)
                with pytest.raises(kvzip.CorruptError, match=f"layer {layer} "):
                    reader.layer(layer)
        blob[at] ^= bit
        with path.open("r+b") as file:
            file.seek(at)
            file.write(blob[at : at + 1])
