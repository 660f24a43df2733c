"""A store of documents' caches, found by model and by the tokens that a prompt begins with.

Below the URL, for each namespace NS (a hash of model, revision, dtype and profile):

========================  ==========================================================================
``store.json``            how the store is cut: tokens in a block
``NS/about.json``         what the namespace is a hash of
``NS/docs/DOC.kvz``       a document's cache, written once and never changed
``NS/chain/DOC``          its hash chain: H1, H2, ... after 1, 2, ... blocks of its tokens; "end"
``NS/with/H/DOC``         this document begins with the tokens that hash to H: empty, or "-" where
                          it is of no use to a prompt that shares no more with it
``NS/last/H``             the name of one such document, so that a reader need not list; with a "-"
                          behind it if none of them is of use there
``NS/used/DOC``           empty: when it was last found, for eviction
``profiles/ID.kvprofile`` a profile, by its SHA-256, which documents name
``NS/profiles/ID``        empty: there are documents that need this profile, and else are of the
                          same identity as those of NS, which need none
``NS/profile``            the last such ID, for a reader that cannot list
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

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import IO, Any

import msgspec
from numpy.typing import ArrayLike

from kvzip import api, dtypes, metrics
from kvzip.codec import Codec
from kvzip.container import Reader
from kvzip.container.sealed import AnyKey
from kvzip.errors import (
    CorruptError,
    FormatError,
    KVZipError,
    NotStoredError,
    ProfileError,
    StoreError,
    UsageError,
)
from kvzip.files import replacing
from kvzip.options import boolean, callback, integer, text
from kvzip.parsing import from_json
from kvzip.profile import Profile, check_profile
from kvzip.snapshot import Snapshot
from kvzip.store import listing
from kvzip.store.bucket import open_bucket
from kvzip.store.evicting import Evictor
from kvzip.store.finding import PROBES, Finder, Match, Prompt
from kvzip.store.given import as_file
from kvzip.store.keys import (
    About,
    Identity,
    Ids,
    check_place,
    document_name,
    document_path,
    hash_chain,
    token_ids_from,
    token_ids_of,
)
from kvzip.store.listing import Stored
from kvzip.store.marks import chain_file, first_useful, mark, stored_chain
from kvzip.store.profiles import Profiles, StoredProfile, id_in, is_profile_key
from kvzip.store.sealed import SealedObjects
from kvzip.store.settings import SettingsFile
from kvzip.store.uses import Uses
from kvzip.workers import Workers, finished, thread_count


class Entry(msgspec.Struct, frozen=True):
    """A document in a store."""

    key: str
    tokens: int
    encoded_bytes: int
    new: bool
    """False: the store had it already."""


class Store:
    """Documents' caches under a URL: a folder, ``s3://bucket/prefix``, or ``http(s)://``, the last
    to read from only.

    `limit_bytes`: documents used longest ago are evicted when all together take more. A writer
    looks after every sixteenth of the limit that it writes, so W of them may exceed it by W/16 for
    a while, or by W documents where these are larger. `block_tokens`: of a store that is new
    (default: 256), or just what a store has, which is a UsageError otherwise; the prefixes that can
    be found end at multiples of it (a found one is then extended to the very token). `timeout`,
    `retries`, `options`: see :class:`kvzip.store.bucket.Bucket`; a folder's files take as long as
    its disk does.
    `make`: make a local folder that is not there.
    `mode`: the permissions of a folder's objects; by default their owner's, and the group's as far
    as the folder is. `key`: seal the store (AES-256-GCM; docs/store.md): its documents, what leads
    to them and all names; 32 bytes, a `kvzip.Key`, or what has keys by their names. A store keeps
    the key that it was made with.

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
        key: AnyKey | None = None,
    ):
        if block_tokens is not None:
            block_tokens = integer("block_tokens", block_tokens, 1, 2**31 - 1)
        if limit_bytes is not None:
            limit_bytes = integer("limit_bytes", limit_bytes, 1)
        self.bucket = open_bucket(
            url,
            timeout=timeout,
            retries=retries,
            options=options,
            make=boolean("make", make),
            mode=mode,
            key=key,
        )
        self.limit_bytes = limit_bytes
        self._again = partial(
            Store,
            url,
            limit_bytes=limit_bytes,
            block_tokens=block_tokens,
            timeout=timeout,
            retries=retries,
            options=options,
            make=make,
            mode=mode,
            key=key,
        )
        self._holds_key = not (key is None or callable(key))
        self._pool = Workers(PROBES, "kvzip-store")
        self._settings = SettingsFile(self.bucket, block_tokens)
        self._profiles = Profiles(self.bucket, self._pool)
        self._finder = Finder(self.bucket, self._pool, self._profiles)
        self._uses = Uses(self.bucket, self._pool)
        self._evictor = Evictor(self.bucket, self._pool)
        self._described: set[str] = set()
        """Namespaces that are known to say what they are of."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as its URL and settings: another process opens it anew. Raises
        UsageError for one with a key, which would be in the pickle."""
        if self._holds_key:
            raise UsageError(
                "a store is not pickled with its key: give key= as a function, which is looked up "
                "by its name where it is unpickled"
            )
        return self._again, ()

    # --- writing ---------------------------------------------------------------------------

    def put(
        self,
        document: Snapshot | str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        codec: str | Codec | Mapping[str, Any] = "channel",
        profile: Profile | None = None,
        token_ids: ArrayLike | None = None,
        threads: int = 0,
        replace: bool = False,
        progress: Callable[[int], None] | None = None,
        device: Any = None,
    ) -> Entry:
        """Store a document, unless the store has it already; return when it can be found.

        `document`: a Snapshot, or a path to one, which is encoded with `codec` and `profile`; or a
        .kvz file (a path or bytes), which is stored as it is. It must name its model.
        `token_ids`: the ids of its tokens, where the file has only their hash. `replace` overwrites
        what the store has, for a document found to be damaged. `device`: the GPU that encodes what
        lies in its memory, as :func:`kvzip.encode` has it. The profile that the document needs is
        stored before it, if it is the one given and the store does not have it.

        Raises UnsupportedError for batches, KVZipError for a document that cannot be found again
        (no model, no ids, shorter than a block) or is larger than the limit, StoreError.
        """
        callback("progress", progress)
        check_profile(profile)
        thread_count(threads)
        replace = boolean("replace", replace)
        with as_file(document, codec, profile, threads, progress, device) as file:
            with api.open(file) as reader:
                api.choose_codec(codec, reader.layout, profile)
                reader.check_stored()
                identity = Identity.of_document(reader)
                about = About.of_identity(identity, reader.header.origin.model)
                ids = token_ids_of(reader, token_ids)
                name = document_name(reader, ids)
                size, least = reader.encoded_bytes, reader.layout.least_prefix
            needed = profile if profile is not None and profile.id == identity.profile else None
            if needed is None:
                self._check_room(size, "a document")
            else:
                self._check_room(size + needed.nbytes, "a document and its profile")
            self._chain(ids, self._settings.wanted())  # before anything is made
            new, written = self._write(about, name, ids, least, file, needed, replace)
        entry = Entry(f"{identity.namespace}/{name}", len(ids), size, new)
        self._keep_limit(written, entry.key)
        return entry

    def put_profile(self, profile: Profile, replace: bool = False) -> bool:
        """Store a profile, unless the store has it already; whether it was written. `put` does so
        for the documents that it encodes; this is for .kvz files that are stored as they are, and,
        with `replace`, for a profile found to be damaged."""
        check_profile(profile)
        if profile is None:
            raise ProfileError("there is no profile to store: it is None")
        self._check_room(profile.nbytes, "a profile")
        self.check_key()
        written = self._profiles.put(profile, boolean("replace", replace))
        self._keep_limit(profile.nbytes * written)
        return written

    def _check_room(self, size: int, what: str) -> None:
        """Raise KVZipError for what is larger than the limit."""
        if self.limit_bytes is not None and size > self.limit_bytes:
            raise KVZipError(f"{what} of {size:,} bytes in a store of {self.limit_bytes:,}")

    def _keep_limit(self, written: int, keep: str | None = None) -> None:
        """Evict what is too much, perhaps, after so many bytes were written."""
        if self.limit_bytes is not None and self._evictor.over(written, self.limit_bytes):
            self.prune(self.limit_bytes, keep)

    def _chain(self, ids: Ids, block_tokens: int) -> list[str]:
        """The hash chain of a document. Raises KVZipError for one that is too short."""
        chain = hash_chain(ids, block_tokens)
        if not chain:
            raise KVZipError(
                f"the document has {len(ids)} tokens and the store finds prefixes by blocks of "
                f"{block_tokens}: give a longer one, or a new store a smaller block_tokens"
            )
        return chain

    def _write(
        self,
        about: About,
        name: str,
        ids: Ids,
        least: int | None,
        file: IO[bytes],
        profile: Profile | None,
        replace: bool,
    ) -> tuple[bool, int]:
        """Write a document, the profile that it needs before it, and its marks after it, in the
        order that lets a writer die at any point; whether the document is new, and how many bytes
        were written. `least`: how many first tokens of it a prompt must share."""
        space = about.identity.namespace
        doc, own_chain = f"{space}/docs/{name}.kvz", f"{space}/chain/{name}"
        needed = f"{space}/about.json", own_chain, doc
        new, written, put = False, 0, self.bucket.put
        for _ in range(8):
            block_tokens = self._settings.made()
            chain = self._chain(ids, block_tokens)
            self._describe(space, about)
            if profile is not None and self._profiles.put(profile, replace and not new):
                written += profile.nbytes
            put(own_chain, chain_file(chain), create=False)
            made = put(doc, file, create=not replace)
            if not made and not self._is_in_place(f"{space}/{name}"):
                made = put(doc, file, create=False)
            new |= made
            first = first_useful(chain, block_tokens, least)
            mark(self.bucket, self._pool, f"{space}/{name}", chain, first)
            if about.profile:
                self._profiles.mark(about.identity)
            # Gone: an eviction had chosen it before it was written anew, or somebody has deleted
            # all of the store. All its marks may be gone.
            looks: list[Callable[[], object]] = [partial(self._settings.is_still, block_tokens)]
            looks += [partial(self.bucket.head, path) for path in needed]
            there = all(self._pool.map(lambda look: look(), looks))
            if there and self._has_profile(about.profile, profile):
                (self._uses.written if new else self._uses.note)(f"{space}/{name}")
                return new, written + new * file.seek(0, os.SEEK_END)
            self._described.discard(space)
        raise StoreError(f"{doc} is evicted as often as it is written: raise the store's limit")

    def _has_profile(self, needed: str, given: Profile | None) -> bool:
        """Whether the profile that a document needs stays, now that the document is there. One that
        was not given cannot be written again: that it is missing is said."""
        if not needed or self._profiles.is_kept(needed):
            return True
        return given is None and not self._profiles.has(needed)

    def _describe(self, space: str, about: About) -> None:
        """Write what a namespace is of, if it does not say so."""
        path, data = f"{space}/about.json", msgspec.json.encode(about)
        if space not in self._described:
            if not self.bucket.put(path, data) and not self._is_of(path, about.identity):
                self.bucket.put(path, data, create=False)
            self._described.add(space)

    def _is_of(self, path: str, identity: Identity) -> bool:
        try:
            found = from_json(self.bucket.get(path) or b"", About)
        except (CorruptError, FormatError):  # a power cut can leave it empty
            return False
        return found.identity == identity

    def _is_in_place(self, key: str) -> bool:
        """Whether a document is whole, and the one that belongs there, as far as its length and
        first bytes tell. (A power cut can leave a file without its bytes.)"""
        try:
            reader = self.bucket.open(document_path(key))
            check_place(reader, key)
            reader.close()
        except (CorruptError, FormatError):
            return False
        except (FileNotFoundError, KVZipError):
            return True
        return True

    # --- finding ---------------------------------------------------------------------------

    def find(
        self,
        token_ids: ArrayLike,
        *,
        model: str,
        revision: str,
        dtype: str,
        profile: Profile | None = None,
        threads: int = 0,
    ) -> Match | None:
        """The document that shares the longest prefix with a prompt, or None; close it after use.

        Of the documents that share the most whole blocks one is taken, and its prefix extended to
        the first token that differs. Documents that need no profile are looked at, and those
        written with `profile` or, where none is given, with one that the store has, which is
        fetched when the first number is decoded. A document whose sliding layers lack what a cache
        of the shared tokens needs is passed over, and so is one whose header is damaged. Raises
        StoreError.
        """
        ids = token_ids_from(token_ids)
        check_profile(profile)
        thread_count(threads)  # what opens documents takes what it raises for damage
        model, revision = text("model", model), text("revision", revision)
        block_tokens = self._settings.block_tokens()
        if block_tokens is None:
            return None
        prompt = Prompt(ids, hash_chain(ids, block_tokens), block_tokens)
        known = "" if profile is None else profile.id
        wanted = Identity.of(model, revision, dtypes.get(dtype).name, known)
        with metrics.lookup("store"):
            best = self._finder.best(prompt, profile, wanted, threads)
        near = bool(prompt.near)
        if best is not None:
            self._uses.note(best.key)
            metrics.count("found_tokens", best.tokens, where="store")
        elif prompt.chain:
            near |= self._finder.tell_of_others(wanted, prompt.chain[0])
        result = "hit" if best is not None else "near_miss" if near else "miss"
        metrics.count("lookups", where="store", result=result)
        return best

    # --- by key ----------------------------------------------------------------------------

    def open(self, key: str, profile: Profile | None = None, threads: int = 0) -> Reader:
        """Open a document by its key, to be read in ranges; unless a profile is given, the one that
        it needs is fetched when the first number is decoded. Raises NotStoredError when it is not
        there (any more); the rest as :func:`kvzip.open`."""
        path, chain = document_path(key), self._stored_chain(key)
        try:
            reader = self.bucket.open(path, profile, threads)
        except FileNotFoundError:
            self.check_key()  # or it has another name
            raise NotStoredError(f"there is no document {key} in {self.bucket.url}") from None
        check_place(reader, key, chain.result())
        reader.look_for_profile(self.get_profile)
        return reader

    def _stored_chain(self, key: str) -> Future[list[str] | None]:
        """A document's hash chain, while it is opened. In a sealed store nothing is at a place that
        is not its own, so that none is needed."""
        if isinstance(self.bucket, SealedObjects):
            return finished(lambda: None)
        return self._pool.submit(stored_chain, self.bucket, *key.split("/"))

    def get_profile(self, key: str) -> Profile:
        """The profile with that SHA-256, which is compared, or with that key; the last ones stay in
        memory. Raises ProfileError when the store has none, CorruptError when it is damaged,
        StoreError."""
        profile_id = id_in(key)
        self.check_key()
        return self._profiles.get(profile_id)

    def fetch(
        self, key: str, path: str | os.PathLike[str], progress: Callable[[int], None] | None = None
    ) -> int:
        """Copy a document, or a profile, to a file, which appears after every checksum is compared;
        its length.

        Raises CorruptError, StoreError, ProfileError for a profile that is not there.
        """
        callback("progress", progress)
        self.check_key()
        with replacing(path) as file:
            if is_profile_key(key):
                return self._profiles.copy(id_in(key), file)
            try:
                self.bucket.copy(document_path(key), file, progress)
            except FileNotFoundError:
                raise NotStoredError(f"there is no document {key} in {self.bucket.url}") from None
            size = file.tell()
            file.flush()
            chain = self._stored_chain(key).result()
            with api.open(file) as reader:
                check_place(reader, key, chain)
                reader.check_stored()
            return size

    def remove(self, key: str) -> bool:
        """Take a document, or a profile that no document needs, out of the store; whether it was
        there. Raises ProfileError for a profile that is needed."""
        if is_profile_key(key):
            profile_id = id_in(key)
            self.check_key()
            return self._profiles.remove(profile_id)
        document_path(key)  # raises KVZipError for what is no key
        self.check_key()
        return self._evictor.remove(key)

    def check_key(self) -> None:
        """Raise SealError for a store that was sealed with another key, or with none, FormatError
        for one of another version: whose documents have other names, so that none would be there.
        What uses the store does so, too: this is to know it before. Raises StoreError.
        """
        self._settings.block_tokens()

    # --- what there is ---------------------------------------------------------------------

    def abouts(self) -> dict[str, About]:
        """What the documents of each namespace, the first part of their keys, are of."""
        self.check_key()
        return listing.abouts(self.bucket)

    def documents(self) -> list[Stored]:
        """All documents, the one that was used longest ago first. Raises UsageError for a store
        that cannot be listed (behind HTTP)."""
        self.check_key()
        self._uses.settle()
        return listing.documents(self.bucket)

    def profiles(self) -> list[StoredProfile]:
        """All profiles, the oldest first, with how many documents need each. Raises UsageError for
        a store that cannot be listed (behind HTTP)."""
        self.check_key()
        return self._profiles.listed()

    def prune(
        self, limit_bytes: int | None = None, keep: str | None = None, profiles: bool = False
    ) -> list[str]:
        """Evict documents, and clear away what dead writers left; keys of the evicted.

        When all take more than `limit_bytes` (None: no limit), profiles among them, those used
        longest ago go, until the rest take a sixteenth less than it. `keep`: the key of one that
        stays. A profile never goes while a document needs it; one that has been there for an hour
        and that no document needs goes when there is more than the limit, or with `profiles`.
        Raises UsageError for a limit that is no integer of 0 or more.
        """
        if limit_bytes is not None:
            limit_bytes = integer("limit_bytes", limit_bytes, 0)
        stored = self.documents()
        known = self._profiles.listed(stored)
        total = sum(d.encoded_bytes for d in stored) + sum(p.encoded_bytes for p in known)
        profiles = boolean("profiles", profiles) or (
            limit_bytes is not None and total > limit_bytes
        )
        unneeded = self._profiles.prune(known) if profiles else []
        beside = sum(p.encoded_bytes for p in known if p.key not in unneeded)
        evicted = self._evictor.prune(stored, limit_bytes, keep, beside)
        if profiles and evicted:
            unneeded += self._profiles.prune(self._profiles.listed())
        self._profiles.sweep()
        metrics.count("evictions", len(evicted))
        return evicted + unneeded
