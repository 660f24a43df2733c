"""Objects behind a URL, through obstore: a folder, a bucket (S3), or a web server (read only).

An object is read in ranges, each tied to the version that was opened, and ranges that a reader
announces are fetched ahead of it. Errors of the network become :class:`StoreError`.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from kvzip.container import Reader
from kvzip.container.source import is_url
from kvzip.errors import KVZipError, StoreError, UsageError, first_line, is_panic
from kvzip.options import integer, seconds
from kvzip.profile import Profile
from kvzip.store.folder import Folder, Meta

_FIRST = 48 << 10
"""Bytes fetched with the opening of an object: what a Reader asks for first."""
_FIRST_PIECE = 12 << 10
"""Of which one request asks for so many: no more than what TCP sends in the first round trip of a
connection, ten segments (RFC 6928). And what is read after that finds all connections made."""
_LEAST, _MOST = 256 << 10, 4 << 20
"""Bytes of a request: ranges that touch are fetched together."""
_LITTLE = 16 << 10
"""Bytes for which no request is made, where they touch others."""
_PATIENCE = 4
"""How many times as long as the wait for its first byte a request is to take."""
_WINDOW = 64 << 20
"""Bytes that may lie fetched and unread."""
_CONNECTIONS = 4
_REACH = 2 * _CONNECTIONS
"""Requests from the oldest that is under way on. TCP does not share a link fairly for so short a
time; while one request starves, those after it are not what a reader waits for."""
_ONE_REQUEST = 256 << 20
"""Objects up to this many bytes are written by one request, which can be create-only."""
_PLAIN = re.compile(r"[A-Za-z0-9._~-]+")
"""Names that stand in a URL as they are."""
_process: int | None = None
"""The process that first used a client: the client's threads are there and nowhere else."""
_MATTERS = re.compile("^AWS_|_PROXY$", re.IGNORECASE)
"""Variables of the environment that a client reads when it is made."""


_URL_PARTS = re.compile(r"([A-Za-z0-9+.-]+://)(?:[^/@\s]+@)?([^?\s\"']*)(\?[^\s\"']*)?")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of obstore as StoreError, in a line without what gives access; FileNotFoundError
    stays what it is."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        cause = error if without_secrets(str(error)) == str(error) else None
        raise StoreError(f"{what}: {without_secrets(first_line(error))}") from cause
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, KVZipError):
            raise
        raise UsageError(f"{what}: {without_secrets(first_line(error))}") from None
    except BaseException as error:
        # A panic of the client's, on settings that it did not check: no Exception.
        if not is_panic(error):
            raise
        why = without_secrets(first_line(error))
        raise StoreError(f"{what}: the client gave up ({why})") from None


def without_secrets(url: str) -> str:
    """A URL, or a text with URLs, for messages: without what gives access in it, a password or a
    signature in its query."""
    return _URL_PARTS.sub(lambda u: u[1] + u[2] + ("?..." if u[3] else ""), url)


# --- what a URL names ------------------------------------------------------------------------

_OBJECT_STORES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss")
_WEB = ("http", "https")


def _scheme(url: str) -> str:
    """The scheme of a URL in small letters; "" for a path. Raises UsageError for any that is not
    one of ours, and for what looks like one."""
    scheme = url.partition("://")[0].lower() if is_url(url) else ""
    if scheme and scheme not in (*_OBJECT_STORES, *_WEB, "file"):
        raise UsageError(
            f"{without_secrets(url)!r}: there is no store of the kind {scheme}://; name a folder, "
            "file://, s3://bucket/prefix, or http(s):// to read from"
        )
    begun = re.match(r"(file|https?|s3a?|gs|az):(?!//)", url, re.IGNORECASE)
    if not scheme and (begun or "://" in url):
        raise UsageError(f"{without_secrets(url)!r} is neither a path nor a URL (s3://..., ...)")
    return scheme


