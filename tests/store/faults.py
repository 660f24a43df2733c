"""Many clients on a server that fails: `make faults SECONDS=60`.

    python tests/store/faults.py --seconds 60 --clients 300

A server of its own speaks as much of S3 as a store needs. To one request in ten it does what
servers do, and what stands before them: see `FAULTS`. Its clock jumps by hours. The clients put
documents, find and read them, and clear away what is left over, all at once. Nothing but a
KVZipError may come out of that; what is found has the numbers that were put; no request outlives
its time-out and its repetitions; and once the server is well again, all that was acknowledged is
found. Prints what happened as JSON; exit code 1 if any of this does not hold.

What a server says that it wrote is taken to be written: of a lie about that nothing can be told.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from email.utils import formatdate
from functools import cache
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np

import kvzip
from kvzip.store import Store
from kvzip.store.bucket import Bucket

FAULTS = {
    "stall": "never answers",
    "drip": "gives its answer byte by byte, for ever",
    "reset": "closes the connection, before it has done what was asked or after",
    "status": "answers 500 or 503, before it has done what was asked or after",
    "cut": "closes the connection in the middle of an answer",
    "short": "gives less than the object has, and says that this is all",
    "flip": "gives another bit",
    "elsewhere": "gives other bytes of the same object",
    "another": "gives the answer to somebody else's request",
    "absent": "says that there is no such object",
    "unlisted": "lists only some of the objects, and in another order",
}
TIMEOUT, RETRIES = 1.0, 1
LONGEST = 2 * TIMEOUT * (1 + RETRIES)
"""Seconds of a request: of its answer, and of the body of that."""
BLOCK, TOKENS, DOCUMENTS, MODELS = 8, 32, 24, 2


# --- the server ------------------------------------------------------------------------------


class Server:
    """Objects in memory, through what a store needs of S3."""

    def __init__(self, seed: int):
        self.share, self.draw = 0.0, random.Random(seed)
        """Of requests that get a fault; ``GET /share/0.1`` sets it, and tells what there was."""
        self.objects: dict[str, tuple[bytes, str, float]] = {}
        self.done: Counter[str] = Counter()
        self._versions = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, url, _ = first.split(" ")
        headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if url.startswith("/share/"):
            self.share = float(url.removeprefix("/share/"))
            writer.write(_packed(200, {}, json.dumps(self.done).encode()))
            return True
        fault = self.draw.choice([*FAULTS]) if self.draw.random() < self.share else ""
        late = self.draw.random() < 0.5
        self.done[fault] += 1
        if fault in ("reset", "status") and not late:
            return self._fails(fault, writer)
        status, more, data = self._do(method, url, headers, body, fault)
        if fault == "stall":
            await asyncio.sleep(3600)
        elif fault in ("reset", "status"):
            return self._fails(fault, writer)
        packed = _packed(status, more, b"" if method == "HEAD" else data, len(data))
        if fault == "drip":
            for at in range(len(packed)):
                writer.write(packed[at : at + 1])
                await writer.drain()
                await asyncio.sleep(0.3)
        elif fault == "cut":
            writer.write(packed[: self.draw.randrange(len(packed))])
            await writer.drain()
            return False
        writer.write(packed)
        await writer.drain()
        return True

    def _fails(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        if fault == "reset":
            writer.transport.abort()
            return False
        writer.write(_packed(self.draw.choice((500, 503)), {}, b""))
        return True

    def _do(
        self, method: str, url: str, headers: dict[str, str], body: bytes, fault: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request, which is done."""
        parts = urlsplit(url)
        path = unquote(parts.path).partition("/bucket")[2].strip("/")
        if not path:
            return 200, {}, self._listed(parse_qs(parts.query), fault == "unlisted")
        if method == "PUT":
            if headers.get("if-none-match") == "*" and path in self.objects:
                return 412, {}, b""
            self._versions += 1
            # Its clock jumps.
            now = time.time() + self.draw.uniform(-1e4, 1e4)
            self.objects[path] = body, f'"{self._versions}"', now
            return 200, {"ETag": f'"{self._versions}"'}, b""
        if method == "DELETE":
            self.objects.pop(path, None)
            return 204, {}, b""
        return self._got(method, path, headers, fault)

    def _got(
        self, method: str, path: str, headers: dict[str, str], fault: str
    ) -> tuple[int, dict[str, str], bytes]:
        if fault == "another" and self.objects and method == "GET":
            path = self.draw.choice([p for p in self.objects if p[-4:] == path[-4:]] or [path])
        found = self.objects.get(path)
        if found is None or (fault == "absent" and method == "GET"):
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        data, version, written = found
        if headers.get("if-match", version) != version:
            return 412, {}, b""
        size = len(data)
        more = {"ETag": version, "Last-Modified": formatdate(written, usegmt=True)}
        start, stop = 0, size
        if asked := headers.get("range", "").removeprefix("bytes="):
            first, _, last = asked.partition("-")
            start, stop = int(first), min(size, int(last or size) + 1)
            if start >= size:
                return 416, {}, b""
            more["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        given = bytearray(data[start:stop])
        if method == "GET" and given:
            if fault == "flip":
                given[self.draw.randrange(len(given))] ^= 1 << self.draw.randrange(8)
            elif fault == "short":
                del given[self.draw.randrange(len(given)) :]
                if asked and given:
                    more["Content-Range"] = f"bytes {start}-{start + len(given) - 1}/{size}"
            elif fault == "elsewhere":
                at = self.draw.randrange(size)
                given = bytearray((data[at:] + data)[: len(given)])
        return (206 if asked else 200), more, bytes(given)

    def _listed(self, query: dict[str, list[str]], fault: bool) -> bytes:
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        paths, folders, found = sorted(self.objects), set(), []
        if fault:
            paths = self.draw.sample(paths, len(paths) // 2)
        for path in paths:
            if not path.startswith(prefix):
                continue
            below, cut, _ = path[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if cut:
                folders.add(prefix + below + cut)
                continue
            data, version, written = self.objects[path]
            day = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(written))
            found.append(
                f"<Contents><Key>{escape(path)}</Key><LastModified>{day}</LastModified>"
                f"<ETag>{version}</ETag><Size>{len(data)}</Size></Contents>"
            )
        found += [f"<CommonPrefixes><Prefix>{f}</Prefix></CommonPrefixes>" for f in folders]
        inside = "".join(found)
        whole = f"<IsTruncated>false</IsTruncated>{inside}"
        return f"<ListBucketResult>{whole}</ListBucketResult>".encode()


def _packed(status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} so", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def serve(seed: int) -> None:
    server = Server(seed)
    listening = await asyncio.start_server(server.talk, "127.0.0.1", 0, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


# --- its clients -----------------------------------------------------------------------------


def ids_of(number: int) -> list[int]:
    """Documents in families of four share their first half."""
    return [number // 4] * (TOKENS // 2) + [number] * (TOKENS // 2)


@cache
def document(model: int, number: int) -> kvzip.Snapshot:
    """Of the same tokens every model has other numbers."""
    rng = np.random.default_rng((model, number))
    bits = rng.integers(0, 1 << 16, (2, 1, TOKENS, 16), np.uint16)
    origin = kvzip.Origin(f"m{model}", "r")
    return kvzip.Snapshot.from_arrays([tuple(bits)], "bf16", ids_of(number), origin)


class Watch:
    """What the clients see."""

    def __init__(self) -> None:
        self.acknowledged: set[tuple[int, int]] = set()
        self.did: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest = 0.0

    def timed(self, method: Any) -> Any:
        """A request of a bucket's, of which the longest is noted."""

        def request(*given: Any, **more: Any) -> Any:
            began = time.monotonic()
            try:
                return method(*given, **more)
            finally:
                self.longest = max(self.longest, time.monotonic() - began)

        return request


def opened(port: int) -> Store:
    options = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}
    options |= {"access_key_id": "a", "secret_access_key": "b"}
    return Store(
        "s3://bucket/store",
        block_tokens=BLOCK,
        timeout=TIMEOUT,
        retries=RETRIES,
        options=options,
    )


def faults_of(port: int, share: float) -> dict[str, int]:
    """Have the server do what it should not to this share of requests; what it did so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/share/{share}") as answer:
        did: dict[str, int] = json.load(answer)
    return did


def looked_for(store: Store, model: int, number: int) -> int:
    """How many tokens of a document are found, with the numbers of it or of one that begins alike.
    Raises AssertionError."""
    found = store.find(ids_of(number), model=f"m{model}", revision="r", dtype="bf16", threads=1)
    if found is None:
        return 0
    with found:
        # Whoever wrote it: the last id that is shared says which documents it may be.
        same = document(model, int(found.reader.token_ids[-1]))
        for part, whole in zip("kv", same.layers[0].parts.values(), strict=True):
            read = found.snapshot(threads=1).layers[0].part(part)
            assert np.array_equal(read, whole[:, : found.tokens]), (
                f"{model}/{number}: other numbers"
            )
        return found.tokens


def client(port: int, seed: int, watch: Watch, end: float) -> None:
    """Put, find and clear away until the end."""
    draw, store = random.Random(seed), opened(port)
    while time.monotonic() < end:
        model, number = draw.randrange(MODELS), draw.randrange(DOCUMENTS)
        act = draw.choices(("put", "find", "prune"), (10, 20, 1))[0]
        try:
            if act == "put":
                store.put(document(model, number), codec="raw", threads=1)
                watch.acknowledged.add((model, number))
            elif act == "find":
                act = "found" if looked_for(store, model, number) else "not found"
            else:
                store.prune()
            watch.did[act] += 1
        except kvzip.KVZipError:
            watch.did["errors"] += 1
        except Exception as error:
            watch.wrong.append(f"{act} {model}/{number}: {type(error).__name__}: {error}")


def run(clients: int, seconds: float, share: float = 0.1, seed: int = 0) -> dict[str, Any]:
    """What happened, and under "wrong" what must not."""
    command = [sys.executable, __file__, "--serve", str(seed)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch, plain = Watch(), {}
    try:
        port = int(server.stdout.readline())
        for model, number in itertools.product(range(MODELS), range(0, DOCUMENTS, 2)):
            opened(port).put(document(model, number), codec="raw", threads=1)
            watch.acknowledged.add((model, number))
        faults_of(port, share)
        for name in ("get", "head", "put", "delete", "read_range"):
            plain[name] = getattr(Bucket, name)
            setattr(Bucket, name, watch.timed(plain[name]))
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=client, args=(port, seed + n, watch, end))
            for n in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        faults, store = faults_of(port, 0), opened(port)
        for model, number in sorted(watch.acknowledged):
            if (tokens := looked_for(store, model, number)) < TOKENS:
                watch.wrong.append(f"{model}/{number} was acknowledged; {tokens} tokens are found")
    finally:
        for name, method in plain.items():
            setattr(Bucket, name, method)
        server.kill()
        server.wait()
    if watch.longest > LONGEST + 5:  # the machine may be busy
        watch.wrong.append(f"a request took {watch.longest:.1f} s")
    return {
        "clients": clients,
        "did": dict(watch.did),
        "acknowledged": len(watch.acknowledged),
        "faults": faults,
        "longest_request": round(watch.longest, 2),
        "wrong": watch.wrong,
    }


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--clients", type=int, default=300)
    parse.add_argument("--seconds", type=float, default=60)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parse.parse_args()
    if given.serve is not None:
        asyncio.run(serve(given.serve))
    found = run(given.clients, given.seconds, seed=given.seed)
    print(json.dumps(found))
    return bool(found["wrong"])


if __name__ == "__main__":
    sys.exit(main())
