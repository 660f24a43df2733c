"""kvzip eval frontier: bits per number against the multiplications that predict them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Column, Table
from rich.text import Text

from kvzip import dtypes
from kvzip.cli.app import evaluate
from kvzip.cli.arguments import (
    Json,
    NativeBf16,
    OutFolder,
    choose_products,
    command_line,
    integers,
    names,
)
from kvzip.cli.terminal import emit, say, show_table, shown, steps
from kvzip.errors import UsageError
from kvzip.files import replacing

if TYPE_CHECKING:
    from kvzip.eval.results.frontier import Frontier
    from kvzip.eval.results.whole_frontier import WholeFrontier

Snapshots = Annotated[list[Path] | None, Parameter(consume_multiple=True)]


@evaluate.command
def frontier(
    *,
    test: Snapshots = None,
    train: Snapshots = None,
    calibrate: Snapshots = None,
    model: str | None = None,
    layers: str | None = None,
    cast: str | None = None,
    copies: str | None = None,
    out: OutFolder = Path("frontier"),
    draw: Path | None = None,
    whole: Snapshots = None,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """Bits per number against the multiplications that a predictor takes, from none to a whole
    second prefill; or draw such a result.

    What is found is kept in the folder: an interrupted run goes on where it stopped. Figures are
    ideal code lengths in floating point.

    Parameters
    ----------
    test
        Snapshots to measure; there is a run for each dtype that they have.
    train
        Snapshots of other documents, for the regressions.
    calibrate
        And of others again, for covariances and densities, in the dtypes of those to measure.
    model
        The model that made them, as for `kvzip capture`: copies of it with rounded weights predict.
    layers
        Which layers, with commas between. Default: six over the model.
    cast
        Dtypes that the first dtype's snapshots are cast to, with commas between, a run for each.
    copies
        Which copies, of int4,fp8,int8,fp32,pieces,stream; "none" for none. Default: all.
    out
        Folder for frontier.json, frontier.svg and what is kept.
    draw
        A stored result: frontier.svg is drawn into --out, and nothing is run.
    whole
        Stored results of `kvzip eval scaling`: the frontier of their models' whole files, all
        layers, goes to whole.json and whole.svg in --out, and nothing is run. With --draw, what
        predictors of single layers took 20 to 50 % of a prefill stands beside it.
    """
    if whole is not None:
        _whole(whole, draw, out, as_json)
        return
    choose_products(native_bf16)
    from kvzip.eval.frontier.copies import COPIES
    from kvzip.eval.frontier.run import run
    from kvzip.eval.report import pictures
    from kvzip.eval.results import stored
    from kvzip.eval.results.frontier import Frontier

    if draw is not None:
        found = stored.load(draw, Frontier)
    elif not (test and train and calibrate and model):
        raise UsageError("name --test, --train, --calibrate and --model, or a result with --draw")
    else:
        with steps() as tell:
            found = run(
                train,
                calibrate,
                test,
                model=model,
                out=out,
                layers=None if layers is None else integers("--layers", layers, 0),
                casts=[dtypes.get(name).name for name in names(cast or "")],
                kinds=tuple(COPIES) if copies is None else names(copies.removesuffix("none")),
                command=command_line(),
                progress=tell,
            )
        stored.save(found, out / "frontier.json")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "frontier.svg", private=False) as file:
        file.write(pictures.frontier_file(found).encode())
    emit(msgspec.to_builtins(found), as_json, lambda: _show(found))


def _whole(scaling: Sequence[Path], predictors: Path | None, out: Path, as_json: bool) -> None:
    """The frontier of whole files, from stored results."""
    from kvzip.eval.frontier.whole import whole
    from kvzip.eval.report import pictures
    from kvzip.eval.results import stored
    from kvzip.eval.results.frontier import Frontier
    from kvzip.eval.results.scaling import ScalingResult

    tried = [] if predictors is None else [(predictors.name, stored.load(predictors, Frontier))]
    files = [(path.name, stored.load(path, ScalingResult)) for path in scaling]
    found = whole(files, tried, command_line())
    out.mkdir(parents=True, exist_ok=True)
    stored.save(found, out / "whole.json")
    with replacing(out / "whole.svg", private=False) as file:
        file.write(pictures.whole_file(found).encode())
    emit(msgspec.to_builtins(found), as_json, lambda: _show_whole(found))


def _show_whole(found: WholeFrontier) -> None:
    for run in found.runs:
        title = f"{run.shape.name}, {run.dtype}: all layers"
        columns = ("bits", "share of prefill", "MB to know", "is")
        table = Table(Column("way", no_wrap=True), *columns, title=title)
        for p in sorted(run.points, key=lambda p: (p.share, -p.bits)):
            name = Text(shown(p.title), "bold" if p.key in run.hull else "")
            size = f"{p.profile_bytes / 1e6:.1f}"
            table.add_row(name, f"{p.bits:.2f}", f"{100 * p.share:.1f} %", size, p.basis)
        show_table(table)


def _show(found: Frontier) -> None:
    from kvzip.eval.frontier.hull import hull

    for run in found.runs:
        title = f"{found.model}, {run.dtype}: layers {', '.join(map(str, found.layers))}"
        columns = ("bits", "share of prefill", "products a token", "MB to know")
        table = Table(Column("predictor", no_wrap=True), *columns, title=title)
        best = {p.key for p in hull(run.points, found.prefill_products)}
        for p in run.points:
            name = Text(shown(p.title), "bold" if p.key in best else "")
            share = f"{100 * p.share:.2f} %"
            size = f"{p.profile_bytes / 1e6:.1f}"
            table.add_row(name, f"{p.bits:.3f}", share, f"{p.products / 1e6:.2f} M", size)
        show_table(table)
        for s in run.steps:
            if s.worth_below_mbps is not None:
                line = f"from {s.cheaper} to {s.dearer}: {s.bits_saved:.2f} bits, worth it "
                say(line + f"below {s.worth_below_mbps:,.1f} Mb/s")
