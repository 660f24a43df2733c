"""Threads for short jobs, which a forked process has of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


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
        return self._current().map(do, *arguments)

    def each(self, do: Callable[[T], object], items: Iterable[T]) -> None:
        """Do it for each of the items; return when all are done, or raise the first one's error."""
        for _ in self.map(do, items):
            pass

    def shutdown(self) -> None:
        self._current().shutdown()