def _folder(url: str) -> Path | None:
    """The folder that a path or a file:// URL names; None for other URLs."""
    scheme = _scheme(url)
    if scheme not in ("", "file"):
        return None
    if not scheme:
        found = url
    else:
        host, slash, rest = url.partition("://")[2].partition("/")
        if host or not slash:
            raise UsageError(f"{url!r}: write file:///folder, the whole path after file://")
        found = "/" + unquote(rest)
    if not found or "\0" in found:
        raise UsageError(f"{url!r} names no folder")
    return Path(found)


def _check_settings(options: Mapping[str, Any]) -> None:
    """Raise UsageError for what the client, which does not look, would panic on."""
    named = {str(key): value for key, value in options.items()}
    named |= {f"variable {k}": v for k, v in os.environ.items() if k.startswith("AWS_")}
    for name, value in named.items():
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f]", value):
            raise UsageError(f"the store's setting {name} has a line break or the like in it")
        if "endpoint" in name.lower() and not _is_address(value):
            raise UsageError(f"the endpoint of the store ({name}) is {value!r}: write http://HOST")


def _is_address(value: Any) -> bool:
    try:
        found = urlsplit(value)
        return (
            found.scheme in _WEB
            and bool(found.hostname)
            and found.port != 0
            and re.search(r"[^\x21-\x7e]", value) is None
        )
    except (ValueError, TypeError, AttributeError):
        return False


