"""The report: one HTML file that needs nothing else, neither network nor fonts; its one script,
`report.js`, moves the maps' lines to prices of one's own, and without it all else is there.

This module turns a :class:`~kvzip.eval.results.demo.DemoResult` into sentences and charts; the page
itself is `report.html.j2`. It measures nothing and decides no verdict: verdicts come from
`economics.py`, and words here only say what their fields say.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from kvzip import dtypes
from kvzip.choice.cost import (
    GB,
    MTOK,
    PrefillModel,
    break_even_bandwidth,
    break_even_egress,
    fit_prefill,
)
from kvzip.errors import KVZipError
from kvzip.eval.frontier.hull import hull
from kvzip.eval.money.breakeven import BreakEven
from kvzip.eval.money.paper import BYTES_PER_TOKEN, ratio_needed
from kvzip.eval.money.prices import HEADLINE, default_prices
from kvzip.eval.report import charts, svg
from kvzip.eval.report.inputs import Extras
from kvzip.eval.results.bench import BenchResult, BenchRow, SnapshotIdentity
from kvzip.eval.results.demo import CodecResult, DemoResult, as_result
from kvzip.eval.results.frontier import Frontier, Run
from kvzip.eval.results.inputs import CodecRow, Inputs
from kvzip.eval.results.links import Links, Point
from kvzip.files import replacing

_WIDE, _NARROW = 760, 344
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_SCRIPT = Path(__file__).with_name("report.js")


class Answer(msgspec.Struct, frozen=True):
    """One verdict of the headline."""

    question: str
    word: str
    sentence: str
    small: str
    good: bool | None


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
        with replacing(path) as file:
            file.write(page.encode())
    except OSError as error:
        raise KVZipError(f"report {path}: {error.strerror or error}") from error
    return Path(path)


def render(result: DemoResult, extras: Extras = Extras()) -> str:  # noqa: B008 - frozen
    """The report as HTML text."""
    try:
        import jinja2
    except ImportError as error:
        raise KVZipError("a report needs jinja2: pip install 'kvzip[eval]'") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"usd": usd, "size": size, "seconds": seconds}
    environment.filters |= {"rate": bit_rate, "num": number, "sci": scientific}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    fit = fit_prefill(result.prefill_points or [(result.tokens, result.prefill_seconds)])
    model = fit.model
    data = msgspec.structs.replace(result, report=None)
    script = _SCRIPT.read_text(encoding="utf-8")
    groups = by_base(result.breakeven)
    return template.render(
        r=result,
        x=extras,
        answers=answers(result),
        bases=[(rows[0], rows) for rows in headline(groups)],
        every_base=[(rows[0], rows) for rows in groups],
        times=groups[0],
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        panel=_json(panel(result, model)),
        link=_some_link(groups[0]),
        input_lengths=sorted({row.tokens for row in extras.inputs.rows}) if extras.inputs else [],
        input_rows=_by_codec(extras.inputs) if extras.inputs else [],
        peer_charts=peer_charts(extras.peers) if extras.peers else [],
        frontier_charts=frontier_charts(extras.frontier) if extras.frontier else [],
        link_charts=link_charts(extras.links) if extras.links else [],
        paper_bytes=BYTES_PER_TOKEN,
        paper_ratio=ratio_needed(),
        widest=max((p.width for p in result.planes), default=1),
        ideal=ideal_ratio(result.codecs),
        model=model,
        fit=fit,
        ladder_width=dtypes.get(extras.ladder.dtype).bits if extras.ladder else 16,
        speed_chart=speed_chart(result.codecs),
        time_map=time_map(result, model),
        dollar_map=dollar_map(result),
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
    lines = _lines(result.codecs, lambda ratio, codec: lambda _: None)
    return {
        "tokens": result.tokens,
        "layers": result.layers,
        "bytes": result.raw_bytes / result.tokens,
        "a": model.a,
        "b": model.b,
        "ideal": ideal_ratio(result.codecs),
        "order": [line.key for line in lines],
        "codecs": [
            {"name": c.name, "ratio": c.ratio, "rate": c.decode_gbps * GB} for c in result.codecs
        ],
        "presets": [
            {
                "name": row.base,
                "title": row.base_title,
                "egress": row.dollars.egress_usd_per_gb,
                "prefill": float(f"{row.dollars.prefill_usd / result.tokens * MTOK:.4g}"),
            }
            for row, *_ in by_base(result.breakeven)
        ],
    }


def by_base(rows: Sequence[BreakEven]) -> list[list[BreakEven]]:
    """Rows in groups of one price base, in their order."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row.base)]


