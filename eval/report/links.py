"""Measured links in words and tables, for a terminal and for a page in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from kvzip.eval.results.links import PREFILL, Links


def summary(links: Links) -> list[str]:
    """The result in a few lines."""
    inputs = links.inputs
    return [
        f"{links.model}, {links.dtype}, {links.tokens:,} tokens, {inputs.raw_bytes / 1e6:.1f} MB: "
        f"prefill {inputs.prefill:.2f} s, the first step from a cache {1e3 * inputs.step:.0f} ms",
        f"predictions are off by {links.worst_error:.0%} at most; decode-ahead takes "
        f"{links.worst_overlap:.2f} times the larger of transfer and decoding at most; "
        "every load exact",
        _spread(links),
    ]


def _spread(links: Links) -> str:
    """How often each time was taken, and how far apart those of one link and way are."""
    counts = [len(point.times) for point in links.points]
    often = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    words = f"each time is the median of {often}"
    apart = [max(p.times) / min(p.times) for p in links.points if len(p.times) > 1]
    if apart:
        words += (
            f"; of one link and way the slowest took {max(apart):.2f} times the fastest at most, "
            f"{statistics.median(apart):.2f} times in the middle"
        )
    return words


def tables(links: Links) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows): for each delay times to first token, measured and predicted; overlap;
    and where the order turns."""
    ways = [PREFILL, *(codec.codec for codec in links.inputs.codecs)]
    for delay in dict.fromkeys(point.delay for point in links.points):
        here = {(p.way, p.mbps): p for p in links.points if p.delay == delay}
        rates = list(dict.fromkeys(rate for _, rate in here))
        beside = f"a delay of {1e3 * delay:g} ms each way" if delay else "no delay"
        rows, overlaps = [], []
        for rate in rates:
            cells = [here[way, rate] for way in ways]
            rows.append(
                [
                    f"{rate:,g} Mb/s",
                    *(f"{c.seconds:.3f} ({c.predicted:.3f}, {c.error:+.0%})" for c in cells),
                ]
            )
            overlaps.append(
                [
                    f"{rate:,g} Mb/s",
                    *(f"{c.transfer:.3f}, {c.overlap:.2f}" for c in cells if c.transfer),
                ]
            )
        yield f"Seconds to the first token (predicted), {beside}", ["link", *ways], rows
        yield f"Seconds of transfer, and overlap, {beside}", ["link", *ways[1:]], overlaps
    rows = [
        [f"{1e3 * c.delay:g} ms", c.below, c.above]
        + ["nowhere here" if m is None else f"{m:,.0f} Mb/s" for m in (c.predicted, c.measured)]
        for c in links.crossovers
    ]
    yield "Where the order turns", ["delay", "below", "above", "predicted", "measured"], rows


def page(links: Links) -> str:
    """The same in Markdown, with what it was measured on."""
    lines = [
        f"{links.tokens:,} tokens ({links.text}) of {links.model.removeprefix('pkg:')}, "
        f"{links.dtype}; {links.machine.cores} {links.machine.cpu} cores do everything: server, "
        f"network, decoder and model; {links.date[:10]}, `{links.command}`; load average "
        f"{links.load_average[0]:.1f} before, {links.load_average[1]:.1f} after (alone, the run "
        f"makes about 1); TCP with {links.congestion_control}.",
        "",
        *(f"- {line}" for line in summary(links)),
    ]
    for title, columns, rows in tables(links):
        lines += ["", f"**{title}**", ""]
        for row in (columns, ["---"] * len(columns), *rows):
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
