"""Objects under a prefix that take no more than so many bytes: those used longest ago go first."""

from __future__ import annotations

import threading
import time

from kvzip import metrics
from kvzip.errors import UsageError
from kvzip.options import integer
from kvzip.store.bucket import Objects
from kvzip.store.evicting import Room


class Bounded:
    """Objects below `prefix`, of all who write there.

    What others use is known by when they wrote it; what they write is noticed after each sixteenth
    of the limit, in bytes, that this process writes. Any number of threads may call.
    """

    def __init__(self, objects: Objects, prefix: str, limit_bytes: int | None):
        self._objects, self._prefix = objects, prefix
        self._limit = None if limit_bytes is None else integer("limit_bytes", limit_bytes, 1)
        self._lock, self._room = threading.Lock(), Room()
        self._used: dict[str, float] = {}
        """When objects were last used by this process."""

    def get(self, path: str, most: int) -> bytes | None:
        """An object's bytes, or None when there is none; none at all of one that has more than
        `most`. This counts as a use."""
        data = self._objects.get(path, most)
        if data is not None:
            self.use(path)
        return data

    def use(self, path: str) -> None:
        """Take note that an object is used now."""
        if self._limit is not None:
            self._used[path] = time.time()

    def has(self, path: str) -> bool:
        """Whether there is an object, and not an empty one, as a power cut can leave it."""
        found = self._objects.head(path)
        return found is not None and found.size > 0

    def put(self, path: str, data: bytes) -> None:
        """Write an object, in the place of one that may be there; others go where there is no
        room. Raises UsageError for one that is larger than the limit, and StoreError."""
        if self._limit is not None and len(data) > self._limit:
            raise UsageError(f"an object of {len(data):,} bytes is above the limit of all")
        self._objects.put(path, data, create=False, durable=False)
        self.use(path)
        if self._limit is not None:
            with self._lock:
                if self._room.over(len(data), self._limit):
                    self._make_room(self._limit, path)

    def _make_room(self, limit: int, keep: str) -> None:
        """Delete what was used longest ago and is too much, but for what was just written."""
        self._objects.sweep()
        there = {meta.path: meta for meta in self._objects.under(self._prefix)}
        self._used = {path: at for path, at in self._used.copy().items() if path in there}

        def used(path: str) -> float:
            return self._used.get(path, there[path].modified.timestamp())

        gone = self._room.surplus(
            ((path, there[path].size) for path in sorted(there, key=used)), limit, keep
        )
        for path in gone:
            self._objects.delete(path)
            self._used.pop(path, None)
        if gone:
            metrics.count("evictions", len(gone))
