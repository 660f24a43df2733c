"""The README's figures, from stored results: its answer in words, its table, and its picture.

`make figures` measures all of it anew; `make redraw` only draws what is stored in docs/results.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from kvzip.choice.cost import MTOK
from kvzip.errors import KVZipError
from kvzip.eval.money.breakeven import BreakEven
from kvzip.eval.money.paper import BYTES_PER_TOKEN, ratio_needed
from kvzip.eval.money.ratios import ratio_basis_of_replay
from kvzip.eval.report.answers import by_base, own_cache
from kvzip.eval.report.page import write_report
from kvzip.eval.report.text import bit_rate, size, usd
from kvzip.eval.report.traffic import cores_use, found_at, ratios
from kvzip.eval.results.demo import DemoResult
from kvzip.eval.results.traffic import TrafficResult
from kvzip.eval.traffic.setting import ROOM_CODECS
from kvzip.files import replacing, scratch_folder
from kvzip.reading import text_in

_PICTURE = '[data-chart="time-wide"]'


class Figure(msgspec.Struct, frozen=True):
    """One number that the README states."""

    name: str
    value: float
    unit: str
    basis: str
    """measured, or what it was worked out from."""


def figures(result: DemoResult, traffic: Sequence[TrafficResult] = ()) -> list[Figure]:
    """Every number of the README's answer, and of the traces behind it, unrounded."""
    measured = f"measured, {result.date}"
    found = [
        Figure("tokens", result.tokens, "", measured),
        Figure("prefill", result.prefill_seconds, "s", measured),
    ]
    found += [Figure(f"ratio, {c.name}", c.ratio, "x", measured) for c in result.codecs]
    found += [Figure(f"decode, {c.name}", c.decode_gbps, "GB/s", measured) for c in result.codecs]
    found += [
        Figure(f"break-even link, {row.codec}", row.time.break_even_mbps, "Mb/s", row.time.basis)
        for row in by_base(result.breakeven)[0]
        if row.time.break_even_mbps is not None
    ]
    found += [
        Figure(f"found at {c.blocks:,.0f} blocks and {c.ratio:g}x", c.hit_rate, "", t.trace)
        for t in traffic
        for c in t.capacity
    ]
    found += [
        Figure(f"found at {_STORE:,.0f} blocks, {name}", found_at(t, _STORE, r), "", t.trace)
        for t in traffic
        for name, r in ratios(t).items()
        if name in ROOM_CODECS
    ]
    found += [
        Figure(f"{r.strategy} {r.codec}".strip(), r.usd, "$", f"{t.trace}, modelled at prices")
        for t in traffic
        for r in t.rows
        if not r.codec or (r.strategy == "load" and r.codec in ROOM_CODECS)
    ]
    return [*found, Figure("ratio that opens the trap", ratio_needed(), "x", "the paper's inputs")]


def answer(result: DemoResult, traffic: Sequence[TrafficResult] = ()) -> str:
    """The README's answer: what was measured, then time, a list price, a prefill at cost, and what
    a store has room for, each with its command."""
    groups = {rows[0].base: rows for rows in by_base(result.breakeven)}
    try:
        listed, rented = groups["paper-m1pro"], groups["h100-rented"]
    except KeyError as error:
        raise KVZipError(f"the demo's result has no price base {error}") from None
    per_token = result.raw_bytes / result.tokens
    best = max(codec.ratio for codec in result.codecs)
    needed = f"{ratio_needed():.2f}x"
    reached = "" if best >= ratio_needed() else ", which no codec here reaches"
    price = listed[0].dollars.prefill_usd / result.tokens * MTOK
    text = "Python's documentation" if result.text.startswith("pydoc") else result.text
    lines = [
        f"**The answer**, for {result.model.id.removeprefix('pkg:')}, {result.dtype}, "
        f"{result.tokens:,} tokens of {text}, on {result.machine.cores} {result.machine.cpu} "
        f"core{'s' if result.machine.cores != 1 else ''}:",
        f"1. *In time*: {_time(listed)} The report of `kvzip demo`",
        f"2. *In dollars, at the paper's list price* (${price:g} per million tokens, "
        f"${listed[0].dollars.egress_usd_per_gb:g} per GB): {_dollars(listed)}{_own(listed)} "
        "Qwen3-4B's cache, "
        f"{BYTES_PER_TOKEN / per_token:.1f} times as many bytes a token, would need "
        f"{needed}{reached}. The report of `kvzip demo`; for the {needed} `kvzip eval paper`",
        f"3. *In dollars, against a rented H100's own prefill* ({rented[0].dollars.prefill_basis}):"
        f" {_dollars(rented)} The report of `kvzip demo`",
        *(f"4. *In room*: {_room(t)}" for t in traffic[:1]),
    ]
    return "\n".join(_wrapped(line, "" if n == 0 else "   ") for n, line in enumerate(lines))


