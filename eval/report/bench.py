"""A benchmark as a page, with a table and a chart of ratio against decode speed for each snapshot,
or as tables in Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape

from kvzip.eval.report import charts
from kvzip.eval.report.text import gbps
from kvzip.eval.results.bench import BenchResult, BenchRow, SnapshotIdentity
from kvzip.files import replacing

_SIZE = (860, 520)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>kvzip bench: {title}</title>
<style>
:root {{ --page: #faf9f6; --ink: #1c1e22; --soft: #585e68; --rule: #dfdcd4; --bad: #a63a00;
  --s0: #6b7078; --s1: #b3471d; --s3: #0072b2; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #15171b; --ink: #e9e7e2; --soft: #a5abb5;
  --rule: #353a42; --bad: #f0986a; --s0: #a2a8b2; --s1: #f08a5d; --s3: #62b0e8; }} }}
body {{ margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, sans-serif; font-variant-numeric: tabular-nums; }}
main {{ max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h2 {{ margin-top: 3rem; }}
p, li {{ overflow-wrap: anywhere; }}
.soft, caption {{ color: var(--soft); font-size: .9rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; }}
th, td {{ padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }}
th.text, td.text {{ text-align: left; }}
thead th {{ color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; }}
.kvzip th {{ color: var(--s1); }} .peer th {{ color: var(--s3); }}
.bad {{ color: var(--bad); font-weight: 650; }}
.chart {{ display: block; max-width: 100%; height: auto; }}
.chart text {{ fill: var(--ink); font-size: 12px; }}
.chart .tick, .chart .axis {{ fill: var(--soft); }}
.chart .grid {{ stroke: var(--rule); fill: none; }}
.chart .leader {{ fill: none; opacity: .75; }}
.chart .label {{ paint-order: stroke; stroke: var(--page); stroke-width: 3px; }}
.chart .s0 {{ stroke: var(--s0); }} .chart .mark.s0 {{ fill: var(--s0); }}
.chart .s1 {{ stroke: var(--s1); }} .chart .mark.s1 {{ fill: var(--s1); }}
.chart .s3 {{ stroke: var(--s3); }} .chart .mark.s3 {{ fill: var(--s3); }}
</style>
</head>
<body>
<main>
<h1>kvzip beside others, losslessly</h1>
{body}
</main>
</body>
</html>
"""


def write(result: BenchResult, path: str | os.PathLike[str]) -> None:
    """Write the page, or the tables where `path` ends in .md; whole or not at all."""
    text = markdown(result) if os.fspath(path).endswith(".md") else page(result)
    with replacing(path, private=False) as file:
        file.write(text.encode())


def markdown(result: BenchResult) -> str:
    """A table for each snapshot; speeds in GB/s as the fastest repeat and, in brackets, median."""
    lines: list[str] = []
    for snapshot, rows in result.by_snapshot():
        lines += [
            f"**{snapshot.model or snapshot.file}**, {snapshot.dtype}, {snapshot.tokens:,} tokens, "
            f"{snapshot.raw_bytes / 1e6:.1f} MB; text: {snapshot.text or 'not named'}",
            "",
            "| codec | ratio | bits a number | encode GB/s | decode GB/s | of memcpy |",
            "|---|---|---|---|---|---|",
        ]
        for r in rows:
            name = f"**{r.title}**" if r.kind == "kvzip" else r.title
            lines.append(
                f"| {name} | {r.ratio:.3f} | {r.bits_per_value:.2f} "
                f"| {gbps(r.encode_gbps)} ({gbps(r.encode_median_gbps)}) "
                f"| {gbps(r.decode_gbps)} ({gbps(r.decode_median_gbps)}) "
                f"| {r.decode_of_memcpy:.3f} |{'' if r.exact else ' NOT EXACT'}"
            )
        lines.append("")
    lines += [f"Missing: {m.name}: {m.reason}" for m in result.missing]
    return "\n".join(lines)


def page(result: BenchResult) -> str:
    """The page as HTML text."""
    machine = result.machine
    cache = "" if machine.cache_mib is None else f", largest cache {machine.cache_mib:g} MiB"
    threads = "one thread" if result.threads == 1 else f"{result.threads} threads"
    parts = [
        _paragraph(
            f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB{cache}; {threads}, "
            f"{result.repeat} repeats; {result.date}."
        ),
        _paragraph(
            "Speeds are GB (10^9 bytes) of raw numbers a second, caches cold, fastest repeat; the "
            "share is of memcpy in the same run. A row of kvzip is a whole file with header, index "
            "and verified checksums; a peer's is bare blocks of one layer's K or V, in the order "
            "that suits it, without the cost of bringing them there."
        ),
    ]
    for number, (snapshot, rows) in enumerate(result.by_snapshot()):
        parts += [
            f"<section><h2>{escape(_about(snapshot))}</h2>",
            _paragraph(f"{snapshot.raw_bytes / 1e6:.1f} MB. {_source(snapshot)}", "soft"),
            charts.bench_svg(rows, f"speed-{number}", _SIZE),
            _table(rows),
            "</section>",
        ]
    if result.missing:
        items = (f"{m.name}{f' on {m.file}' if m.file else ''}: {m.reason}" for m in result.missing)
        lines = "".join(f"<li>{escape(item)}</li>" for item in items)
        parts.append(f"<h2>Missing</h2><ul>{lines}</ul>")
    versions = ", ".join(f"{name} {v}" for name, v in result.versions.items())
    parts += [
        "<h2>This run</h2>",
        _paragraph(result.command),
        _paragraph(versions),
        _paragraph("Vector extensions: " + ", ".join(machine.simd)),
    ]
    title = "; ".join(escape(_about(snapshot)) for snapshot, _ in result.by_snapshot())
    return _PAGE.format(title=title, body="\n".join(parts))


def _about(snapshot: SnapshotIdentity) -> str:
    return f"{snapshot.model or snapshot.file}, {snapshot.tokens:,} tokens, {snapshot.dtype}"


def _source(snapshot: SnapshotIdentity) -> str:
    text = f"Text: {snapshot.text}. " if snapshot.text else ""
    return f"{text}SHA-256 of the numbers: {snapshot.sha256_raw}."


def _paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


_HEAD = (
    '<thead><tr><th class="text">codec</th><th>ratio</th><th>bits a number</th>'
    "<th>encode GB/s</th><th>median</th><th>of memcpy</th>"
    "<th>decode GB/s</th><th>median</th><th>of memcpy</th>"
    '<th>exact</th><th class="text">order</th><th class="text">setting</th></tr></thead>'
)


def _table(rows: Sequence[BenchRow]) -> str:
    lines = []
    for r in rows:
        numbers = [
            f"{r.ratio:.3f}",
            f"{r.bits_per_value:.2f}",
            *map(gbps, (r.encode_gbps, r.encode_median_gbps, r.encode_of_memcpy)),
            *map(gbps, (r.decode_gbps, r.decode_median_gbps, r.decode_of_memcpy)),
        ]
        exact = "<td>yes</td>" if r.exact else '<td class="bad">NO</td>'
        cells = "".join(f"<td>{n}</td>" for n in numbers)
        words = "".join(f'<td class="text">{escape(w)}</td>' for w in (r.order, r.setting))
        name = f'<th class="text">{escape(r.title)}</th>'
        lines.append(f'<tr class="{r.kind}">{name}{cells}{exact}{words}</tr>')
    return f'<div class="scroll"><table>{_HEAD}<tbody>{"".join(lines)}</tbody></table></div>'
