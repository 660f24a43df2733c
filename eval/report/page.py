"""The report: one HTML file that needs nothing else, neither network nor fonts; its one script,
`report.js`, moves the maps' lines to prices of one's own, and without it all else is there.

This module hands a :class:`~kvzip.eval.results.demo.DemoResult` and its charts to the page itself,
`report.html.j2`. Nothing here measures, or decides a verdict: verdicts come from
:mod:`kvzip.eval.money.breakeven`, and words only say what their fields say.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvzip.choice.cost import GB, MTOK, CodecFigures, PrefillModel, fit_prefill
from kvzip.errors import KVZipError, extra_told
from kvzip.eval.frontier.hull import hull
from kvzip.eval.money.breakeven import BreakEven
from kvzip.eval.money.paper import BYTES_PER_TOKEN, ratio_needed
from kvzip.eval.report import charts, maps, svg
from kvzip.eval.report.answers import answers, by_base, headline
from kvzip.eval.report.parts import by_dtype, format_labels, part_label, unpredicted_line
from kvzip.eval.report.sources import Extras, origin, origins
from kvzip.eval.report.text import bit_rate, gbps, number, scientific, seconds, size, usd
from kvzip.eval.report.traffic import (
    DIFFERENT_STORES,
    WEIGHTS_NOT_READ,
    capacity_map,
    capacity_table,
    core_seconds,
    decoder_in_words,
    ratio_source,
    tiers_in_words,
    told,
    too_few_cores,
    trace_name,
)
from kvzip.eval.results.bench import BenchResult, BenchRow, SnapshotIdentity
from kvzip.eval.results.demo import DemoResult, as_result
from kvzip.eval.results.frontier import Frontier, Run
from kvzip.eval.results.inputs import CodecRow, Inputs
from kvzip.eval.results.links import Links, Point
from kvzip.eval.results.traffic import FleetRow, TrafficResult
from kvzip.eval.traffic.fleet import STRATEGIES
from kvzip.files import replacing

_WIDE, _NARROW = 760, 344
"""Pixels: a page and a phone."""
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_SCRIPT = Path(__file__).with_name("report.js")


class Chart(msgspec.Struct, frozen=True):
    """One drawing at the width of a page and at the width of a phone."""

    wide: str
    narrow: str


def write_report(
    result: DemoResult | Mapping[str, Any],
    path: str | os.PathLike[str],
    extras: Extras | None = None,
) -> Path:
    """Write the report of `result`, with the sections that `extras` allow, to `path` and return
    it. No half-written file is ever seen.

    Raises KVZipError when the result is not valid, jinja2 is not installed, or the file cannot be
    written.
    """
    page = render(as_result(result), extras or Extras())
    try:
        with replacing(path, private=False) as file:
            file.write(page.encode())
    except OSError as error:
        raise KVZipError(f"report {path}: {error.strerror or error}") from error
    return Path(path)


def render(result: DemoResult, extras: Extras = Extras()) -> str:  # noqa: B008 - frozen
    """The report as HTML text."""
    with extra_told("a report needs jinja2", "eval"):
        import jinja2
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"usd": usd, "size": size, "seconds": seconds}
    environment.filters |= {"rate": bit_rate, "gbps": gbps, "num": number, "sci": scientific}
    environment.filters |= {"part": part_label, "format_labels": format_labels}
    environment.filters |= {"unpredicted": unpredicted_line, "groupby_dtype": by_dtype}
    environment.filters |= {"plain": plain, "origin": origin, "code": code, "trace": trace_name}
    environment.filters |= {"ratio_source": ratio_source, "tiers": tiers_in_words}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    fit = fit_prefill(result.prefill_points or [(result.tokens, result.prefill_seconds)])
    model = fit.model
    data = msgspec.structs.replace(result, report=None)
    script = _SCRIPT.read_text(encoding="utf-8")
    groups = by_base(result.breakeven)
    given = panel(result, model)
    best = max(result.codecs, key=lambda codec: codec.ratio)
    return template.render(
        r=result,
        x=extras,
        answers=answers(result, extras.traffic or ()),
        bases=[(rows[0], rows) for rows in headline(groups)],
        every_base=[(rows[0], rows) for rows in groups],
        times=groups[0],
        light=svg.variables(svg.LIGHT),
        dark=svg.variables(svg.DARK),
        colours=svg.COLOURS,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        panel=_json(given),
        start=given["presets"][0],
        here=origin(result),
        origins=origins(result, extras),
        link=_some_link(groups[0]),
        input_lengths=sorted({row.tokens for row in extras.inputs.rows}) if extras.inputs else [],
        input_rows=_by_codec(extras.inputs) if extras.inputs else [],
        peer_charts=_peer_charts(extras.peers) if extras.peers else [],
        frontier_charts=_frontier_charts(extras.frontier) if extras.frontier else [],
        link_charts=_link_charts(extras.links) if extras.links else [],
        traffic_charts=_traffic_charts(extras.traffic or ()),
        strategies=STRATEGIES,
        different_stores=DIFFERENT_STORES,
        weights_not_read=WEIGHTS_NOT_READ,
        core_seconds=core_seconds,
        decoder_in_words=decoder_in_words,
        too_few_cores=too_few_cores,
        models=maps.models(),
        families=maps.family_sentence(CodecFigures(best.name, best.ratio, math.inf)),
        paper_bytes=BYTES_PER_TOKEN,
        paper_ratio=ratio_needed(),
        widest=max((p.width for p in result.planes), default=1),
        ideal=maps.ideal_ratio(result.codecs),
        model=model,
        fit=fit,
        ladder_width=extras.ladder.ladder.width or 1 if extras.ladder else 1,
        speed_chart=_both(
            lambda name, box: charts.speed_svg(result.codecs, name, box), "speed", 300
        ),
        time_map=_both(lambda name, box: maps.time_map(result, model, name, box), "time", 400),
        dollar_map=_both(lambda name, box: maps.dollar_map(result, name, box), "dollar", 400),
        data=_json(data),
    )


def _json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return msgspec.json.encode(value).decode().replace("<", "\\u003c")


def _some_link(rows: Sequence[BreakEven]) -> str:
    """Mb/s to begin with, on the map: half as fast again as raw bytes need to be."""
    able = [row.time.break_even_mbps for row in rows if row.time.break_even_mbps]
    return f"{float(f'{1.5 * max(able):.2g}'):g}" if able else "1000"


def _by_codec(inputs: Inputs) -> list[tuple[tuple[str, str], dict[int, CodecRow]]]:
    """Rows of one dtype and codec by their length."""
    found: dict[tuple[str, str], dict[int, CodecRow]] = {}
    for row in inputs.rows:
        found.setdefault((row.dtype, row.codec), {})[row.tokens] = row
    return list(found.items())


def panel(result: DemoResult, model: PrefillModel) -> dict[str, Any]:
    """What `report.js` needs: the document, its prefill, the codecs, and presets to begin with."""
    lines = maps.lines_of(result.codecs, lambda ratio, codec: lambda _: None)
    return {
        "tokens": result.tokens,
        "seconds": result.prefill_seconds,
        "layers": result.layers,
        "bytes": result.raw_bytes / result.tokens,
        "a": model.a,
        "b": model.b,
        "ideal": maps.ideal_ratio(result.codecs),
        "order": [line.key for line in lines],
        "codecs": [
            {"name": c.name, "ratio": c.ratio, "rate": c.decode_gbps * GB} for c in result.codecs
        ],
        "models": [msgspec.to_builtins(model) for model in maps.models()],
        "presets": [
            {
                "name": row.base,
                "title": row.base_title,
                "egress": row.dollars.egress_usd_per_gb,
                "prefill": _rounded(row.dollars.prefill_usd / result.tokens * MTOK),
                "device": _rounded(3600 * row.dollars.decode_usd / row.time.decode_seconds),
            }
            for row, *_ in by_base(result.breakeven)
        ],
    }


def plain(value: float) -> str:
    """A number as a field of the panel has it: ten significant digits, no exponent if it can be."""
    return f"{value:.10g}"


def _rounded(price: float) -> float:
    """A price as a field shows it: so many digits that no figure computed from it differs."""
    return float(f"{price:.6g}")


def code(text: str) -> str:
    """Plain text as HTML, what stands in backticks as code."""
    escaped = html.escape(text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)


def _both(draw: Callable[[str, tuple[int, int]], str], name: str, height: int) -> Chart:
    """A chart at both widths; `draw` takes the name and the size."""
    wide, narrow = (_WIDE, height), (_NARROW, height)
    return Chart(draw(f"{name}-wide", wide), draw(f"{name}-narrow", narrow))


def _peer_charts(bench: BenchResult) -> list[tuple[SnapshotIdentity, list[BenchRow], Chart]]:
    """Each snapshot with its rows by ratio, and ratio against decode speed as a chart."""
    found = []
    for n, (snapshot, rows) in enumerate(bench.by_snapshot()):

        def draw(name: str, box: tuple[int, int], rows: list[BenchRow] = rows) -> str:
            return charts.bench_svg(rows, name, box)

        found.append((snapshot, rows, _both(draw, f"peers-{n}", 420)))
    return found


def _frontier_charts(frontier: Frontier) -> list[tuple[Run, list[str], list[str], Chart]]:
    """Each dtype's points, the keys of the hull, the keys of those that may not be on it, and bits
    against multiplications."""
    found = []
    for n, run in enumerate(frontier.runs):

        def draw(name: str, box: tuple[int, int], run: Run = run) -> str:
            return charts.frontier_svg(frontier, run, name, box)

        room = frontier.prefill_products
        named = [p.key for p in hull(run.points, room)]
        # One that may be on a hull is the hull of itself alone.
        left_out = [p.key for p in run.points if not hull([p], room)]
        found.append((run, named, left_out, _both(draw, f"frontier-{n}", 440)))
    return found


def _link_charts(links: Links) -> list[tuple[float, list[Point], Chart]]:
    """Each delay with what was measured, and time to first token against bandwidth."""
    found = []
    for n, delay in enumerate(dict.fromkeys(point.delay for point in links.points)):

        def draw(name: str, box: tuple[int, int], delay: float = delay) -> str:
            return charts.links_svg(links, delay, name, box)

        here = [point for point in links.points if point.delay == delay]
        found.append((delay, here, _both(draw, f"links-{n}", 400)))
    return found


Columns = tuple[list[float], list[tuple[str, list[float]]]]


def _traffic_charts(
    found: Sequence[TrafficResult],
) -> list[tuple[TrafficResult, Chart, Columns, list[FleetRow]]]:
    """Each replayed trace with its map of capacity, hit rates by size and ratio, and the rows that
    are shown."""
    charts_of = []
    for n, traffic in enumerate(found):

        def draw(name: str, box: tuple[int, int], traffic: TrafficResult = traffic) -> str:
            return capacity_map(traffic, name, box)

        both = _both(draw, f"capacity-{n}", 400)
        charts_of.append((traffic, both, capacity_table(traffic), told(traffic.rows)))
    return charts_of