# --- the headline --------------------------------------------------------------------------


def answers(result: DemoResult) -> list[Answer]:
    """The answer in dollars at each price base of the headline, then the one in time."""
    groups = by_base(result.breakeven)
    return [*map(_dollar_answer, headline(groups)), _time_answer(groups[0])]


def headline(groups: Sequence[list[BreakEven]]) -> list[list[BreakEven]]:
    """Those of the price bases of the headline, or the first when there is none of them."""
    return [rows for rows in groups if rows[0].base in HEADLINE] or list(groups[:1])


def _dollar_answer(rows: Sequence[BreakEven]) -> Answer:
    best = min(rows, key=lambda row: row.dollars.load_usd)
    d = best.dollars
    sentence = (
        f"The cheapest load ({best.codec}, {best.ratio:.2f}×) costs {usd(d.load_usd)}; "
        f"the prefill costs {usd(d.prefill_usd)}. "
    )
    word, good = {"load": ("Yes", True), "prefill": ("No", False)}.get(
        d.verdict, ("Not known", None)
    )
    if d.break_even_usd_per_gb is not None:
        top = max(rows, key=lambda row: row.dollars.break_even_usd_per_gb or 0)
        price = top.dollars.break_even_usd_per_gb or 0.0
        sentence += (
            f"Shipping pays while egress costs less than {usd(price)} per GB ({top.codec}); "
            f"here it is {usd(d.egress_usd_per_gb)}."
        )
    else:
        free = max(row.dollars.break_even_free_decode_usd_per_gb for row in rows)
        sentence += (
            f"Decoding alone costs {usd(d.decode_usd)}; even with free decoding, egress would "
            f"have to be below {usd(free)} per GB, and it is {usd(d.egress_usd_per_gb)}."
        )
    return Answer(f"In dollars · {best.base_title}", word, sentence, d.basis, good)


def _time_answer(rows: Sequence[BreakEven]) -> Answer:
    able = [row for row in rows if row.time.break_even_mbps is not None]
    time = rows[0].time
    question = "In time to first token · this machine"
    prefill = f"Prefill took {seconds(time.prefill_seconds)}. "
    if not able:
        return Answer(
            question,
            "No",
            prefill + "Decoding alone takes as long with every codec, so no link helps.",
            time.basis,
            False,
        )
    best = min(able, key=lambda row: row.time.break_even_mbps or 0)
    limit = bit_rate((best.time.break_even_mbps or 0) * 1e6)
    sentence = f"{prefill}Loading with {best.codec} ({best.ratio:.2f}×) is faster over any link "
    sentence += f"above {limit}"
    raw = next((row for row in able if row.codec == "raw"), None)
    if raw is not None and raw is not best:
        sentence += f", and raw bytes above {bit_rate((raw.time.break_even_mbps or 0) * 1e6)}"
    return Answer(question, f"Yes, above {limit}", sentence + ".", time.basis, True)


# --- charts --------------------------------------------------------------------------------


def _styles(codecs: Sequence[CodecResult]) -> dict[str, str]:
    """The same colour for a codec in every chart."""
    return {codec.name: f"s{i % svg.COLOURS}" for i, codec in enumerate(codecs)}


def ideal_ratio(codecs: Sequence[CodecResult]) -> float:
    """The ratio of the line that is drawn beside the codecs, with decoding free: the next whole
    number above them all, 2 at least."""
    return max(2.0, math.floor(max(codec.ratio for codec in codecs)) + 1.0)


