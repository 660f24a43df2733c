"""Objects under a URL, through obstore: a bucket, or a web server (read only).

Errors of the network become :class:`StoreError`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote, urlsplit

from kvzip.container import Reader, Source
from kvzip.container.sealed import AnyKey
from kvzip.container.source import in_pieces
from kvzip.errors import KVZipError, NotStoredError, StoreError, UsageError, first_line
from kvzip.options import integer, seconds
from kvzip.profile import Profile
from kvzip.store.answers import as_store_errors, told
from kvzip.store.folder import SMALL, Folder, Meta, write_all
from kvzip.store.remote import Piece, Remote
from kvzip.store.sealed import SealedObjects
from kvzip.store.urls import WEB, folder_of, plain_scheme, scheme_of, without_secrets

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_ONE_REQUEST = 32 << 20
"""Objects up to this many bytes are written by one request, which can be create-only."""
_PART, _PARTS, _AT_ONCE = 8 << 20, 10_000, 4
"""Bytes of a part of larger ones, how many of them servers take, and how many are on their way
together: 32 MiB are within the time-out of a request on a link of 1.1 MB/s."""
_MOST_CHARACTERS = 60_000
"""Of a URL as it is asked for; the client panics at 65,535."""
_PLAIN = re.compile(r"[^/?#]+((/(?!\.\.?/)[^/?#]+)*/(?!\.\.?$)[A-Za-z0-9._~-]+)?")
"""A host and a path that a client puts together again from its folder and its last part: without
empty parts, and parts that mean another folder; with a name that stands in a URL as it is."""
_NO_RANGES = re.compile("content.(range|length)|range request", re.IGNORECASE)
"""What the client says of a server that does not answer with the range that was asked for."""
_NO_BYTES = "status code: 416"
"""What is in a server's answer to who asks for a part of an object that is empty."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_process: int | None = None
"""The process that first used a client: the client's threads are there and nowhere else."""
_MATTERS = re.compile("^(AWS|GOOGLE|AZURE)_|^SERVICE_ACCOUNT$|_PROXY$", re.IGNORECASE)
"""Variables of the environment that a client reads when it is made."""


def _check_settings(options: Mapping[str, Any]) -> None:
    """Raise UsageError for what the client, which does not look, would panic on."""
    named = {str(key): value for key, value in options.items()}
    named |= {f"variable {k}": v for k, v in os.environ.items() if k.startswith("AWS_")}
    for name, value in named.items():
        if isinstance(value, str) and _CONTROLS.search(value):
            raise UsageError(f"the store's setting {name} has a line break or the like in it")
        if "endpoint" in name.lower() and not _is_address(value):
            raise UsageError(f"the endpoint of the store ({name}) is {value!r}: write http://HOST")


def _is_address(value: Any) -> bool:
    try:
        found = urlsplit(value)
        return (
            found.scheme in WEB
            and bool(found.hostname)
            and found.port != 0
            and re.search(r"[^\x21-\x7e]", value) is None
        )
    except (ValueError, TypeError, AttributeError):
        return False


def _check_text(text: str, shown: str, more: int = 0) -> None:
    """Raise UsageError for a URL, or a part of one beside `more` characters, that is too long, or
    has in it what no URL can have."""
    if _CONTROLS.search(text):
        raise UsageError(f"{shown[:80]!r} has a line break or the like in it")
    count = len(quote(text, errors="replace")) + more
    if count > _MOST_CHARACTERS:
        raise UsageError(
            f"{shown[:80]}...: a URL of {count:,} characters is more than servers take"
        )


