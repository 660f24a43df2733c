"""The answers at the head of a report: a verdict at each price base of the headline, in time, and
in room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import msgspec

from kvzip.eval.money.breakeven import BreakEven, own_cache_usd
from kvzip.eval.money.prices import HEADLINE, default_prices
from kvzip.eval.report.text import bit_rate, seconds, size, usd
from kvzip.eval.report.traffic import found_at, ratio_source, ratios, trace_name
from kvzip.eval.results.demo import DemoResult
from kvzip.eval.results.traffic import TrafficResult


class Answer(msgspec.Struct, frozen=True):
    """One verdict of the headline."""

    question: str
    word: str
    sentence: str
    small: str
    good: bool | None


def answers(result: DemoResult, traffic: Sequence[TrafficResult] = ()) -> list[Answer]:
    """The answer in dollars at each price base of the headline, then the one in time, and one for
    each replayed trace."""
    groups = by_base(result.breakeven)
    return [
        *map(_dollar_answer, headline(groups)),
        _time_answer(groups[0]),
        *(_room_answer(result, replayed) for replayed in traffic),
    ]


def by_base(rows: Sequence[BreakEven]) -> list[list[BreakEven]]:
    """Rows in groups of one price base, in their order."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row.base)]


def headline(groups: Sequence[list[BreakEven]]) -> list[list[BreakEven]]:
    """Those of the price bases of the headline, or the first when there is none of them."""
    return [rows for rows in groups if rows[0].base in HEADLINE] or list(groups[:1])


def _dollar_answer(rows: Sequence[BreakEven]) -> Answer:
    best = min(rows, key=lambda row: row.dollars.load_usd)
    d = best.dollars
    sentence = (
        f"The cheapest load ({best.codec}, {best.ratio:.2f}× on this document) costs "
        f"{usd(d.load_usd)}; the prefill costs {usd(d.prefill_usd)}. "
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
        limits = [row.dollars.break_even_free_decode_usd_per_gb for row in rows]
        sentence += f"Decoding alone costs {usd(d.decode_usd)}; even with free decoding, "
        free = max((limit for limit in limits if limit is not None), default=None)
        if free is None:
            sentence += "shipping never pays, because storage alone costs as much as the prefill."
        else:
            sentence += (
                f"egress would have to be below {usd(free)} per GB, and it is "
                f"{usd(d.egress_usd_per_gb)}."
            )
    sentence += own_cache(best.base, d.prefill_usd, d.load_usd)
    return Answer(f"In dollars · {best.base_title}", word, sentence, d.basis, good)


def own_cache(base: str, prefill: float, load: float) -> str:
    """What the provider's own cache asks for what a prefill costs, and the cheapest load; "" at a
    base that has no such price."""
    book = default_prices()
    found = own_cache_usd(book.base(base), prefill) if base in book.preset else None
    if found is None:
        return ""
    beside = "less" if found < load else "more"
    return (
        f" A read from the provider’s own cache would cost {usd(found)}, {beside} than that load."
    )


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


_TYPICAL = 5000.0
"""Blocks of raw size of the store that the answer in room looks at."""


def _room_answer(result: DemoResult, traffic: TrafficResult) -> Answer:
    codecs = ratios(traffic)
    codec, ratio = list(codecs.items())[-1]
    raw, best = found_at(traffic, _TYPICAL), found_at(traffic, _TYPICAL, ratio)
    times = f"{best / raw:.1f} times as many" if raw > 0 else f"{best:.0%} instead of none"
    sentence = (
        f"An LRU store of {size(_TYPICAL * traffic.block_bytes)} of {traffic.model}’s cache has "
        f"room for {_TYPICAL:,.0f} blocks of {traffic.block_tokens} tokens. It finds {raw:.1%} of "
        f"the trace’s blocks raw and {best:.1%} with {codec} (at {ratio:.2f}×), "
        "whatever egress costs."
    )
    basis = (
        f"Counted: {traffic.requests:,} requests of {traffic.trace}, {traffic.seconds / 60:.0f} "
        f"minutes; with room for all, {traffic.most:.1%} are found. {ratio_source(traffic)}"
    )
    own = next((c.ratio for c in result.codecs if c.name == codec), None)
    if own is not None and f"{own:.2f}" != f"{ratio:.2f}":
        basis += f" On this page’s document {codec} saves {own:.2f}×."
    good = best > raw
    return Answer(
        f"In room · what a full store finds · {trace_name(traffic)}",
        f"Yes, {times}" if good else "No",
        sentence,
        basis,
        good,
    )