def _both(draw: Callable[[str, tuple[int, int]], str], height: int) -> Chart:
    return Chart(draw("wide", (_WIDE, height)), draw("narrow", (_NARROW, height)))


def _scatter(
    name: str,
    title: str,
    spoken: str,
    x: svg.Axis,
    y: svg.Axis,
    points: Sequence[svg.Point],
    kind: str,
    box: tuple[int, int],
) -> str:
    return svg.scatter(f"{name}-{kind}", title, spoken, x, y, points, size=box)


def speed_chart(codecs: Sequence[CodecResult]) -> Chart:
    """Ratio against decode speed, one point a codec."""
    speeds = [codec.decode_gbps for codec in codecs]
    ratios = [codec.ratio for codec in codecs]
    x = svg.log_axis(
        "decode speed, GB of raw numbers per second", min(speeds) / 1.6, max(speeds) * 1.6, _short
    )
    high = max(1.1, *ratios) + 0.08
    step = 0.1 if high < 2 else 0.5
    ticks = [
        (i * step, f"{i * step:.1f}")
        for i in range(math.floor(0.9 / step), math.ceil(high / step) + 1)
        if 0.95 <= i * step <= high
    ]
    y = svg.Axis("ratio, raw bytes over encoded bytes", min(0.95, *ratios), high, ticks, False)
    style = _styles(codecs)
    points = [
        svg.Point(c.name, f"{c.name} {c.ratio:.2f}×", style[c.name], c.decode_gbps, c.ratio)
        for c in codecs
    ]
    spoken = "; ".join(f"{c.name}: {c.ratio:.2f}x at {c.decode_gbps:.2f} GB/s" for c in codecs)
    draw = partial(_scatter, "speed", "Ratio against decode speed", spoken, x, y, points)
    return _both(draw, 300)


def _lines(
    codecs: Sequence[CodecResult],
    curve: Callable[[float, CodecResult | None], Callable[[float], float | None]],
) -> list[svg.Line]:
    """A line for raw bytes, each codec by increasing ratio, and the ideal. `curve` takes the ratio
    and the codec, which is None for the two lines that no codec of the run stands for."""
    style = _styles(codecs)
    lines = [
        svg.Line(c.name, f"{c.name} {c.ratio:.2f}×", style[c.name], curve(c.ratio, c))
        for c in sorted(codecs, key=lambda c: c.ratio)
    ]
    if all(c.name != "raw" for c in codecs):
        lines.insert(0, svg.Line("raw", "raw 1.00×", "plain", curve(1.0, None)))
    else:
        lines.sort(key=lambda line: line.key != "raw")
    ideal = ideal_ratio(codecs)
    return [*lines, svg.Line("ideal", f"ideal {ideal:.0f}×", "ideal", curve(ideal, None))]


def time_map(result: DemoResult, model: PrefillModel) -> Chart:
    """Break-even bandwidth against context length, on this machine."""
    bytes_per_token = result.raw_bytes / result.tokens

    def curve(ratio: float, codec: CodecResult | None) -> Callable[[float], float | None]:
        rate = codec.decode_gbps * GB if codec else math.inf

        def y(tokens: float) -> float | None:
            raw = bytes_per_token * tokens
            return break_even_bandwidth(
                model.seconds(tokens),
                raw,
                ratio,
                decode_rate=rate,
                fill=raw / rate / result.layers,
            ).value

        return y

    lines = _lines(result.codecs, curve)
    low = 2.0 ** math.floor(math.log2(result.tokens) - 4)
    high = low * 2**8
    ticks = [low * 2.0**i for i in range(9)]
    x = svg.Axis("context length, tokens", low, high, [(n, f"{n:,.0f}") for n in ticks[::2]])
    found = [v for line in lines for n in ticks if (v := line.y(n)) is not None] or [1e8]
    y = svg.log_axis("bandwidth of the link", min(found) / 2, max(found) * 2, bit_rate)
    here = {line.label: line.y(result.tokens) for line in lines}
    lengths = [n for n, _ in result.prefill_points] or [result.tokens]
    measured = (min(lengths), max(lengths))
    spoken = f"At {result.tokens} tokens loading beats prefill above: " + "; ".join(
        f"{label}: {bit_rate(v) if v else 'never'}" for label, v in here.items()
    )
    return _both(
        lambda kind, box: svg.region_map(
            f"time-{kind}",
            "Where loading is faster than prefill",
            spoken,
            x,
            y,
            lines,
            size=box,
            regions=("loading is faster", "prefill is faster"),
            wins_above=True,
            guides=[svg.Guide("this document", result.tokens, vertical=True)],
            measured=measured,
            own="yours",
        ),
        400,
    )


