"""kvzip eval scaling: how ratios grow with what is learned, with profiles and with models."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Table

from kvzip.cli.app import evaluate
from kvzip.cli.arguments import (
    Json,
    NativeBf16,
    ResultFile,
    Texts,
    check_folders,
    choose_products,
    command_line,
    integers,
    names,
    numbers,
)
from kvzip.cli.terminal import emit, say, show_table, working
from kvzip.files import replacing

if TYPE_CHECKING:
    from kvzip.eval.results.scaling import Extrapolation, ScalingResult

Files = Annotated[list[Path] | None, Parameter(consume_multiple=True)]


@evaluate.command
def scaling(
    *,
    models: str = "",
    work: Path = Path("scaling"),
    output: ResultFile = None,
    ratios: Files = None,
    kinds: str = "python-docs,python-source,package-metadata,licences",
    text: Texts = None,
    tokens: int = 2048,
    train: str = "2,4,8",
    test: int = 1,
    sizes: str = "3,10,30",
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    picture: Path | None = None,
    draw: Path | None = None,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """How small caches become with more to learn from, larger profiles and other models, by the
    protocol of `kvzip eval ratios`; and what that says of Qwen3-4B, where nobody has measured it.

    Parameters
    ----------
    models
        As for `kvzip capture`, with commas between.
    work
        Folder for what takes long: captured caches, profiles, points. The same command goes on
        where it was ended.
    output
        File for the result as JSON; its points go beside it as CSV.
    ratios
        Stored results of `kvzip eval ratios`, whose points join in. One of Qwen3-4B takes the place
        of what is extrapolated.
    kinds
        Texts that are at hand, with commas between; "none" for none.
    text
        Texts of your own, each as NAME=TRAIN.txt:TEST.txt.
    tokens
        Of a document.
    train
        Documents of each text that are learned from: a training set for each number, with commas
        between.
    test
        Documents of each text that are measured.
    sizes
        Sizes of profiles in per cent of the model's matrices in bf16, with commas between. One that
        the documents are too few for, or that has no room for one predictor a layer, gives the
        nearest that can be.
    dtype
        Of the cache. Default: the model's.
    seed
        Draws which files of a text are for training, and their order.
    picture
        File for the charts, SVG.
    draw
        A stored result: it is shown and drawn, and nothing is run.
    """
    check_folders(output, picture)
    choose_products(native_bf16)
    from kvzip.eval.ratios.run import CHARACTERS
    from kvzip.eval.ratios.texts import texts
    from kvzip.eval.report.scaling import scaling_file
    from kvzip.eval.results import stored
    from kvzip.eval.results.ratios import RatiosResult
    from kvzip.eval.results.scaling import ScalingResult
    from kvzip.eval.scaling.run import Plan, run
    from kvzip.eval.scaling.table import as_csv

    if draw is not None:
        found = stored.load(draw, ScalingResult)
    else:
        shares = [size / 100 for size in numbers("--sizes", sizes)]
        plan = Plan(tokens, integers("--train", train), test, shares, dtype, device)
        named = names(models)
        room = CHARACTERS * tokens * max(*plan.train, test)
        chosen = texts(names(kinds.removesuffix("none")), text or (), seed, room) if named else []
        others = [(path.name, stored.load(path, RatiosResult)) for path in ratios or ()]
        with working("starting") as step:
            found = run(named, chosen, work, plan, others=others, command=command_line(), step=step)
    if output is not None:
        stored.save(found, output, as_csv(found))
    if picture is not None:
        with replacing(picture, private=False) as file:
            file.write(scaling_file(found).encode())
    emit(msgspec.to_builtins(found), as_json, lambda: _show(found))


def _show(found: ScalingResult) -> None:
    from kvzip.eval.quantities import significant

    for model in found.models:
        shape = model.shape
        about = f"{shape.name}, {model.dtype}: {shape.layers} layers, (K+V) / hidden size "
        columns = ("codec", "learned from", "profile", "of the model", "regions", "bits", "ratio")
        table = Table(*columns, title=f"{about}{shape.cache_width:.0%}")
        for p in model.points:
            regions = f"{statistics.fmean(p.regions):.1f}" if p.regions else ""
            size = (
                f"{significant(p.profile_bytes / 1e6)} MB",
                f"{p.profile_bytes / shape.matrix_bytes:.2%}",
            )
            learned = (
                (f"{p.train_tokens:,} tokens", *size) if p.train_tokens else ("nothing", "", "")
            )
            table.add_row(p.codec, *learned, regions, f"{p.bits_per_value:.2f}", f"{p.ratio:.2f}")
        show_table(table)
    for gain in found.gains:
        if gain.tokens is not None:
            low, high = gain.tokens_range
            of = f"{low:,} to {high:,} tokens"
            say(f"{gain.model}, {of}: twice the tokens save {gain.tokens:.2f} bits a number")
        if gain.profile is not None:
            low, high = gain.profile_range
            of = f"{low / 1e6:.0f} to {high / 1e6:.0f} MB"
            say(f"{gain.model}, {of}: twice the profile saves {gain.profile:.2f} bits a number")
    for one in found.extrapolations[-1:]:
        _show_extrapolation(one, found.target.name)


def _show_extrapolation(one: Extrapolation, target: str) -> None:
    """What is said of a model that was not measured, with how little it is worth."""
    bits = ", ".join(f"{b:.2f}" for b in one.bits)
    say(
        f"{target} was not measured. An extrapolation from {len(one.models)} models ({bits} bits, "
        f"learned from {one.train_tokens:,} tokens): about {one.mean:.1f} bits a number. A further "
        f"model lies from {one.half[0]:.1f} to {one.half[1]:.1f} in half of all cases, and from "
        f"{one.most[0]:.1f} to {one.most[1]:.1f} in 95 of 100."
    )
    for line in one.lines:
        far = f"{line.beyond:.1f} ranges outside" if line.beyond else "within the models' range"
        say(f"by {line.axis}, {far}: {line.bits:.1f} bits")
