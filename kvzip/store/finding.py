"""Finding the document that shares the longest prefix with a prompt."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from kvzip.container import Reader
from kvzip.errors import CorruptError, FormatError, KVZipError, StoreError
from kvzip.parsing import from_json
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.store.bucket import Objects
from kvzip.store.keys import Identity, Ids, check_place, document_path
from kvzip.store.listing import namespaces
from kvzip.store.marks import is_useful, name_in, others_with, stored_chain
from kvzip.store.profiles import Profiles
from kvzip.store.sealed import SealedObjects
from kvzip.workers import Workers

_log = logging.getLogger("kvzip.store")

PROBES = 16
"""Requests at once, and into how many parts a search cuts what is left of a prompt."""
_OTHERS, _OTHERS_SECONDS = 64, 10.0
"""After a miss: how many other identities are looked at, and for how long a bucket's not again."""


class Match:
    """A document whose first `tokens` tokens are those of the prompt, with its file open. Threads
    may use it at once."""

    def __init__(self, key: str, tokens: int, reader: Reader):
        self.key, self.tokens, self.reader = key, tokens, reader

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.close()

    def snapshot(self, threads: int | None = None) -> Snapshot:
        """The shared tokens, decoded. Raises CorruptError, StoreError."""
        found: Snapshot = self.reader.decode(tokens=(0, self.tokens), threads=threads)
        return found


@dataclass(frozen=True)
class Prompt:
    """What is looked for: token ids, and their hash chain in blocks of a store."""

    ids: Ids
    chain: Sequence[str]
    block_tokens: int
    near: set[str] = field(default_factory=set)
    """Names of documents that begin alike and cannot be used, once it was looked for."""