class Bucket:
    """Objects under a URL: ``s3://bucket/prefix``, ``http(s)://``.

    `timeout`: seconds for one request; `retries`: how often one is tried again. `options`: the
    configuration that obstore takes for the kind of store; S3 also reads the usual AWS_ variables.
    """

    folder = None
    """Objects are no files here."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 2,
        options: Mapping[str, Any] | None = None,
    ):
        if find_spec("obstore") is None:
            raise KVZipError("buckets need more: pip install 'kvzip[store]'")
        self.url = without_secrets(url)
        self.writable = self.listable = _scheme(url) not in _WEB
        timeout, retries = seconds("timeout", timeout), integer("retries", retries, 0, 1000)
        if not isinstance(options or {}, Mapping):
            raise UsageError("options must be a mapping of the client's settings")
        options = dict(options or {})
        if self.writable:
            _check_settings(options)
        with _told(f"cannot use {self.url} as a store"):
            self._client = self._connected(url, options, timeout, retries)

    def _connected(self, url: str, options: Mapping[str, Any], timeout: float, retries: int) -> Any:
        """obstore's client for a URL that names no folder."""
        from obstore import store as stores

        endpoint = options.get("endpoint") or os.environ.get(
            "AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")
        )
        client = {
            "timeout": timedelta(seconds=timeout),
            "connect_timeout": timedelta(seconds=timeout),
            "allow_http": url.startswith("http:") or str(endpoint).startswith("http:"),
        }
        retry = {
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=timeout * (1 + retries)),
        }
        if not self.writable and re.search("[?%]", url):
            # As it stands: a signed URL's path and query are part of what is signed.
            return stores.HTTPStore(url, client_options=client, retry_config=retry)
        more = {"config": dict(options)} if options else {}
        return stores.from_url(url, **more, client_options=client, retry_config=retry)

    @property
    def store(self) -> Any:
        """obstore's client. Raises StoreError in a process that was forked from one that has used
        it: it has threads, which a fork does not take along, and what asks them waits for ever."""
        global _process
        if _process is None:
            _process = os.getpid()
        elif _process != os.getpid():
            raise StoreError(
                f"{self.url} cannot be used in a process that was forked from one that uses such "
                "stores: start it by spawn or forkserver, as multiprocessing calls them"
            )
        return self._client

    def _named(self, path: str) -> str:
        return f"{path} in {self.url}" if path else self.url

    def get(self, path: str) -> bytes | None:
        """An object's bytes, or None when there is none."""
        import obstore

        with _told(f"cannot read {self._named(path)}"):
            try:
                return bytes(obstore.get(self.store, path).bytes())
            except FileNotFoundError:
                return None

    def copy(self, path: str, sink: IO[bytes], progress: Callable[[int], None] | None) -> None:
        """Write an object's bytes to a file. Raises FileNotFoundError when there is none."""
        import obstore

        with _told(f"cannot read {self._named(path)}"):
            chunks = iter(obstore.get(self.store, path).stream(min_chunk_size=1 << 20))
        while True:
            with _told(f"cannot read {self._named(path)}"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            sink.write(chunk)  # whose errors are not the store's
            if progress is not None:
                progress(len(chunk))

    def head(self, path: str) -> Meta | None:
        import obstore

        with _told(f"cannot read {self._named(path)}"):
            try:
                return _meta(obstore.head(self.store, path))
            except FileNotFoundError:
                return None

    def put(self, path: str, data: bytes | Path, create: bool = True, durable: bool = True) -> bool:
        """Write an object, whole or not at all; False when `create` and there is one already. What
        a bucket has taken is always durable.

        An object of more than 256 MiB is written in parts: of two writers at once, the last wins.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if not self.writable:
            raise UsageError(f"{self.url} is read only: write to what the server serves")
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        with _told(f"cannot write {self._named(path)}"):
            try:
                if size > _ONE_REQUEST:
                    if create and self.head(path) is not None:
                        return False
                    obstore.put(self.store, path, data, use_multipart=True, chunk_size=64 << 20)
                else:
                    mode = "create" if create else "overwrite"
                    obstore.put(self.store, path, data, mode=mode, use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def under(self, prefix: str) -> Iterator[Meta]:
        """Objects under a prefix; a part of a name is no prefix."""
        import obstore

        with _told(f"cannot list {prefix} in {self.url}"), suppress(FileNotFoundError):
            for found in obstore.list(self.store, prefix, chunk_size=1000):
                yield from map(_meta, found)

    def folders(self) -> list[str]:
        """First parts of all objects' paths."""
        import obstore

        with _told(f"cannot list {self.url}"):
            try:
                return list(obstore.list_with_delimiter(self.store)["common_prefixes"])
            except FileNotFoundError:
                return []

    def delete(self, path: str) -> None:
        """Delete an object, if there is one."""
        import obstore

        with _told(f"cannot delete {self._named(path)}"), suppress(FileNotFoundError):
            obstore.delete(self.store, path)

    def open(self, path: str, profile: Profile | None = None, threads: int = 0) -> Reader:
        """A .kvz object, to be read in ranges. Raises FileNotFoundError when there is none."""
        return Reader(Remote(self, path), profile, threads)

    def sweep(self) -> None:
        """Nothing unfinished is seen in a bucket."""


def open_bucket(
    url: str | os.PathLike[str],
    *,
    timeout: float = 30.0,
    retries: int = 2,
    options: Mapping[str, Any] | None = None,
    make: bool = False,
    mode: int | None = None,
) -> Bucket | Folder:
    """The objects under a URL: those of :class:`kvzip.store.folder.Folder` under a path or ``file://``,
    which takes `make` and `mode`, and those of :class:`Bucket` under any other."""
    if not isinstance(url, (str, os.PathLike)):
        raise UsageError(f"a store is named by a path or a URL, not by a {type(url).__name__}")
    timeout, retries = seconds("timeout", timeout), integer("retries", retries, 0, 1000)
    name = os.fsdecode(url)
    folder = _folder(name)
    if folder is not None:
        return Folder(folder, name, make=make, mode=mode)
    if mode is not None:
        raise UsageError(f"mode is for folders, and {without_secrets(name)} is none")
    return Bucket(name, timeout=timeout, retries=retries, options=options)


def _meta(found: Mapping[str, Any]) -> Meta:
    return Meta(found["path"], found["size"], found["e_tag"], found["last_modified"])


class Remote:
    """One object as a `kvzip.container.Source`; a change of the object while it is read is an
    error, not a mixture."""

    def __init__(self, bucket: Bucket, path: str):
        self._bucket, self._path = bucket, path
        self._version: str | None = None
        self.wait = math.inf
        """Seconds from a request to its first byte, the least so far."""
        self.pool = ThreadPoolExecutor(_CONNECTIONS, "kvzip-fetch")
        self.size, self._first = self._open()
        self._ahead: _Ahead | None = None

    def _open(self) -> tuple[int, memoryview]:
        """The object's size and its first bytes."""
        later = [
            self.pool.submit(self._get, start, min(_FIRST_PIECE, _FIRST - start))
            for start in range(_FIRST_PIECE, _FIRST, _FIRST_PIECE)
        ]
        meta, first = self._get(0, min(_FIRST_PIECE, _FIRST))
        self._version = meta.version
        if meta.size <= _FIRST_PIECE:  # the others ask for what there is not
            return meta.size, first
        pieces = [first]
        for piece in later[: -(-meta.size // _FIRST_PIECE) - 1]:
            found, data = piece.result()
            if (found.size, found.version) != (meta.size, meta.version):
                raise StoreError(f"{self._bucket._named(self._path)} changed while it was read")
            pieces.append(data)
        return meta.size, memoryview(b"".join(pieces))

    def _get(self, offset: int, length: int) -> tuple[Meta, memoryview]:
        import obstore

        options: dict[str, Any] = {"range": (offset, offset + length)}
        if self._version is not None:
            options["if_match"] = self._version
        with _told(f"cannot read {self._bucket._named(self._path)}"):
            began = time.perf_counter()
            found = obstore.get(self._bucket.store, self._path, options=options)
            self.wait = min(self.wait, time.perf_counter() - began)
            return _meta(found.meta), memoryview(found.bytes()).cast("B")

    def fetch(self, offset: int, length: int) -> memoryview:
        try:
            data = self._get(offset, length)[1]
        except FileNotFoundError:
            where = self._bucket._named(self._path)
            raise StoreError(f"{where} went away while it was read") from None
        if len(data) != length:
            raise StoreError(f"{self._bucket._named(self._path)} ended while it was read")
        return data

    def read(self, offset: int, length: int) -> memoryview:
        if not length or offset + length <= len(self._first):
            return self._first[offset : offset + length]
        _ = self._bucket.store  # before waiting for threads that a forked process has not
        found = None if self._ahead is None else self._ahead.take(offset, length)
        return self.fetch(offset, length) if found is None else found

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch (offset, length) ranges, in ascending order, that will be read once."""
        begin = len(self._first)
        _ = self._bucket.store
        self._ahead = _Ahead(self, [r for r in ranges if r[1] and sum(r) > begin])


class _Request:
    """Bytes from `start` on, which hold `reads` announced ranges."""

    def __init__(self, start: int, size: int, reads: int, future: Future[memoryview]):
        self.start, self.size, self.reads, self.future = start, size, reads, future


class _Ahead:
    """Fetches ranges in their order, a few requests at a time, a window ahead of who reads.

    Requests under way share the link, so the first bytes of one come as late as the last of those
    beside it. They are small to begin with, for the first layer to be there soon, and towards the
    end, for little to be left to decode when the last byte has come (guided self-scheduling,
    Polychronopoulos and Kuck 1987), but not so small that the link waits for round trips.
    """

    def __init__(self, remote: Remote, ranges: Sequence[tuple[int, int]]):
        self._remote, self._lock = remote, Lock()
        self._left = dict(ranges)
        self._asked: dict[int, _Request] = {}
        self._begun, self._remaining = 0, sum(self._left.values())
        self._least = _LEAST
        self._under_way: set[int] = set()
        self._count = self._bytes = 0
        with self._lock:
            self._submit()

    def _submit(self) -> None:
        """Ask for what comes next while there are connections and room; the lock is held."""
        while (
            self._left
            and len(self._under_way) < _CONNECTIONS
            and self._count - min(self._under_way, default=self._count) < _REACH
            and self._bytes < _WINDOW
        ):
            share = min(self._begun, self._remaining // 4) // _CONNECTIONS
            limit = min(max(share, self._least), _MOST)
            limit = min(limit, max(self._remaining // _CONNECTIONS, self._least // 2, _LEAST))
            start, size = next(iter(self._left.items()))
            reads = 1
            # Tables never go alone: little of a request is worse than a block too much.
            while (more := self._left.get(start + size)) and (
                size + more <= limit or min(size, more) <= _LITTLE
            ):
                size, reads = size + more, reads + 1
            self._ask(start, size, reads)

    def _ask(self, start: int, size: int, reads: int = 1) -> None:
        self._under_way.add(self._count)
        future = self._remote.pool.submit(self._get, self._count, start, size)
        request, at = _Request(start, size, reads, future), start
        while at < start + size:
            self._asked[at] = request
            at += self._left.pop(at)
        self._begun, self._remaining = self._begun + size, self._remaining - size
        self._bytes, self._count = self._bytes + size, self._count + 1

    def _get(self, which: int, start: int, size: int) -> memoryview:
        began = time.perf_counter()
        try:
            return self._remote.fetch(start, size)
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self._under_way.remove(which)
                waited = self._remote.wait
                worthwhile = size * _PATIENCE * waited / max(took - waited, waited / 4)
                self._least = int(min(max(worthwhile, _LEAST), _MOST))
                self._submit()

    def take(self, offset: int, length: int) -> memoryview | None:
        """An announced range's bytes, once it is here; None when it is not announced, or was
        taken before."""
        with self._lock:
            if self._left.get(offset) == length:  # before its turn
                self._ask(offset, length)
            request = self._asked.pop(offset, None)
        if request is None:
            return None
        try:
            data = request.future.result()
        finally:
            with self._lock:
                request.reads -= 1
                if not request.reads:
                    self._bytes -= request.size
                self._submit()
        return data[offset - request.start : offset - request.start + length]


def open_url(
    url: str,
    profile: Profile | None = None,
    threads: int = 0,
    *,
    timeout: float = 30.0,
    retries: int = 2,
    options: Mapping[str, Any] | None = None,
) -> Reader:
    """Open the .kvz file at a URL (``https://``, ``s3://``, ``file://``), to be read in ranges.

    Raises StoreError when there is none or the store does not answer; the rest as `kvzip.open`.
    """
    scheme = _scheme(url)
    if not scheme:
        raise UsageError(f"{url!r} is no URL")
    shown = without_secrets(url)
    folder, slash, name = url.rpartition("/")
    if scheme in _WEB and not _PLAIN.fullmatch(name):
        folder, name = url.partition("#")[0], ""  # as it stands: it is signed, or has escapes
    elif not slash or not name or folder.endswith("/"):
        raise UsageError(f"{shown!r} names no file in a store")
    elif scheme == "file":
        name = unquote(name)
    environment = frozenset(item for item in os.environ.items() if _MATTERS.search(item[0]))
    try:
        bucket = _bucket(folder, timeout, retries, frozenset((options or {}).items()), environment)
    except TypeError as error:  # a value that cannot be compared is none that a client takes
        raise UsageError(f"cannot use {shown} as a store: {error}") from None
    try:
        return bucket.open(name, profile, threads)
    except FileNotFoundError:
        raise StoreError(f"there is no {shown}") from None


@lru_cache(maxsize=16)
def _bucket(
    url: str,
    timeout: float,
    retries: int,
    options: frozenset[tuple[str, Any]],
    environment: frozenset[tuple[str, str]],
) -> Bucket | Folder:
    """One for all that is opened under a URL: making a client takes milliseconds (it reads the
    system's certificates), and its connections are there for the next object."""
    return open_bucket(url, timeout=timeout, retries=retries, options=dict(options))


def forget_clients() -> None:
    """What :func:`open_url` opens next connects anew, as the first time."""
    _bucket.cache_clear()
