"""The charts of stored results, each drawn here and nowhere else: ratio against speed, the ladder
of entropy models, the frontier, measured links. The two maps are in `maps.py`.

Each function gives SVG text that a page styles (classes as in `svg.py`); `pictures.py` makes files
of their own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from kvzip.entropy import Ladder, Rung
from kvzip.entropy.ladder import BEFORE_ROPE, PREDICTED, PROFILE, TABLES
from kvzip.entropy.tables import LEVELS
from kvzip.eval.frontier.hull import hull
from kvzip.eval.links.prediction import predict
from kvzip.eval.report import svg
from kvzip.eval.report.parts import format_labels, part_label
from kvzip.eval.report.text import short
from kvzip.eval.results.bench import BenchRow
from kvzip.eval.results.demo import CodecResult
from kvzip.eval.results.frontier import Frontier, Point, Run
from kvzip.eval.results.links import PREFILL, Links
from kvzip.eval.results.whole_frontier import WholePoint, WholeRun

WIDE = 760
_STYLES = {
    "tables": "s0",
    "linear": "s1",
    "piecewise": "s2",
    "copy": "s3",
    "recomputation": "s4",
    "file": "s1",
    "recompute": "s4",
    "tried": "s0",
}
"""By family of predictors, and of what stands in a frontier of whole files."""

# --- ratio against speed -------------------------------------------------------------------------


def speed_svg(
    codecs: Sequence[CodecResult], name: str = "speed", size: tuple[int, int] = (WIDE, 300)
) -> str:
    """Ratio against decode speed, a point for each codec of a demo."""
    style = codec_styles(codecs)
    points = [
        svg.Point(c.name, f"{c.name} {c.ratio:.2f}×", style[c.name], c.decode_gbps, c.ratio)
        for c in codecs
    ]
    return _ratio_against_speed(points, name, size)


def bench_svg(
    rows: Sequence[BenchRow], name: str = "bench", size: tuple[int, int] = (WIDE, 420)
) -> str:
    """Ratio against decode speed, a point for each row of a benchmark."""
    style = {"memcpy": "s0", "kvzip": "s1", "peer": "s3"}
    narrow = size[0] < 500
    points = [
        svg.Point(
            r.title,
            r.title if narrow else f"{r.title} {r.ratio:.2f}×",
            style[r.kind],
            r.decode_gbps,
            r.ratio,
        )
        for r in rows
    ]
    return _ratio_against_speed(points, name, size)


def codec_styles(codecs: Sequence[CodecResult]) -> dict[str, str]:
    """A class for each codec, the same in every chart."""
    return {codec.name: f"s{i % svg.COLOURS}" for i, codec in enumerate(codecs)}


def _ratio_against_speed(points: Sequence[svg.Point], name: str, size: tuple[int, int]) -> str:
    speeds, ratios = [p.x for p in points], [p.y for p in points]
    x = svg.log_axis(
        "decode speed, GB of raw numbers per second", min(speeds) / 1.6, max(speeds) * 1.6, short
    )
    low, high = min(0.95, *ratios), max(1.1, *ratios) + 0.08
    step = 0.1 if high < 2 else 0.5 if high < 6 else 10.0 ** math.ceil(math.log10(high) - 1)
    ticks = [
        (i * step, f"{i * step:.1f}")
        for i in range(math.floor(0.9 / step), math.ceil(high / step) + 1)
        if low <= i * step <= high
    ]
    y = svg.Axis("ratio, raw bytes over encoded bytes", low, high, ticks, False)
    spoken = "; ".join(f"{p.key}: {p.y:.2f}x at {p.x:.2f} GB/s" for p in points)
    return svg.scatter(name, "Ratio against decode speed", spoken, x, y, points, size=size)


# --- the ladder ----------------------------------------------------------------------------------


def ladder_svg(ladder: Ladder) -> str:
    """Bits per number, a bar for each rung."""
    style = dict.fromkeys((*LEVELS, BEFORE_ROPE), "s0") | dict.fromkeys(PREDICTED, "s1")
    style |= dict.fromkeys((PROFILE, TABLES), "s3")
    rows = [(rung.name, style[rung.name], rung.bits) for rung in ladder.rungs]
    top = max(1, math.ceil(max(rung.bits for rung in ladder.rungs)))
    formats = dict.fromkeys(part.dtype for part in ladder.rungs[0].parts)
    every = 2 if top > 8 else 1
    axis = svg.Axis(
        f"bits per number, ideal ({', '.join(formats)})",
        0,
        top,
        [(i, str(i)) for i in range(0, top + 1, every)],
        False,
    )
    spoken = "; ".join(f"{label}: {bits:.2f}" for label, _, bits in rows)
    size = WIDE, 86 + 26 * len(rows)
    return svg.bars("ladder", "Bits per number by model", spoken, axis, rows, size=size)


def heat_svg(ladder: Ladder) -> str:
    """Bits per number by layer and head, part below part, keys first, under the lowest rung that
    tells heads apart."""
    able = [r for r in ladder.rungs if _heads(r) == _heads(ladder.rungs[0])]
    chosen = min(able, key=lambda r: r.bits)
    found = [{p: bits.heads for p, bits in layer.items()} for layer in chosen.layers]
    heads = {p.part: max(len(layer.get(p.part, [])) for layer in found) for p in chosen.parts}
    rows = [(p, h) for p, n in heads.items() for h in range(n)]
    labels = [f"{part_label(p)} {h}" for p, h in rows]
    values = [[next(iter(layer.get(p, [])[h : h + 1]), None) for layer in found] for p, h in rows]
    numbers = [str(i) for i in range(len(chosen.layers))]
    size = WIDE, 96 + max(16, min(26, 400 // len(labels))) * len(labels)
    title = f"Bits per number by layer and head: {chosen.name}"
    means = zip(format_labels(chosen.parts), chosen.parts, strict=True)
    spoken = ", ".join(
        [f"{chosen.bits:.2f} on average", *(f"{label} {p.bits:.2f}" for label, p in means)]
    )
    return svg.heat_map(
        "heat", title, spoken, ("layer", numbers), ("head", labels), values, size=size
    )


def _heads(rung: Rung) -> list[int]:
    """How many heads a rung tells apart in each part of each layer."""
    return [len(part.heads) for layer in rung.layers for part in layer.values()]


def spectrum_svg(ladder: Ladder) -> str:
    """Eigenvalues of what is left of a layer, beside those of the layer itself: the median over
    layers, and from the lowest to the highest. The first layer, which has none before, stays out.
    """
    spectra = ladder.spectra[1:] or ladder.spectra
    count = min(len(s.residual) for s in spectra)
    lines = []
    for key, label, style in (
        ("before", "the numbers", "s0"),
        ("residual", "what is left", "s1"),
    ):
        by_layer = [getattr(s, key)[:count] for s in spectra]
        columns = [[max(v, 1e-6) for v in column] for column in zip(*by_layer, strict=True)]
        places = [(i + 1.0, statistics.median(c)) for i, c in enumerate(columns)]
        band = [(i + 1.0, min(c), max(c)) for i, c in enumerate(columns)]
        lines.append(svg.Curve(key, label, style, places, band))
    every = [v for line in lines for _, v in line.places]
    ticks = [1, *range(count // 6, count + 1, max(count // 6, 1))]
    x = svg.Axis("eigenvalue, largest first", 1, max(count, 2), [(t, str(t)) for t in ticks], False)
    y = svg.log_axis(
        "variance along it, 1 is a channel's own",
        min(every) / 2,
        max(every) * 2,
        lambda v: f"{v:g}",
    )
    title = "Spectrum of a layer before and after prediction from the layers before"
    spoken = "Medians over layers: " + "; ".join(
        f"{line.label}: {line.places[0][1]:.3g} to {line.places[-1][1]:.3g}" for line in lines
    )
    return svg.curves("spectrum", title, spoken, x, y, lines, size=(WIDE, 340))


# --- the frontier --------------------------------------------------------------------------------


def frontier_svg(
    result: Frontier, run: Run, name: str = "frontier", size: tuple[int, int] = (WIDE, 440)
) -> str:
    """Bits per number against share of the prefill's multiplications; a point's area is the bytes
    that its predictor must know; the line is the lower convex hull of those that need little room.
    """
    chosen = hull(run.points, result.prefill_products)
    best = {p.key for p in chosen}
    points = [p for p in run.points if p.family != "floor" and (not p.within or p.key in best)]
    floors = [p for p in run.points if p.family == "floor" and not p.within]
    guides = [svg.Guide(f"{p.label} {p.bits:.2f}", p.bits) for p in floors]
    title = f"Bits per number against compute, {run.dtype}"
    return _against_compute(name, title, points, chosen, guides, "bits per number, ideal", size)


def whole_svg(run: WholeRun, name: str) -> str:
    """The same of whole files, and of files whose first layers are computed. Of points of a kind
    at the same place on the scale of compute only the lowest has its name beside it."""

    def in_crowd(p: WholePoint) -> bool:
        return any(
            q.family == p.family and abs(q.share - p.share) < 0.02 and q.bits < p.bits
            for q in run.points
        )

    points = [msgspec.structs.replace(p, label="") if in_crowd(p) else p for p in run.points]
    by_key = {p.key: p for p in points}
    chosen = [by_key[key] for key in run.hull]
    title = f"Bits per number of whole files against compute, {run.shape.name}, {run.dtype}"
    return _against_compute(
        name, title, points, chosen, (), "bits per number", (WIDE, 480), log=False
    )


def _against_compute(
    name: str,
    title: str,
    given: Sequence[Point | WholePoint],
    chosen: Sequence[Point | WholePoint],
    guides: Sequence[svg.Guide],
    axis_of_bits: str,
    size: tuple[int, int],
    log: bool = True,
) -> str:
    """Points by their share of a prefill and their bits, `chosen` joined by a line, which is a
    mixture of its ends where shares are not logarithmic. A narrow chart names only those."""
    best = {p.key for p in chosen}
    points = sorted(given, key=lambda p: -p.profile_bytes)  # small ones in front
    least = min((p.share for p in points if p.share > 0), default=1.0)
    nothing = least / 3
    largest = max(p.profile_bytes for p in points) or 1.0
    narrow = size[0] < 500

    def place(p: Point | WholePoint) -> float:
        return max(p.share, nothing) if log else p.share

    def label(p: Point | WholePoint) -> str:
        if not p.label or (narrow and p.key not in best):
            return ""
        return f"{p.label} {p.bits:.2f}"

    marks = [
        svg.Point(
            p.key,
            label(p),
            _STYLES[p.family],
            place(p),
            p.bits,
            round(3 + 17 * math.sqrt(p.profile_bytes / largest), 1),
        )
        for p in points
    ]
    about, high = "multiplications, as a share of the model's own prefill", max(map(place, points))
    x = svg.Axis(about, -0.06, high + 0.06, [(n / 5, f"{20 * n} %") for n in range(6)], False)
    if log:
        axis = svg.log_axis(about, nothing / 1.5, high * 1.6, _percent)
        ticks = [(nothing, "0"), *(t for t in axis.ticks if t[0] >= least)]
        x = svg.Axis(about, axis.low, axis.high, ticks)
    bits = [*(p.bits for p in points), *(guide.value for guide in guides)]
    low, top = math.floor(min(bits)), math.ceil(max(bits) + 0.3)
    # The lowest point has room for its area above the axis' own names.
    least_shown = min(low, min(bits) - 0.07 * (top - low))
    ticks_of_bits = [(i, str(i)) for i in range(low, top + 1)]
    y = svg.Axis(axis_of_bits, least_shown, top, ticks_of_bits, False)
    spoken = "; ".join(f"{p.title}: {p.bits:.2f} bits at {_percent(p.share)}" for p in points)
    chain = [(place(p), p.bits) for p in chosen]
    right = 16.0 if narrow else 120.0  # for the names of what costs as much as a prefill
    return svg.scatter(
        name, title, spoken, x, y, marks, size=size, chain=chain, guides=guides, right=right
    )


# --- links ---------------------------------------------------------------------------------------

_WAYS = {PREFILL: "s0", "raw": "s3", "channel": "s2", "predictive": "s1"}


def links_svg(
    links: Links, delay: float, name: str = "links", size: tuple[int, int] = (WIDE, 400)
) -> str:
    """Seconds to the first token against bandwidth, at one delay: lines as predicted, a point for
    each measurement, its median large."""
    here = [p for p in links.points if p.delay == delay]
    rates = sorted({p.mbps for p in here})
    low, high = rates[0] / 1.25, rates[-1] * 1.25
    ways = list(dict.fromkeys(p.way for p in here))
    style = {w: _WAYS.get(w, f"s{i % svg.COLOURS}") for i, w in enumerate(ways)}
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    lines = [
        svg.Curve(w, w, style[w], [(m, predict(links.inputs, w, m, delay)) for m in grid])
        for w in ways
    ]
    points = [
        svg.Point(f"{p.way}-{p.mbps:g}", "", style[p.way], p.mbps, seconds, radius)
        for p in here
        for seconds, radius in [*((t, 2.0) for t in p.times), (p.seconds, 4.5)]
    ]
    every = [p.y for p in points] + [y for line in lines for _, y in line.places]
    x = svg.log_axis("nominal bandwidth of the link", low, high, _mbps)
    y = svg.log_axis(
        "time to first token", min(every) / 1.2, max(every) * 1.2, lambda s: f"{s:g} s"
    )
    title = "Time to first token against bandwidth: lines predicted, points measured"
    spoken = "; ".join(
        f"{p.way} at {_mbps(p.mbps)}: {p.seconds:.3g} s, predicted {p.predicted:.3g}" for p in here
    )
    return svg.curves(name, title, spoken, x, y, lines, size=size, points=points)


def _mbps(rate: float) -> str:
    return f"{rate / 1e3:g} Gb/s" if rate >= 1000 else f"{rate:g} Mb/s"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
