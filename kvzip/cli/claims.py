"""kvzip eval claims: what is claimed of compressed KV caches, by others and by us."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.table import Column, Table

from kvzip.cli.app import evaluate
from kvzip.cli.arguments import Json
from kvzip.cli.terminal import emit, say, show_table


@evaluate.command
def claims(*, page: Path | None = None, results: Path | None = None, as_json: Json = False) -> None:
    """Published claims of lossless or nearly lossless compression of KV caches, each with what it
    means, and this project's own beside them, in the same fields.

    Parameters
    ----------
    page
        A Markdown file: the tables are put anew between its marks.
    results
        The repository: the figures of our own claims are compared with its stored results.
    """
    from kvzip.eval.claims.claims import EXACT, check_stored, load
    from kvzip.eval.claims.page import blocks
    from kvzip.eval.report.readme import put_between

    found = load()
    figures = None if results is None else check_stored(found.own, results)
    if page is not None:
        put_between(page, blocks(found))

    def show() -> None:
        for title, rows in (("published", found.published), ("kvzip", found.own)):
            table = Table(Column(title, no_wrap=True), "claim", "exact", "of", "measured on")
            for row in rows:
                cells = (row.claim, EXACT[row.exact], row.dtype, row.measured_on)
                table.add_row(row.name.replace("`", ""), *cells)
            show_table(table)
        if figures is None:
            say("kvzip's figures were not compared with stored results: --results")
        else:
            say(
                f"All {figures} figures of kvzip's {len(found.own)} claims agree with their "
                "stored results."
            )

    emit(msgspec.to_builtins(found), as_json, show)
