"""kvzip eval exactness: whether tokens and logits change with the cache."""

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
    choose_products,
    command_line,
    names,
)
from kvzip.cli.failures import CheckFailed
from kvzip.cli.terminal import emit, show_table, working
from kvzip.codec_spec import split_specs
from kvzip.eval.measured_codecs import EXACTNESS_CODECS

if TYPE_CHECKING:
    from kvzip.eval.results.exactness import ExactnessResult


@evaluate.command
def exactness(
    snapshots: list[Path],
    *,
    output: ResultFile = None,
    model: str | None = None,
    codecs: str = ",".join(EXACTNESS_CODECS),
    profile: Path | None = None,
    lossy: str = "int8,int4",
    continuations: int = 2,
    new_tokens: int = 32,
    work: Path | None = None,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """Bytes, tokens and logits over many documents and continuations: what each codec changes, and
    what rounding the cache changes.

    Parameters
    ----------
    snapshots
        Captured documents of one model.
    output
        File for the result as JSON; `kvzip report` takes it.
    model
        Default: what the snapshots say.
    profile
        For codecs that need one; learned from other documents.
    lossy
        References that are not exact: int8, int4 (each channel its own scale).
    continuations
        Of each document: as it is, then with tokens of other documents after it.
    work
        Folder for what each document gave: the same command goes on where an earlier one was
        ended. Default: none, and an ended one begins anew.
    """
    choose_products(native_bf16)
    from kvzip.eval.exactness import corpus
    from kvzip.eval.results import stored

    with working("starting") as step:
        found = corpus.run(
            snapshots,
            model=model,
            codecs=split_specs(codecs),
            lossy=names(lossy),
            profile=profile,
            continuations=continuations,
            new_tokens=new_tokens,
            work=work,
            command=command_line(),
            step=step,
        )
    if output is not None:
        stored.save(found, output)
    emit(msgspec.to_builtins(found), as_json, lambda: _show(found))
    if not found.exact:
        raise CheckFailed("a lossless codec changed something")


def _show(found: ExactnessResult) -> None:
    table = Table("", "ratio", "runs exact", "tokens equal", "worst run", "logits differ by")
    for r in [*found.rows, found.fresh]:
        table.add_row(
            r.name,
            f"{r.ratio:.3f}",
            f"{r.exact_runs} of {r.runs}" if r is not found.fresh else "",
            f"{r.tokens_matching} of {r.tokens}",
            f"{r.worst_tokens_matching} of {found.new_tokens}",
            f"{r.max_logit_difference:.3g}",
        )
    show_table(table)