class Bucket:
    """Objects under a URL: ``s3://bucket/prefix``, ``gs://``, ``az://``, ``http(s)://``.

    `timeout`: seconds for one request; `retries`: how often one is tried again. `options`: the
    configuration that obstore takes for the kind of store, whose usual variables (AWS_...,
    GOOGLE_..., AZURE_...) are read, too.
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
            raise KVZipError("buckets and URLs need more: pip install 'kvzip[store]'")
        url = plain_scheme(url)
        self.url = without_secrets(url)
        _check_text(url, self.url)
        self._characters = len(url)
        self._scheme = scheme_of(url)
        self.writable = self.listable = self._scheme not in WEB
        timeout, retries = seconds("timeout", timeout), integer("retries", retries, 0, 1000)
        if not isinstance(options or {}, Mapping):
            raise UsageError("options must be a mapping of the client's settings")
        options = dict(options or {})
        if self.writable:
            _check_settings(options)
        with as_store_errors(f"cannot use {self.url} as a store", self._scheme):
            self._client = self._connected(url, options, timeout, retries)

    def _connected(
        self, url: str, options: Mapping[str, Any], timeout: float, retries: int
    ) -> ObjectStore:
        """obstore's client for a URL that names no folder."""
        from obstore import store as stores

        endpoint = options.get("endpoint") or os.environ.get(
            "AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")
        )
        client = {
            "timeout": timedelta(seconds=timeout),
            "connect_timeout": timedelta(seconds=timeout),
            "allow_http": url.startswith("http:") or str(endpoint).lower().startswith("http:"),
        }
        retry = {
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=timeout * (1 + retries)),
        }
        if not self.writable and not options:
            # As it stands: a signed URL's path and query are part of what is signed.
            return stores.HTTPStore(url, client_options=client, retry_config=retry)
        more = {"config": dict(options)} if options else {}
        return stores.from_url(url, **more, client_options=client, retry_config=retry)

    @property
    def client(self) -> ObjectStore:
        """obstore's client; raises what :meth:`check_process` does."""
        self.check_process()
        return self._client

    def check_process(self) -> None:
        """Raise StoreError in a process that was forked from one that has used a client: it has
        threads, which a fork does not take along, and what asks them waits for ever."""
        global _process
        if _process is None:
            _process = os.getpid()
        elif _process != os.getpid():
            raise StoreError(
                f"{self.url} cannot be used in a process that was forked from one that uses such "
                "stores: start it by spawn or forkserver, as multiprocessing calls them"
            )

    def named(self, path: str) -> str:
        """An object's path with where it is, for messages."""
        return f"{path} in {self.url}" if path else self.url

    @contextmanager
    def _to(self, verb: str, path: str) -> Iterator[None]:
        """Something done with an object, whose errors say what it was."""
        _check_text(path, self.url, self._characters)
        with as_store_errors(f"cannot {verb} {self.named(path)}", self._scheme):
            yield

    def get(self, path: str, most: int = SMALL) -> bytes | None:
        """An object's bytes, or None when there is none; none at all of one that has more than
        `most`."""
        import obstore

        try:
            with self._to("read", path):
                data = _body(obstore.get(self.client, path), most)
                return b"" if len(data) > most else bytes(data)
        except FileNotFoundError:
            return None

    def copy(self, path: str, sink: IO[bytes], progress: Callable[[int], None] | None) -> None:
        """Write an object's bytes to a file, in requests that each have the time-out. Raises
        FileNotFoundError when there is none."""
        with closing(Remote(self, path)) as source:
            write_all(in_pieces(source), sink, progress)

    def read_range(self, path: str, offset: int, length: int, version: str | None) -> Piece:
        """Up to `length` bytes of an object from `offset` on. Raises FileNotFoundError when there
        is none, and StoreError when it is not the version that is named."""
        import obstore
        from obstore.exceptions import BaseError

        options: dict[str, Any] = {"range": (offset, offset + length)}
        if version is not None and not version.startswith("W/"):  # weak ones match nothing
            options["if_match"] = version
        with self._to("read", path):
            began = time.perf_counter()
            try:
                found = obstore.get(self.client, path, options=options)
            except BaseError as error:
                if not offset and _NO_BYTES in str(error):
                    about = self.head(path)
                    if about is not None and not about.size:
                        return Piece(about, memoryview(b""), time.perf_counter() - began)
                if self.listable or not _NO_RANGES.search(str(error)):
                    raise
                raise StoreError(
                    f"the server of {self.named(path)} does not give parts of a file as they are "
                    f"asked for ({first_line(error)}): download the file, and open that"
                ) from None
            wait = time.perf_counter() - began
            meta = _meta(found.meta)
            if version not in (None, meta.version):
                raise StoreError(f"{self.named(path)} changed while it was read")
            data = _body(found, length)
            if len(data) > length:
                raise StoreError(
                    f"the server gives more of {self.named(path)} than it is asked for"
                )
            return Piece(meta, data, wait)

    def head(self, path: str) -> Meta | None:
        """What is known of an object, or None when there is none."""
        import obstore

        try:
            with self._to("read", path):
                return _meta(obstore.head(self.client, path))
        except FileNotFoundError:
            return None

    def put(
        self, path: str, data: bytes | IO[bytes], create: bool = True, durable: bool = True
    ) -> bool:
        """Write an object, all of a file or these bytes, whole or not at all; False when `create`
        and there is one already. What a bucket has taken is always durable.

        An object of more than 32 MiB is written in parts: of two writers at once, the last wins.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if not self.writable:
            raise UsageError(f"{self.url} is read only: write to what the server serves")
        if isinstance(data, bytes):
            size = len(data)
        else:
            size = data.seek(0, os.SEEK_END)
            data.seek(0)
        with self._to("write", path):
            try:
                if size > _ONE_REQUEST:
                    if create and self.head(path) is not None:
                        return False
                    part = max(_PART, -(-size // _PARTS))
                    how = {"use_multipart": True, "chunk_size": part, "max_concurrency": _AT_ONCE}
                    obstore.put(self.client, path, data, **how)
                else:
                    mode = "create" if create else "overwrite"
                    obstore.put(self.client, path, data, mode=mode, use_multipart=False)
            except AlreadyExistsError:
                return False
            except FileNotFoundError as error:  # of the bucket, whatever the server calls that
                words = told(error, self._scheme)
                raise StoreError(f"cannot write {self.named(path)}: {words}") from None
        return True

    def under(self, prefix: str) -> Iterator[Meta]:
        """Objects under a prefix; a part of a name is no prefix."""
        import obstore

        with suppress(FileNotFoundError), self._to("list", prefix):
            for found in obstore.list(self.client, prefix, chunk_size=1000):
                yield from map(_meta, found)

    def folders(self) -> list[str]:
        """First parts of all objects' paths."""
        import obstore

        try:
            with as_store_errors(f"cannot list {self.url}", self._scheme):
                return list(obstore.list_with_delimiter(self.client)["common_prefixes"])
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        """Delete an object, if there is one."""
        import obstore

        with suppress(FileNotFoundError), self._to("delete", path):
            obstore.delete(self.client, path)

    def open(self, path: str, profile: Profile | None = None, threads: int = 0) -> Reader:
        """A .kvz object, to be read in ranges. Raises FileNotFoundError when there is none."""
        return Reader(self.source(path), profile, threads)

    def source(self, path: str) -> Source:
        """An object's bytes, to be read in ranges. Raises FileNotFoundError when there is none."""
        return Remote(self, path)

    def sweep(self) -> None:
        """Nothing unfinished is seen in a bucket."""


