"""One object in a bucket, read in ranges that are tied to the version that was opened.

Ranges that a reader announces are fetched ahead of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from kvzip.container import blocks
from kvzip.container.source import Closable, Memory
from kvzip.errors import CancelledError, StoreError
from kvzip.store.folder import Meta
from kvzip.workers import Lock

if TYPE_CHECKING:
    from kvzip.store.bucket import Bucket

_FIRST_PIECE = 12 << 10
"""What a Reader asks for first is fetched with the opening of an object. Of that one request asks
for so many bytes: no more than what TCP sends in the first round trip of a connection, ten segments
(RFC 6928). And what is read after that finds all connections made."""
_LEAST, _MOST = 256 << 10, 4 << 20
"""Bytes of a request: ranges that touch are fetched together."""
_PART = 4 << 20
"""Bytes of a request for a range that alone is longer: each request has the time-out."""
_LITTLE = 16 << 10
"""Bytes for which no request is made, where they touch others."""
_PATIENCE = 4
"""How many times as long as the wait for its first byte a request is to take."""
_WINDOW = 64 << 20
"""Bytes that may lie fetched and unread."""
_CONNECTIONS = 4
_DIRECT = 64
"""Requests at once that were not announced: as many as there are threads that read, in general."""
_REACH = 2 * _CONNECTIONS
"""Requests from the oldest that is under way on. TCP does not share a link fairly for so short a
time; while one request starves, those after it are not what a reader waits for."""


class Piece(NamedTuple):
    """Bytes of an object, and what it is."""

    meta: Meta
    data: memoryview
    wait: float
    """Seconds from the request to the first byte."""


class Remote(Closable):
    """One object as a `kvzip.container.Source`; a change of the object while it is read is an
    error, not a mixture."""

    def __init__(self, bucket: Bucket, path: str):
        self._bucket, self._path = bucket, path
        self._version: str | None = None
        self.name = bucket.named(path)
        """What errors call it."""
        self._cancelled: Future[None] = Future()
        """Done when nobody waits for anything any more."""
        self.wait = math.inf
        """Seconds from a request to its first byte, the least so far."""
        self.pool = ThreadPoolExecutor(_CONNECTIONS, "kvzip-fetch")
        self._direct = ThreadPoolExecutor(_DIRECT, "kvzip-read")
        self._ahead: ReadAhead | None = None
        self.size, self._first = self._open()

    def _open(self) -> tuple[int, memoryview]:
        """The object's size and its first bytes."""
        end = blocks.FIRST_READ
        later = [
            self.pool.submit(self._get, start, min(_FIRST_PIECE, end - start))
            for start in range(_FIRST_PIECE, end, _FIRST_PIECE)
        ]
        meta, first = self._get(0, min(_FIRST_PIECE, end))
        self._version = meta.version
        if meta.size <= _FIRST_PIECE:  # the others ask for what there is not
            return meta.size, first
        pieces = [first]
        for piece in later[: -(-meta.size // _FIRST_PIECE) - 1]:
            found, data = piece.result()
            if (found.size, found.version) != (meta.size, meta.version):
                raise StoreError(f"{self._bucket.named(self._path)} changed while it was read")
            pieces.append(data)
        return meta.size, memoryview(b"".join(pieces))

    def _get(self, offset: int, length: int) -> tuple[Meta, memoryview]:
        meta, data, wait = self._bucket.read_range(self._path, offset, length, self._version)
        self.wait = min(self.wait, wait)
        return meta, data

    def cancel(self) -> None:
        """Ask for nothing more; who waits for what was asked for gets a CancelledError at once. The
        requests under way end by themselves, within their timeout."""
        with suppress(InvalidStateError):
            self._cancelled.set_result(None)
        if self._ahead is not None:
            self._ahead.cancel()
        for pool in (self.pool, self._direct):
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Fetch nothing more ahead, and let go of what was."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()

    def check_cancelled(self) -> None:
        """Raise CancelledError if nobody is to wait any more."""
        if self._cancelled.done():
            raise CancelledError(f"reading {self.name} was cancelled")

    def fetch(self, offset: int, length: int) -> memoryview:
        """Bytes of the object, in one request, or in several where they are many."""
        end = offset + length
        parts = [self._part(at, min(_PART, end - at)) for at in range(offset, end, _PART)]
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _part(self, offset: int, length: int) -> memoryview:
        self.check_cancelled()
        try:
            data = self._get(offset, length)[1]
        except FileNotFoundError:
            where = self._bucket.named(self._path)
            raise StoreError(f"{where} went away while it was read") from None
        if len(data) != length:
            raise StoreError(f"{self._bucket.named(self._path)} ended while it was read")
        return data

    def read(self, offset: int, length: int) -> memoryview:
        if not length or offset + length <= len(self._first):
            return self._first[offset : offset + length]
        self._bucket.check_process()  # before waiting for threads that a forked process has not
        self.check_cancelled()
        ahead = self._ahead
        try:
            found = None if ahead is None else ahead.take(offset, length)
        except CancelledError:  # of what was announced, perhaps, and not of all
            self.check_cancelled()
            found = None
        if found is None:
            found = self._fetch_beside(offset, length)
        return found

    def _fetch_beside(self, offset: int, length: int) -> memoryview:
        """As `fetch`, in another thread. Raises CancelledError as soon as that is so."""
        try:
            future = self._direct.submit(self.fetch, offset, length)
        except RuntimeError:  # the threads were sent home
            self.check_cancelled()
            raise
        waited_for: list[Future[Any]] = [future, self._cancelled]
        wait(waited_for, return_when=FIRST_COMPLETED)
        self.check_cancelled()
        return future.result()

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch (offset, length) ranges, in ascending order, that will be read once."""
        begin = len(self._first)
        self._bucket.check_process()
        self.check_cancelled()
        self.close()  # what was announced before
        self._ahead = ReadAhead(self, [r for r in ranges if r[1] and sum(r) > begin])


class _Request:
    """Bytes from `start` on, which hold `reads` announced ranges."""

    def __init__(self, start: int, size: int, reads: int, future: Future[Memory]):
        self.start, self.size, self.reads, self.future = start, size, reads, future


class ReadAhead:
    """Fetches ranges in their order, a few requests at a time, a window ahead of who reads.

    Requests under way share the link, so the first bytes of one come as late as the last of those
    beside it. They are small to begin with, for the first layer to be there soon, and towards the
    end, for little to be left to decode when the last byte has come (guided self-scheduling,
    Polychronopoulos and Kuck 1987), but not so small that the link waits for round trips.
    """

    def __init__(self, remote: Remote, ranges: Sequence[tuple[int, int]]):
        self._remote, self._lock = remote, Lock()
        self._left = dict(ranges)
        self._asked: dict[int, _Request] = {}
        self._untaken: set[_Request] = set()
        """Those of which not all ranges were taken; some may be waited for."""
        self._begun, self._remaining = 0, sum(self._left.values())
        self._least, self._cancelled = _LEAST, False
        self._under_way: set[int] = set()
        self._count = self._bytes = 0
        with self._lock:
            self._submit()

    def _submit(self) -> None:
        """Ask for what comes next while there are connections and room; the lock is held."""
        while (
            self._left
            and not self._cancelled
            and len(self._under_way) < _CONNECTIONS
            and self._count - min(self._under_way, default=self._count) < _REACH
            and self._bytes < _WINDOW
        ):
            share = min(self._begun, self._remaining // 4) // _CONNECTIONS
            limit = min(max(share, self._least), _MOST)
            limit = min(limit, max(self._remaining // _CONNECTIONS, self._least // 2, _LEAST))
            self._ask(*self._next(limit))

    def _next(self, limit: int) -> tuple[int, int, int]:
        """The next request, of about `limit` bytes at most: where it begins, its bytes, and how
        many ranges it holds."""
        start, size = next(iter(self._left.items()))
        reads, after_little = 1, size <= _LITTLE
        while more := self._left.get(start + size):
            # Tables never go alone: little of a request is worse than a block too much. But a file
            # of small blocks is not one request.
            alone = size <= _LITTLE or (more <= _LITTLE and not after_little)
            if size + more > limit and not alone:
                break
            size, reads, after_little = size + more, reads + 1, more <= _LITTLE
        return start, size, reads

    def _ask(self, start: int, size: int, reads: int = 1) -> None:
        self._under_way.add(self._count)
        future: Future[Memory] = Future()
        self._remote.pool.submit(self._get, self._count, start, size, future)
        request, at = _Request(start, size, reads, future), start
        self._untaken.add(request)
        while at < start + size:
            self._asked[at] = request
            at += self._left.pop(at)
        self._begun, self._remaining = self._begun + size, self._remaining - size
        self._bytes, self._count = self._bytes + size, self._count + 1

    def cancel(self) -> None:
        """Ask for nothing more; who waits gets a CancelledError at once."""
        with self._lock:
            self._cancelled = True
            for request in self._untaken:
                with suppress(InvalidStateError):
                    request.future.set_exception(CancelledError("reading was cancelled"))

    def _get(self, which: int, start: int, size: int, future: Future[Memory]) -> None:
        began = time.perf_counter()
        try:
            found = self._remote.fetch(start, size)
        except BaseException as error:
            with suppress(InvalidStateError):
                future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                future.set_result(Memory(found))
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self._under_way.remove(which)
                waited = self._remote.wait
                worthwhile = size * _PATIENCE * waited / max(took - waited, waited / 4)
                self._least = int(min(max(worthwhile, _LEAST), _MOST))
                self._submit()

    def take(self, offset: int, length: int) -> memoryview | None:
        """An announced range's bytes, once it is here; None when it is not announced, or was
        taken before."""
        with self._lock:
            if self._left.get(offset) == length and not self._cancelled:  # before its turn
                self._ask(offset, length)
            request = self._asked.pop(offset, None)
        if request is None:
            return None
        try:
            data = request.future.result()
        finally:
            with self._lock:
                request.reads -= 1
                if not request.reads:
                    self._bytes -= request.size
                    self._untaken.discard(request)
                self._submit()
        return data.read(offset - request.start, length)
