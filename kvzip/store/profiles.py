"""Profiles in a store: each is kept once, by the SHA-256 of its file, as long as documents need it.

Without its profile a document is lost. So a profile is there before the first document that names
it, and who removes one and who writes a document agree, whatever dies: the remover first writes
``profiles/removing/ID/...``, and only then looks which documents there are; the writer first
writes the document, and only then looks whether somebody removes its profile. So one of them sees
the other. A remover that sees the document leaves the profile; a writer that sees the remover
waits for its end and writes the profile again if it is gone. After a minute it takes the remover
for a dead one and takes its mark away; a remover that is only slow sees that, and leaves the
profile.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import IO

import msgspec

from kvzip.errors import CorruptError, FormatError, KVZipError, ProfileError
from kvzip.files import scratch_file
from kvzip.options import text
from kvzip.profile import Profile
from kvzip.store.bucket import Objects
from kvzip.store.keys import Identity, document_path
from kvzip.store.listing import Stored, abouts, documents, namespaces
from kvzip.store.marks import name_in, repoint
from kvzip.store.urls import store_option
from kvzip.workers import Lock, Workers, machine_memory

_log = logging.getLogger("kvzip.store")

_ID = re.compile(r"[0-9a-f]{64}")
_KEPT = 2
"""Profiles that stay in memory for the next document."""
_LOOKED_FOR = 8
"""Profiles of one model, the newest, whose documents are looked for where no profile was given."""
_FRESH = timedelta(hours=1)
"""For how long a profile that no document needs may wait for its first one."""
_PATIENCE = 60.0
"""Seconds after which a remover that has not ended is taken for dead."""
_PREFIX = "profiles/"


class StoredProfile(msgspec.Struct, frozen=True):
    """A profile as a listing shows it."""

    key: str
    """``profiles/`` and its SHA-256."""
    encoded_bytes: int
    written: datetime
    documents: int
    """How many documents of the store need it."""


def is_profile_key(key: str) -> bool:
    """Whether a key names a profile, and not a document."""
    return text("key", key).startswith(_PREFIX)


def id_in(key: str) -> str:
    """The SHA-256 that a profile's key, or the SHA-256 alone, names. Raises KVZipError."""
    found = text("key", key).removeprefix(_PREFIX)
    if not _ID.fullmatch(found):
        raise KVZipError(f"{key!r} is not the SHA-256 of a profile, nor a profile's key")
    return found


def _path(profile_id: str) -> str:
    return f"{_PREFIX}{profile_id}.kvprofile"


def _removing(profile_id: str) -> str:
    return f"{_PREFIX}removing/{profile_id}"


