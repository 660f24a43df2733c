"""The two maps of a report: where loading is faster than prefill, and where it is cheaper; and the
models that they can be looked at for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from kvzip.choice.cost import (
    GB,
    MTOK,
    CodecFigures,
    PrefillModel,
    break_even_bandwidth,
    break_even_egress,
)
from kvzip.eval.money.families import families, prefill_of, sentence
from kvzip.eval.money.prices import FAMILIES, default_prices
from kvzip.eval.report import charts, svg
from kvzip.eval.report.answers import by_base, headline
from kvzip.eval.report.text import bit_rate, usd
from kvzip.eval.results.demo import CodecResult, DemoResult

_DEVICE, _SEEN_AT = "h200", 32768
"""The device that prefills other models, and the length at which their rates are stated."""


class MapModel(msgspec.Struct, frozen=True):
    """A model of the price book, as the maps' panel takes it: bytes a token in bf16 and the
    prefill's time, ``a L + b L^2``, modelled."""

    name: str
    title: str
    bytes: float
    layers: int
    a: float
    b: float


def models() -> list[MapModel]:
    """The models of the price book on H200s."""
    book, found = default_prices(), []
    for name, shape in book.model.items():
        prefill, _ = prefill_of(shape, book.compute[_DEVICE], book)
        gpus = "an H200" if shape.gpus == 1 else f"{shape.gpus} H200"
        title = f"{name} on {gpus} ({FAMILIES[shape.family]})"
        size = 2 * shape.numbers_per_token
        found.append(MapModel(name, title, size, shape.layers, prefill.a, prefill.b))
    return found


def family_sentence(codec: CodecFigures) -> str:
    """What a family changes, beside that codec."""
    return sentence(families(default_prices(), _DEVICE, _SEEN_AT, "bf16"), codec)


def ideal_ratio(codecs: Sequence[CodecResult]) -> float:
    """The ratio of the line that is drawn beside the codecs, with decoding free: the next whole
    number above them all, 2 at least."""
    return max(2.0, math.floor(max(codec.ratio for codec in codecs)) + 1.0)


def lines_of(
    codecs: Sequence[CodecResult],
    curve: Callable[[float, CodecResult | None], Callable[[float], float | None]],
) -> list[svg.Line]:
    """A line for raw bytes, each codec by increasing ratio, and the ideal. `curve` takes the ratio
    and the codec, which is None for the two lines that no codec of the run stands for."""
    style = charts.codec_styles(codecs)
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


def time_map(result: DemoResult, model: PrefillModel, name: str, size: tuple[int, int]) -> str:
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

    lines = lines_of(result.codecs, curve)
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
    return svg.region_map(
        name,
        "Where loading is faster than prefill",
        spoken,
        x,
        y,
        lines,
        size=size,
        regions=("loading is faster", "prefill is faster"),
        wins_above=True,
        guides=[svg.Guide("this document", result.tokens, vertical=True)],
        measured=measured,
        own="yours",
    )


def dollar_map(result: DemoResult, name: str, size: tuple[int, int]) -> str:
    """Break-even egress price against the price of a prefill, decoding free."""
    raw_mtok = result.raw_bytes / result.tokens * MTOK

    def curve(ratio: float, _: CodecResult | None) -> Callable[[float], float | None]:
        return lambda price: break_even_egress(price, raw_mtok, ratio).value

    lines = lines_of(result.codecs, curve)
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
    return svg.region_map(
        name,
        "Where loading is cheaper than prefill",
        spoken,
        x,
        y,
        lines,
        size=size,
        regions=("prefill is cheaper", "loading is cheaper"),
        wins_above=False,
        points=points,
        guides=guides,
        own="yours",
    )
