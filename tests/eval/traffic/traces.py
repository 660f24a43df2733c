"""Small traces for tests."""

from __future__ import annotations

from collections.abc import Sequence

from kvzip.eval.traffic.trace import Request, Trace, of_requests


def a_trace(*prompts: list[int], seconds: Sequence[float] | None = None) -> Trace:
    """A trace of prompts of whole blocks, by default a millisecond apart."""
    times = [i / 1e3 for i in range(len(prompts))] if seconds is None else seconds
    return of_requests(
        [Request(1e3 * time, len(p) * 512, 1, p) for time, p in zip(times, prompts, strict=True)],
        "a trace",
    )
