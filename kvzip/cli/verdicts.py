"""kvzip advise, eval prices, families, paper: when compression pays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Table

from kvzip.cli.app import app, evaluate
from kvzip.cli.arguments import Decode, GpuFile, Json, PriceFiles
from kvzip.cli.terminal import emit, say, show_table
from kvzip.codec_spec import split_specs

Reads = Annotated[
    float, Parameter(help="How often a stored cache is read: storage is charged by the read.")
]
Hours = Annotated[float, Parameter(help="In which these reads come.")]
StoreSize = Annotated[str, Parameter(help="Size of a store whose room is asked about: 400GB, 8TB.")]
Trace = Annotated[
    Path | None,
    Parameter(help="Requests in Mooncake's format: what that store finds of their blocks."),
]


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
    decode: Decode = "host",
    gpu: GpuFile = None,
    reads: Reads = 1.0,
    hours: Hours = 0.0,
    inputs: Path | None = None,
    store: StoreSize = "1TB",
    trace: Trace = None,
    as_json: Json = False,
) -> None:
    """Prefill, load raw bytes, or load with which codec; by how much, and how sure; and how much
    more a store keeps.

    Parameters
    ----------
    tokens
        Length of the document.
    link
        10Gb/s, 400Mb/s, 7GB/s, or a link of the price book: s3-connection, nvme-gen4, ... Those
        of the book that stay inside a machine or a data centre have no egress price.
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
    inputs
        Measured inputs (kvzip eval inputs -o). Default: those that come with the library.
    """
    from kvzip.choice.auto import MEASURED
    from kvzip.eval.money import advise as advising
    from kvzip.eval.money.arguments import bandwidth, shape_of, store_size
    from kvzip.eval.money.breakeven import Use
    from kvzip.eval.money.gpu_inputs import with_gpu
    from kvzip.eval.money.prices import load_prices, pick
    from kvzip.eval.results.gpu import GpuResult
    from kvzip.eval.results.inputs import Inputs
    from kvzip.eval.results.stored import load
    from kvzip.eval.traffic.trace import read_trace

    book = load_prices(*(price_file or []))
    book = with_gpu(book, load(gpu, GpuResult)) if gpu else book
    advice = advising.advise(
        shape=shape_of(model, book),
        model=model,
        tokens=tokens,
        dtype=dtype,
        bandwidth=bandwidth(link, book),
        base=book.base(prices),
        inputs=load(inputs or MEASURED, Inputs),
        latency=latency,
        compute=None if device is None else pick("device", book.compute, device),
        codecs=None if codecs is None else split_specs(codecs),
        use=Use(reads, hours),
        threads=threads,
        store_bytes=store_size(store),
        trace=None if trace is None else read_trace(trace),
        book=book,
        on_device=decode == "device",
        inside=book.link[link].inside if link in book.link else "",
    )

    def show() -> None:
        for line in advice.lines():
            say(line)

    emit(msgspec.to_builtins(advice), as_json, show)


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
    from kvzip.eval.money.prices import load_prices, pick

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
                table.add_row(entry, value, fields.get("date", ""), source + mark)
            show_table(table)

    emit(shown, as_json, show)


@evaluate.command
def families(
    *,
    tokens: int = 32768,
    device: str = "h200",
    dtype: str = "bf16",
    inputs: Path | None = None,
    price_file: PriceFiles = None,
    as_json: Json = False,
) -> None:
    """What a model's family changes: cache a token, and how fast a prefill produces it, which is
    the break-even bandwidth of raw bytes.

    Parameters
    ----------
    tokens
        Length of the text.
    device
        What prefills, of the price book: h100, h200, a100, ... As many as a model takes.
    inputs
        Measured inputs, for the codecs' ratios. Default: those that come with the library.
    """
    from kvzip.choice.auto import MEASURED
    from kvzip.eval.money import families as comparing
    from kvzip.eval.money.prices import FAMILIES, load_prices, pick
    from kvzip.eval.money.ratios import ratio_basis
    from kvzip.eval.quantities import duration, rate, significant
    from kvzip.eval.results.inputs import Inputs
    from kvzip.eval.results.stored import load

    book = load_prices(*(price_file or []))
    pick("device", book.compute, device)
    measured = load(inputs or MEASURED, Inputs)
    found = {f.name: f for f in measured.figures(dtype, 1e9)}
    codecs = [found[name] for name in ("channel", "predictive") if name in found]
    rows = comparing.families(book, device, tokens, dtype, codecs, measured)
    says = comparing.sentence(rows, codecs[0]) if codecs else ""

    def show() -> None:
        table = Table(
            *("model", "family", "kB a token", "fixed MB", "GPUs", "prefill", "raw from"),
            *(f"{codec.name} from" for codec in codecs),
            "rate is",
            title=f"{tokens:,} tokens, {dtype}, {device}: loading beats prefill from ...",
        )
        for r in rows:
            table.add_row(
                *(r.model, r.family, significant(r.bytes_per_token / 1e3)),
                *(significant(r.fixed_bytes / 1e6), str(r.gpus), duration(r.prefill_seconds)),
                *(rate(1e9 * v) for v in (r.kv_gbps, *r.codec_gbps.values())),
                r.basis,
            )
        show_table(table)
        for name, words in FAMILIES.items():
            say(f"{name}: {words}")
        if codecs:
            say(ratio_basis(measured.model, "every other model", own=False))
        if says:
            say(says)

    emit({"rows": msgspec.to_builtins(rows), "sentence": says}, as_json, show)


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
    from kvzip.choice.auto import MEASURED
    from kvzip.eval.money.prices import load_prices
    from kvzip.eval.money.reproduction import reproduction
    from kvzip.eval.results.exactness import ExactnessResult
    from kvzip.eval.results.inputs import Inputs
    from kvzip.eval.results.stored import load

    found = reproduction(
        load(inputs or MEASURED, Inputs),
        load_prices(*(price_file or [])),
        None if exactness is None else load(exactness, ExactnessResult),
    )

    def show() -> None:
        table = Table("figure", "paper", "ours", "agrees", "formula")
        for r in found.rows:
            agrees = {True: "yes", False: "no", None: "derived"}[r.agrees]
            agrees = "by construction" if r.by_construction else agrees
            stated = "" if r.paper is None else f"{r.paper:,.{r.digits}f} {r.unit}"
            table.add_row(r.name, stated, f"{r.ours:,.{r.digits}f} {r.unit}", agrees, r.formula)
        show_table(table)
        for r in found.rows:
            if r.note:
                say(f"{r.name}: {r.note}")
        table = Table("codec", "dtype", "ratio", "pays below", "faster above", title="Its question")
        for a in found.answers:
            faster = "never" if a.bandwidth_mbps is None else f"{a.bandwidth_mbps:,.0f} Mb/s"
            pays = f"${a.egress_usd_per_gb:.3f}/GB"
            table.add_row(a.codec, a.dtype, f"{a.ratio:.2f} of {a.ratio_needed:.2f}", pays, faster)
        show_table(table)
        dtype = found.verdicts[0].dtype
        codecs = list(dict.fromkeys(v.codec for v in found.verdicts))
        table = Table("preset", *codecs, title=f"Cheaper, the paper's document, {dtype}")
        for preset in dict.fromkeys(v.preset for v in found.verdicts):
            cells = {
                v.codec: v.verdict + ("*" if v.turns_on_decoding else "")
                for v in found.verdicts
                if (v.preset, v.dtype) == (preset, dtype)
            }
            table.add_row(preset, *(cells.get(codec, "") for codec in codecs))
        show_table(table)
        if any(v.turns_on_decoding for v in found.verdicts if v.dtype == dtype):
            say("*: load, if decoding were free; it is one thread's seconds at the device's rent")
        for b in found.beside:
            say(f"{b.name}: paper {b.paper}, ours {b.ours} ({b.why})")
        say(found.basis)

    emit(msgspec.to_builtins(found), as_json, show)
