"""The lower convex hull of the predictors, and what each step along it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

from kvzip.eval.results.frontier import Point, Step


class _Place(Protocol):
    """What has bits a number, and a share of a prefill's products."""

    @property
    def bits(self) -> float: ...
    @property
    def share(self) -> float: ...


P = TypeVar("P", bound=_Place)


def hull(points: Sequence[Point], room: float) -> list[Point]:
    """The lower convex hull of the predictors by share: no mixture of others is below these.

    Recomputation, which is the prefill itself, stays out, and so does what must know more than
    `room` bytes beside the model, which a copy is made from."""
    able = [
        p
        for p in points
        if p.family == "copy"
        or (p.family not in ("recomputation", "floor") and p.profile_bytes <= room)
    ]
    return lower_hull(able)


def lower_hull(points: Sequence[P]) -> list[P]:
    """The lower convex hull of points by share, the cheapest first: no mixture is below it."""
    found: list[P] = []
    for p in sorted(points, key=lambda p: (p.share, p.bits)):
        if found and p.bits >= min(q.bits for q in found):
            continue
        while len(found) > 1 and _turns_up(found[-2], found[-1], p):
            found.pop()
        found.append(p)
    return found


def _turns_up(a: _Place, b: _Place, c: _Place) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.bits - a.bits) * (c.share - a.share) >= (c.bits - a.bits) * (b.share - a.share)


def steps(
    points: Sequence[Point], room: float, numbers: int, prefill_seconds_per_token: float | None
) -> list[Step]:
    """`numbers`: of a token. The bits that a step saves take numbers * bits / rate to send."""
    chain = hull(points, room)
    found = []
    for a, b in pairwise(chain):
        saved, more = a.bits - b.bits, b.share - a.share
        rate = None
        if prefill_seconds_per_token is not None and more > 0:
            rate = saved * numbers / (more * prefill_seconds_per_token) / 1e6
        found.append(
            Step(
                cheaper=a.key,
                dearer=b.key,
                bits_saved=saved,
                share_more=more,
                worth_below_mbps=rate,
            )
        )
    return found