def dollar_map(result: DemoResult) -> Chart:
    """Break-even egress price against the price of a prefill, decoding free."""
    raw_mtok = result.raw_bytes / result.tokens * MTOK

    def curve(ratio: float, _: CodecResult | None) -> Callable[[float], float | None]:
        return lambda price: break_even_egress(price, raw_mtok, ratio).value

    lines = _lines(result.codecs, curve)
    points = [
        svg.Point(
            row.base,
            row.base_title + (" (model)" if row.dollars.prefill_basis == "model" else ""),
            "base",
            row.dollars.prefill_usd / result.tokens * MTOK,
            row.dollars.egress_usd_per_gb,
        )
        for row, *_ in headline(by_base(result.breakeven))
        if row.dollars.prefill_usd > 0 and row.dollars.egress_usd_per_gb > 0
    ]
    points.sort(key=lambda point: point.x)
    prices = [point.x for point in points] or [1.0]
    x = svg.log_axis(
        "price of a prefill, per million tokens", min(prices) / 8, max(prices) * 8, usd
    )
    levels = [v for line in lines for price in prices if (v := line.y(price)) is not None]
    levels += [point.y for point in points]
    y = svg.log_axis("egress, per GB", min(levels) / 4, max(levels) * 12, usd)
    book = default_prices().egress
    guides = [
        svg.Guide(f"{label} {usd(book[name].value)}", book[name].value)
        for name, label in (("aws", "AWS"), ("oci", "OCI"))
        if y.low < book[name].value < y.high
    ]
    spoken = "Price bases: " + "; ".join(
        f"{p.label}: prefill {usd(p.x)} per million tokens, egress {usd(p.y)} per GB"
        for p in points
    )
    return _both(
        lambda kind, box: svg.region_map(
            f"dollar-{kind}",
            "Where loading is cheaper than prefill",
            spoken,
            x,
            y,
            lines,
            size=box,
            regions=("prefill is cheaper", "loading is cheaper"),
            wins_above=False,
            points=points,
            guides=guides,
            own="yours",
        ),
        400,
    )


def peer_charts(peers: BenchResult) -> list[tuple[SnapshotIdentity, list[BenchRow], Chart]]:
    """For each snapshot: its rows by ratio, and ratio against decode speed as a chart."""
    style = {"memcpy": "s0", "kvzip": "s1"}
    found = []
    for n, snapshot in enumerate(peers.snapshots):
        rows = sorted((r for r in peers.rows if r.file == snapshot.file), key=lambda r: -r.ratio)
        if not rows:
            continue
        points = [
            svg.Point(r.title, r.title, style.get(r.kind, "s3"), r.decode_gbps, r.ratio)
            for r in rows
        ]
        speeds = [p.x for p in points]
        x = svg.log_axis(
            "decode speed, GB of raw numbers per second", min(speeds) / 2, max(speeds) * 2, _short
        )
        high = max(p.y for p in points) + 0.06
        ticks = [(i / 10, f"{i / 10:.1f}") for i in range(9, math.ceil(high * 10) + 1)]
        y = svg.Axis("ratio", 0.94, high, [t for t in ticks if 0.94 <= t[0] <= high], False)
        spoken = "; ".join(f"{r.title}: {r.ratio:.3f}x at {r.decode_gbps:.2f} GB/s" for r in rows)

        draw = partial(_scatter, f"peers-{n}", "Ratio against decode speed", spoken, x, y, points)
        found.append((snapshot, rows, _both(draw, 420)))
    return found


