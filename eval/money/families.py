"""What a model's family changes: how much cache a text leaves, how fast a machine produces it, and
so the bandwidth from which on loading beats computing.

A machine that computes a prefill in t seconds, which leaves B bytes, produces cache at 8 B / t bits
per second. That is the break-even bandwidth of raw bytes, latency and decoding left out; a codec
divides it by its ratio (:func:`kvzip.choice.cost.break_even_bandwidth`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvzip import dtypes
from kvzip.choice.cost import (
    TERA,
    CodecFigures,
    PrefillModel,
    number,
    prefill_at_peak,
    prefill_flops,
)
from kvzip.eval.money.prices import Family, Price, PriceBook, Shape
from kvzip.eval.money.ratios import ratio_basis, same_model
from kvzip.eval.results.inputs import Inputs


def document_bytes(shape: Shape, tokens: float, itemsize: float) -> float:
    """Raw bytes that a text of so many tokens leaves, with `itemsize` bytes a number."""
    return (shape.numbers_per_token * tokens + shape.fixed_numbers) * itemsize


def utilisation(shape: Shape, peak: Price, book: PriceBook | None = None) -> tuple[float, str]:
    """The share of `peak` that a prefill reaches, and where that is from: the rate at which a
    machine was seen to produce the model's cache, the model's entry, or that of the peak.

    `book`: where the peak of that machine stands; without it a seen rate is not looked at.
    """
    if shape.kv_gbps is not None and book is not None:
        stated = book.compute[shape.kv_device]
        seconds = document_bytes(shape, shape.kv_tokens, 2) * 8 / (shape.kv_gbps * 1e9)
        flops = prefill_flops(shape.parameters, shape.kv_tokens, shape.square_layers, shape.width)
        share = flops / seconds / (stated.value * TERA * shape.kv_gpus)
        return share, f"as {shape.kv_source} has it at {shape.kv_tokens:,} tokens"
    if shape.utilisation is not None:
        return shape.utilisation, "assumed"
    return peak.utilisation, "assumed"


def prefill_of(
    shape: Shape, peak: Price, book: PriceBook | None = None
) -> tuple[PrefillModel, str]:
    """The prefill's time on as many devices of that peak as the model takes, and in words what it
    rests on."""
    share, source = utilisation(shape, peak, book)
    speed = peak.value * TERA * share * shape.gpus
    model = prefill_at_peak(shape.parameters, shape.square_layers, shape.width, speed)
    words = f"prefill a model: {share:.0%} of {peak.value:g} TFLOP/s"
    if shape.gpus > 1:
        words += f" on each of {shape.gpus}"
    return model, words if source == "assumed" else f"{words}, {source}"


def scaled(model: PrefillModel, measured: Shape, wanted: Shape) -> PrefillModel:
    """A prefill's time as measured on one model, for another: products with the weights by the
    parameters, attention by the layers that have it and their width. A model."""
    return PrefillModel(
        model.a * wanted.parameters / measured.parameters,
        model.b * wanted.square_layers * wanted.width / (measured.square_layers * measured.width),
    )


class FamilyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the price book at one length, on one kind of device."""

    model: str
    family: Family
    bytes_per_token: float
    fixed_bytes: float
    tokens: int
    raw_bytes: float
    gpus: int
    prefill_seconds: float
    kv_gbps: float
    """Gb/s of cache that the prefill produces: the break-even bandwidth of raw bytes."""
    basis: str
    """"stated" at the length and on the device of the source, else "modelled"."""
    codec_gbps: dict[str, float]
    """Break-even bandwidth with each codec, decoding left out: `kv_gbps` / ratio."""
    ratio_basis: str
    """Which model the codecs' ratios were measured on, and whether it is this one; "" where that
    was not given."""


def families(
    book: PriceBook,
    device: str,
    tokens: int,
    dtype: str,
    codecs: Sequence[CodecFigures] = (),
    inputs: Inputs | None = None,
) -> list[FamilyRow]:
    """Every model of the price book, the one whose cache comes fastest first.

    `device`: an entry of `compute`. Ratios are taken to hold for all models; `inputs`: the ones
    that `codecs` are of. Raises KVZipError for figures that cannot be.
    """
    number("tokens", tokens, zero=False)
    size, peak = dtypes.get(dtype).itemsize, book.compute[device]
    rows = []
    for name, shape in book.model.items():
        seconds = prefill_of(shape, peak, book)[0].seconds(tokens)
        raw = document_bytes(shape, tokens, size)
        gbps = raw * 8 / seconds / 1e9
        seen = (shape.kv_device, shape.kv_tokens, 2) == (device, tokens, size)
        rows.append(
            FamilyRow(
                model=name,
                family=shape.family,
                bytes_per_token=shape.numbers_per_token * size,
                fixed_bytes=shape.fixed_numbers * size,
                tokens=tokens,
                raw_bytes=raw,
                gpus=shape.gpus,
                prefill_seconds=seconds,
                kv_gbps=gbps,
                basis="stated" if seen and shape.kv_gbps is not None else "modelled",
                codec_gbps={c.name: gbps / c.ratio for c in codecs},
                ratio_basis=ratio_basis(inputs.model, name, same_model(shape, inputs))
                if inputs is not None and codecs
                else "",
            )
        )
    return sorted(rows, key=lambda row: -row.kv_gbps)


def sentence(rows: Sequence[FamilyRow], codec: CodecFigures) -> str:
    """What a family changes, beside what a codec does, by the rates that are stated."""
    stated = [row for row in rows if row.basis == "stated"]
    dense = [row for row in stated if row.family == "gqa"]
    hybrids = [row for row in stated if row.family == "hybrid"]
    if not dense or not hybrids:
        return ""
    times = sorted(d.kv_gbps / h.kv_gbps for d in dense for h in hybrids)
    return (
        f"A hybrid divides the break-even bandwidth by {times[0]:.1f} to {times[-1]:.1f} "
        f"({' and '.join(row.model for row in hybrids)} against "
        f"{' and '.join(row.model for row in dense)}, as stated), "
        f"{codec.name} by {codec.ratio:.2f}."
    )