class Profiles:
    """The profiles of one store."""

    def __init__(self, objects: Objects, pool: Workers):
        self._objects, self._pool = objects, pool
        self._lock, self._kept = Lock(), OrderedDict[str, Profile]()
        self._told: set[str] = set()

    # --- reading ---------------------------------------------------------------------------

    def get(self, profile_id: str) -> Profile:
        """The profile with that SHA-256. Raises ProfileError if the store has none, CorruptError if
        its bytes have another SHA-256, StoreError."""
        with self._lock:  # of those who need it at once, one fetches it
            found = self._kept.pop(profile_id, None)
            if found is None:
                with scratch_file() as file:
                    self.copy(profile_id, file)
                    found = Profile.of_file(self._named(profile_id), file)
            self._kept[profile_id] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return found

    def copy(self, profile_id: str, file: IO[bytes]) -> int:
        """Write a profile's bytes to a file; how many there are. Raises what :meth:`get` does, when
        wrong bytes may be in the file."""
        path, named = _path(profile_id), self._named(profile_id)
        meta = self._objects.head(path)
        if meta is None:
            raise self._missing(profile_id)
        memory = machine_memory()
        if meta.size > memory:
            raise ProfileError(
                f"{named} has {meta.size:,} bytes, more than this machine's memory ({memory:,})"
            )
        sink, whole = _Hashed(file, meta.size), True
        try:
            self._objects.copy(path, sink, None)  # type: ignore[arg-type]
        except FileNotFoundError:
            raise self._missing(profile_id) from None
        except (_Longer, CorruptError, FormatError):  # a sealed store's objects tell it themselves
            whole = False
        if not whole or sink.size != meta.size or sink.digest.hexdigest() != profile_id:
            raise CorruptError(
                f"{named} is damaged: the SHA-256 of its bytes is another one. Whoever has the "
                "profile writes it anew: kvzip put FILE.kvprofile --replace "
                f"{store_option(self._objects.url)}"
            )
        file.flush()
        return sink.size

    def has(self, profile_id: str) -> bool:
        """Whether the store has a profile; if not, say so once."""
        if profile_id in self._kept or self._objects.head(_path(profile_id)) is not None:
            return True
        if profile_id not in self._told:
            self._told.add(profile_id)
            _log.warning("%s", self._missing(profile_id))
        return False

    def _named(self, profile_id: str) -> str:
        return f"{_path(profile_id)} in {self._objects.url}"

    def _missing(self, profile_id: str) -> ProfileError:
        url = self._objects.url
        return ProfileError(
            f"{url} does not have profile {profile_id}: give it as profile= (--profile), or store "
            f"it for all (kvzip put FILE.kvprofile {store_option(url)})"
        )

    # --- writing ---------------------------------------------------------------------------

    def put(self, profile: Profile, replace: bool = False) -> bool:
        """Store a profile unless the store has it, or has damaged bytes in its place as far as
        their number tells; whether it was written. It outlives a power cut that comes after."""
        path, put = _path(profile.id), self._objects.put
        if put(path, profile.file, create=not replace, durable=True):
            return True
        meta = self._objects.head(path)
        if meta is not None and meta.size == profile.nbytes:
            return False
        return put(path, profile.file, create=False, durable=True)

    def is_kept(self, profile_id: str) -> bool:
        """Whether a profile is there, and stays, now that a document needs it. Waits while somebody
        removes it."""
        end = time.monotonic() + _PATIENCE
        while begun := list(self._objects.under(_removing(profile_id))):
            if time.monotonic() > end:  # left by dead ones
                self._pool.each(lambda meta: self._objects.delete(meta.path), begun)
                break
            time.sleep(0.05)
        return self._objects.head(_path(profile_id)) is not None

    # --- finding ---------------------------------------------------------------------------

    def mark(self, identity: Identity) -> None:
        """Note in the namespace of those who have no profile that there are documents of this
        identity, which need one."""
        space = _plain(identity)
        self._objects.put(f"{space}/profiles/{identity.profile}", b"")
        self._objects.put(f"{space}/profile", identity.profile.encode(), create=False)

    def marked(self, identity: Identity) -> list[str]:
        """The SHA-256s of profiles that documents of such an identity need, the newest first; where
        nothing can be listed, the newest only."""
        space = _plain(identity)
        last = self._objects.get(f"{space}/profile")
        if last is None:  # as mostly: a bucket takes more for a listing
            return []
        if self._objects.listable:
            found = sorted(self._objects.under(f"{space}/profiles"), key=lambda meta: meta.modified)
            names = [meta.path.rpartition("/")[2] for meta in reversed(found)]
        else:
            names = [last.decode(errors="replace")]
        return [name for name in names if _ID.fullmatch(name)][:_LOOKED_FOR]

    # --- what there is ---------------------------------------------------------------------

    def listed(self, stored: Sequence[Stored] | None = None) -> list[StoredProfile]:
        """All profiles, the oldest first. `stored`: all documents, if they are known. Raises
        UsageError for a store that cannot be listed."""
        namespaces(self._objects)  # raises
        metas = [m for m in self._objects.under("profiles") if m.path.endswith(".kvprofile")]
        if not metas:
            return []
        counts = _counts(self._objects, documents(self._objects) if stored is None else stored)
        found = []
        for meta in sorted(metas, key=lambda m: (m.modified, m.path)):
            name = meta.path.removeprefix(_PREFIX).removesuffix(".kvprofile")
            if _ID.fullmatch(name):
                users = counts[name] + counts[""]
                found.append(StoredProfile(_PREFIX + name, meta.size, meta.modified, users))
        return found

    # --- removing --------------------------------------------------------------------------

    def remove(self, profile_id: str) -> bool:
        """Take a profile that no document needs out of the store; whether it was there. Raises
        ProfileError for one that is needed."""
        there = self._objects.head(_path(profile_id)) is not None
        needed = self._remove([profile_id])
        if there and profile_id in needed:
            raise ProfileError(f"profile {profile_id} stays: {needed[profile_id]}")
        return there

    def prune(self, listed: Iterable[StoredProfile]) -> list[str]:
        """Remove those of the listed profiles that no document needs and that are not new; the keys
        of those that went."""
        old = datetime.now(UTC) - _FRESH
        unneeded = [id_in(p.key) for p in listed if not p.documents and p.written < old]
        needed = self._remove(unneeded)
        for profile_id, why in needed.items():  # since it was listed
            _log.info("profile %s stays: %s", profile_id, why)
        return [_PREFIX + each for each in unneeded if each not in needed]

    def _remove(self, profile_ids: Sequence[str]) -> dict[str, str]:
        """Take those of the profiles out of the store that no document needs; why others stay. The
        documents are counted once for all."""
        if not profile_ids:
            return {}
        marks = {each: f"{_removing(each)}/{uuid.uuid4().hex}" for each in profile_ids}
        try:
            self._pool.each(lambda mark: self._objects.put(mark, b""), marks.values())
            counts = _counts(self._objects, documents(self._objects))
            needed = {each: _needed(counts, each) for each in marks}
            spaces = namespaces(self._objects)
            for profile_id in [each for each, why in needed.items() if not why]:
                if self._objects.head(marks[profile_id]) is None:
                    needed[profile_id] = "who writes did not wait so long for its removal"
                    continue
                self._objects.delete(_path(profile_id))
                for space in spaces:
                    self._unmark(space, profile_id)
        finally:
            self._pool.each(self._objects.delete, marks.values())
        with self._lock:
            for profile_id in marks:
                self._kept.pop(profile_id, None)
        return {each: why for each, why in needed.items() if why}

    def _unmark(self, space: str, profile_id: str) -> None:
        """Undo :meth:`mark` in a namespace."""
        self._objects.delete(f"{space}/profiles/{profile_id}")
        path = f"{space}/profile"
        if (found := self._objects.get(path)) is None or name_in(found) not in (profile_id, ""):
            return
        repoint(self._objects, path, f"{space}/profiles")

    def sweep(self) -> None:
        """Clear away what removers left that died."""
        old = datetime.now(UTC) - _FRESH
        for meta in list(self._objects.under(f"{_PREFIX}removing")):
            if meta.modified < old:
                self._objects.delete(meta.path)