def _wrapped(line: str, indent: str) -> str:
    """A line of Markdown wrapped at 120 columns, commands in backquotes whole."""
    whole = re.sub("`[^`]*`", lambda found: found[0].replace(" ", "\0"), line)
    wrapped = textwrap.fill(whole, 120, subsequent_indent=indent, break_on_hyphens=False)
    return wrapped.replace("\0", " ")


def _time(rows: list[BreakEven]) -> str:
    able = {row.codec: row for row in rows if row.time.break_even_mbps is not None}
    prefill = f"Prefill takes {rows[0].time.prefill_seconds:.1f} s"
    if not able:
        return f"no. {prefill}; decoding takes as long with every codec."
    named = [able[name] for name in ("raw", "channel", "predictive") if name in able]
    limits = ", ".join(
        f"{bit_rate(1e6 * (row.time.break_even_mbps or 0))} "
        + ("raw" if row.codec == "raw" else f"with `{row.codec}` ({row.ratio:.2f}x)")
        for row in named or able.values()
    )
    text = f"yes. {prefill}; loading the cache beats it on any link above {limits}, to the bit."
    slow = [row for row in rows if row.codec == "predictive" and row.codec not in able]
    for row in slow:
        text += f" `predictive` ({row.ratio:.2f}x) decodes slower than this small model prefills."
    return text


def _dollars(rows: list[BreakEven]) -> str:
    cheapest = min((row.dollars for row in rows), key=lambda d: d.load_usd)
    load, prefill = usd(cheapest.load_usd), usd(cheapest.prefill_usd)
    both = f"the cheapest load costs {load}, the prefill {prefill}."
    paying = [row for row in rows if row.dollars.verdict == "load"]
    if paying:
        raw = ", even as raw bytes" if any(row.codec == "raw" for row in paying) else ""
        return f"yes for this cache{raw}: {both}"
    if all(row.dollars.verdict == "prefill" for row in rows):
        return f"no codec makes paid egress pay: {both}"
    return "not known: the prefill's price is only an upper bound."


def _own(rows: list[BreakEven]) -> str:
    """What the provider's own cache asks beside the cheapest load."""
    cheapest = min((row.dollars for row in rows), key=lambda d: d.load_usd)
    said = own_cache(rows[0].base, cheapest.prefill_usd, cheapest.load_usd)
    return said.replace("’", "'")


_STORE = 5000.0
"""Blocks of raw size of the store that the answer in room looks at."""


def _room(traffic: TrafficResult) -> str:
    """What a store finds of a trace with the ratios that the trace was replayed with, and whether
    such a store in host memory is worth its price."""
    raw = found_at(traffic, _STORE)
    measured = {name: r for name, r in ratios(traffic).items() if name in ROOM_CODECS}
    found = [
        f"{found_at(traffic, _STORE, ratio):.1%} with `{name}` ({ratio:.2f}x)"
        for name, ratio in measured.items()
    ]
    text = (
        f"yes, a full store keeps more. Of {traffic.requests:,} real requests "
        f"({traffic.trace.partition('.')[0]}, {traffic.seconds / 60:.0f} minutes) an LRU store of "
        f"{size(_STORE * traffic.block_bytes)} of {traffic.model}'s cache finds "
    )
    text += ", ".join([f"{raw:.1%} of the blocks raw", *found])
    text += ", whatever egress costs"
    if measured:
        text += f" ({ratio_basis_of_replay(traffic.inputs, traffic.model)})"
    return f"{text}.{_rent(traffic)} `kvzip eval fleet --spread --trace FILE`"


