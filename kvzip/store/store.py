"""A store of documents' caches, found by model and by the tokens that a prompt begins with.

Below the URL, for each namespace NS (a hash of model, revision, dtype and profile):

========================  ==========================================================================
``store.json``            how the store is cut: tokens in a block
``NS/about.json``         what the namespace is a hash of
``NS/docs/DOC.kvz``       a document's cache, written once and never changed
``NS/chain/DOC``          its hash chain: H1, H2, ... after 1, 2, ... blocks of its tokens; "end"
``NS/with/H/DOC``         empty: this document begins with the tokens that hash to H
``NS/last/H``             the name of one such document, so that a reader need not list
``NS/used/DOC``           empty: when it was last found, for eviction
========================  ==========================================================================

H(i) is the SHA-256 of H(i-1) and the ids of block i, so it stands for all tokens up to there. What
is found is checked against the ids in the file itself.

Writers and readers share nothing but the store, and each may die at any point. Every object is
written whole or not at all. A document is acknowledged after all its marks are written and it is
seen to be still there. What a dead writer leaves is a document that is found by some of its
marks, or by none: never a damaged one. An eviction takes the marks away first and the document
after them; the chain goes last, and `prune` ends what a dead one began.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import container, dtypes
from kvzip.codec import Codec
from kvzip.container import MAGIC, Reader
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    StoreError,
    UnsupportedError,
    UsageError,
)
from kvzip.files import reading, replacing
from kvzip.identity import is_fingerprint
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.store.healing import block_tokens_of, chain_file, chain_of, name_in
from kvzip.store.remote import open_bucket
from kvzip.workers import Workers

_log = logging.getLogger("kvzip.store")

BLOCK_TOKENS = 256
_PROBES = 16
"""Requests at once, and into how many parts a search cuts what is left of a prompt."""
_TOUCH_SECONDS = 60.0
"""How old a document's time of use may get before it is written again."""
_OTHERS, _OTHERS_SECONDS = 64, 10.0
"""After a miss: how many other identities are looked at, and for how long a bucket's not again."""
_STALE = timedelta(hours=1)
"""How long a writer may take; what looks unfinished and is older is cleared away."""

T = TypeVar("T")
U = TypeVar("U")


class Identity(msgspec.Struct, frozen=True):
    """What must be equal for a cache to be of use."""

    model: str
    """Empty where a fingerprint says which weights these are, whatever they are called."""
    revision: str
    dtype: str
    profile: str = ""
    """SHA-256 of the profile that a reader must have; empty: none."""

    @classmethod
    def of(cls, model: str, revision: str, dtype: str, profile: str = "") -> Identity:
        return cls("" if is_fingerprint(revision) else model, revision, dtype, profile)

    def __str__(self) -> str:
        names = [self.model and f"model {self.model}", self.revision, self.dtype]
        return ", ".join(filter(None, [*names, self.profile and f"profile {self.profile[:12]}"]))

    @property
    def namespace(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]


class Entry(msgspec.Struct, frozen=True):
    """A document in a store."""

    key: str
    tokens: int
    encoded_bytes: int
    new: bool
    """False: the store had it already."""


class Stored(msgspec.Struct, frozen=True):
    """A document as a listing shows it."""

    key: str
    encoded_bytes: int
    used: datetime


class Match:
    """A document whose first `tokens` tokens are those of the prompt, with its file open."""

    def __init__(self, key: str, tokens: int, reader: Reader):
        self.key, self.tokens, self.reader = key, tokens, reader

    def __enter__(self) -> Match:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.reader.close()

    def snapshot(self, threads: int | None = None) -> Snapshot:
        """The shared tokens, decoded. Raises CorruptError, StoreError."""
        found: Snapshot = self.reader.decode(tokens=(0, self.tokens), threads=threads)
        return found


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int = 1
    block_tokens: int = BLOCK_TOKENS


