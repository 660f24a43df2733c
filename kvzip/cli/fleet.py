"""kvzip eval fleet: what many readers, or a trace's requests, cost with and without a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from rich.table import Column, Table

from kvzip.cli.app import evaluate
from kvzip.cli.arguments import (
    Decode,
    GpuFile,
    Json,
    PriceFiles,
    ResultFile,
    command_line,
    names,
    numbers,
)
from kvzip.cli.terminal import counted, emit, say, show_table, steps
from kvzip.codec_spec import split_specs
from kvzip.errors import UsageError

if TYPE_CHECKING:
    from kvzip.eval.money.fleet import Fleet
    from kvzip.eval.results.traffic import TrafficResult


def _says(words: str) -> Parameter:
    return Parameter(help=words)


Preset = Annotated[str, _says("paper-80m, one-reader, team, company or world.")]
Config = Annotated[
    Path | None, _says("TOML with fields that differ from the preset: readers = 1e6, zipf = 0.8.")
]
Capacities = Annotated[
    str, _says("Of an LRU store, in blocks of 512 tokens of raw size, with commas between.")
]
Ratios = Annotated[
    str | None,
    _says(
        "How many times as small codecs make a block, commas between. Default: 1, and as channel "
        "and predictive were measured."
    ),
]
Model = Annotated[str, _says("One of the price book (kvzip eval families), a hub id, or a folder.")]
Prices = Annotated[str, _says("A preset of the price book, for the GPU's rent and its prefill.")]
Tiers = Annotated[
    str, _says("gpu, host, nvme, object, each with a size after a colon if wanted: host:400GB.")
]
Gpus = Annotated[int | None, _says("Default: the fewest that are 75 % busy without a store.")]
Cores = Annotated[int, _says("Cores of the host for each GPU; they decode and encode.")]
Eviction = Annotated[
    Literal["lru", "s3-fifo"],
    _says("What a full tier drops: what was used longest ago, or as S3-FIFO says."),
]


@evaluate.command
def fleet(
    *,
    preset: Preset = "paper-80m",
    config: Config = None,
    trace: Path | None = None,
    codecs: str | None = None,
    dtype: str = "bf16",
    inputs: Path | None = None,
    price_file: PriceFiles = None,
    capacity_blocks: Capacities = "1000,2000,5000,10000,20000,50000",
    ratios: Ratios = None,
    model: Model = "qwen3-4b",
    prices: Prices = "h100-rented",
    tiers: Tiers = "gpu,host",
    gpus: Gpus = None,
    threads: Cores = 16,
    policy: Eviction = "lru",
    strategies: str = "recompute,gpu,load,choose,overlap",
    decode: Decode = "host",
    gpu: GpuFile = None,
    spread: bool = False,
    output: ResultFile = None,
    as_json: Json = False,
) -> None:
    """Dollars, bytes and seconds of a fleet of readers, in every way of having the caches; or,
    with --trace, of real traffic, with every codec and strategy.

    Parameters
    ----------
    trace
        Requests in Mooncake's format, plain, gzip or Zstandard, which are replayed on GPUs with a
        store between (docs/fleet.md).
    codecs
        Measured codecs, with commas between. Default: raw,channel; of a trace all that were
        measured; none, to see capacities only.
    inputs
        Measured inputs (kvzip eval inputs -o). Default: those that come with the library.
    strategies
        Names with commas between: recompute, gpu, load, choose, overlap.
    spread
        Place requests of one time evenly until the next time.
    output
        File for the result as JSON, of a trace; `kvzip report` takes it.
    """
    if trace is None:
        if output is not None:
            raise UsageError("only what a trace gives is stored: name one with --trace")
        _presets(preset, config, codecs or "raw,channel", dtype, inputs, price_file, as_json)
        return
    found = _replay(
        trace,
        spread=spread,
        model=model,
        dtype=dtype,
        prices=prices,
        price_file=price_file,
        gpu=gpu,
        inputs=inputs,
        codecs=codecs,
        strategies=names(strategies),
        sizes=numbers("--capacity-blocks", capacity_blocks),
        ratios=None if ratios is None else numbers("--ratios", ratios),
        options={"tiers_text": tiers, "gpus": gpus, "cores": threads, "policy": policy}
        | {"decode": decode},
    )
    if output is not None:
        from kvzip.eval.results import stored

        stored.save(found, output)
    emit(msgspec.to_builtins(found), as_json, lambda: _show_traffic(found))


def _replay(
    path: Path,
    *,
    spread: bool,
    model: str,
    dtype: str,
    prices: str,
    price_file: list[Path] | None,
    gpu: Path | None,
    inputs: Path | None,
    codecs: str | None,
    strategies: tuple[str, ...],
    sizes: list[float],
    ratios: list[float] | None,
    options: dict[str, Any],
) -> TrafficResult:
    """`kvzip eval fleet --trace`."""
    from kvzip.choice.auto import MEASURED
    from kvzip.eval.money.arguments import shape_of
    from kvzip.eval.money.gpu_inputs import with_gpu
    from kvzip.eval.money.prices import load_prices, pick
    from kvzip.eval.results.gpu import GpuResult
    from kvzip.eval.results.inputs import Inputs
    from kvzip.eval.results.stored import load
    from kvzip.eval.traffic.fleet import STRATEGIES
    from kvzip.eval.traffic.replay import replay
    from kvzip.eval.traffic.setting import measured_ratios, setting
    from kvzip.eval.traffic.trace import read_trace
    from kvzip.eval.traffic.trace import spread as evenly

    for name in strategies:
        pick("strategy", STRATEGIES, name)
    trace = read_trace(path)
    trace = evenly(trace) if spread else trace
    book = load_prices(*(price_file or []))
    book = with_gpu(book, load(gpu, GpuResult)) if gpu else book
    known = load(inputs or MEASURED, Inputs)
    made = setting(
        trace=trace,
        model=model,
        shape=shape_of(model, book),
        dtype=dtype,
        base=book.base(prices),
        book=book,
        inputs=known,
        codecs=None if codecs in (None, "none") else split_specs(codecs or ""),
        **options,
    )
    with steps() as tell:
        return replay(
            trace,
            made.fleet,
            made.codecs,
            () if codecs == "none" else strategies,  # type: ignore[arg-type]
            blocks=sizes,
            ratios=measured_ratios(known, dtype) if ratios is None else ratios,
            dtype=dtype,
            inputs=made.inputs,
            command=command_line(),
            progress=tell,
        )


def _show_traffic(found: TrafficResult) -> None:
    from kvzip.eval.money.ratios import ratio_basis_of_replay
    from kvzip.eval.quantities import dollars, duration, significant
    from kvzip.eval.report.traffic import (
        DIFFERENT_STORES,
        WEIGHTS_NOT_READ,
        core_seconds,
        decoder_in_words,
        tiers_in_words,
        too_few_cores,
    )
    from kvzip.eval.traffic.fleet import STRATEGIES

    say(
        f"{found.trace}: {counted(found.requests, 'request')} in {duration(found.seconds)}, "
        f"{found.accesses:,} blocks of {found.block_tokens} tokens, {found.distinct:,} "
        f"different ones; with room for all, {found.most:.1%} need not be computed"
    )
    ratios = list(dict.fromkeys(c.ratio for c in found.capacity))
    table = Table(
        "raw blocks",
        f"raw GB, {found.model}",
        *(f"at {significant(ratio)}x" for ratio in ratios),
        title="Blocks found by one LRU store of each size (--capacity-blocks, --ratios; counted)",
    )
    for at in range(0, len(found.capacity), len(ratios)):
        row = found.capacity[at : at + len(ratios)]
        size = f"{row[0].blocks * found.block_bytes / 1e9:,.0f}"
        table.add_row(f"{row[0].blocks:,.0f}", size, *(f"{c.hit_rate:.1%}" for c in row))
    show_table(table)
    if not found.rows:
        return
    columns = ("found", "loaded", "mean", "median", "99 %", "GPU s", "GPU $", "store $", "core s")
    table = Table(
        Column("strategy", no_wrap=True),
        Column("codec", no_wrap=True),
        *columns,
        title=f"On {counted(found.gpus, 'GPU')}, {found.model}, {found.dtype}, {found.policy}; "
        f"the store of --tiers: {tiers_in_words(found)}",
    )
    for r in found.rows:
        codec = f"{r.codec} {r.ratio:.2f}x{decoder_in_words(found, r)}"
        table.add_row(
            *(r.strategy, codec if r.codec else ""),
            *(f"{r.hit_rate:.1%}", f"{r.loaded_share:.1%}"),
            *(duration(s) for s in (r.ttft_mean, r.ttft_p50, r.ttft_p99)),
            *(f"{r.gpu_seconds:,.0f}", dollars(r.gpu_usd), dollars(r.store_usd)),
            core_seconds(found, r),
        )
    show_table(table)
    say(DIFFERENT_STORES)
    say(
        f"found: counted; {ratio_basis_of_replay(found.inputs, found.model)}; seconds to the first "
        "token, of GPUs and of cores: modelled; dollars: modelled, at list prices. "
        f"{WEIGHTS_NOT_READ}"
    )
    if short := too_few_cores(found, found.rows):
        say(short)
    for name, words in STRATEGIES.items():
        if any(r.strategy == name for r in found.rows):
            say(f"{name}: {words}")
    say("What went in, with where it comes from: --json, inputs. The model: docs/fleet.md.")


def _presets(
    preset: str,
    config: Path | None,
    codecs: str,
    dtype: str,
    inputs: Path | None,
    price_file: list[Path] | None,
    as_json: bool,
) -> None:
    """`kvzip eval fleet --preset`."""
    from kvzip import dtypes
    from kvzip.choice.auto import MEASURED
    from kvzip.eval.money import fleet as fleets
    from kvzip.eval.money.fleet_presets import MODEL, presets
    from kvzip.eval.money.prices import load_prices, pick
    from kvzip.eval.money.profiles import figures_of
    from kvzip.eval.money.ratios import ratio_basis, same_model
    from kvzip.eval.results.inputs import Inputs
    from kvzip.eval.results.stored import load

    book = load_prices(*(price_file or []))
    chosen = pick("fleet", presets(book, dtypes.get(dtype).itemsize), preset)
    if config is not None:
        chosen = fleets.changed(chosen, config)
    measured = load(inputs or MEASURED, Inputs)
    known = {f.name: f for f in figures_of(book.model[MODEL], measured, dtype, 1e9)}
    found = fleets.bills(
        chosen, [pick("measured codec", known, name) for name in split_specs(codecs)]
    )
    rows = [{"counts": msgspec.to_builtins(c), "bill": msgspec.to_builtins(b)} for c, b in found]
    basis = ratio_basis(measured.model, MODEL, same_model(book.model[MODEL], measured))

    def show() -> None:
        _show_bills(preset, chosen, found)
        say(f"Caches of {dtype}; a node keeps what was read last.")
        say(f"All of it is a model; {basis}.")

    emit({"fleet": chosen, "rows": rows, "ratio_basis": basis}, as_json, show)


def _show_bills(preset: str, chosen: Fleet, found: list[Any]) -> None:
    from kvzip.eval.money.fleet import WAYS
    from kvzip.eval.quantities import dollars, significant

    counts = found[0][0]
    say(
        f"{preset}: {counts.reads:,.0f} reads, {counts.writes:,.0f} writes in "
        f"{chosen.hours:g} h, {counts.method}",
    )
    table = Table(
        Column("way", no_wrap=True),
        Column("codec", no_wrap=True),
        *("dollars", "network", "hits", "GB from store", "device h"),
    )
    for c, b in found:
        seconds = b.device_seconds + b.decode_seconds + b.encode_seconds
        table.add_row(
            *(b.way, b.codec, dollars(b.dollars), dollars(b.network_usd)),
            *(f"{c.hit_rate:.1%}" if b.codec else "", significant(b.store_bytes / 1e9)),
            significant(seconds / 3600),
        )
    show_table(table)
    late = [b.codec for c, b in found if b.way == "provider" and c.link_use >= 1]
    if late:
        say(f"The nodes' links cannot keep up: {', '.join(late)} would need more of them.")
    for way, words in WAYS.items():
        say(f"{way}: {words}")
