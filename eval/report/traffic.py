"""What a report says of replayed traces: the map of capacity, and the table of strategies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvzip.eval.money.ratios import ratio_basis_of_replay
from kvzip.eval.report import svg
from kvzip.eval.report.text import size, usd
from kvzip.eval.results.traffic import FleetRow, TrafficResult

DIFFERENT_STORES = (
    "The tables are of different stores: a row of the first is one store of that size, the second "
    "is of all tiers together."
)
WEIGHTS_NOT_READ = (
    "A GPU's seconds are of its operations alone: reading the weights from its memory, which takes "
    "longer where a prompt has few tokens left to compute, is not counted."
)

_TOO_FEW_CORES = (
    "Core seconds that the hosts' cores do not have in the trace's time say how many times as "
    "many: such a row is of more cores than there are, and their price is not in its dollars."
)


def cores_use(traffic: TrafficResult, row: FleetRow) -> float:
    """What decoding and encoding take of the hosts' cores, as a share of the trace's time. Above 1
    the cores are not there: encoding delays nothing in a replay, so that nothing else tells."""
    each = next((i.value for i in traffic.inputs if i.name == "cores of a GPU's host"), None)
    there = (each or math.inf) * traffic.gpus * traffic.seconds
    needed = row.decode_core_seconds + row.encode_core_seconds
    return needed / there if there > 0 else 0.0


def core_seconds(traffic: TrafficResult, row: FleetRow) -> str:
    """Core seconds in words; where there are not so many, how many times those that there are."""
    words = f"{row.decode_core_seconds + row.encode_core_seconds:,.0f}"
    use = cores_use(traffic, row)
    return f"{words} ({use:.1f}x)" if use > 1 else words


def too_few_cores(traffic: TrafficResult, rows: Sequence[FleetRow]) -> str:
    """What to know of rows that take more cores than there are; "" where none does."""
    return _TOO_FEW_CORES if any(cores_use(traffic, row) > 1 for row in rows) else ""


def decoder_in_words(traffic: TrafficResult, row: FleetRow) -> str:
    """Behind a codec's name: that a GPU decodes, and whether anybody has measured how fast."""
    if row.decoder != "device":
        return ""
    basis = next((i.basis for i in traffic.inputs if i.name == f"{row.codec}, decode"), None)
    return " (GPU, a target)" if basis == "target" else " (GPU)"


def found_at(traffic: TrafficResult, blocks: float, ratio: float = 1.0) -> float:
    """The hit rate of an LRU store of so many blocks of raw size that are `ratio` times as small:
    that of the capacities where one is within half a hundredth of the ratio, else from the curve,
    between whose points it is an estimate."""
    for c in traffic.capacity:
        if c.blocks == blocks and abs(c.ratio - ratio) < 0.005:
            return c.hit_rate
    sizes, rates = np.array(traffic.curve).T
    room = blocks * ratio
    if room < sizes[0]:
        return 0.0
    return float(np.interp(math.log(room), np.log(sizes), rates))


def ratios(traffic: TrafficResult) -> dict[str, float]:
    """The ratio of each codec of a replay, the smallest first; those of the capacities where no
    codec was replayed."""
    found = {row.codec: row.ratio for row in traffic.rows if row.codec}
    found = found or {f"{c.ratio:g}x": c.ratio for c in traffic.capacity}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def trace_name(traffic: TrafficResult) -> str:
    """The trace's name without the endings of its file."""
    return traffic.trace.partition(".")[0]


def ratio_source(traffic: TrafficResult) -> str:
    """On which model the ratios were measured, and whether that is the one whose cache the store
    keeps, in a sentence."""
    words = ratio_basis_of_replay(traffic.inputs, traffic.model) or "ratios given, not measured"
    return f"{words[0].upper()}{words[1:]}."