class Store:
    """Documents' caches under a URL: a folder, ``s3://bucket/prefix``, or ``http(s)://``, the last
    to read from only.

    `limit_bytes`: documents used longest ago are evicted when all together take more. A writer
    looks after every sixteenth of the limit that it writes, so W of them may exceed it by W/16 for
    a while. `block_tokens`: of a store that is new (default: 256), or just what a store has, which
    is a UsageError otherwise; the prefixes that can be found end at multiples of it (a found one is
    then extended to the very token). `timeout`, `retries`, `options`: see
    :class:`kvzip.store.remote.Bucket`. `make`: make a local folder that is not there.
    `mode`: the permissions of a folder's objects; by default their owner's, and the group's as far
    as the folder is.

    A process that is forked may go on with a folder; of other stores it gets a StoreError at once.

    Objects may be used by any number of threads and processes at once.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        limit_bytes: int | None = None,
        block_tokens: int | None = None,
        timeout: float = 30.0,
        retries: int = 2,
        options: Mapping[str, Any] | None = None,
        make: bool = True,
        mode: int | None = None,
    ):
        if block_tokens is not None:
            block_tokens = integer("block_tokens", block_tokens, 1, 2**31 - 1)
        if limit_bytes is not None:
            limit_bytes = integer("limit_bytes", limit_bytes, 1)
        self.bucket = open_bucket(
            url, timeout=timeout, retries=retries, options=options, make=make, mode=mode
        )
        self.limit_bytes = limit_bytes
        self._asked = block_tokens
        self._settings: _Settings | None = None
        self._touched: dict[str, float] = {}
        self._total: int | None = None
        self._written = 0
        self._pool = Workers(_PROBES, "kvzip-store")
        self._searches = Workers(_PROBES, "kvzip-find")
        self._touches: dict[Future[None], int] = {}
        """Notes under way, and the process that makes each."""
        self._described: set[str] = set()
        """Namespaces that are known to say what they are of."""
        self._told: set[tuple[str, str]] = set()
        self._look_again = 0.0

    # --- writing ---------------------------------------------------------------------------

    def put(
        self,
        document: Any,
        *,
        codec: str | Codec | Mapping[str, Any] = "channel",
        profile: Profile | None = None,
        token_ids: Any = None,
        threads: int = 0,
        replace: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Entry:
        """Store a document, unless the store has it already; return when it can be found.

        `document`: a Snapshot, or a path to one, which is encoded with `codec` and `profile`; or a
        .kvz file (a path or bytes), which is stored as it is. It must name its model.
        `token_ids`: of its tokens, where the file has only their hash. `replace` overwrites
        what the store has, for a document found to be damaged.

        Raises UnsupportedError for batches, KVZipError for a document that cannot be found again
        (no model, no ids, shorter than a block) or is larger than the limit, StoreError.
        """
        with _as_file(document, codec, profile, threads, progress) as path:
            with container.open(path) as reader:
                reader.check_stored()
                identity, ids = _identity(reader), _ids_of(reader, token_ids)
                name = _name(reader, ids)
            size = path.stat().st_size
            if self.limit_bytes is not None and size > self.limit_bytes:
                raise KVZipError(f"a document of {size:,} bytes in a store of {self.limit_bytes:,}")
            chain = _chain(ids, self._made().block_tokens)
            if not chain:
                raise KVZipError(
                    f"the document has {len(ids)} tokens and the store finds prefixes by blocks of "
                    f"{self._made().block_tokens}: give a longer one, or a new store a smaller "
                    "block_tokens"
                )
            new = self._write(identity, name, chain, path, replace)
        entry = Entry(f"{identity.namespace}/{name}", len(ids), size, new)
        if self.limit_bytes is not None:
            self._keep_limit(entry, self.limit_bytes)
        return entry

    def _write(
        self, identity: Identity, name: str, chain: Sequence[str], path: Path, replace: bool
    ) -> bool:
        space, doc = identity.namespace, f"{identity.namespace}/docs/{name}.kvz"
        self._describe(space, identity)
        new = False
        for _ in range(8):
            self.bucket.put(f"{space}/chain/{name}", chain_file(chain), create=False)
            made = self.bucket.put(doc, path, create=not replace)
            if not made and not self._has_header(doc):
                made = self.bucket.put(doc, path, create=False)
            new |= made
            self._each(lambda h: self.bucket.put(f"{space}/with/{h}/{name}", b""), chain)
            self._each(
                lambda h: self.bucket.put(f"{space}/last/{h}", name.encode(), create=False), chain
            )
            # Gone: an eviction had chosen it before it was written anew. All its marks may be gone.
            if self.bucket.head(doc) is not None:
                self._touched[f"{space}/{name}"] = time.monotonic()
                return new
        raise StoreError(f"{doc} is evicted as often as it is written: raise the store's limit")

    def _describe(self, space: str, identity: Identity) -> None:
        """Write what a namespace is of, if it does not say so."""
        about, data = f"{space}/about.json", msgspec.json.encode(identity)
        if space not in self._described:
            if not self.bucket.put(about, data) and self.bucket.get(about) != data:
                self.bucket.put(about, data, create=False)
            self._described.add(space)

    def _has_header(self, doc: str) -> bool:
        """Whether a document is whole as far as its length and first bytes tell. (A power cut can
        leave a file without its bytes.)"""
        try:
            self.bucket.open(doc).close()
        except (CorruptError, FormatError):
            return False
        except (FileNotFoundError, KVZipError):
            return True
        return True

    def _each(self, do: Callable[[T], U], items: Iterable[T]) -> list[U]:
        return list(self._pool.map(do, items))

    def _made(self) -> _Settings:
        """The store's settings; those of a new store are written."""
        found = self._read_settings()
        if found is None:
            self._write_settings(_Settings(block_tokens=self._asked or BLOCK_TOKENS), create=True)
            found = self._read_settings()
            if found is None:
                raise StoreError(f"{self.bucket.url} does not keep what is written to it")
        return found

    def _read_settings(self) -> _Settings | None:
        if self._settings is None and (data := self.bucket.get("store.json")) is not None:
            try:
                found = msgspec.json.decode(data, type=_Settings)
            except msgspec.ValidationError as error:
                raise FormatError(f"{self.bucket.url} is no store of ours: {error}") from None
            except (msgspec.DecodeError, UnicodeDecodeError):
                found = self._settings_again()
            if found.version != 1 or found.block_tokens < 1:
                raise FormatError(f"{self.bucket.url} is a store of another version")
            if self._asked not in (None, found.block_tokens):
                raise UsageError(
                    f"{self.bucket.url} is a store of blocks of {found.block_tokens} tokens, not "
                    f"{self._asked}: leave block_tokens out, or take another store"
                )
            self._settings = found
        return self._settings

    def _write_settings(self, settings: _Settings, create: bool) -> None:
        self.bucket.put("store.json", msgspec.json.encode(settings), create=create, durable=True)

    def _settings_again(self) -> _Settings:
        """The settings that a power cut has taken: as asked for if the store has no documents, else
        those that a document's marks were made with."""
        documents = self.documents() if self.bucket.listable else []
        found = None if documents else self._asked or BLOCK_TOKENS
        for document in documents:
            space, name = document.key.split("/")
            with suppress(KVZipError, OSError), self.bucket.open(_path(document.key)) as reader:
                ids, marks = _ids_of(reader, None), chain_of(self.bucket, space, name)
                found = block_tokens_of(ids, marks)
            if found is not None:
                break
        if found is None:
            raise FormatError(
                f"store.json in {self.bucket.url} is damaged, and no document tells what it held: "
                'write {"version":1,"block_tokens":N} into it, with the N that the store was '
                f"made with ({BLOCK_TOKENS} unless another was given)"
            )
        _log.warning("store.json in %s was damaged and is written anew", self.bucket.url)
        settings = _Settings(block_tokens=found)
        if self.bucket.writable:
            try:
                self._write_settings(settings, create=False)
            except StoreError as error:  # a reader may have no right to write
                _log.info("it is not written: %s", error)
        return settings

    # --- finding ---------------------------------------------------------------------------

    def find(
        self,
        token_ids: Any,
        *,
        model: str,
        revision: str,
        dtype: str,
        profile: Profile | None = None,
        threads: int = 0,
    ) -> Match | None:
        """The document that shares the longest prefix with a prompt, or None; close it after use.

        Of the documents that share the most whole blocks one is taken, and its prefix extended to
        the first token that differs. Documents written with `profile`, and those that need none,
        are looked at. A document whose sliding layers lack what a cache of the shared tokens needs
        is passed over, and so is one whose header is damaged. Raises StoreError.
        """
        ids = _ids(token_ids)
        settings = self._read_settings()
        if settings is None:
            return None
        chain = _chain(ids, settings.block_tokens)
        form = dtypes.get(dtype).name

        def identity_of(known: Profile | None) -> Identity:
            return Identity.of(model, revision, form, "" if known is None else known.id)

        def search(known: Profile | None) -> Match | None:
            return self._search(
                identity_of(known).namespace, ids, chain, settings.block_tokens, known, threads
            )

        # Beside each other: a search is a few round trips, one after the other.
        searches = [
            self._searches.submit(search, known) for known in dict.fromkeys((profile, None))
        ]
        errors = [error for each in searches if (error := each.exception()) is not None]
        matches = [match for each in searches if not each.exception() and (match := each.result())]
        best = max(matches, key=lambda match: match.tokens, default=None) if not errors else None
        for match in matches:
            if match is not best:
                match.reader.close()
        if errors:
            raise errors[0]
        if best is not None:
            self._touch(best.key)
        elif chain:
            self._tell_of_others(identity_of(profile), chain[0])
        return best

    def _tell_of_others(self, wanted: Identity, mark: str) -> None:
        """Say once if the store has documents that begin alike, under another identity."""
        now = time.monotonic()
        if not self.bucket.listable or now < self._look_again:
            return
        self._look_again = now + (0 if self.bucket.folder is not None else _OTHERS_SECONDS)
        try:
            own = wanted.namespace
            spaces = [s for s in self._spaces() if s != own and (own, s) not in self._told]
            marks = self._each(lambda s: self.bucket.get(f"{s}/last/{mark}"), spaces[:_OTHERS])
            alike = [s for s, data in zip(spaces, marks, strict=False) if data]
            for space in alike:
                self._told.add((wanted.namespace, space))
                found = self.bucket.get(f"{space}/about.json") or b"{}"
                other = msgspec.json.decode(found, type=Identity)
                _log.warning(
                    "%s has the prompt's tokens for (%s), not for (%s): they are not used",
                    self.bucket.url,
                    other,
                    wanted,
                )
        except (StoreError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.info("no other documents are looked for: %s", error)

    def _search(
        self,
        space: str,
        ids: NDArray[Any],
        chain: Sequence[str],
        block_tokens: int,
        profile: Profile | None,
        threads: int,
    ) -> Match | None:
        limit, rejected = len(chain), set[str]()
        while limit:
            # Whoever has the first n blocks has the first n - 1, so the most is found by cutting.
            low, high, name = 0, limit, ""
            while low < high:
                at = sorted({low + -(-(high - low) * i // _PROBES) for i in range(1, _PROBES + 1)})
                found = self._each(lambda i: self.bucket.get(f"{space}/last/{chain[i - 1]}"), at)
                marked = [i for i, data in zip(at, found, strict=True) if data is not None]
                if marked:
                    low = marked[-1]
                    name = name_in(found[at.index(low)])
                high = min((i - 1 for i in at if i > low), default=high)
            if not low:
                return None
            sure = low * block_tokens
            for candidate in itertools.chain([name], self._others(space, chain[low - 1], name)):
                if not candidate or candidate in rejected:
                    continue
                match = self._usable(f"{space}/{candidate}", ids, sure, profile, threads)
                if match is not None:
                    return match
                rejected.add(candidate)
            limit = low - 1
        return None

    def _usable(
        self, key: str, ids: NDArray[Any], sure: int, profile: Profile | None, threads: int
    ) -> Match | None:
        """The document if it is there, whole as far as its header tells, and holds what a prompt
        that shares `sure` tokens with it needs."""
        try:
            reader = self.bucket.open(_path(key), profile, threads)
        except FileNotFoundError:
            return None
        except StoreError:
            raise
        except KVZipError as error:
            _log.warning("%s is passed over: %s", key, error)
            return None
        count = _shared(reader, ids, sure)
        if count >= sure and reader.layout.lacking(count) is None:
            return Match(key, count, reader)
        reader.close()
        return None

    def _others(self, space: str, mark: str, name: str) -> Iterator[str]:
        """Other documents with that mark."""
        if self.bucket.listable:
            for meta in self.bucket.under(f"{space}/with/{mark}"):
                other = meta.path.rpartition("/")[2]
                if other != name:
                    yield other

    def _touch(self, key: str) -> None:
        """Note that a document was used, not more often than eviction needs it. Who found it does
        not wait for that."""
        now = time.monotonic()
        if not self.bucket.writable or now - self._touched.get(key, -1e9) < _TOUCH_SECONDS:
            return
        self._touched[key] = now
        touch = self._pool.submit(self._note_use, key)
        self._touches[touch] = os.getpid()
        touch.add_done_callback(lambda done: self._touches.pop(done, None))

    def _note_use(self, key: str) -> None:
        space, name = key.split("/")
        try:
            self.bucket.put(f"{space}/used/{name}", b"", create=False)
        except StoreError as error:  # a reader may have no right to write
            _log.info("the use of %s is not noted: %s", key, error)

    # --- by key ----------------------------------------------------------------------------

    def open(self, key: str, profile: Profile | None = None, threads: int = 0) -> Reader:
        """Open a document by its key, to be read in ranges. Raises StoreError when it is not
        there (any more); the rest as :func:`kvzip.open`."""
        try:
            return self.bucket.open(_path(key), profile, threads)
        except FileNotFoundError:
            raise StoreError(f"there is no document {key} in {self.bucket.url}") from None

    def fetch(
        self, key: str, path: str | os.PathLike[str], progress: Callable[[int], None] | None = None
    ) -> int:
        """Copy a document to a file, which appears after every checksum is compared; its length.

        Raises CorruptError, StoreError.
        """
        with replacing(path) as file:
            try:
                self.bucket.copy(_path(key), file, progress)
            except FileNotFoundError:
                raise StoreError(f"there is no document {key} in {self.bucket.url}") from None
            size = file.tell()
            file.flush()
            with container.open(file) as reader:
                reader.check_stored()
            return size

    def remove(self, key: str) -> bool:
        """Take a document out of the store; whether it was there."""
        doc = _path(key)
        there = self.bucket.head(doc) is not None
        space, name = key.split("/")
        chain = chain_of(self.bucket, space, name)
        self._each(lambda h: self.bucket.delete(f"{space}/with/{h}/{name}"), chain)
        self._each(lambda h: self._repoint(space, h, name), chain)
        self.bucket.delete(doc)
        self.bucket.delete(f"{space}/used/{name}")
        self.bucket.delete(f"{space}/chain/{name}")
        return there

    def _repoint(self, space: str, mark: str, name: str) -> None:
        """Let ``last/mark`` name another document than `name`, or be gone if there is none."""
        path = f"{space}/last/{mark}"
        if (found := self.bucket.get(path)) is None or name_in(found) not in (name, ""):
            return
        other = next(self._others(space, mark, name), None)
        if other is None:
            self.bucket.delete(path)
            # Written meanwhile? Then its own pointer may be what was deleted.
            other = next(self._others(space, mark, name), None)
        if other is not None:
            self.bucket.put(path, other.encode(), create=False)

    # --- size ------------------------------------------------------------------------------

    def identities(self) -> dict[str, Identity]:
        """What the documents of each namespace, the first part of their keys, are of."""
        found = {}
        for space in self._spaces():
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                data = self.bucket.get(f"{space}/about.json") or b""
                found[space] = msgspec.json.decode(data, type=Identity)
        return found

    def documents(self) -> list[Stored]:
        """All documents, the one that was used longest ago first. Raises UsageError for a store
        that cannot be listed (behind HTTP)."""
        wait([touch for touch, by in self._touches.copy().items() if by == os.getpid()])
        found = []
        for space in self._spaces():
            used = {
                m.path.rpartition("/")[2]: m.modified for m in self.bucket.under(f"{space}/used")
            }
            for meta in self.bucket.under(f"{space}/docs"):
                name = meta.path.rpartition("/")[2].removesuffix(".kvz")
                last = max(meta.modified, used.get(name, meta.modified))
                found.append(Stored(f"{space}/{name}", meta.size, last))
        return sorted(found, key=lambda d: (d.used, d.key))

    def _spaces(self) -> list[str]:
        if not self.bucket.listable:
            raise UsageError(f"{self.bucket.url} cannot be listed: name what the server serves")
        return [name for name in self.bucket.folders() if len(name) == 32]

    def prune(self, limit_bytes: int | None = None, keep: str | None = None) -> list[str]:
        """Evict documents, and clear away what dead writers left; keys of the evicted.

        When all take more than `limit_bytes` (None: no limit), those used longest ago go, until
        the rest take a sixteenth less than it. `keep`: the key of one that stays.
        """
        documents = self.documents()
        total = sum(d.encoded_bytes for d in documents)
        over = limit_bytes is not None and total > limit_bytes
        evicted = []
        for document in documents:
            if not over or limit_bytes is None or total <= limit_bytes - limit_bytes // 16:
                break
            if document.key != keep:
                self.remove(document.key)
                evicted.append(document.key)
                total -= document.encoded_bytes
        self._total, self._written = total, 0
        self._clear({d.key for d in documents})
        return evicted

    def _clear(self, keys: set[str]) -> None:
        old = datetime.now(UTC) - _STALE
        for space in self._spaces():
            for meta in list(self.bucket.under(f"{space}/chain")):
                key = f"{space}/{meta.path.rpartition('/')[2]}"
                if key not in keys and meta.modified < old:
                    self.remove(key)
        self.bucket.sweep()

    def _keep_limit(self, entry: Entry, limit: int) -> None:
        self._written += entry.encoded_bytes if entry.new else 0
        if (
            self._total is None
            or self._total + self._written > limit
            or self._written > limit // 16
        ):
            self.prune(limit, keep=entry.key)


# --- documents ---------------------------------------------------------------------------------


def _chain(ids: NDArray[Any], block_tokens: int) -> list[str]:
    """The hash chain of the whole blocks of a document."""
    data = np.ascontiguousarray(ids, "<u4")
    digest, chain = b"", []
    for end in range(block_tokens, len(data) + 1, block_tokens):
        digest = hashlib.sha256(digest + data[end - block_tokens : end].tobytes()).digest()
        chain.append(digest.hex())
    return chain


def _identity(reader: Reader) -> Identity:
    header = reader.header
    if not (header.origin.model or is_fingerprint(header.origin.revision)):
        raise KVZipError("the document does not name its model, by which it would be found")
    return Identity.of(
        header.origin.model, header.origin.revision, header.layout.dtype, header.profile or ""
    )


def _ids(given: Any) -> NDArray[Any]:
    """Token ids in any form as [tokens]."""
    ids = np.asarray(given).reshape(-1)
    if ids.dtype.kind not in "iu" and ids.size:
        raise UsageError(f"token ids must be integers, not {ids.dtype}")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
        raise UsageError("token ids must be from 0 to 4,294,967,295")
    return ids.astype(np.uint32)


def _ids_of(reader: Reader, given: Any) -> NDArray[Any]:
    """Ids of the document's tokens, from the file or as given, checked."""
    if any(len(layer.k) == 4 and layer.k[0] != 1 for layer in reader.layout.layers):
        raise UnsupportedError("the document is a batch: store each row as a document of its own")
    ids = reader.token_ids
    if ids is None:
        if given is None:
            raise KVZipError("the document has no token ids, by which it would be found: give them")
        ids = _ids(given)
        digest = hashlib.sha256(np.ascontiguousarray(ids, "<u4").tobytes()).hexdigest()
        if reader.header.token_ids_sha256 not in (None, digest):
            raise KVZipError("the token ids given are not those of the document")
    ids = ids.reshape(-1)
    if len(ids) != reader.layout.tokens:
        raise KVZipError(f"{len(ids)} token ids for a document of {reader.layout.tokens} tokens")
    return ids


def _name(reader: Reader, ids: NDArray[Any]) -> str:
    """A document's name within its namespace: its tokens, how it is coded, and what it holds."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, "<u4").tobytes())
    digest.update(msgspec.json.encode(reader.header.codec, order="sorted"))
    digest.update(msgspec.json.encode(reader.layout))
    return digest.hexdigest()


def _shared(reader: Reader, ids: NDArray[Any], sure: int) -> int:
    """How many first tokens a document shares with a prompt; `sure` if it withholds its ids."""
    known = reader.token_ids
    if known is None:
        return min(sure, reader.layout.tokens)
    shared = min(len(ids), len(known.reshape(-1)))
    equal = known.reshape(-1)[:shared] == ids[:shared]
    return int(np.append(equal, False).argmin())


@contextmanager
def _as_file(
    document: Any,
    codec: str | Codec | Mapping[str, Any],
    profile: Profile | None,
    threads: int,
    progress: Callable[[int], None] | None,
) -> Iterator[Path]:
    """The document as a .kvz file on disk."""
    if isinstance(document, (str, os.PathLike)):
        path = Path(document)
        with reading(path) as file:
            encoded = file.read(len(MAGIC)) == MAGIC
            if encoded and path.is_file():
                yield path
                return
            if encoded:  # a pipe
                file.seek(0)
                document = file.read()
        if not encoded:
            document = Snapshot.load(path)
    with tempfile.TemporaryDirectory(prefix="kvzip-") as folder:
        path = Path(folder) / "doc.kvz"
        if isinstance(document, Snapshot):
            container.write(path, document, codec, profile, threads, progress=progress)
        else:
            try:
                path.write_bytes(document)
            except TypeError:
                kind = type(document).__name__
                raise UsageError(
                    f"a {kind} is no document: give a Snapshot, a path or bytes"
                ) from None
        yield path


def _path(key: str) -> str:
    """Where a document lies."""
    space, slash, name = key.partition("/")
    if not slash or not (space + name).isalnum():
        raise KVZipError(f"{key!r} is not a key of a document")
    return f"{space}/docs/{name}.kvz"