def frontier_charts(frontier: Frontier) -> list[tuple[Run, list[str], Chart]]:
    """For each dtype: its points, the keys of the hull, and bits against multiplications. A point
    that takes none stands at the left edge."""
    found = []
    for n, run in enumerate(frontier.runs):
        named = [p.key for p in hull(run.points, frontier.prefill_products)]
        families = list(dict.fromkeys(p.family for p in run.points))
        shares = [p.share for p in run.points if p.share > 0] or [1.0]
        low = min(shares) / 3
        points = [
            svg.Point(
                p.key,
                p.title if p.key in named else "",
                f"s{families.index(p.family) % svg.COLOURS}",
                p.share if p.share > 0 else low * 1.2,
                p.bits,
            )
            for p in run.points
        ]
        x = svg.log_axis(
            "multiplications, share of the prefill's", low, max(shares) * 3, lambda v: f"{v:.3g}"
        )
        bits = [p.bits for p in run.points]
        bottom, top = math.floor(min(bits)) - 0.3, math.ceil(max(bits)) + 0.3
        ticks = [(float(b), f"{b}") for b in range(math.ceil(bottom), math.floor(top) + 1)]
        y = svg.Axis("bits per number", bottom, top, ticks, False)
        spoken = "; ".join(f"{p.title}: {p.bits:.2f} bits at {p.share:.3g}" for p in run.points)

        draw = partial(_scatter, f"frontier-{n}", "Bits against compute", spoken, x, y, points)
        found.append((run, named, _both(draw, 380)))
    return found


def link_charts(links: Links) -> list[tuple[float, list[Point], Chart]]:
    """For each delay: what was measured, and time to first token against bandwidth."""
    found = []
    for n, delay in enumerate(dict.fromkeys(point.delay for point in links.points)):
        here = [point for point in links.points if point.delay == delay]

        def draw(kind: str, box: tuple[int, int], n: int = n, delay: float = delay) -> str:
            return charts.links_svg(links, delay, f"links-{n}-{kind}", box)

        found.append((delay, here, _both(draw, 400)))
    return found


# --- figures as text -------------------------------------------------------------------------


def number(value: float, digits: int = 2) -> str:
    """A plain number with so many decimals and commas between thousands."""
    return f"{value:,.{digits}f}"


def _short(value: float) -> str:
    """Three significant digits without an exponent and without trailing zeros."""
    if value == 0:
        return "0"
    text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float, digits: int = 1) -> str:
    """A number as a factor and a power of ten: 4.8 × 10⁻⁷."""
    if value == 0:
        return "0"
    factor, power = f"{value:.{digits}e}".split("e")
    return f"{factor} × 10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def usd(value: float) -> str:
    """Dollars: cents from a dollar on, three significant digits down to a tenth of a cent, two
    below, and a power of ten where even they would hide behind zeros."""
    if value == 0:
        return "$0"
    if value >= 1:
        return f"${value:,.2f}".removesuffix(".00")
    if value < 0.999e-6:
        return "$" + scientific(value)
    power = math.floor(math.log10(value))
    text = f"{value:.{(2 if value >= 1e-3 else 1) - power}f}".rstrip("0")
    return f"${text}0" if len(text) == 3 else f"${text}"


def size(value: float) -> str:
    """Bytes in the decimal unit that fits: 47.2 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{_short(value / factor)} {unit}"
    return f"{value:,.0f} bytes"


def seconds(value: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{_short(value)} s" if value >= 1 else f"{_short(value * 1e3)} ms"


def bit_rate(value: float) -> str:
    """Bits per second in the unit that fits: 63.1 Mb/s."""
    for unit, factor in (("Tb/s", 1e12), ("Gb/s", 1e9), ("Mb/s", 1e6), ("kb/s", 1e3)):
        if value >= factor * 0.9999:
            return f"{_short(value / factor)} {unit}"
    return f"{_short(value)} b/s"
