"""The threads of linear algebra while a profile is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")

NARROW = 1024
"""Numbers of a layer and token up to which a product is too small to be shared by threads."""
_held: ContextVar[int] = ContextVar("threads before BLAS was held to one", default=0)


@contextmanager
def for_width(width: int) -> Iterator[None]:
    """BLAS has its threads for what is as wide as that, or one where they would not pay. OpenBLAS's
    threads wait for each other without sleeping, so that products of narrow layers take several
    times as long, and as much of the processor, wherever others use it, too. What runs
    :func:`side_by_side` keeps all cores busy none the less.

    Sums are cut by the number of threads: with one a profile has the same bytes on any number of
    cores, for wider layers they depend on how many there are (docs/qwen3-4b.md). They depend on the
    processor in any case: OpenBLAS has kernels for each kind, which add in another order."""
    if width > NARROW:
        yield
        return
    blas = ThreadpoolController().select(user_api="blas")
    before = _held.set(_threads(blas))
    try:
        with blas.limit(limits=1):
            yield
    finally:
        _held.reset(before)


def side_by_side(job: Callable[[int], T], count: int) -> list[T]:
    """What a job gives for each number below `count`, several at a time where BLAS has the threads,
    which share them: products keep all busy, and what lies between them one. A job holds some
    hundred megabytes at a large model's width, hence four at most."""
    blas = ThreadpoolController().select(user_api="blas")
    threads = _held.get() or _threads(blas)
    jobs = max(1, min(count, threads, 4))
    each = 1 if _held.get() else max(1, threads // jobs)
    with blas.limit(limits=each), ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(job, range(count)))


def _threads(blas: Any) -> int:
    return max((library.num_threads for library in blas.lib_controllers), default=1)
