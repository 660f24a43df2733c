"""When documents were last used, by which an eviction chooses."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future, wait

from kvzip.errors import StoreError
from kvzip.store.bucket import Objects
from kvzip.store.keys import document_path
from kvzip.workers import Lock, Workers

_log = logging.getLogger("kvzip.store")

_TOUCH_SECONDS = 60.0
"""How old a document's time of use may get before it is written again."""


class Uses:
    """Notes when documents are used, as often as an eviction needs it; nobody waits for that."""

    def __init__(self, objects: Objects, pool: Workers):
        self._objects, self._pool = objects, pool
        self._lock = Lock()
        self._touched: dict[str, float] = {}
        """When documents were last used, of those whose next use need not be written yet; in the
        order of these times."""
        self._touches: dict[Future[None], int] = {}
        """Notes under way, and the process that makes each."""

    def written(self, key: str) -> None:
        """Take note that a document was written now, which counts as a use."""
        now = time.monotonic()
        with self._lock:
            self._touched.pop(key, None)
            self._touched[key] = now

    def note(self, key: str) -> None:
        """Begin to write that a document was used now."""
        if not self._objects.writable or not self._is_due(key):
            return
        touch = self._pool.submit(self._write, key)
        self._touches[touch] = os.getpid()
        touch.add_done_callback(lambda done: self._touches.pop(done, None))

    def _is_due(self, key: str) -> bool:
        """Whether the last use of a document is so old that one now is to be written; then that
        counts."""
        now = time.monotonic()
        with self._lock:
            while self._touched:
                oldest = next(iter(self._touched))
                if now - self._touched[oldest] < _TOUCH_SECONDS:
                    break
                del self._touched[oldest]
            if key in self._touched:
                return False
            self._touched[key] = now
            return True

    def _write(self, key: str) -> None:
        space, name = key.split("/")
        mark = f"{space}/used/{name}"
        try:
            self._objects.put(mark, b"", create=False)
            # Removed meanwhile? Who removes a document takes it away before this mark.
            if self._objects.head(document_path(key)) is None:
                self._objects.delete(mark)
        except StoreError as error:  # a reader may have no right to write
            _log.info("the use of %s is not noted: %s", key, error)

    def settle(self) -> None:
        """Wait for the notes that this process has begun."""
        wait([touch for touch, by in self._touches.copy().items() if by == os.getpid()])
