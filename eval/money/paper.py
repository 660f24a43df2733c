"""The paper's own figures, recomputed: arXiv 2606.13361, "Can I Buy Your KV Cache?" (June 2026).

Each row holds what the paper states, what its own inputs give, and the formula. A figure that the
paper does not state but that follows from it is marked derived and has nothing to agree with.
Qwen3-4B, fp16, Apple M1 Pro: none of this was measured by this library.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from kvzip.choice.cost import (
    GB,
    HOUR,
    Threshold,
    break_even_bandwidth,
    break_even_egress,
    break_even_ratio,
    load_cost,
    token_cost,
)
from kvzip.errors import KVZipError
from kvzip.eval.money.prices import PriceBook, default_prices

SHORT, LONG = 255, 3774
"""Tokens of the paper's shortest and longest prompt."""
PREFILL = {SHORT: 0.67, LONG: 14.71}
"""Seconds."""
REUSE = {SHORT: 0.078, LONG: 0.296}
"""Seconds to go on from a cache that is already in memory."""
BYTES_PER_TOKEN = 36 * 2 * 8 * 128 * 2
"""Layers x (K, V) x KV heads x head dimension x bytes of an fp16 number."""
RAW_BYTES = BYTES_PER_TOKEN * LONG
"""The cache of the longest prompt, fp16."""
STATED_GB = 0.54
"""The paper's size at 3,774 tokens. Exactly it is 0.5565 GB; 556.5 MB / 1024 would give 0.54."""
AGENTS = 80e6
CACHED_PRICE = 0.1
"""A cache read's price as a share of the input price."""


class PaperRow(msgspec.Struct, frozen=True):
    """One figure of the paper and ours beside it."""

    name: str
    paper: float | None
    """As the paper states it; None where it does not."""
    ours: float
    """Recomputed from the paper's inputs, not rounded."""
    unit: str
    digits: int
    """Decimals to show: the paper's own, where it states the figure."""
    inputs: str
    formula: str
    agrees: bool | None
    """Ours, rounded to the paper's decimals, is the paper's figure; None where it states none."""
    derived: bool
    """The figure, or a price that it rests on, is not stated in the paper but follows from it."""
    note: str = ""
    by_construction: bool = False
    """It could not but agree: a price that it rests on was derived from the paper's figure."""


def paper_table(prices: PriceBook | None = None) -> list[PaperRow]:
    """The paper's figures, recomputed with the prices of the preset `paper-m1pro`."""
    egress, token_price = paper_prices(prices)
    return [
        *_reuse_rows(),
        *_size_rows(),
        *_fleet_rows(token_price),
        *_egress_rows(egress, token_price),
        *_threshold_rows(egress, token_price),
        *_bandwidth_rows(),
    ]


def _row(
    name: str,
    paper: float | None,
    ours: float,
    unit: str,
    digits: int,
    inputs: str,
    formula: str,
    *,
    derived: bool = False,
    note: str = "",
    by_construction: bool = False,
) -> PaperRow:
    agrees = None if paper is None else round(ours, digits) == round(paper, digits)
    if by_construction:
        note = f"Agrees by construction: the price was derived from it. {note}".rstrip()
    return PaperRow(
        name, paper, ours, unit, digits, inputs, formula, agrees, derived, note, by_construction
    )


def _reuse_rows() -> Iterator[PaperRow]:
    """What going on from a cache in memory saves."""
    for tokens, stated in ((SHORT, 8.6), (LONG, 49.7)):
        yield _row(
            f"Reuse against prefill, {tokens:,} tokens",
            stated,
            PREFILL[tokens] / REUSE[tokens],
            "x",
            1,
            f"{PREFILL[tokens]} s, {REUSE[tokens]} s",
            "prefill / reuse",
        )
    for tokens, stated in ((SHORT, 1.13), (LONG, 1.02)):
        yield _row(
            f"Break-even reads, {tokens:,} tokens",
            stated,
            PREFILL[tokens] / (PREFILL[tokens] - REUSE[tokens]),
            "reads",
            2,
            f"{PREFILL[tokens]} s, {REUSE[tokens]} s",
            "prefill / (prefill - reuse)",
        )


def _size_rows() -> list[PaperRow]:
    """Bytes of the cache."""
    return [
        _row(
            "Cache of a token",
            0.148,
            BYTES_PER_TOKEN / 1e6,
            "MB",
            3,
            "36 layers, K and V, 8 heads, 128 numbers, 2 bytes",
            "36 × 2 × 8 × 128 × 2",
            note="Exactly 147,456 bytes; the paper's last digit is one too high.",
        ),
        _row(
            "Cache of 3,774 tokens",
            STATED_GB,
            RAW_BYTES / GB,
            "GB",
            2,
            "147,456 bytes a token",
            "bytes a token × tokens",
            note="Exactly 556.5 MB, 3 % more than the paper's 0.54 GB. Where the size enters, its "
            "figures come out 3 % low.",
        ),
    ]


