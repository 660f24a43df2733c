"""Objects under a prefix that take no more than so many bytes: those used longest ago go first."""

from __future__ import annotations

import threading
import time

from kvzip import metrics
from kvzip.errors import UsageError
from kvzip.options import integer
from kvzip.store.bucket import Objects


class Bounded:
    """Objects below `prefix`, of all who write there.

    What others use is known by when they wrote it; what they write is noticed after each sixteenth
    of the limit, in bytes, that this process writes. Any number of threads may call.
    """

    def __init__(self, objects: Objects, prefix: str, limit_bytes: int | None):
        self._objects, self._prefix = objects, prefix
        self._limit = None if limit_bytes is None else integer("limit_bytes", limit_bytes, 1)
        self._lock = threading.Lock()
        self._listed: int | None = None
        """Bytes of all objects when they were last listed."""
        self._written = 0
        """Bytes that were written since."""
        self._used: dict[str, float] = {}
        """When objects were last used by this process."""

    def get(self, path: str) -> bytes | None:
        """An object's bytes, or None when there is none; this counts as a use."""
        data = self._objects.get(path)
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
        if self._limit is not None:
            if len(data) > self._limit:
                raise UsageError(f"an object of {len(data):,} bytes is above the limit of all")
            with self._lock:
                self._make_room(len(data), self._limit)
                self._written += len(data)
            self.use(path)
        self._objects.put(path, data, create=False, durable=False)

    def _make_room(self, more: int, limit: int) -> None:
        """Delete what was used longest ago, until a sixteenth of the limit and `more` are free, if
        these bytes may be too many."""
        fresh = self._listed is not None and self._written <= limit // 16
        if fresh and (self._listed or 0) + self._written + more <= limit:
            return
        self._objects.sweep()
        there = list(self._objects.under(self._prefix))
        total, paths = sum(meta.size for meta in there), {meta.path for meta in there}
        used = {path: at for path, at in self._used.copy().items() if path in paths}
        there.sort(key=lambda meta: used.get(meta.path, meta.modified.timestamp()))
        goal = total if total + more <= limit else max(0, limit - limit // 16 - more)
        gone = 0
        for meta in there:
            if total <= goal:
                break
            self._objects.delete(meta.path)
            used.pop(meta.path, None)
            total -= meta.size
            gone += 1
        if gone:
            metrics.count("evictions", gone)
        self._used, self._listed, self._written = used, total, 0
