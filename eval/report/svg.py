"""Charts as SVG text, to be put inside an HTML page that styles them.

Each drawing says of itself, in `data-` attributes, where its plot lies and what each path is, so
that a script in the page can move lines. Colours come from the page's CSS variables (classes `s0`,
`s1`, ... and `ideal`), so one drawing serves light, dark and print. A line also has its dash
pattern and its name beside it: colour is never the only sign. Lengths are in pixels at the width
that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from kvzip.eval.report.frame import (
    CHAR,
    LINE,
    Axis,
    Box,
    Frame,
    along,
    beside,
    clip_path,
    drawing,
    log_axis,
    path,
    spread,
    text_at,
)

__all__ = [
    "COLOURS",
    "DARK",
    "LIGHT",
    "Axis",
    "Curve",
    "Guide",
    "Line",
    "Point",
    "bars",
    "curves",
    "heat_map",
    "log_axis",
    "region_map",
    "scatter",
    "variables",
]

LIGHT = ("#6b7078", "#b3471d", "#9a6a00", "#0072b2", "#007a5a", "#a3477d", "#3d7fa6")
DARK = ("#a2a8b2", "#f08a5d", "#e5b64a", "#62b0e8", "#4cc79a", "#df93bd", "#8ecae6")
"""The colours of series on a light ground and on a dark one."""
COLOURS = len(LIGHT)
"""Distinct series classes; further series begin again."""


def variables(colours: Sequence[str]) -> str:
    """CSS that gives the series these colours."""
    return " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours))


@dataclass(frozen=True)
class Line:
    """A curve by a function of x; None where it has no value: beyond the top of the chart."""

    key: str
    label: str
    style: str
    y: Callable[[float], float | None]


@dataclass(frozen=True)
class Point:
    """A point of a chart: its place in the axes' units, its name, and a label beside it; `radius`
    is in pixels."""

    key: str
    label: str
    style: str
    x: float
    y: float
    radius: float = 5.0


@dataclass(frozen=True)
class Guide:
    """A thin line across the chart at one value of an axis, with a name."""

    label: str
    value: float
    vertical: bool = False


def region_map(
    name: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    *,
    size: tuple[int, int],
    regions: tuple[str, str],
    wins_above: bool,
    points: Sequence[Point] = (),
    guides: Sequence[Guide] = (),
    measured: tuple[float, float] | None = None,
    own: str = "",
) -> str:
    """A plane cut by lines into three regions: where loading wins with raw bytes already (beyond
    the first line), where it takes a codec (from there to the last line that is not `ideal`), and
    where it loses. `wins_above` says on which side of the lines it wins; `regions` are the words
    for the top and for the bottom. `measured` marks a range of x on its axis. `own` is the name of
    a point that is not there until a script puts it somewhere.
    """
    # A narrow chart has room for the names only.
    labels = [line.label if size[0] > 500 else line.key for line in lines]
    frame = Frame(x, y, size, right=max(map(len, labels)) * CHAR + 24)
    xs = [x.low * (x.high / x.low) ** (i / 96) for i in range(97)]
    curves = [[(frame.px(v), frame.py(line.y(v))) for v in xs] for line in lines]
    clip = f"{name}-clip"
    body = [
        clip_path(clip, frame),
        f'<g clip-path="url(#{clip})">',
        *_regions(frame, curves, lines, wins_above),
        "</g>",
        frame.axes(),
    ]
    body.append(text_at(frame.left + 9, frame.top + 18, regions[0], "region", "start"))
    body.append(text_at(frame.right - 9, frame.bottom - 26, regions[1], "region", "end"))
    if measured is not None:
        start, end = (frame.px(min(max(v, x.low), x.high)) for v in measured)
        body.append(f'<path class="measured" d="M{start:.1f} {frame.bottom}H{end:.1f}"/>')
        body.append(text_at((start + end) / 2, frame.bottom - 7, "measured", "note", "middle"))
    body += _guides(frame, guides)
    body.append(f'<g clip-path="url(#{clip})">')
    for line, curve in reversed(list(zip(lines, curves, strict=True))):
        body.append(
            f'<path class="line {line.style}" data-line="{escape(line.key)}" d="{path(curve)}"/>'
        )
    body.append("</g>")
    body += _line_names(frame, lines, labels, curves)
    body += _named_marks(frame, points)
    if own:
        body.append(
            f'<g class="own" data-own hidden><circle class="mark own" r="6"/>'
            f"{text_at(0, -10, own, 'label strong', 'middle')}</g>"
        )
    above = f' data-above="{"yes" if wins_above else "no"}"'
    return drawing(name, size, title, description, "".join(body), frame.attribute() + above)


def _regions(
    frame: Frame,
    curves: Sequence[Sequence[tuple[float, float]]],
    lines: Sequence[Line],
    wins_above: bool,
) -> list[str]:
    """The areas where loading wins with raw bytes already, and where it takes a codec."""
    real = [c for c, line in zip(curves, lines, strict=True) if line.style != "ideal"]
    first = real[0]
    furthest = max if wins_above else min  # pixels grow downwards
    last = [(column[0][0], furthest(p[1] for p in column)) for column in zip(*real, strict=True)]
    edge = frame.top - 60 if wins_above else frame.bottom + 60
    return [
        f'<path class="wins" d="{path(first)}L{frame.right} {edge}L{frame.left} {edge}Z"/>',
        f'<path class="turns" d="{path(first)}L{path(last[::-1])[1:]}Z"/>',
    ]


def _guides(frame: Frame, guides: Sequence[Guide]) -> list[str]:
    """Thin lines with their names; one that would write over the name before goes without."""
    body = []
    named = math.inf
    for guide in guides:
        if guide.vertical:
            at = frame.px(guide.value)
            body.append(f'<path class="guide" d="M{at:.1f} {frame.top}V{frame.bottom}"/>')
            body.append(text_at(at, frame.top - 6, guide.label, "note", "middle"))
        else:
            at = frame.py(guide.value)
            body.append(f'<path class="guide" d="M{frame.left} {at:.1f}H{frame.right}"/>')
            if abs(at - named) > LINE:
                body.append(text_at(frame.left + 9, at - 4, guide.label, "note", "start"))
            named = at
    return body


def _line_names(
    frame: Frame,
    lines: Sequence[Line],
    labels: Sequence[str],
    curves: Sequence[Sequence[tuple[float, float]]],
) -> list[str]:
    """The names of lines at their right ends, moved apart, each with a leader to its line."""
    body = []
    ends = [min(max(c[-1][1], frame.top), frame.bottom) for c in curves]
    places = spread(ends, frame.top + 4, frame.bottom - 4)
    for line, label, end, at in zip(lines, labels, ends, places, strict=True):
        body.append(
            f'<path class="leader {line.style}" data-leader="{escape(line.key)}" '
            f'd="M{frame.right} {end:.1f}L{frame.right + 14} {at:.1f}"/>'
        )
        key = f' data-label="{escape(line.key)}"'
        body.append(text_at(frame.right + 18, at + 4, label, "label", "start", key))
    return body


def _named_marks(frame: Frame, points: Sequence[Point]) -> list[str]:
    """Points with their names below them, one under the other where they would meet."""
    body = []
    taken: list[tuple[float, float]] = []
    for point in points:
        body.append(_mark(frame, point))
        half = len(point.label) * CHAR / 2
        at = min(max(frame.px(point.x), frame.left + half + 6), frame.right - half - 6)
        below = frame.py(point.y) + 20
        while any(abs(at - a) < 2 * half and abs(below - b) < LINE for a, b in taken):
            below += LINE
        taken.append((at, below))
        body.append(text_at(at, below, point.label, "label strong", "middle"))
    return body


def scatter(
    name: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    points: Sequence[Point],
    *,
    size: tuple[int, int],
    chain: Sequence[tuple[float, float]] = (),
    guides: Sequence[Guide] = (),
    right: float = 16.0,
) -> str:
    """Points with their names beside them, each as near as it has room; one whose label is empty
    is a mark only. `chain` joins places by a line; `guides` go across. `right`: pixels beside the
    plot, which names may use."""
    frame = Frame(x, y, size, right=right)
    body = [frame.axes(), *_guides(frame, guides)]
    if chain:
        places = [(frame.px(a), frame.py(b)) for a, b in chain]
        body.append(f'<path class="line ideal" d="{path(places)}"/>')
    taken = along([(frame.px(a), frame.py(b)) for a, b in chain])
    taken += [
        Box(frame.px(p.x) - r, frame.py(p.y) - r, 2 * r, 2 * r)
        for p in points
        for r in [p.radius + 1]
    ]
    for point in points:
        if not point.label:
            continue
        px, py = frame.px(point.x), frame.py(point.y)
        left, box = beside(px, py, len(point.label) * CHAR, frame, taken)
        taken.append(box)
        edge, at = (box.x + box.width + 4 if left else box.x - 4), box.y + LINE / 2
        body.append(
            f'<path class="leader {point.style}" d="M{px:.1f} {py:.1f}L{edge:.1f} {at:.1f}"/>'
        )
        start = box.x + box.width if left else box.x
        body.append(text_at(start, at + 4, point.label, "label", "end" if left else "start"))
    body += [_mark(frame, point) for point in points]
    return drawing(name, size, title, description, "".join(body), frame.attribute())


def _mark(frame: Frame, point: Point) -> str:
    return (
        f'<circle class="mark {point.style}" data-point="{escape(point.key)}" '
        f'cx="{frame.px(point.x):.1f}" cy="{frame.py(point.y):.1f}" r="{point.radius:g}"/>'
    )


def bars(
    name: str,
    title: str,
    description: str,
    x: Axis,
    rows: Sequence[tuple[str, str, float]],
    *,
    size: tuple[int, int],
) -> str:
    """A bar for each row, (label, style, value), from the axis' low end, with its value behind."""
    ticks = [(0.0, label) for label, _, _ in rows]
    frame = Frame(x, Axis("", 0, len(rows), ticks, False), size, right=44)
    step = (frame.bottom - frame.top) / max(len(rows), 1)
    parts = frame.x_ticks(grid=True)
    for i, (label, style, value) in enumerate(rows):
        top, end = frame.top + i * step, frame.px(value)
        parts.append(
            f'<rect class="bar {style}" data-bar="{escape(label)}" x="{frame.left:.1f}" '
            f'y="{top + 0.15 * step:.1f}" width="{max(end - frame.left, 0):.1f}" '
            f'height="{0.7 * step:.1f}"/>'
        )
        parts.append(text_at(frame.left - 7, top + step / 2 + 4, label, "tick", "end"))
        parts.append(text_at(end + 6, top + step / 2 + 4, f"{value:.2f}", "label", "start"))
    return drawing(name, size, title, description, "".join(parts + frame.titles()))