def _fleet_rows(token_price: float) -> list[PaperRow]:
    """What the paper's fleet pays for compute."""
    prefill = token_cost(LONG, token_price)
    price = f"${token_price:g} per Mtok"
    speedup = PREFILL[LONG] / REUSE[LONG]
    return [
        _row(
            "Prefill of the document",
            None,
            prefill,
            "$",
            4,
            f"3,774 tokens, {price}",
            "tokens × price",
            derived=True,
            note="The price is derived: $1.5 M / 80 M / 3,774 tokens. The same dollars are "
            f"${prefill / PREFILL[LONG] * HOUR:.2f} for an hour of the paper's machine.",
        ),
        _row(
            "Fleet, everyone prefills",
            1.5,
            prefill * AGENTS / 1e6,
            "$ M",
            1,
            f"80 M agents, 3,774 tokens, {price}",
            "agents × tokens × price",
            derived=True,
            by_construction=True,
        ),
        _row(
            "Fleet, compute of reuse",
            0.03,
            prefill * AGENTS / speedup / 1e6,
            "$ M",
            2,
            "$1.5 M, 49.7x",
            "fleet's prefill / 49.7",
            derived=True,
        ),
    ]


def _egress_rows(egress: float, token_price: float) -> list[PaperRow]:
    """What shipping the cache costs beside the prefill that it saves."""
    prefill = token_cost(LONG, token_price)
    stated, exact = (load_cost(size, egress) for size in (STATED_GB * GB, RAW_BYTES))
    tariff, price = f"${egress:g}/GB", f"${token_price:g} per Mtok"
    return [
        _row(
            "Egress of one load",
            0.049,
            stated,
            "$",
            3,
            f"0.54 GB, {tariff}",
            "stated 0.54 GB × egress price",
            derived=True,
            note=f"With the exact size: ${exact:.4f}.",
            by_construction=True,
        ),
        _row(
            "Egress over the prefill it saves",
            2.6,
            stated / prefill,
            "x",
            1,
            f"0.54 GB, {tariff}, {price}",
            "egress of the stated 0.54 GB / prefill",
            derived=True,
            note=f"With the exact size {exact / prefill:.2f}x, which would round to "
            f"{exact / prefill:.1f}.",
        ),
        _row(
            "What a reader's tariff saves",
            10.0,
            1 / CACHED_PRICE,
            "x",
            0,
            "cache read at 0.1x of the input price",
            "1 / 0.1",
        ),
    ]


def _threshold_rows(egress: float, token_price: float) -> list[PaperRow]:
    """The ratios and the egress price from which on shipping costs less than the prefill, decoding
    free."""
    prefill = token_cost(LONG, token_price)
    tariff, price = f"${egress:g}/GB", f"${token_price:g} per Mtok"
    opens, from_stated, cheaper = (
        threshold_value(break_even_ratio(prefill, size, usd_per_gb))
        for size, usd_per_gb in ((RAW_BYTES, egress), (STATED_GB * GB, egress), (RAW_BYTES, 0.05))
    )
    turns, turns_stated = (
        threshold_value(break_even_egress(prefill, size, 1)) for size in (RAW_BYTES, STATED_GB * GB)
    )
    return [
        _row(
            "Ratio at which shipping beats prefill",
            None,
            opens,
            "x",
            2,
            f"556.5 MB, {tariff}, {price}",
            "exact 0.5565 GB × egress price / prefill",
            derived=True,
            note=f"{16 / opens:.2f} bits of 16, if decoding is free. From 0.54 GB: "
            f"{from_stated:.2f}x.",
        ),
        _row(
            "The same at $0.05/GB",
            None,
            cheaper,
            "x",
            2,
            f"556.5 MB, $0.05/GB, {price}",
            "exact 0.5565 GB × egress price / prefill",
            derived=True,
            note=f"{16 / cheaper:.2f} bits of 16, if decoding is free.",
        ),
        _row(
            "Egress price at which raw bytes break even",
            None,
            turns,
            "$/GB",
            3,
            f"556.5 MB, {price}",
            "prefill / exact 0.5565 GB",
            derived=True,
            note=f"Below it raw wins. From 0.54 GB: ${turns_stated:.3f}.",
        ),
    ]


def _bandwidth_rows() -> Iterator[PaperRow]:
    """The links from which on loading is faster than the paper's prefill."""
    for ratio in (1.0, 1.5, 2.2):
        bits = break_even_bandwidth(PREFILL[LONG], RAW_BYTES, ratio, latency=REUSE[LONG])
        yield _row(
            "Break-even bandwidth, " + ("raw" if ratio == 1 else f"ratio {ratio}x"),
            None,
            threshold_value(bits) / 1e6,
            "Mb/s",
            0,
            "556.5 MB, 14.71 s, 0.296 s",
            "exact bits / ratio / (prefill - reuse)",
            derived=True,
            note="Decoding taken to keep up with the link." if ratio > 1 else "",
        )


def ratio_needed(prices: PriceBook | None = None) -> float:
    """The ratio that "opens the trap": from it on, shipping the paper's cache costs no more than
    its prefill, with decoding free."""
    egress, token_price = paper_prices(prices)
    prefill = token_cost(LONG, token_price)
    return threshold_value(break_even_ratio(prefill, RAW_BYTES, egress))


def paper_prices(prices: PriceBook | None) -> tuple[float, float]:
    """The paper's egress price, $/GB, and its token price, $/Mtok."""
    base = (prices or default_prices()).base("paper-m1pro")
    if base.api_input is None:
        raise KVZipError("preset.paper-m1pro has no api_input price")
    return base.egress.value, base.api_input.value


def threshold_value(threshold: Threshold) -> float:
    """The threshold, which exists for the paper's inputs unless the prices were changed."""
    if threshold.value is None:
        raise KVZipError(f"the paper's table: {threshold.reason}")
    return threshold.value
