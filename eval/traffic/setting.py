"""A fleet, its codecs, and where each of their numbers comes from: put together from the price book
and measured inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from kvzip import dtypes
from kvzip.choice.cost import number
from kvzip.errors import UsageError
from kvzip.eval.money.advise import prefill_model
from kvzip.eval.money.prices import PriceBase, PriceBook, Shape, pick
from kvzip.eval.money.profiles import profile_bytes
from kvzip.eval.money.ratios import OTHER, same_model, slowdown_of
from kvzip.eval.quantities import speed
from kvzip.eval.results.inputs import CodecRow, Inputs
from kvzip.eval.results.traffic import Basis, Input
from kvzip.eval.traffic.eviction import PolicyName
from kvzip.eval.traffic.fleet import CodecUse, Fleet, gpus_needed, tier_inputs, tiers
from kvzip.eval.traffic.trace import Trace

ROOM_CODECS = ("channel", "predictive")
"""Codecs for whose ratios it is counted what a store finds, where none are given."""
CORES = 16
"""Of a host, for each GPU, where none are given."""


class Setting(msgspec.Struct, frozen=True):
    """What a trace is replayed with."""

    fleet: Fleet
    codecs: list[CodecUse]
    inputs: list[Input]


def setting(
    *,
    trace: Trace,
    model: str,
    shape: Shape,
    dtype: str,
    base: PriceBase,
    book: PriceBook,
    inputs: Inputs,
    codecs: Sequence[str] | None = None,
    decode: Literal["host", "device"] = "host",
    gpus: int | None = None,
    tiers_text: str = "gpu,host",
    policy: PolicyName = "lru",
    cores: int = CORES,
) -> Setting:
    """The fleet that these words and figures name.

    The prefill is modelled on the device of the price base, whose rent it is. `codecs`: those to
    look at, all of `inputs` by default. `gpus`: as many as the trace needs without a store, by
    default. Raises KVZipError for what cannot be.
    """
    prefill, how, _ = prefill_model(shape, None, None, base, book=book)
    each = shape.gpus
    places = gpus_needed(trace, prefill) if gpus is None else gpus / each
    number("gpus", places, zero=False)
    if places != int(places):
        raise UsageError(f"gpus is {gpus}; {model} takes {each} for each copy of it")
    count = int(places) * each
    pcie = book.link["host-to-h100"]
    fleet = Fleet(
        model=model,
        layers=shape.layers,
        bytes_per_token=float(shape.numbers_per_token * dtypes.get(dtype).itemsize),
        prefill=prefill,
        gpus=int(places),
        gpus_each=each,
        gpu_usd_per_hour=base.device.value,
        pcie=pcie.value * 1e9 * each,
        cores=cores * each,
        tiers=tiers(tiers_text, count, book),
        policy=policy,
    )
    rows = _measured(inputs, dtype, codecs)
    found = [
        Input("prefill, a", prefill.a, "s/token", "modelled", how),
        Input("prefill, b", prefill.b, "s/token^2", "modelled", how),
        *_machine_inputs(fleet, shape, dtype, base, book, "given" if gpus else "assumed"),
    ]
    uses = [_use(row, shape, inputs, decode, book) for row in rows]
    for use, row in zip(uses, rows, strict=True):
        found += _codec_inputs(use, row, inputs, same_model(shape, inputs), book)
    return Setting(fleet.check(), [use.check() for use in uses], found)


def _machine_inputs(
    fleet: Fleet, shape: Shape, dtype: str, base: PriceBase, book: PriceBook, count: Basis
) -> list[Input]:
    """The numbers of a fleet's machines and of the model's cache."""
    pcie, each = book.link["host-to-h100"], fleet.gpus_each
    found = [
        Input("cache", fleet.bytes_per_token, "bytes/token", "stated", shape.source),
        Input("GPUs", fleet.gpus * each, "", count, "--gpus"),
        Input("GPU, rent", base.device.value, base.device.unit, "price", base.device.source),
        Input(
            "cores of a GPU's host", fleet.cores / each, "", "given", "--threads, or its default"
        ),
        Input("PCIe", pcie.value, pcie.unit, "stated", pcie.source),
        *tier_inputs(fleet.tiers, book),
    ]
    if shape.fixed_numbers:
        size = shape.fixed_numbers * dtypes.get(dtype).itemsize
        words = "left out of blocks, as if it could be had again: hits are an upper bound"
        found.append(Input("states and windows", size, "bytes", "assumed", words))
    return found


def _measured(inputs: Inputs, dtype: str, codecs: Sequence[str] | None) -> list[CodecRow]:
    """The rows of these codecs at the greatest length measured of that dtype."""
    able = [row for row in inputs.rows if row.dtype == dtype]
    if not able:
        inputs.figures(dtype, math.inf)  # raises with the dtypes there are
    most = max(row.tokens for row in able)
    known = {row.codec: row for row in able if row.tokens == most}
    return [pick("measured codec", known, name) for name in codecs or known]


def measured_ratios(inputs: Inputs, dtype: str) -> list[float]:
    """1, and the ratios of those codecs for which a store's room is asked, to two digits."""
    rows = {row.codec: row for row in _measured(inputs, dtype, None)}
    return [1.0, *(round(rows[name].ratio, 2) for name in ROOM_CODECS if name in rows)]