def _rent(traffic: TrafficResult) -> str:
    """Whether a store in host memory saves more than it costs beside what the GPUs' memory finds
    by itself, with the cheapest codec that the hosts have cores for; "" where that was not
    replayed."""
    loads = [row for row in traffic.rows if row.strategy == "load" and row.codec in ROOM_CODECS]
    able = [row for row in loads if cores_use(traffic, row) <= 1]
    without = next((row for row in traffic.rows if row.strategy == "gpu"), None)
    host = next((i.value for i in traffic.inputs if i.name == "host, size"), None)
    if not able or without is None or host is None:
        return ""
    best = min(able, key=lambda row: row.usd)
    more = "more than it saves" if best.usd > without.usd else "less than it saves"
    text = (
        f" At list price a store of {size(host)} of host memory costs {more} on this trace "
        f"(model): {usd(best.usd)} with `{best.codec}` against {usd(without.usd)} with the GPUs' "
        "own memory alone."
    )
    for row in loads:
        if row not in able:
            text += (
                f" `{row.codec}` would be {usd(row.usd)}, but takes {cores_use(traffic, row):.1f} "
                "times the hosts' cores."
            )
    return text


_WAYS = {
    "`zstd`, `lz4`": "looking for repeats, of which there are next to none",
    "`planes`": "putting like bytes together first",
    "`channel`": "a probability table per channel for sign and exponent; keys as before RoPE",
    "`predictive`": "predicting each layer from the layers before it, in integers, with a profile",
}


def table(result: DemoResult) -> str:
    """The README's table of codecs: their ratios in the demo, and how they work."""
    ratios = {codec.name: codec.ratio for codec in result.codecs}
    lines = [f"| codec | {result.dtype} ratio | codes a number by |", "|---|---|---|"]
    for names, way in _WAYS.items():
        found = [f"{ratios[name]:.2f}" for name in names.replace("`", "").split(", ")]
        lines.append(f"| {names} | {', '.join(found)} | {way} |")
    return "\n".join(lines)


def put_figures(
    result: DemoResult, readme: str | os.PathLike[str], traffic: Sequence[TrafficResult] = ()
) -> bool:
    """Put answer and table between their marks in a Markdown file; whether that changed anything.
    Raises as `put_between`."""
    return put_between(readme, {"answer": answer(result, traffic), "codecs": table(result)})


def put_between(path: str | os.PathLike[str], blocks: Mapping[str, str]) -> bool:
    """Put each block between ``<!-- name -->`` and ``<!-- /name -->`` in a Markdown file; whether
    that changed anything.

    Raises as :func:`check_marks`.
    """
    text, new = _between(path, blocks)
    if new == text:
        return False
    with replacing(path, private=False) as file:
        file.write(new.encode())
    return True


def check_marks(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raise KVZipError when the file is no text, or the marks of a block are not there, once each,
    in order; and OSError when there is no file."""
    _between(path, dict.fromkeys(names, ""))


def _between(path: str | os.PathLike[str], blocks: Mapping[str, str]) -> tuple[str, str]:
    """What is in a file, and what would be with the blocks between their marks."""
    text = new = text_in(path)
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = new.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise KVZipError(f"{path} has no {begin} and {end} to put the {name} between")
        new = f"{before}{begin}\n{block}\n{end}{after}"
    return text, new


def put_picture(result: DemoResult, picture: str | os.PathLike[str]) -> None:
    """The report's map of time as a PNG, by a headless Chromium. Raises KVZipError without one."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise KVZipError(
            "a picture needs playwright and Chromium: pip install playwright"
        ) from None
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    options: Mapping[str, Any] = {"executable_path": chromium} if chromium else {}
    with scratch_folder() as folder, sync_playwright() as play:
        page_file = write_report(result, folder / "report.html")
        try:
            browser = play.chromium.launch(args=["--no-sandbox"], **options)
        except Error as error:
            raise KVZipError(
                f"a picture needs Chromium, and {chromium or 'that of playwright'} does "
                "not start: install it, or call `playwright install chromium`"
            ) from error
        page = browser.new_page(
            viewport={"width": 1000, "height": 900},
            device_scale_factor=1.5,
            java_script_enabled=False,
        )
        page.goto(page_file.as_uri())
        shot = page.locator(_PICTURE).screenshot()
        browser.close()
    with replacing(picture, private=False) as file:
        file.write(shot)
