"""What loads and stores do, counted for whoever listens.

.. code-block:: python

    from kvzip import metrics

    stop = metrics.listen(lambda event: print(event))      # any function of an Event
    metrics.prometheus()                                   # as metrics of prometheus_client

Nobody listens by default, and then nothing is counted or timed. METRICS has all there are. A
listener is called in the thread in which something happened, by several threads at once, and must
be quick; what it raises is logged once (logger "kvzip.metrics") and goes no further.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from kvzip.errors import (
    CancelledError,
    CorruptError,
    FormatError,
    KVZipError,
    ProfileError,
    SealError,
    StoreError,
    UnsupportedError,
    UsageError,
    WeightsError,
    extra_told,
)
from kvzip.options import callback
from kvzip.workers import Lock

_log = logging.getLogger("kvzip.metrics")


class Metric(NamedTuple):
    """Something that is counted."""

    words: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's; a metric without is a counter."""


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
METRICS: Mapping[str, Metric] = {
    "lookups": Metric(
        "Prompts or pages looked for, by what was found: hit, miss, near_miss (something begins "
        "alike, and is of other weights or cannot be used), error",
        ("where", "result"),
    ),
    "found_tokens": Metric("Tokens of prompts that lookups found", ("where",)),
    "recomputes": Metric(
        "What was there and had to be computed all the same, by the reason: damaged, store, "
        "profile, key, weights, unsupported, cancelled, other",
        ("where", "reason"),
    ),
    "read_bytes": Metric("Stored bytes that were read to be decoded", ("codec",)),
    "decoded_bytes": Metric("Bytes of numbers that were decoded", ("codec",)),
    "decode_seconds": Metric("Time of a call that decodes, reading included", ("codec",), _SECONDS),
    "encoded_bytes": Metric("Bytes of numbers that were encoded", ("codec",)),
    "written_bytes": Metric("Bytes of the files that they became", ("codec",)),
    "encode_seconds": Metric("Time of a call that encodes", ("codec",), _SECONDS),
    "evictions": Metric("Documents that a full store let go", ()),
}
"""All metrics by their names. `where`: store, transformers, vllm, lmcache, sglang."""


class Event(NamedTuple):
    """Something that happened: `value` is a number of times, tokens, bytes, or seconds."""

    name: str
    value: float
    labels: Mapping[str, str]


Listener = Callable[[Event], object]
_listeners: tuple[Listener, ...] = ()
_lock = Lock()
_told: set[int] = set()


def listen(listener: Listener) -> Callable[[], None]:
    """Have a function called with each Event from now on; what is given back ends that. Any thread
    may call either. Raises UsageError for what is no function."""
    global _listeners
    if callback("listener", listener) is None:
        raise UsageError("listener is None: it must be a function")
    with _lock:
        _listeners = (*_listeners, listener)

    def stop() -> None:
        global _listeners
        with _lock:
            left = list(_listeners)
            if listener in left:
                left.remove(listener)
            _listeners = tuple(left)

    return stop


def listening() -> bool:
    """Whether anybody wants to know."""
    return bool(_listeners)


def count(name: str, value: float = 1, **labels: str) -> None:
    """Tell who listens that something happened."""
    for listener in _listeners:
        try:
            listener(Event(name, value, labels))
        except Exception as error:  # who counts must not break what is counted
            if id(listener) not in _told:
                _told.add(id(listener))
                _log.warning("a listener of metrics failed: %s", error, exc_info=True)


def recomputed(where: str, error: BaseException) -> None:
    """Tell that something is computed because of an error."""
    if _listeners:
        count("recomputes", where=where, reason=reason_of(error))


def reason_of(error: BaseException) -> str:
    """The label `reason` of an error."""
    for kinds, reason in _REASONS:
        if isinstance(error, kinds):
            return reason
    return "other"


_REASONS: tuple[tuple[Any, str], ...] = (
    (CancelledError, "cancelled"),
    (WeightsError, "weights"),
    ((CorruptError, FormatError), "damaged"),
    (ProfileError, "profile"),
    (SealError, "key"),
    (UnsupportedError, "unsupported"),
    ((StoreError, OSError), "store"),
)


@contextmanager
def lookup(where: str) -> Iterator[None]:
    """A block in which something is looked for: an error in it is counted."""
    try:
        yield
    except (KVZipError, OSError):
        count("lookups", where=where, result="error")
        raise


class Timer:
    """The time since it was made, if anybody wants to know."""

    __slots__ = ("_began",)

    def __init__(self) -> None:
        self._began = time.perf_counter() if _listeners else None

    @property
    def wanted(self) -> bool:
        """Whether anybody wanted to know when it was made."""
        return self._began is not None

    def done(self, name: str, **labels: str) -> None:
        """Tell how long it took."""
        if self._began is not None:
            count(name, time.perf_counter() - self._began, **labels)


def prometheus(registry: Any = None, prefix: str = "kvzip_") -> Callable[[], None]:
    """Count with `prometheus_client` (``pip install 'kvzip[metrics]'``), in a registry of its
    (default: its own); what is given back ends that and takes the metrics out again.

    Names are `prefix` and those of METRICS, counters with ``_total`` behind. Raises KVZipError
    where that package is missing, UsageError where the registry has such names already.
    """
    with extra_told("this needs more", "metrics"):
        from prometheus_client import REGISTRY, Counter, Histogram
    chosen = REGISTRY if registry is None else registry
    made: dict[str, Any] = {}

    def unregister() -> None:
        for each in made.values():
            chosen.unregister(each)

    try:
        for name, metric in METRICS.items():
            if metric.buckets:
                made[name] = Histogram(
                    prefix + name,
                    metric.words,
                    metric.labels,
                    registry=chosen,
                    buckets=metric.buckets,
                )
            else:
                made[name] = Counter(prefix + name, metric.words, metric.labels, registry=chosen)
    except ValueError as error:
        unregister()
        raise UsageError(f"the registry does not take kvzip's metrics: {error}") from None

    def take(event: Event) -> None:
        of = made[event.name]
        child = of.labels(**event.labels) if event.labels else of
        if METRICS[event.name].buckets:
            child.observe(event.value)
        else:
            child.inc(event.value)

    end = listen(take)

    def stop() -> None:
        end()
        unregister()

    return stop