def heat_map(
    name: str,
    title: str,
    description: str,
    columns: tuple[str, Sequence[str]],
    rows: tuple[str, Sequence[str]],
    values: Sequence[Sequence[float | None]],
    *,
    size: tuple[int, int],
) -> str:
    """A cell for each value of `values` [rows][columns], the darker the higher, and a key to the
    shades; None: no cell. Each axis is a title and its labels. A cell's title is its value."""
    known = [value for row in values for value in row if value is not None]
    low, high = min(known), max(known)
    x = Axis(
        columns[0], 0, len(columns[1]), [(i + 0.5, t) for i, t in enumerate(columns[1])], False
    )
    y = Axis(rows[0], 0, len(rows[1]), [(i + 0.5, t) for i, t in enumerate(rows[1])], False)
    frame = Frame(x, y, size, right=64)
    wide = (frame.right - frame.left) / max(len(columns[1]), 1)
    tall = (frame.bottom - frame.top) / max(len(rows[1]), 1)

    def cell(at: float, top: float, box: tuple[float, float], value: float, says: str) -> str:
        shade = 0.06 + 0.94 * (value - low) / (high - low) if high > low else 0.5
        return (
            f'<rect class="cell" x="{at:.1f}" y="{top:.1f}" width="{box[0]:.1f}" '
            f'height="{box[1]:.1f}" fill-opacity="{shade:.3f}"><title>{escape(says)}</title></rect>'
        )

    parts = []
    for i, (row, label) in enumerate(zip(values, rows[1], strict=True)):
        top = frame.top + i * tall
        parts.append(text_at(frame.left - 7, top + tall / 2 + 4, label, "tick", "end"))
        for j, value in enumerate(row):
            if value is None:
                continue
            says = f"{rows[0]} {label}, {columns[0]} {columns[1][j]}: {value:.2f}"
            at = frame.left + j * wide
            parts.append(cell(at, top, (max(wide - 1, 0.5), max(tall - 1, 0.5)), value, says))
    parts += frame.x_ticks(grid=False)
    steps = 6
    for i in range(steps if high > low else 1):
        value = high - (high - low) * i / (steps - 1)
        top = frame.top + i * 18
        parts.append(cell(frame.right + 12, top, (14, 14), value, f"{value:.2f}"))
        parts.append(text_at(frame.right + 30, top + 11, f"{value:.1f}", "tick", "start"))
    return drawing(name, size, title, description, "".join(parts + frame.titles()))