Objects: TypeAlias = Bucket | Folder | SealedObjects
"""What a store is made of."""


def open_bucket(
    url: str | os.PathLike[str],
    *,
    timeout: float = 30.0,
    retries: int = 2,
    options: Mapping[str, Any] | None = None,
    make: bool = False,
    mode: int | None = None,
    key: AnyKey | None = None,
) -> Objects:
    """The objects under a URL: those of :class:`kvzip.store.folder.Folder` under a path or ``file://``,
    which takes `make` and `mode`, and those of :class:`Bucket` under any other; with `key` sealed,
    as :class:`kvzip.store.sealed.SealedObjects`."""
    found = _plain_bucket(url, timeout, retries, options, make, mode)
    return found if key is None else SealedObjects(found, key)


def _plain_bucket(
    url: str | os.PathLike[str],
    timeout: float,
    retries: int,
    options: Mapping[str, Any] | None,
    make: bool,
    mode: int | None,
) -> Bucket | Folder:
    if not isinstance(url, (str, os.PathLike)):
        raise UsageError(f"a store is named by a path or a URL, not by a {type(url).__name__}")
    timeout, retries = seconds("timeout", timeout), integer("retries", retries, 0, 1000)
    name = os.fsdecode(url)
    folder = folder_of(name)
    if folder is not None:
        return Folder(folder, name, make=make, mode=mode)
    if mode is not None:
        raise UsageError(f"mode is for folders, and {without_secrets(name)} is none")
    return Bucket(name, timeout=timeout, retries=retries, options=options)


def _body(found: Any, most: int) -> memoryview:
    """The bytes of a client's `found`; of an answer that has more than `most`, somewhat more than
    these: it may have no end."""
    for piece in found.stream(min_chunk_size=most + 1):
        return memoryview(piece).cast("B")
    return memoryview(b"")


def _meta(found: Mapping[str, Any]) -> Meta:
    return Meta(found["path"], found["size"], found["e_tag"], found["last_modified"])


def open_url(
    url: str,
    profile: Profile | None = None,
    threads: int = 0,
    *,
    timeout: float = 30.0,
    retries: int = 2,
    options: Mapping[str, Any] | None = None,
    key: AnyKey | None = None,
) -> Reader:
    """Open the .kvz file at a URL (``https://``, ``s3://``, ``file://``), to be read in ranges.

    Raises StoreError when there is none or the store does not answer; the rest as `kvzip.open`.
    """
    folder, name = _folder_and_name(url)
    shown = without_secrets(url)
    environment = frozenset(item for item in os.environ.items() if _MATTERS.search(item[0]))
    try:
        bucket = _bucket(folder, timeout, retries, frozenset((options or {}).items()), environment)
    except TypeError as error:  # a value that cannot be compared is none that a client takes
        raise UsageError(f"cannot use {shown} as a store: {error}") from None
    try:
        return Reader(bucket.source(name), profile, threads, key)
    except FileNotFoundError:
        raise NotStoredError(f"there is no {shown}") from None


def _folder_and_name(url: str) -> tuple[str, str]:
    """The URL of a folder, and the name of the file in it that a URL names. A web server's URL that
    must be asked for as it stands, since it is signed or has escapes, is a folder with no name."""
    scheme, shown = scheme_of(url), without_secrets(url)
    if not scheme:
        raise UsageError(f"{url!r} is no URL")
    if scheme != "file":
        _check_text(url, shown)
    url = plain_scheme(url)
    rest = url.partition("://")[2]
    if scheme in WEB and not _PLAIN.fullmatch(rest):
        return url.partition("#")[0], ""
    parts, _, name = rest.rpartition("/")
    if not name or (not parts and scheme != "file"):
        raise UsageError(f"{shown!r} names no file in a store")
    path = folder_of(url)
    if path is not None:
        return path.parent.as_uri(), path.name
    if "//" in rest:
        raise UsageError(
            f"{shown!r} has an empty part in its path (//): buckets cannot be asked so"
        )
    return f"{scheme}://{parts}", name


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
    return _plain_bucket(url, timeout, retries, dict(options), make=False, mode=None)


def forget_clients() -> None:
    """What :func:`open_url` opens next connects anew, as the first time."""
    _bucket.cache_clear()
