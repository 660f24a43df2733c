"""Objects behind a URL, through obstore: a folder, a bucket (S3), or a web server (read only).

An object is read in ranges, each tied to the version that was opened, and ranges that a reader
announces are fetched ahead of it. Errors of the network become :class:`StoreError`.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple

from kvzip import container
from kvzip.container import Reader
from kvzip.errors import KVZipError, StoreError
from kvzip.profile import Profile

_FIRST = 1 << 16
"""Bytes fetched with the opening of an object: what a Reader asks for first."""
_REQUEST = 4 << 20
"""Ranges that touch are fetched together up to so many bytes."""
_WINDOW = 64 << 20
"""Bytes that may lie fetched and unread."""
_CONNECTIONS = 4
_ONE_REQUEST = 256 << 20
"""Objects up to this many bytes are written by one request, which can be create-only."""


class Meta(NamedTuple):
    path: str
    size: int
    version: str | None
    """What changes when the object does (ETag)."""
    modified: datetime


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of obstore as StoreError, in a line; FileNotFoundError stays what it is."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise StoreError(f"{what}: {lines[0]}") from error


class Bucket:
    """Objects under a URL: a path, ``file://``, ``s3://bucket/prefix``, ``http(s)://``.

    `timeout`: seconds for one request; `retries`: how often one is tried again. `options`: the
    configuration that obstore takes for the kind of store; S3 also reads the usual AWS_ variables.
    `make`: make the folder of a path that does not exist yet.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        timeout: float = 30.0,
        retries: int = 2,
        options: Mapping[str, Any] | None = None,
        make: bool = False,
    ):
        try:
            from obstore import store as stores
        except ModuleNotFoundError as error:
            raise KVZipError(f"stores need more: pip install 'kvzip[store]' ({error})") from None
        self.url = os.fspath(url)
        scheme, mark, rest = self.url.partition("://")
        self.folder = Path(rest) if mark and scheme == "file" else None if mark else Path(self.url)
        """Where the objects are files, or None."""
        self.writable = self.listable = scheme not in ("http", "https")
        options = dict(options or {})
        with _told(f"cannot use {self.url}"):
            try:
                if self.folder is not None:
                    if not make and not self.folder.is_dir():
                        raise KVZipError(f"{self.folder} is not a folder")
                    self.store: Any = stores.LocalStore(self.folder.absolute(), mkdir=make)
                    return
                endpoint = options.get("endpoint") or os.environ.get(
                    "AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")
                )
                self.store = stores.from_url(
                    self.url,
                    **({"config": options} if options else {}),
                    client_options={
                        "timeout": timedelta(seconds=timeout),
                        "connect_timeout": timedelta(seconds=timeout),
                        "allow_http": scheme == "http" or str(endpoint).startswith("http:"),
                    },
                    retry_config={
                        "max_retries": retries,
                        "retry_timeout": timedelta(seconds=timeout * (1 + retries)),
                    },
                )
            except (ValueError, TypeError) as error:
                raise KVZipError(f"cannot use {self.url} as a store: {error}") from None

    def get(self, path: str) -> bytes | None:
        """An object's bytes, or None when there is none."""
        import obstore

        with _told(f"cannot read {path} in {self.url}"):
            try:
                return bytes(obstore.get(self.store, path).bytes())
            except FileNotFoundError:
                return None

    def copy(self, path: str, sink: IO[bytes], progress: Callable[[int], None] | None) -> None:
        """Write an object's bytes to a file. Raises FileNotFoundError when there is none."""
        import obstore

        with _told(f"cannot read {path} in {self.url}"):
            for chunk in obstore.get(self.store, path).stream(min_chunk_size=1 << 20):
                sink.write(chunk)
                if progress is not None:
                    progress(len(chunk))

    def head(self, path: str) -> Meta | None:
        import obstore

        with _told(f"cannot read {path} in {self.url}"):
            try:
                return _meta(obstore.head(self.store, path))
            except FileNotFoundError:
                return None

    def put(self, path: str, data: bytes | Path, create: bool = True) -> bool:
        """Write an object, whole or not at all; False when `create` and there is one already.

        An object of more than 256 MiB is written in parts: of two writers at once, the last wins.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if not self.writable:
            raise KVZipError(f"{self.url} is read only: write to what the server serves")
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        with _told(f"cannot write {path} in {self.url}"):
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

        with _told(f"cannot list {prefix} in {self.url}"):
            for found in obstore.list(self.store, prefix, chunk_size=1000):
                yield from map(_meta, found)

    def folders(self) -> list[str]:
        """First parts of all objects' paths."""
        import obstore

        with _told(f"cannot list {self.url}"):
            return list(obstore.list_with_delimiter(self.store)["common_prefixes"])

    def delete(self, path: str) -> None:
        """Delete an object, if there is one."""
        import obstore

        with _told(f"cannot delete {path} in {self.url}"), suppress(FileNotFoundError):
            obstore.delete(self.store, path)

    def open(self, path: str, profile: Profile | None = None, threads: int = 0) -> Reader:
        """A .kvz object, to be read in ranges. Raises FileNotFoundError when there is none."""
        if self.folder is not None:
            with _told(f"cannot read {path} in {self.url}"):
                return container.open(self.folder / path, profile, threads)
        return Reader(Remote(self, path), profile, threads)