@dataclass(frozen=True)
class Curve:
    """Places joined by a line, and a band around it, both [(x, y)] or (x, low, high)."""

    key: str
    label: str
    style: str
    places: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def curves(
    name: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Curve],
    *,
    size: tuple[int, int],
    points: Sequence[Point] = (),
    right: float | None = None,
) -> str:
    """Curves with their names at their right ends, and marks (without names) over them. `right`:
    pixels beside the plot, which the names use; by default as many as they are long."""
    if right is None:
        right = max(len(c.label) for c in lines) * CHAR + 24
    frame = Frame(x, y, size, right=right)
    clip = f"{name}-clip"
    body = [
        clip_path(clip, frame),
        frame.axes(),
        f'<g clip-path="url(#{clip})">',
    ]
    for c in lines:
        if c.band:
            edge = [(frame.px(a), frame.py(b)) for a, b, _ in c.band]
            edge += [(frame.px(a), frame.py(b)) for a, _, b in reversed(c.band)]
            body.append(f'<path class="band {c.style}" d="{path(edge)}Z"/>')
        places = [(frame.px(a), frame.py(b)) for a, b in c.places]
        body.append(
            f'<path class="line {c.style}" data-line="{escape(c.key)}" d="{path(places)}"/>'
        )
    body += [_mark(frame, point) for point in points]
    body.append("</g>")
    ends = [min(max(frame.py(c.places[-1][1]), frame.top), frame.bottom) for c in lines]
    # Where curves end together, their names stand in the order in which they came.
    means = [sum(frame.py(b) for _, b in c.places) / len(c.places) for c in lines]
    places_of_names = spread(ends, frame.top, frame.bottom, means)
    for c, end, at in zip(lines, ends, places_of_names, strict=True):
        start = frame.px(c.places[-1][0])
        body.append(
            f'<path class="leader {c.style}" d="M{start:.1f} {end:.1f}'
            f'L{frame.right + 14} {at:.1f}"/>'
        )
        body.append(text_at(frame.right + 18, at + 4, c.label, "label", "start"))
    return drawing(name, size, title, description, "".join(body))
