"""Jobs in threads: how many threads, pools and locks that outlive a fork, jobs in order, jobs in
chains."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

from kvzip.options import integer

T = TypeVar("T")


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def thread_count(threads: int) -> int:
    """`threads`, or the number of cores that this process may use when it is 0. Raises UsageError
    for what is no number of threads."""
    return integer("threads (0: all cores)", threads, 0, 1024) or usable_cores()


def usable_cores() -> int:
    """How many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux's
    return os.cpu_count() or 1 if allowed is None else len(allowed(0))


class Lock:
    """A lock that a forked process finds free: the thread that held it was not taken along, and
    would never release it. What it guards must make sense whenever that happens."""

    __slots__ = ("__weakref__", "_lock", "_owner")

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()

    def free(self) -> None:
        """Be free, unless this thread holds it."""
        if self._owner != threading.get_ident():
            self._lock = threading.Lock()


_locks: WeakSet[Lock] = WeakSet()


def _free_all() -> None:
    for lock in _locks:
        lock.free()


os.register_at_fork(after_in_child=_free_all)


class Workers:
    """A pool of threads. A fork takes no threads along, and jobs given to a pool that had some
    would wait for ever: so the first job in a forked process makes a new pool."""

    def __init__(self, count: int, name: str):
        self._count, self._name = count, name
        self._process, self._pool = os.getpid(), ThreadPoolExecutor(count, name)

    def _current(self) -> ThreadPoolExecutor:
        if self._process != os.getpid():
            self._pool = ThreadPoolExecutor(self._count, self._name)
            self._process = os.getpid()
        return self._pool

    def submit(self, do: Callable[..., T], *arguments: Any) -> Future[T]:
        return self._current().submit(do, *arguments)

    def map(self, do: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
        """Results in order; what no thread has begun with when the iterator goes is left out."""
        return self._current().map(do, *arguments)

    def each(self, do: Callable[[T], object], items: Iterable[T]) -> None:
        """Do it for each of the items; return when all are done, or raise the first one's error."""
        for _ in self.map(do, items):
            pass

    def shutdown(self) -> None:
        self._current().shutdown()


def in_order(jobs: Iterable[Callable[[], T]], workers: int, ahead: int) -> Iterator[T]:
    """Results of `jobs` in their order, at most `ahead` of them running or waiting. One of the
    workers is the thread that asks: it would wait otherwise, and systems are slow to move one of
    the others to its core."""
    if workers == 1:
        for job in jobs:
            yield job()
        return
    pending: deque[tuple[Future[T], Callable[[], T]]] = deque()

    def oldest() -> T:
        for at in range(len(pending)):
            future, job = pending[at]
            if pending[0][0].done():
                break
            if future.cancel():
                pending[at] = finished(job), job
        return pending.popleft()[0].result()

    pool = ThreadPoolExecutor(workers - 1)
    try:
        for job in jobs:
            if len(pending) >= ahead:
                yield oldest()
            pending.append((pool.submit(job), job))
        while pending:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)


def finished(job: Callable[[], T]) -> Future[T]:
    """A job's result, done here and now."""
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


def after(before: Future[Any] | None, job: Callable[[], T], pool: ThreadPoolExecutor) -> Future[T]:
    """A job's result; it is begun when `before` is done, and fails if that fails."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    def begin(done: Future[Any]) -> None:
        error = done.exception()
        if error is not None:
            future.set_exception(error)
            return
        with suppress(RuntimeError):  # nobody wants it any more
            pool.submit(work)

    if before is None:
        pool.submit(work)
    else:
        before.add_done_callback(begin)
    return future
