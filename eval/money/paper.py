"""The paper's own figures, recomputed: arXiv 2606.13361, "Can I Buy Your KV Cache?" (June 2026).

Each row holds what the paper states, what its own inputs give, and the formula. A figure that the
paper does not state but that follows from it is marked derived and has nothing to agree with.
Qwen3-4B, fp16, Apple M1 Pro: none of this was measured by this library.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvzip.choice.cost import (
    GB,
    HOUR,
    Threshold,
    break_even_bandwidth,
    break_even_egress,
    break_even_ratio,
    load_cost,
    prefill_flops,
    token_cost,
)
from kvzip.errors import KVZipError
from kvzip.eval.money.breakeven import Basis, Measured, Verdict, breakeven
from kvzip.eval.money.prices import PriceBook, default_prices
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.inputs import Inputs

SHORT, LONG = 255, 3774
"""Tokens of the paper's shortest and longest prompt."""
PREFILL = {SHORT: 0.67, LONG: 14.71}
"""Seconds."""
REUSE = {SHORT: 0.078, LONG: 0.296}
"""Seconds to go on from a cache that is already in memory."""
BYTES_PER_TOKEN = 36 * 2 * 8 * 128 * 2
"""Layers x (K, V) x KV heads x head dimension x bytes of an fp16 number."""
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


def paper_table(prices: PriceBook | None = None) -> list[PaperRow]:
    """The paper's figures, recomputed with the prices of the preset `paper-m1pro`."""
    egress, token_price = _prices(prices)
    rows: list[PaperRow] = []

    def row(
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
    ) -> None:
        agrees = None if paper is None else round(ours, digits) == round(paper, digits)
        rows.append(
            PaperRow(name, paper, ours, unit, digits, inputs, formula, agrees, derived, note)
        )

    short, long = (PREFILL[n] / REUSE[n] for n in (SHORT, LONG))
    row(
        "Reuse against prefill, 255 tokens",
        8.6,
        short,
        "x",
        1,
        "0.67 s, 0.078 s",
        "prefill / reuse",
    )
    row(
        "Reuse against prefill, 3,774 tokens",
        49.7,
        long,
        "x",
        1,
        "14.71 s, 0.296 s",
        "prefill / reuse",
    )
    for tokens, stated in ((SHORT, 1.13), (LONG, 1.02)):
        row(
            f"Break-even reads, {tokens:,} tokens",
            stated,
            PREFILL[tokens] / (PREFILL[tokens] - REUSE[tokens]),
            "reads",
            2,
            f"{PREFILL[tokens]} s, {REUSE[tokens]} s",
            "prefill / (prefill - reuse)",
        )

    raw = BYTES_PER_TOKEN * LONG
    row(
        "Cache of a token",
        0.148,
        BYTES_PER_TOKEN / 1e6,
        "MB",
        3,
        "36 layers, K and V, 8 heads, 128 numbers, 2 bytes",
        "36 × 2 × 8 × 128 × 2",
        note="Exactly 147,456 bytes; the paper's last digit is one too high.",
    )
    row(
        "Cache of 3,774 tokens",
        STATED_GB,
        raw / GB,
        "GB",
        2,
        "147,456 bytes a token",
        "bytes a token × tokens",
        note="Exactly 556.5 MB, 3 % more than the paper's 0.54 GB. Where the size enters, its "
        "figures come out 3 % low.",
    )

    prefill = token_cost(LONG, token_price)
    price = f"${token_price:g} per Mtok"
    row(
        "Prefill of the document",
        None,
        prefill,
        "$",
        4,
        f"3,774 tokens, {price}",
        "tokens × price",
        derived=True,
        note=f"The price is derived: $1.5 M / 80 M / 3,774 tokens. The same "
        f"dollars are ${prefill / PREFILL[LONG] * HOUR:.2f} for an hour of the paper's machine.",
    )
    row(
        "Fleet, everyone prefills",
        1.5,
        prefill * AGENTS / 1e6,
        "$ M",
        1,
        f"80 M agents, 3,774 tokens, {price}",
        "agents × tokens × price",
        derived=True,
        note="Agrees by construction: the price was derived from it.",
    )
    row(
        "Fleet, compute of reuse",
        0.03,
        prefill * AGENTS / long / 1e6,
        "$ M",
        2,
        "$1.5 M, 49.7x",
        "fleet's prefill / 49.7",
        derived=True,
    )

    stated, exact = (load_cost(size, egress) for size in (STATED_GB * GB, raw))
    tariff = f"${egress:g}/GB"
    row(
        "Egress of one load",
        0.049,
        stated,
        "$",
        3,
        f"0.54 GB, {tariff}",
        "GB × egress price",
        derived=True,
        note=f"The price is derived from this figure. With the exact size: ${exact:.4f}.",
    )
    row(
        "Egress over the prefill it saves",
        2.6,
        stated / prefill,
        "x",
        1,
        f"0.54 GB, {tariff}, {price}",
        "egress / prefill",
        derived=True,
        note=f"With the exact size {exact / prefill:.2f}x, which would round to "
        f"{exact / prefill:.1f}.",
    )
    row(
        "What a reader's tariff saves",
        10.0,
        1 / CACHED_PRICE,
        "x",
        0,
        "cache read at 0.1x of the input price",
        "1 / 0.1",
    )

    opens = ratio_needed(prices)
    loose = _value(break_even_ratio(prefill, STATED_GB * GB, egress))
    row(
        "Ratio at which shipping beats prefill",
        None,
        opens,
        "x",
        2,
        f"556.5 MB, {tariff}, {price}",
        "raw GB × egress price / prefill",
        derived=True,
        note=f"{16 / opens:.2f} bits of 16, if decoding is free. From 0.54 GB: {loose:.2f}x.",
    )
    cheaper = _value(break_even_ratio(prefill, raw, 0.05))
    row(
        "The same at $0.05/GB",
        None,
        cheaper,
        "x",
        2,
        f"556.5 MB, $0.05/GB, {price}",
        "raw GB × egress price / prefill",
        derived=True,
        note=f"{16 / cheaper:.2f} bits of 16, if decoding is free.",
    )
    turns = _value(break_even_egress(prefill, raw, 1))
    loose = _value(break_even_egress(prefill, STATED_GB * GB, 1))
    row(
        "Egress price at which raw bytes break even",
        None,
        turns,
        "$/GB",
        3,
        f"556.5 MB, {price}",
        "prefill / raw GB",
        derived=True,
        note=f"Below it raw wins. From 0.54 GB: ${loose:.3f}.",
    )

    for ratio in (1.0, 1.5, 2.2):
        bits = break_even_bandwidth(PREFILL[LONG], raw, ratio, latency=REUSE[LONG])
        row(
            "Break-even bandwidth, " + ("raw" if ratio == 1 else f"ratio {ratio}x"),
            None,
            _value(bits) / 1e6,
            "Mb/s",
            0,
            "556.5 MB, 14.71 s, 0.296 s",
            "raw bits / ratio / (prefill - reuse)",
            derived=True,
            note="Decoding taken to keep up with the link." if ratio > 1 else "",
        )
    return rows