def _needed(counts: Counter[str], profile_id: str) -> str:
    """Why a profile stays; "" where no document needs it. `counts`: of :func:`_counts`."""
    count = counts[profile_id] + counts[""]
    if not count:
        return ""
    which = "1 document needs" if count == 1 else f"{count} documents need"
    return f"{which} it" + (", or cannot say what it needs" if counts[""] else "")


def _plain(identity: Identity) -> str:
    """The namespace of documents of that identity that need no profile."""
    return msgspec.structs.replace(identity, profile="").namespace


def _counts(objects: Objects, stored: Sequence[Stored]) -> Counter[str]:
    """How many documents need each profile, by its SHA-256; under "" those that do not say."""
    by_space = Counter(document.key.partition("/")[0] for document in stored)
    said = {space: about.identity for space, about in abouts(objects).items()}
    found = Counter[str]()
    for space, count in by_space.items():
        identity = said.get(space)
        if identity is not None and identity.namespace == space:
            if identity.profile:
                found[identity.profile] += count
        else:  # a power cut can have taken it
            needed = _in_headers(objects, [d.key for d in stored if d.key.startswith(space)])
            if needed != "none":
                found[needed] += count
    return found


def _in_headers(objects: Objects, keys: Sequence[str]) -> str:
    """The profile that the documents of one namespace need, or "none", by the first of them that
    tells; "" if none does."""
    for key in keys:
        try:
            with objects.open(document_path(key)) as reader:
                return reader.header.profile or "none"
        except (KVZipError, OSError) as error:
            _log.info("%s does not tell its profile: %s", key, error)
    return ""


class _Longer(Exception):
    """More bytes came than an object was said to have."""


class _Hashed:
    """A file that takes up to `most` bytes and has their SHA-256; raises `_Longer`."""

    def __init__(self, file: IO[bytes], most: int):
        self._file, self._most = file, most
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.size > self._most:
            raise _Longer
        self.digest.update(data)
        return self._file.write(data)