def capacity_map(traffic: TrafficResult, name: str, box: tuple[int, int]) -> str:
    """Blocks found against what the store has room for, a line for each codec."""
    low, high = 100.0, 1.5 * max(2 * traffic.curve[-1][0], 1000.0)
    grid = [low * (high / low) ** (i / 240) for i in range(241)]
    codecs = _told_apart(ratios(traffic))
    lines = [
        svg.Curve(
            codec,
            f"{codec} {ratio:.2f}×",
            "plain" if codec == "raw" else f"s{i % svg.COLOURS}",
            [(blocks, found_at(traffic, blocks, ratio)) for blocks in grid],
        )
        for i, (codec, ratio) in enumerate(codecs.items())
    ]
    x = svg.log_axis("room of the store, in blocks of raw size", low, high, lambda b: f"{b:,.0f}")
    top = min(1.0, 0.1 * math.ceil(10.5 * traffic.most + 0.01))
    step = 0.1 if top > 0.35 else 0.05
    ticks = [(i * step, f"{i * step:.0%}") for i in range(round(top / step) + 1)]
    y = svg.Axis("blocks found, of all", 0.0, top, ticks, False)
    spoken = "; ".join(
        f"{c.blocks:,.0f} blocks at {c.ratio:g}x: {c.hit_rate:.1%}" for c in traffic.capacity
    )
    return svg.curves(name, "What a store of a given size finds", spoken, x, y, lines, size=box)


def _told_apart(codecs: dict[str, float]) -> dict[str, float]:
    """Codecs whose lines lie apart, the smallest ratio first: raw, and of those within a twentieth
    of each other the best."""
    kept: dict[str, float] = {}
    for codec, ratio in sorted(codecs.items(), key=lambda item: -item[1]):
        near_raw = "raw" in codecs and ratio < 1.05 * codecs["raw"]
        if codec == "raw" or not (near_raw or any(1.05 * ratio > other for other in kept.values())):
            kept[codec] = ratio
    return dict(reversed(kept.items()))


def capacity_table(traffic: TrafficResult) -> tuple[list[float], list[tuple[str, list[float]]]]:
    """The ratios, and by size the hit rates at each."""
    columns = list(dict.fromkeys(c.ratio for c in traffic.capacity))
    by_size: dict[float, list[float]] = {}
    for c in traffic.capacity:
        by_size.setdefault(c.blocks, []).append(c.hit_rate)
    return columns, [(f"{blocks:,.0f}", rates) for blocks, rates in by_size.items()]


def told(rows: Sequence[FleetRow]) -> list[FleetRow]:
    """The rows that a page shows: no store, and of each strategy the codecs that are told apart."""
    codecs = _told_apart({row.codec: row.ratio for row in rows if row.codec})
    return [row for row in rows if not row.codec or row.codec in codecs]


def tiers_in_words(traffic: TrafficResult) -> str:
    """The tiers of the replayed store with their sizes, also in blocks of raw size, the unit of
    its map."""
    words = []
    for row in traffic.inputs:
        if row.name.endswith(", size"):
            tier = row.name.removesuffix(", size")
            room = "without limit"
            if row.value is not None:
                room = f"{size(row.value)}, {row.value / traffic.block_bytes:,.0f} raw blocks"
            words.append(f"{tier} {room}")
    return "; ".join(words)


_BARE = {"recompute": "no store", "gpu": "GPU memory alone"}
"""Strategies without a store."""


def markdown(traffic: Sequence[TrafficResult]) -> str:
    """A table for each trace, in Markdown: no store, and each strategy with the codecs that are
    told apart."""
    tables = []
    for t in traffic:
        tiers = ", ".join(
            f"{tier.tier} {size(tier.room_blocks * t.block_bytes)}"
            for row in t.rows
            if row.codec == "raw" and row.strategy == "load"
            for tier in row.tiers
            if tier.room_blocks is not None
        )
        lines = [
            f"**{trace_name(t)}**, {t.requests:,} requests in {t.seconds / 60:.0f} "
            f"minutes, {t.model} on {t.gpus} GPUs ({tiers}):",
            "",
            "| | found | loaded | mean | median | 99 % | GPU s | core s | GPU $ | store $ |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in told(t.rows):
            codec = f"`{r.codec}`{decoder_in_words(t, r)}"
            name = f"{r.strategy}, {codec}" if r.codec else _BARE[r.strategy]
            cells = [
                *(name, f"{r.hit_rate:.1%}", f"{r.loaded_share:.1%}"),
                *(f"{s:.2f} s" for s in (r.ttft_mean, r.ttft_p50, r.ttft_p99)),
                *(f"{r.gpu_seconds:,.0f}", core_seconds(t, r), usd(r.gpu_usd), usd(r.store_usd)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