class Answer(msgspec.Struct, frozen=True):
    """The paper's open question, "KV is nearly incompressible": for one dtype and codec."""

    dtype: str
    codec: str
    ratio: float
    ratio_needed: float
    """From which on shipping costs no more than the prefill, at the paper's prices, decoding
    free."""
    opens: bool
    egress_usd_per_gb: float
    """Below it shipping pays at that ratio, decoding free."""
    bandwidth_mbps: float | None
    """Above it loading is faster than the paper's prefill; None where decoding is too slow."""


class PresetVerdict(msgspec.Struct, frozen=True):
    """The paper's document at one preset, with one codec."""

    preset: str
    dtype: str
    codec: str
    verdict: Verdict
    prefill_usd: float
    prefill_basis: Basis
    load_usd: float
    decode_usd: float
    break_even_usd_per_gb: float | None
    break_even_ratio: float | None


class Beside(msgspec.Struct, frozen=True):
    """A figure of the paper that its inputs do not give, and what this library measured."""

    name: str
    paper: str
    ours: str
    why: str
    """What differs between the two."""


class Reproduction(msgspec.Struct, frozen=True):
    """All that `kvzip eval paper --json` prints."""

    figures: dict[str, float]
    """The figures that the paper's case rests on, recomputed, under short names."""
    rows: list[PaperRow]
    answers: list[Answer]
    verdicts: list[PresetVerdict]
    basis: str
    """Where the ratios and decode speeds of answers and verdicts come from."""
    beside: list[Beside] = []


_FIGURES = {
    "prefill_over_reuse_255": "Reuse against prefill, 255 tokens",
    "prefill_over_reuse_3774": "Reuse against prefill, 3,774 tokens",
    "fleet_prefill_million_usd": "Fleet, everyone prefills",
    "fleet_reuse_million_usd": "Fleet, compute of reuse",
    "egress_over_prefill": "Egress over the prefill it saves",
    "ratio_needed": "Ratio at which shipping beats prefill",
}


