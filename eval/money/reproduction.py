"""The paper's question, whether compression opens its trap, answered with measured codecs.

Its figures recomputed, the verdict on its document at every preset, and measured exactness beside
its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvzip.choice.cost import break_even_egress, prefill_flops, token_cost
from kvzip.errors import KVZipError
from kvzip.eval.money.breakeven import Basis, BreakEven, Measured, Verdict, breakeven
from kvzip.eval.money.paper import (
    LONG,
    PREFILL,
    RAW_BYTES,
    REUSE,
    PaperRow,
    paper_prices,
    paper_table,
    ratio_needed,
    threshold_value,
)
from kvzip.eval.money.prices import PriceBook, Shape, default_prices
from kvzip.eval.money.profiles import figures_of
from kvzip.eval.money.ratios import ratio_basis, same_model, slowdown_of
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.inputs import Inputs


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
    turns_on_decoding: bool
    """Prefill is cheaper only because decoding costs the device's time."""
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
    bf16, as far as they were measured. `exactness` puts measured exactness beside the paper's.

    Raises KVZipError when the inputs have neither dtype.
    """
    book = prices or default_prices()
    rows = paper_table(book)
    named = {row.name: row.ours for row in rows}
    measured_dtypes = {row.dtype for row in inputs.rows}
    found = [
        (dtype, row)
        for dtype in ("fp16", "bf16")
        if dtype in measured_dtypes
        for row in breakeven(_document(inputs, dtype, book), book.bases())
    ]
    if not found:
        raise KVZipError("the inputs have neither fp16 nor bf16, the dtypes the paper asks about")
    return Reproduction(
        {short: named[name] for short, name in _FIGURES.items()},
        rows,
        [_answer(dtype, row, book) for dtype, row in found if row.base == "paper-m1pro"],
        [_verdict(dtype, row) for dtype, row in found],
        f"Ratios and decode speeds: {inputs.command}; {inputs.model}, {inputs.text}, on "
        f"{inputs.machine.cpu}, {inputs.threads} thread, {inputs.date}. "
        + _estimate(inputs, book.model["qwen3-4b"])
        + _slower(inputs, book.model["qwen3-4b"]),
        [] if exactness is None else beside(exactness),
    )


def _estimate(inputs: Inputs, shape: Shape) -> str:
    """What the answers' ratios rest on, and whether that makes them an estimate."""
    own = same_model(shape, inputs)
    words = ratio_basis(inputs.model, "Qwen3-4B", own)
    return f"{words[0].upper()}{words[1:]}" + ("." if own else ", which makes this an estimate.")


def _slower(inputs: Inputs, shape: Shape) -> str:
    """Which codecs are taken to be slower than was measured, in a sentence; "" where none is."""
    slow = {name: slowdown_of(name, shape, inputs) for name in {r.codec for r in inputs.rows}}
    words = [f"{name} {times:.1f} times" for name, times in sorted(slow.items()) if times != 1]
    if not words:
        return ""
    return f" Taken as long to decode in a model as wide: {', '.join(words)} (a model)."


def _document(inputs: Inputs, dtype: str, book: PriceBook) -> Measured:
    """The paper's longest prompt, with the codecs' figures on a cache of that dtype."""
    shape = book.model["qwen3-4b"]
    return Measured(
        model="Qwen3-4B",
        device="Apple M1 Pro (MPS)",
        tokens=LONG,
        layers=shape.layers,
        raw_bytes=RAW_BYTES,
        prefill_seconds=PREFILL[LONG],
        codecs=tuple(figures_of(shape, inputs, dtype, LONG)),
        prefill_flops=prefill_flops(shape.parameters, LONG, shape.layers, shape.width),
        latency=REUSE[LONG],
        decoder=f"{inputs.machine.cpu}, {inputs.threads} thread, a cache of {inputs.model}",
    )


def _answer(dtype: str, row: BreakEven, book: PriceBook) -> Answer:
    egress, token_price = paper_prices(book)
    prefill = token_cost(LONG, token_price)
    free = threshold_value(break_even_egress(prefill, RAW_BYTES, row.ratio))
    return Answer(
        dtype,
        row.codec,
        row.ratio,
        ratio_needed(book),
        free > egress,
        free,
        row.time.break_even_mbps,
    )


def _verdict(dtype: str, row: BreakEven) -> PresetVerdict:
    d = row.dollars
    return PresetVerdict(
        row.base,
        dtype,
        row.codec,
        d.verdict,
        d.turns_on_decoding,
        d.prefill_usd,
        d.prefill_basis,
        d.load_usd,
        d.decode_usd,
        d.break_even_usd_per_gb,
        d.break_even_ratio,
    )
