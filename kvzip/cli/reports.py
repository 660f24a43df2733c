"""kvzip report and eval figures: pages and pictures from stored results."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.table import Table

from kvzip.cli.app import app, evaluate
from kvzip.cli.arguments import Json, ResultFile
from kvzip.cli.terminal import emit, say, show_table
from kvzip.errors import UsageError


@app.command
def report(
    results: list[Path] | None = None,
    *,
    output: ResultFile = None,
    sql: str | None = None,
    as_json: Json = False,
) -> None:
    """Draw a report from stored results, or query a sweep.

    Parameters
    ----------
    results
        Of kvzip demo (its folder or result.json) and, each if wanted: eval inputs, eval exactness,
        eval frontier, eval links, eval fleet (a trace each), entropy, bench, as JSON. With --sql:
        a sweep's folder, or a Parquet file.
    output
        The page. Default: report.html beside the demo's result.
    sql
        A query in DuckDB's SQL over the table `sweep`.
    """
    if sql is not None:
        _sql(results or [], sql, as_json)
        return
    from kvzip.eval.report.page import write_report
    from kvzip.eval.report.sources import read

    if not results:
        raise UsageError(
            "name stored results, first the folder of kvzip demo; or --sql and a sweep"
        )
    result, extras = read(results)
    first = results[0]
    page = output or (first if first.is_dir() else first.parent) / "report.html"
    write_report(result, page, extras)
    shown = [f for f in extras.__struct_fields__ if getattr(extras, f) is not None]
    emit(
        {"page": str(page), "sections": ["demo", *shown]},
        as_json,
        lambda: say(str(page)),
    )


def _sql(results: list[Path], sql: str, as_json: bool) -> None:
    from kvzip.eval.sweep.query import query

    if len(results) != 1:
        raise UsageError("--sql takes one folder of a sweep, or one Parquet file")
    rows = query(results[0], sql)

    def show() -> None:
        table = Table(*(rows[0] if rows else ["no rows"]))
        for row in rows:
            table.add_row(*(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()))
        show_table(table)

    emit({"rows": rows}, as_json, show)


@evaluate.command
def figures(
    results: list[Path],
    *,
    readme: Path | None = None,
    page: Path | None = None,
    picture: Path | None = None,
    as_json: Json = False,
) -> None:
    """The README's figures, and those of docs/fleet.md, from stored results.

    Parameters
    ----------
    results
        What kvzip demo wrote: its folder, or result.json. Beside it, results of kvzip eval fleet
        --trace: the first of them answers for room.
    readme
        A Markdown file: its answer is put anew between its marks.
    page
        A Markdown file: the tables of the replayed traces are put anew between their marks.
    picture
        PNG of the map of time; needs Chromium.
    """
    from kvzip.eval.quantities import significant
    from kvzip.eval.report import readme as drawing
    from kvzip.eval.report.sources import read
    from kvzip.eval.report.traffic import markdown

    result, extras = read(results)
    traffic = extras.traffic or ()
    found, answer = drawing.figures(result, traffic), drawing.answer(result, traffic)
    if readme is not None:
        drawing.put_figures(result, readme, traffic)
    if page is not None:
        drawing.put_between(page, {"traffic": markdown(traffic)})
    if picture is not None:
        drawing.put_picture(result, picture)

    def show() -> None:
        table = Table("figure", "value", "from")
        for f in found:
            table.add_row(f.name, f"{significant(f.value, 4)} {f.unit}", f.basis)
        show_table(table)
        say(answer)

    emit({"figures": msgspec.to_builtins(found), "answer": answer}, as_json, show)
