"""Where the things of a chart lie: its axes, values as pixels, and names that do not meet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LINE = 15.0
"""Least distance of two labels, baseline to baseline."""
CHAR = 6.7
"""Mean width of a character of a label."""
_SPARE = 8.0
"""What a label leaves free to the picture's edge: some fonts are wider."""


@dataclass(frozen=True)
class Axis:
    """One axis: a title, its range and its ticks (value, text); logarithmic or linear."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = True

    def place(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high end; may lie outside."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def log_axis(title: str, low: float, high: float, text: Callable[[float], str]) -> Axis:
    """A logarithmic axis with ticks at 1, 2, 5 x 10^n, or at powers of ten over a long range."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [m * 10.0**n for n in decades for m in steps]
    return Axis(title, low, high, [(v, text(v)) for v in values if low <= v <= high])


class Frame:
    """The plot's rectangle, its axes, and the mapping from values to pixels."""

    def __init__(self, x: Axis, y: Axis, size: tuple[int, int], right: float) -> None:
        self.x, self.y = x, y
        self.width, self.height = size
        self.left = 16 + CHAR * max(len(text) for _, text in y.ticks)
        self.top, self.bottom = 40.0, self.height - 46.0
        self.right = self.width - right

    def attribute(self) -> str:
        """Where the plot lies, and what its edges stand for, as an attribute of the drawing."""
        geometry = json.dumps(
            {
                "left": round(self.left, 2),
                "right": round(self.right, 2),
                "top": self.top,
                "bottom": self.bottom,
                "x": [self.x.low, self.x.high],
                "y": [self.y.low, self.y.high],
            }
        )
        return f" data-geometry='{geometry}'"

    def px(self, value: float) -> float:
        """Pixels from the left."""
        return self.left + self.x.place(value) * (self.right - self.left)

    def py(self, value: float | None) -> float:
        """Pixels from the top; None lies above the plot, and far values stay near it."""
        if value is None:
            return self.top - 50
        place = self.y.place(value) if value > 0 or not self.y.log else -1.0
        return self.bottom - min(max(place, -1), 2) * (self.bottom - self.top)

    def axes(self) -> str:
        """Both axes: grid, ticks and titles."""
        parts = self.x_ticks(grid=True)
        for value, text in self.y.ticks:
            at = self.py(value)
            parts.append(f'<path class="grid" d="M{self.left} {at:.1f}H{self.right}"/>')
            key = f' data-tick="{value:g}"'
            parts.append(text_at(self.left - 7, at + 4, text, "tick", "end", key))
        return "".join(parts + self.titles())

    def x_ticks(self, grid: bool) -> list[str]:
        """The names of the ticks below the plot, as far as they have room, and the `grid`'s lines
        at all of them."""
        parts = []
        last = -math.inf
        for value, text in self.x.ticks:
            at = self.px(value)
            if grid:
                parts.append(f'<path class="grid" d="M{at:.1f} {self.top}V{self.bottom}"/>')
            if at - last > len(text) * CHAR + 6:
                last = at
                parts.append(text_at(at, self.bottom + 17, text, "tick", "middle"))
        return parts

    def titles(self) -> list[str]:
        """The axes' titles, of those that have one."""
        middle = (self.left + self.right) / 2
        x = text_at(middle, self.height - 8, self.x.title, "axis", "middle")
        y = text_at(4, 13, self.y.title, "axis", "start")
        return [text for text, axis in ((x, self.x), (y, self.y)) if axis.title]


def text_at(x: float, y: float, text: str, style: str, anchor: str, more: str = "") -> str:
    """Text whose anchor ("start", "middle", "end") is at a place; `more` attributes."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def spread(
    wanted: Sequence[float], low: float, high: float, ties: Sequence[float] = ()
) -> list[float]:
    """`wanted` moved apart by a label's height, in order, inside [low, high] if they fit. Where two
    are the same, `ties` says which comes first."""
    order = sorted(range(len(wanted)), key=lambda i: (round(wanted[i], 1), *ties[i : i + 1]))
    at = [min(max(wanted[i], low), high) for i in order]
    for _ in range(50):
        moved = False
        for i in range(len(at) - 1):
            if at[i + 1] - at[i] < LINE - 0.1:
                middle = (at[i] + at[i + 1]) / 2
                at[i], at[i + 1] = middle - LINE / 2, middle + LINE / 2
                moved = True
        shift = max(low - at[0], 0) if at else 0
        shift = min(high - at[-1], 0) if at and at[-1] > high else shift
        at = [a + shift for a in at]
        if not moved:
            break
    placed = [0.0] * len(wanted)
    for i, a in zip(order, at, strict=True):
        placed[i] = a
    return placed


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def along(places: Sequence[tuple[float, float]]) -> list[Box]:
    """Boxes that cover the line through `places`, so that no name is written over it."""
    found = []
    for (ax, ay), (bx, by) in pairwise(places):
        steps = max(1, math.ceil(math.hypot(bx - ax, by - ay) / 4))
        for i in range(steps + 1):
            x, y = ax + (bx - ax) * i / steps, ay + (by - ay) * i / steps
            found.append(Box(x - 2, y - 2, 4, 4))
    return found


def beside(
    px: float, py: float, width: float, frame: Frame, taken: Sequence[Box]
) -> tuple[bool, Box]:
    """Whether the name of a point goes to its left, and the name's box: the nearest free one."""
    roomier = px > (frame.left + frame.right) / 2
    places = [
        (left, Box(px - 20 - width if left else px + 20, middle - LINE / 2, width, LINE))
        for away in range(int(frame.height / LINE))
        for middle in (py + away * LINE, py - away * LINE)
        for left in (roomier, not roomier)
    ]
    inside = [
        (left, box)
        for left, box in places
        if frame.left < box.x
        and box.x + width + _SPARE < frame.width
        and frame.top < box.y
        and box.y + LINE < frame.bottom
    ]
    free = (p for p in inside if not any(p[1].meets(other) for other in taken))
    return next(free, places[0])


def clip_path(clip: str, frame: Frame) -> str:
    """The plot's rectangle, by which a group can be cut off."""
    return (
        f'<clipPath id="{clip}"><rect x="{frame.left}" y="{frame.top}" '
        f'width="{frame.right - frame.left}" height="{frame.bottom - frame.top}"/></clipPath>'
    )


def path(curve: Sequence[tuple[float, float]]) -> str:
    """The `d` of a path through these places."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in curve)


def drawing(
    name: str,
    size: tuple[int, int],
    title: str,
    description: str,
    body: str,
    attributes: str = "",
) -> str:
    """A whole drawing, which says what it is to who cannot see it."""
    width, height = size
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" aria-labelledby="{name}-t {name}-d" data-chart="{name}"{attributes}>'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}'
        f"</desc>{body}</svg>"
    )