def beside(exactness: ExactnessResult) -> list[Beside]:
    """The paper's measurements of exactness, and ours on another model and machine."""
    what = f"{exactness.model}, {exactness.dtype}, on {exactness.machine.cpu}, "
    what += (
        f"{len(exactness.documents)} documents of {max(exactness.document_tokens):,} tokens at most"
    )

    def tokens(rows: Sequence[ExactnessRow]) -> str:
        return f"{sum(r.tokens_matching for r in rows)} of {sum(r.tokens for r in rows)}"

    exact = [row for row in exactness.rows if not row.lossy]
    found = []
    if exact:
        names = ", ".join(row.name for row in exact)
        found.append(
            Beside("Greedy tokens, lossless", "24 of 24", tokens(exact), f"{names}; {what}")
        )
    fresh = f"{exactness.fresh.max_logit_difference:.3g}"
    found.append(Beside("Logits, cache against prefill", "0.02", fresh, what))
    found += [
        Beside("Greedy tokens, int8", "16 of 32", tokens([row]), f"one scale a channel; {what}")
        for row in exactness.rows
        if row.name == "int8"
    ]
    return found


def reproduction(
    inputs: Inputs, prices: PriceBook | None = None, exactness: ExactnessResult | None = None
) -> Reproduction:
    """The paper's table, its open question answered with each codec's figures from `inputs`, and
    the verdict on its document with each codec at each preset. fp16, the paper's own dtype, and
    bf16, as far as they were measured. `exactness` puts measured exactness beside the paper's."""
    book = prices or default_prices()
    rows = paper_table(book)
    named = {row.name: row.ours for row in rows}
    raw = BYTES_PER_TOKEN * LONG
    shape = book.model["qwen3-4b"]
    needed = ratio_needed(book)
    egress, token_price = _prices(book)
    prefill_usd = token_cost(LONG, token_price)
    answers, verdicts = [], []
    measured_dtypes = {row.dtype for row in inputs.rows}
    for dtype in [d for d in ("fp16", "bf16") if d in measured_dtypes]:
        document = Measured(
            model="Qwen3-4B",
            device="Apple M1 Pro (MPS)",
            tokens=LONG,
            layers=shape.layers,
            raw_bytes=raw,
            prefill_seconds=PREFILL[LONG],
            codecs=tuple(inputs.figures(dtype, LONG)),
            prefill_flops=prefill_flops(shape.parameters, LONG, shape.layers, shape.width),
            latency=REUSE[LONG],
            decoder=f"{inputs.machine.cpu}, {inputs.threads} thread, a cache of {inputs.model}",
        )
        found = breakeven(document, book.bases())
        for row in found:
            d = row.dollars
            verdicts.append(
                PresetVerdict(
                    row.base,
                    dtype,
                    row.codec,
                    d.verdict,
                    d.prefill_usd,
                    d.prefill_basis,
                    d.load_usd,
                    d.decode_usd,
                    d.break_even_usd_per_gb,
                    d.break_even_ratio,
                )
            )
            if row.base == "paper-m1pro":
                free = _value(break_even_egress(prefill_usd, raw, row.ratio))
                answers.append(
                    Answer(
                        dtype,
                        row.codec,
                        row.ratio,
                        needed,
                        free > egress,
                        free,
                        row.time.break_even_mbps,
                    )
                )
    if not verdicts:
        raise KVZipError("the inputs have neither fp16 nor bf16, the dtypes the paper asks about")
    return Reproduction(
        {short: named[name] for short, name in _FIGURES.items()},
        rows,
        answers,
        verdicts,
        f"Ratios and decode speeds: {inputs.command}; {inputs.model}, {inputs.text}, on "
        f"{inputs.machine.cpu}, {inputs.threads} thread, {inputs.date}. Qwen3-4B's own cache was "
        "not measured: taking another model's ratio for it is an estimate.",
        [] if exactness is None else beside(exactness),
    )


def ratio_needed(prices: PriceBook | None = None) -> float:
    """The ratio that "opens the trap": from it on, shipping the paper's cache costs no more than
    its prefill, with decoding free."""
    egress, token_price = _prices(prices)
    prefill = token_cost(LONG, token_price)
    return _value(break_even_ratio(prefill, BYTES_PER_TOKEN * LONG, egress))


def _prices(prices: PriceBook | None) -> tuple[float, float]:
    """The paper's egress price, $/GB, and its token price, $/Mtok."""
    base = (prices or default_prices()).base("paper-m1pro")
    if base.api_input is None:
        raise KVZipError("preset.paper-m1pro has no api_input price")
    return base.egress.value, base.api_input.value


def _value(threshold: Threshold) -> float:
    """The threshold, which exists for the paper's inputs unless the prices were changed."""
    if threshold.value is None:
        raise KVZipError(f"the paper's table: {threshold.reason}")
    return threshold.value