class Finder:
    """Searches the namespaces of one store."""

    def __init__(self, objects: Objects, pool: Workers, profiles: Profiles):
        self._objects, self._pool, self._profiles = objects, pool, profiles
        self._searches = Workers(PROBES, "kvzip-find")
        self._told: set[tuple[str, str]] = set()
        """Pairs of identities, by their namespaces: the one was asked for, the other was there."""
        self._look_again = 0.0

    def best(
        self, prompt: Prompt, profile: Profile | None, wanted: Identity, threads: int
    ) -> Match | None:
        """The best match of documents written with the profile and of those that need none, in this
        order of preference; where none is given, of those that need none and of those whose profile
        the store has.

        `wanted`: their identity but for the profile. Raises StoreError.
        """

        def search(known: Profile | str | None) -> Match | None:
            named = known if isinstance(known, str) else "" if known is None else known.id
            identity = msgspec.structs.replace(wanted, profile=named)
            return self._search(identity.namespace, prompt, known, threads)

        # Beside each other: a search is a few round trips, one after the other.
        first = dict.fromkeys((profile, None))
        searches = [self._searches.submit(search, known) for known in first]
        errors: list[BaseException] = []
        if profile is None:
            try:
                known = self._profiles.marked(wanted)
            except KVZipError as error:
                errors.append(error)
            else:
                searches += [self._searches.submit(search, name) for name in known]
        errors += [e for each in searches if (e := each.exception()) is not None]
        matches = [match for each in searches if not each.exception() and (match := each.result())]
        best = max(matches, key=lambda match: match.tokens, default=None) if not errors else None
        for match in matches:
            if match is not best:
                match.reader.close()
        if errors:
            raise errors[0]
        return best

    def _search(
        self, space: str, prompt: Prompt, profile: Profile | str | None, threads: int
    ) -> Match | None:
        """The best match in a namespace of documents that need a profile: one that is here, one of
        the store's, by its SHA-256, or none."""
        rejected = set[str]()
        low, found = self._longest_marked(space, prompt.chain)
        while low:
            name = name_in(found)
            if not is_useful(found):
                prompt.near.add(name)
                low, found = self._next_useful(space, prompt.chain[: low - 1])
                continue
            others = others_with(self._objects, space, prompt.chain[low - 1], name)
            for candidate in itertools.chain([name], others):
                if not candidate or candidate in rejected:
                    continue
                match = self._usable(f"{space}/{candidate}", prompt, low, profile, threads)
                if match is not None:
                    return match
                rejected.add(candidate)
                prompt.near.add(candidate)
            low, found = self._next_useful(space, prompt.chain[: low - 1])
        return None

    def _longest_marked(self, space: str, chain: Sequence[str]) -> tuple[int, bytes | None]:
        """How many first blocks of a chain some document has, and their last mark."""
        # Whoever has the first n blocks has the first n - 1, so the most is found by cutting.
        low, high, mark = 0, len(chain), None
        while low < high:
            at = sorted({low + -(-(high - low) * i // PROBES) for i in range(1, PROBES + 1)})
            found = self._last_marks(space, [chain[i - 1] for i in at])
            marked = [i for i, data in zip(at, found, strict=True) if data is not None]
            if marked:
                low = marked[-1]
                mark = found[at.index(low)]
            high = min((i - 1 for i in at if i > low), default=high)
        return low, mark

    def _next_useful(self, space: str, chain: Sequence[str]) -> tuple[int, bytes | None]:
        """How many first blocks of a chain, of which there are documents, some document may be of
        use for, and their last mark."""
        for stop in range(len(chain), 0, -PROBES):
            start = max(0, stop - PROBES)
            found = self._last_marks(space, chain[start:stop])
            for i in range(stop - 1, start - 1, -1):
                if found[i - start] is not None and is_useful(found[i - start]):
                    return i + 1, found[i - start]
        return 0, None

    def _last_marks(self, space: str, hashes: Sequence[str]) -> list[bytes | None]:
        paths = [f"{space}/last/{h}" for h in hashes]
        return list(self._pool.map(lambda path: self._objects.get(path), paths))

    def _usable(
        self, key: str, prompt: Prompt, blocks: int, profile: Profile | str | None, threads: int
    ) -> Match | None:
        """The document if it is there, whole as far as its header tells, holds what a prompt that
        by its marks shares so many blocks with it needs, and the profile that it needs is there."""
        if isinstance(profile, str) and not self._profiles.has(profile):
            return None
        given = None if isinstance(profile, str) else profile
        try:
            reader = self._objects.open(document_path(key), given, threads)
            check_place(reader, key)
        except FileNotFoundError:
            return None
        except StoreError:
            raise
        except KVZipError as error:
            _log.warning("%s is passed over: %s", key, error)
            return None
        if isinstance(profile, str):
            reader.look_for_profile(self._profiles.get)
        sure = blocks * prompt.block_tokens
        shared, states = _shared(reader, prompt.ids, sure), reader.layout.state_length
        # States are good at their length only, which is mostly one token short of the document.
        count = shared if states is None else min(shared, states)
        if (
            shared >= sure
            and reader.layout.lacking(count) is None
            and (reader.token_ids is not None or self._has_chain(key, prompt.chain[:blocks]))
        ):
            return Match(key, count, reader)
        reader.close()
        return None

    def _has_chain(self, key: str, chain: Sequence[str]) -> bool:
        """Whether a document, which withholds its ids, begins with that chain by its own. Its marks
        are names, which in a sealed store anybody can copy to where they do not belong: there
        they tell nothing if its own chain is lost."""
        found = stored_chain(self._objects, *key.split("/"))
        if found is None:
            return not isinstance(self._objects, SealedObjects)
        return found[: len(chain)] == list(chain)

    def tell_of_others(self, wanted: Identity, mark: str) -> bool:
        """Say once if the store has documents that begin alike, under another identity; whether it
        was said now."""
        now, told = time.monotonic(), False
        if not self._objects.listable or now < self._look_again:
            return False
        self._look_again = now + (0 if self._objects.folder is not None else _OTHERS_SECONDS)
        try:
            own = wanted.namespace
            spaces = [s for s in namespaces(self._objects) if s != own]
            spaces = [s for s in spaces if (own, s) not in self._told][:_OTHERS]
            marks = self._pool.map(lambda s: self._objects.get(f"{s}/last/{mark}"), spaces)
            for space in [s for s, data in zip(spaces, marks, strict=True) if data]:
                self._told.add((own, space))
                told = True
                found = self._objects.get(f"{space}/about.json") or b"{}"
                other = from_json(found, Identity)
                _log.warning(
                    "%s has the prompt's tokens for (%s), not for (%s): they are not used",
                    self._objects.url,
                    other,
                    wanted,
                )
        except (StoreError, CorruptError, FormatError) as error:
            _log.info("no other documents are looked for: %s", error)
        return told


def _shared(reader: Reader, ids: Ids, sure: int) -> int:
    """How many first tokens a document shares with a prompt; `sure` if it withholds its ids."""
    known = reader.token_ids
    if known is None:
        return min(sure, reader.layout.tokens)
    shared = min(len(ids), len(known.reshape(-1)))
    equal = known.reshape(-1)[:shared] == ids[:shared]
    return int(np.append(equal, False).argmin())
