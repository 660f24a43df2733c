"""Taking documents out of a store: one, those used longest ago, and what dead writers left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from kvzip.store.bucket import Objects
from kvzip.store.keys import document_path, is_document_key
from kvzip.store.listing import Stored, namespaces
from kvzip.store.marks import chain_file, chain_of, mark, name_in, repoint, stored_chain
from kvzip.workers import Workers

_STALE = timedelta(hours=1)
"""How long a writer may take; what looks unfinished and is older is cleared away."""


class Room:
    """Knows about how many bytes there are, and what goes when they are too many.

    A writer does not know what others write, so it lists anew after each sixteenth of the limit
    that it writes."""

    def __init__(self) -> None:
        self._total: int | None = None
        """Bytes of all that there was when it was last listed."""
        self._written = 0
        """Bytes that were written since."""

    def over(self, written: int, limit: int) -> bool:
        """Whether there may be more than `limit` bytes, with those that were just written."""
        self._written += written
        if self._total is None:
            return True
        return self._total + self._written > limit or self._written > limit // 16

    def surplus(
        self,
        sizes: Iterable[tuple[str, int]],
        limit: int | None,
        keep: str | None = None,
        beside: int = 0,
    ) -> list[str]:
        """Which of all that there is, names and bytes, must go: the first, where they and the bytes
        `beside` them are more than `limit`, until the rest take a sixteenth less. `keep`: one that
        stays."""
        listed = list(sizes)
        total = sum(size for _, size in listed) + beside
        goal = total if limit is None or total <= limit else limit - limit // 16
        gone = []
        for name, size in listed:
            if total <= goal:
                break
            if name != keep:
                gone.append(name)
                total -= size
        self._total, self._written = total, 0
        return gone


class Evictor:
    """Removes documents of one store."""

    def __init__(self, objects: Objects, pool: Workers):
        self._objects, self._pool, self._room = objects, pool, Room()

    def remove(self, key: str) -> bool:
        """Take a document out of the store; whether it was there."""
        doc = document_path(key)
        there = self._objects.head(doc) is not None
        self._unmark(key)
        self._objects.delete(doc)
        self._forget(key)
        return there

    def _unmark(self, key: str) -> list[str]:
        """Take a document's marks away, so that nobody finds it; its hash chain."""
        space, name = key.split("/")
        chain = chain_of(self._objects, space, name)
        self._pool.each(lambda h: self._objects.delete(f"{space}/with/{h}/{name}"), chain)
        self._pool.each(lambda h: self._repoint(space, h, name), chain)
        return chain

    def _forget(self, key: str) -> None:
        """Remove what is left of a document that is gone, the chain last. Of one that is written
        anew meanwhile the chain stays: who writes it looks for it after the document is there."""
        space, name = key.split("/")
        chain = stored_chain(self._objects, space, name)
        self._objects.delete(f"{space}/used/{name}")
        self._objects.delete(f"{space}/chain/{name}")
        if chain and self._objects.head(document_path(key)) is not None:
            self._objects.put(f"{space}/chain/{name}", chain_file(chain))

    def _end(self, key: str) -> None:
        """End a removal or a writing that was begun, of a document that is not listed. If it is
        there all the same, since its writer is alive and a clock has jumped, or since a server
        lists what it likes, then it stays, with its marks."""
        doc = document_path(key)
        if self._objects.head(doc) is not None:
            return
        chain = self._unmark(key)
        if self._objects.head(doc) is None:
            self._forget(key)
        else:  # written meanwhile, with marks that may just have been taken away
            mark(self._objects, self._pool, key, chain)

    def _repoint(self, space: str, mark: str, name: str) -> None:
        """Let ``last/mark`` name another document than `name`, or be gone if there is none."""
        path = f"{space}/last/{mark}"
        if (found := self._objects.get(path)) is None or name_in(found) not in (name, ""):
            return
        repoint(self._objects, path, f"{space}/with/{mark}", name)

    def over(self, written: int, limit: int) -> bool:
        """Whether the store may hold more than `limit` bytes, with those that were just written."""
        return self._room.over(written, limit)

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
        sizes = ((d.key, d.encoded_bytes) for d in documents)
        evicted = self._room.surplus(sizes, limit, keep, beside)
        for key in evicted:
            self.remove(key)
        self._clear({d.key for d in documents})
        return evicted

    def _clear(self, keys: set[str]) -> None:
        """End the removals that were begun, and remove what was begun to be written, and what a
        reader that died noted of a document that was gone."""
        old = datetime.now(UTC) - _STALE
        for space in namespaces(self._objects):
            for meta in list(self._objects.under(f"{space}/used")):
                key = f"{space}/{meta.path.rpartition('/')[2]}"
                if key not in keys and meta.modified < old:
                    self._objects.delete(meta.path)
            for meta in list(self._objects.under(f"{space}/chain")):
                key = f"{space}/{meta.path.rpartition('/')[2]}"
                if key not in keys and meta.modified < old and is_document_key(key):
                    self._end(key)
        self._objects.sweep()