def _meta(found: Mapping[str, Any]) -> Meta:
    return Meta(found["path"], found["size"], found["e_tag"], found["last_modified"])


class Remote:
    """One object as a `kvzip.container.Source`; a change of the object while it is read is an
    error, not a mixture."""

    def __init__(self, bucket: Bucket, path: str):
        self._bucket, self._path = bucket, path
        self._version: str | None = None
        meta, self._first = self._get(0, _FIRST)
        self.size, self._version = meta.size, meta.version
        self._ahead: _Ahead | None = None

    def _get(self, offset: int, length: int) -> tuple[Meta, memoryview]:
        import obstore

        options: dict[str, Any] = {"range": (offset, offset + length)}
        if self._version is not None:
            options["if_match"] = self._version
        with _told(f"cannot read {self._path} in {self._bucket.url}"):
            found = obstore.get(self._bucket.store, self._path, options=options)
            return _meta(found.meta), memoryview(found.bytes()).cast("B")

    def _fetch(self, offset: int, length: int) -> memoryview:
        data = self._get(offset, length)[1]
        if len(data) != length:
            raise StoreError(f"{self._path} in {self._bucket.url} ended while it was read")
        return data

    def read(self, offset: int, length: int) -> memoryview:
        if not length or offset + length <= len(self._first):
            return self._first[offset : offset + length]
        found = None if self._ahead is None else self._ahead.take(offset, length)
        return self._fetch(offset, length) if found is None else found

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch (offset, length) ranges, in ascending order, that will be read once."""
        begin = len(self._first)
        self._ahead = _Ahead(self._fetch, [r for r in ranges if r[1] and sum(r) > begin])


class _Segment:
    """One request: bytes from `start` to `stop`, which hold `reads` announced ranges."""

    def __init__(self, start: int, stop: int):
        self.start, self.stop, self.reads = start, stop, 1
        self.future: Future[memoryview] | None = None


class _Ahead:
    """Fetches ranges in their order, a few requests at a time, a window ahead of who reads."""

    def __init__(self, fetch: Callable[[int, int], memoryview], ranges: Sequence[tuple[int, int]]):
        self._fetch, self._lock = fetch, Lock()
        self._segments: list[_Segment] = []
        for offset, length in ranges:
            last = self._segments[-1] if self._segments else None
            if last and offset == last.stop and offset + length - last.start <= _REQUEST:
                last.stop, last.reads = offset + length, last.reads + 1
            else:
                self._segments.append(_Segment(offset, offset + length))
        self._starts = [s.start for s in self._segments]
        self._next = self._bytes = 0
        self._pool = ThreadPoolExecutor(_CONNECTIONS, "kvzip-fetch")
        with self._lock:
            self._submit()

    def _submit(self) -> None:
        """Ask for segments while the window has room; the lock is held."""
        while self._next < len(self._segments) and self._bytes < _WINDOW:
            segment = self._segments[self._next]
            if segment.future is None and segment.reads:
                self._ask(segment)
            self._next += 1

    def _ask(self, segment: _Segment) -> Future[memoryview]:
        size = segment.stop - segment.start
        segment.future = self._pool.submit(self._fetch, segment.start, size)
        self._bytes += size
        return segment.future

    def take(self, offset: int, length: int) -> memoryview | None:
        """An announced range's bytes, once it is here; None when it is not announced, or was
        taken before."""
        at = bisect_right(self._starts, offset) - 1
        if at < 0 or offset + length > self._segments[at].stop:
            return None
        segment = self._segments[at]
        with self._lock:
            if not segment.reads:
                return None
            future = segment.future or self._ask(segment)
        try:
            data = future.result()
        finally:
            with self._lock:
                segment.reads -= 1
                if not segment.reads:
                    segment.future = None
                    self._bytes -= segment.stop - segment.start
                self._submit()
        return data[offset - segment.start : offset - segment.start + length]


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
    if "?" in url:
        raise KVZipError(f"{url!r}: URLs with a query (signed ones, say) cannot be opened")
    folder, slash, name = url.rpartition("/")
    if not slash or not name or folder.endswith("/"):
        raise KVZipError(f"{url!r} names no file in a store")
    bucket = Bucket(folder, timeout=timeout, retries=retries, options=options)
    try:
        return bucket.open(name, profile, threads)
    except FileNotFoundError:
        raise StoreError(f"there is no {url}") from None