def _use(row: CodecRow, shape: Shape, inputs: Inputs, decode: str, book: PriceBook) -> CodecUse:
    on_device = decode == "device" and row.codec in book.decoder
    slow = slowdown_of(row.codec, shape, inputs)
    rate = book.decoder[row.codec].value if on_device else row.decode_gbps / slow
    if decode not in ("host", "device"):
        raise UsageError(f"decode {decode!r}: write host or device")
    return CodecUse(
        name=row.codec,
        ratio=row.ratio,
        decoder="device" if on_device else "host",
        decode_rate=1e9 * rate * (shape.gpus if on_device else 1),
        encode_rate=1e9 * row.encode_gbps / slow,
        profile_bytes=profile_bytes(row.codec, shape, inputs),
    )


def _speed(name: str, rate: float, measured_gbps: float, where: str) -> Input:
    """A speed as it was measured, or as it is taken to be for a model as wide."""
    if math.isclose(rate, 1e9 * measured_gbps):
        return Input(name, measured_gbps, "GB/s", "measured", where)
    words = f"{where}: {speed(measured_gbps)}, slower for a model as wide"
    return Input(name, rate / 1e9, "GB/s", "modelled", words)


def _codec_inputs(
    use: CodecUse, row: CodecRow, inputs: Inputs, own: bool, book: PriceBook
) -> list[Input]:
    where = f"{inputs.model}, {row.dtype}, {row.tokens:,} tokens, {inputs.machine.cpu}"
    threads = f"{where}, {inputs.threads} thread{'s' if inputs.threads > 1 else ''}"
    found = [
        Input(
            f"{use.name}, ratio",
            use.ratio,
            "x",
            "measured",
            where if own else f"{where}: {OTHER}",
        )
    ]
    if use.decoder == "device":
        decoder = book.decoder[use.name]
        basis: Basis = "target" if decoder.basis == "target" else "measured"
        found.append(Input(f"{use.name}, decode", decoder.value, "GB/s", basis, decoder.source))
    else:
        found.append(_speed(f"{use.name}, decode", use.decode_rate, row.decode_gbps, threads))
    found.append(_speed(f"{use.name}, encode", use.encode_rate, row.encode_gbps, threads))
    if use.profile_bytes:
        found.append(
            Input(
                f"{use.name}, profile",
                use.profile_bytes,
                "bytes",
                "modelled",
                "layers * 4 * (numbers a layer and token)^2, codecs/predictive/spec.md"
                + (", as many times as it was measured with" if row.profile_bytes else ""),
            )
        )
    return found
