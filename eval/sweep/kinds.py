"""The kinds of sweeps: of codecs on caches, and of traces on fleets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from kvzip.eval.results.sweep import Row, SweepRow, TrafficRow
from kvzip.eval.sweep import measure as codecs
from kvzip.eval.sweep import traffic
from kvzip.eval.sweep.points import Point, TrafficPoint

AnyPoint = Point | TrafficPoint


class Kind(msgspec.Struct, frozen=True):
    """What belongs together: a point, how it is measured, and the row that comes of it."""

    point: type[Any]
    row: type[SweepRow]
    measure: Callable[[Any, str], SweepRow]
    """Takes the point, and the sweep's folder."""


KindName = Literal["codecs", "traffic"]
KINDS: dict[KindName, Kind] = {
    "codecs": Kind(Point, Row, codecs.measure),
    "traffic": Kind(TrafficPoint, TrafficRow, traffic.measure),
}


def kind_of(point: AnyPoint) -> Kind:
    """The kind that a point is of."""
    return next(kind for kind in KINDS.values() if isinstance(point, kind.point))


def row_form(points: Sequence[AnyPoint]) -> type[SweepRow] | None:
    """The rows of these points, which are of one kind; None where there is none."""
    return kind_of(points[0]).row if points else None


def measure(point: AnyPoint, folder: str) -> SweepRow:
    """Measure one point, whatever its kind."""
    return kind_of(point).measure(point, folder)
