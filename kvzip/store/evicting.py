"""Taking documents out of a store: one, those used longest ago, and what dead writers left."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from kvzip.store.bucket import Objects
from kvzip.store.keys import document_path
from kvzip.store.listing import Stored, namespaces
from kvzip.store.marks import chain_of, name_in, others_with
from kvzip.workers import Workers

_STALE = timedelta(hours=1)
"""How long a writer may take; what looks unfinished and is older is cleared away."""


class Evictor:
    """Removes documents of one store, and knows about how many bytes it holds."""

    def __init__(self, objects: Objects, pool: Workers):
        self._objects, self._pool = objects, pool
        self._total: int | None = None
        """Bytes of all documents and profiles when they were last listed."""
        self._written = 0
        """Bytes that were written since."""

    def remove(self, key: str) -> bool:
        """Take a document out of the store; whether it was there."""
        doc = document_path(key)
        there = self._objects.head(doc) is not None
        space, name = key.split("/")
        chain = chain_of(self._objects, space, name)
        self._pool.each(lambda h: self._objects.delete(f"{space}/with/{h}/{name}"), chain)
        self._pool.each(lambda h: self._repoint(space, h, name), chain)
        self._objects.delete(doc)
        self._objects.delete(f"{space}/used/{name}")
        self._objects.delete(f"{space}/chain/{name}")
        return there

    def _repoint(self, space: str, mark: str, name: str) -> None:
        """Let ``last/mark`` name another document than `name`, or be gone if there is none."""
        path = f"{space}/last/{mark}"
        if (found := self._objects.get(path)) is None or name_in(found) not in (name, ""):
            return
        other = next(others_with(self._objects, space, mark, name), None)
        if other is None:
            self._objects.delete(path)
            # Written meanwhile? Then its own pointer may be what was deleted.
            other = next(others_with(self._objects, space, mark, name), None)
        if other is not None:
            self._objects.put(path, other.encode(), create=False)

    def over(self, written: int, limit: int) -> bool:
        """Whether the store may hold more than `limit` bytes, with those that were just written.

        A writer does not know what others write, so it says yes after each sixteenth of the limit.
        """
        self._written += written
        if self._total is None:
            return True
        return self._total + self._written > limit or self._written > limit // 16

    def prune(
        self,
        documents: Sequence[Stored],
        limit: int | None = None,
        keep: str | None = None,
        beside: int = 0,
    ) -> list[str]:
        """Remove the first of `documents`, which are all, if they and the bytes `beside` them, of
        profiles, take more than `limit` bytes, until the rest take a sixteenth less; then clear
        away what dead writers left.

        `keep`: the key of one that stays. Returns the keys of what was removed.
        """
        total = sum(d.encoded_bytes for d in documents) + beside
        goal = total if limit is None or total <= limit else limit - limit // 16
        evicted = []
        for document in documents:
            if total <= goal:
                break
            if document.key != keep:
                self.remove(document.key)
                evicted.append(document.key)
                total -= document.encoded_bytes
        self._total, self._written = total, 0
        self._clear({d.key for d in documents})
        return evicted

    def _clear(self, keys: set[str]) -> None:
        """End the removals that were begun, and remove what was begun to be written."""
        old = datetime.now(UTC) - _STALE
        for space in namespaces(self._objects):
            for meta in list(self._objects.under(f"{space}/chain")):
                key = f"{space}/{meta.path.rpartition('/')[2]}"
                if key not in keys and meta.modified < old:
                    self.remove(key)
        self._objects.sweep()
