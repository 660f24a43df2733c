"""When does loading a KV cache beat computing it again? In dollars, and in time to first token.

These are two questions with two answers, and nothing here adds one to the other. The formulas are
pure functions of plain numbers in SI units: bytes, seconds, bits per second, FLOP, dollars; a GB
is 10^9 bytes, a Mtok 10^6 tokens. :func:`breakeven` puts them together for one captured document.

A number that cannot be (negative, not a number, a ratio of zero) raises KVZipError with its name:
nonsense never becomes a verdict. A threshold that does not exist is None, with the reason why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np

from kvzip.errors import KVZipError
from kvzip.eval.prices import PriceBase

GB = 1e9
MTOK = 1e6
HOUR = 3600.0
TERA = 1e12


def _number(name: str, value: float, *, zero: bool = True, infinite: bool = False) -> float:
    """`value`, or KVZipError that names it: below zero, not a number, or a zero or infinity that
    makes no sense there."""
    if math.isnan(value) or value < 0 or (value == 0 and not zero):
        raise KVZipError(
            f"{name} is {value}; it must be {'zero or more' if zero else 'above zero'}"
        )
    if math.isinf(value) and not infinite:
        raise KVZipError(f"{name} is infinite")
    return value


class Threshold(msgspec.Struct, frozen=True):
    """Where a verdict turns: a value, or None and the reason why it never turns."""

    value: float | None
    reason: str = ""


# --- prefill ---------------------------------------------------------------------------------


class PrefillModel(msgspec.Struct, frozen=True):
    """Seconds of a prefill of L tokens: ``a * L + b * L**2``.

    Products with the weights grow with L, attention with L^2 (economics.md, "Two questions").
    A model: it is trusted at the lengths it was fitted to and is an estimate elsewhere.
    """

    a: float
    """Seconds per token."""
    b: float
    """Seconds per token squared."""

    def seconds(self, tokens: float) -> float:
        """Prefill time of so many tokens."""
        tokens = _number("tokens", tokens, zero=False)
        return self.a * tokens + self.b * tokens * tokens


def fit_prefill(points: Iterable[Sequence[float]]) -> PrefillModel:
    """The model through measured points (tokens, seconds).

    One length gives a straight line through zero, two the exact parabola, more the least squares
    of the relative error. Neither coefficient may be below zero, or long prompts would take
    negative time: where noise asks for that, it is set to zero and the other one fitted alone.
    Raises KVZipError for no points or points that are not above zero.
    """
    pairs = [
        (_number("tokens", n, zero=False), _number("seconds", s, zero=False)) for n, s in points
    ]
    if not pairs:
        raise KVZipError("a prefill model needs at least one measured point")
    length, seconds = np.array(pairs, dtype=float).T
    # s = a L + b L^2, every row divided by its s: residuals are relative errors.
    columns = np.stack([length, length**2]) / seconds
    if len(set(length)) > 1:
        (a, b), *_ = np.linalg.lstsq(columns.T, np.ones(len(pairs)), rcond=None)
        if a >= 0 and b >= 0:
            return PrefillModel(float(a), float(b))
        alone = 0 if b < 0 else 1
    else:
        alone = 0
    only = float(columns[alone].sum() / (columns[alone] ** 2).sum())
    return PrefillModel(*((only, 0.0) if alone == 0 else (0.0, only)))


def prefill_flops(parameters: float, tokens: float, layers: int = 0, width: int = 0) -> float:
    """Operations of a prefill: ``2 * parameters * tokens + 2 * layers * width * tokens**2``.

    Two for each parameter and token; causal attention multiplies each query with half of the keys
    and values on average, `width` = query heads x head dimension (Kaplan et al. 2020, section 2.1).
    `layers` or `width` 0 leaves attention out. The input embedding is a lookup, so for a model
    with its own output matrix leave it out of `parameters`.
    """
    parameters = _number("parameters", parameters, zero=False)
    tokens = _number("tokens", tokens, zero=False)
    attention = _number("layers", layers) * _number("width", width)
    return 2 * parameters * tokens + 2 * attention * tokens * tokens


# --- dollars ---------------------------------------------------------------------------------


def token_cost(tokens: float, usd_per_mtok: float) -> float:
    """Dollars of a prefill at a provider's price: ``tokens / 10^6 * price``."""
    return _number("tokens", tokens) / MTOK * _number("price of a million tokens", usd_per_mtok)


def device_cost(seconds: float, usd_per_hour: float) -> float:
    """Dollars of a device's time: ``seconds / 3600 * rent``."""
    return _number("seconds", seconds) / HOUR * _number("price of an hour", usd_per_hour)


def load_cost(encoded_bytes: float, egress: float, decode_usd: float = 0.0) -> float:
    """Dollars of one load: ``encoded GB * egress price + the decoder's own compute``.

    `egress` is in dollars per GB. Storage and requests are not in it.
    """
    transfer = _number("encoded bytes", encoded_bytes) / GB * _number("egress price", egress)
    return transfer + _number("decode cost", decode_usd)


def break_even_egress(
    prefill_usd: float, raw_bytes: float, ratio: float, decode_usd: float = 0.0
) -> Threshold:
    """The egress price ($/GB) at which a load costs what the prefill costs:

    ``p* = (prefill - decode) * ratio / raw GB`` (economics.md, "Dollars").

    Below it loading is cheaper. None where decoding alone costs as much as the prefill.
    """
    saved = _number("prefill cost", prefill_usd) - _number("decode cost", decode_usd)
    raw_gb = _number("raw bytes", raw_bytes, zero=False) / GB
    ratio = _number("ratio", ratio, zero=False)
    if saved <= 0:
        return Threshold(None, "decoding alone costs as much as the prefill")
    return Threshold(saved * ratio / raw_gb)


def break_even_ratio(
    prefill_usd: float, raw_bytes: float, egress: float, decode_usd: float = 0.0
) -> Threshold:
    """The compression ratio at which a load costs what the prefill costs:

    ``ratio* = raw GB * egress / (prefill - decode)``.

    Above it loading is cheaper; at 1 or less it is so without a codec. None as above.
    """
    saved = _number("prefill cost", prefill_usd) - _number("decode cost", decode_usd)
    raw_gb = _number("raw bytes", raw_bytes, zero=False) / GB
    egress = _number("egress price", egress)
    if saved <= 0:
        return Threshold(None, "decoding alone costs as much as the prefill")
    return Threshold(raw_gb * egress / saved)


# --- time to first token ---------------------------------------------------------------------


def load_seconds(
    raw_bytes: float,
    ratio: float,
    bandwidth: float,
    *,
    decode_rate: float = math.inf,
    upload_rate: float = math.inf,
    latency: float = 0.0,
    fill: float = 0.0,
) -> float:
    """Time to first token by loading, with transfer, decode and upload overlapped layer by layer:

    ``latency + fill + max(raw / ratio * 8 / bandwidth, raw / decode rate, raw / upload rate)``

    (economics.md, "Time to first token"). `bandwidth` in bits per second; the rates in raw bytes
    per second, infinite where there is no such stage; `latency` in seconds, for the round trip
    and the first step; `fill` in seconds, what the overlap cannot hide: the last piece is still
    to be decoded when its last byte has come.
    """
    raw = _number("raw bytes", raw_bytes, zero=False)
    ratio = _number("ratio", ratio, zero=False)
    link = raw / ratio * 8 / _number("bandwidth", bandwidth, zero=False, infinite=True)
    return _fixed(latency, fill) + max(link, _slowest_stage(raw, decode_rate, upload_rate))


def break_even_bandwidth(
    prefill_seconds: float,
    raw_bytes: float,
    ratio: float,
    *,
    decode_rate: float = math.inf,
    upload_rate: float = math.inf,
    latency: float = 0.0,
    fill: float = 0.0,
) -> Threshold:
    """The bandwidth (bits per second) at which loading takes as long as the prefill:

    ``raw / ratio * 8 / (prefill - latency - fill)``, from :func:`load_seconds`.

    A faster link makes loading faster. None where no link does, because decoding, uploading, or
    latency and fill alone take as long as the prefill.
    """
    prefill = _number("prefill seconds", prefill_seconds, zero=False)
    raw = _number("raw bytes", raw_bytes, zero=False)
    ratio = _number("ratio", ratio, zero=False)
    left = prefill - _fixed(latency, fill)
    slowest = _slowest_stage(raw, decode_rate, upload_rate)
    if left <= 0:
        return Threshold(None, "latency and pipeline fill alone take as long as the prefill")
    if slowest >= left:
        stage = "decoding" if decode_rate <= upload_rate else "uploading"
        return Threshold(None, f"{stage} alone takes as long as the prefill")
    return Threshold(raw / ratio * 8 / left)


def _fixed(latency: float, fill: float) -> float:
    return _number("latency", latency) + _number("fill", fill)


def _slowest_stage(raw: float, decode_rate: float, upload_rate: float) -> float:
    decode = _number("decode rate", decode_rate, zero=False, infinite=True)
    upload = _number("upload rate", upload_rate, zero=False, infinite=True)
    return max(raw / decode, raw / upload)


# --- one captured document -------------------------------------------------------------------


class MeasuredCodec(msgspec.Struct, frozen=True):
    """What a run measured of one codec on one document."""

    name: str
    ratio: float
    decode_rate: float
    """Raw bytes per second."""


class Measured(msgspec.Struct, frozen=True):
    """What a run measured of one document: the input of :func:`breakeven`."""

    model: str
    device: str
    """The machine that prefilled and decoded, e.g. its CPU's or GPU's name."""
    tokens: int
    layers: int
    raw_bytes: int
    prefill_seconds: float
    codecs: tuple[MeasuredCodec, ...]
    prefill_flops: float | None = None
    """Operations of the prefill (:func:`prefill_flops`); lets a device that is not at hand be
    modelled."""
    latency: float = 0.0
    """Seconds before the first byte and for the first step on the loaded cache."""


Basis = Literal["list price", "measured", "model", "upper bound"]
Verdict = Literal["load", "prefill", "unknown"]


class Dollars(msgspec.Struct, frozen=True):
    """One load against one prefill, in dollars, at one price base."""

    prefill_usd: float
    decode_usd: float
    load_usd: float
    """Egress of the encoded bytes and the decoder's compute."""
    egress_usd_per_gb: float
    """The base's own egress price."""
    break_even_usd_per_gb: float | None
    """Egress price at which both cost the same; None where decoding alone costs as much."""
    break_even_free_decode_usd_per_gb: float
    """The same if decoding cost nothing: no codec of this ratio does better."""
    break_even_ratio: float | None
    """Ratio at which both cost the same at the base's egress price."""
    verdict: Verdict
    """"load" where it is cheaper at the base's egress price, "prefill" where it is not, "unknown"
    where the prefill's cost is an upper bound and the load is below it."""
    prefill_basis: Basis
    basis: str
    """In words: what was measured, what is a price, what is a model."""


class Time(msgspec.Struct, frozen=True):
    """One load against one prefill, in seconds to the first token, as measured on one machine."""

    prefill_seconds: float
    decode_seconds: float
    fill_seconds: float
    """The last layer's decoding, which the transfer cannot hide."""
    break_even_mbps: float | None
    """10^6 bits per second above which loading is faster; None where it never is."""
    decode_bound: bool
    """No link makes loading faster, because decoding alone takes as long as the prefill."""
    beats_raw_below_mbps: float | None
    """10^6 bits per second up to which the codec is faster than sending raw bytes: its decode
    rate. None for a codec that saves nothing."""
    verdict: str
    basis: str


class BreakEven(msgspec.Struct, frozen=True):
    """Where loading beats prefill, for one codec and one price base.

    Time needs no price: that part is the same under every base, and is repeated so that each row
    can be read alone.
    """

    base: str
    base_title: str
    codec: str
    ratio: float
    dollars: Dollars
    time: Time


def breakeven(measured: Measured, bases: Iterable[PriceBase]) -> list[BreakEven]:
    """A row for each price base and codec, in that order.

    Time is all measured here. Dollars are priced as each base says: by the token at a list price,
    or by the second on the base's device. Seconds count as measured only if they were measured on
    that device; otherwise they are modelled from `prefill_flops`, and without that the seconds of
    this machine stand as an upper bound, below which the verdict is "unknown". `basis` says which.
    Raises KVZipError for an impossible input or when there is no codec or base.
    """
    bases = tuple(bases)
    if not measured.codecs or not bases:
        raise KVZipError("break-even needs at least one codec and one price base")
    times = [_time(measured, codec) for codec in measured.codecs]
    return [
        BreakEven(
            base.name, base.title, codec.name, codec.ratio, _dollars(measured, codec, base), time
        )
        for base in bases
        for codec, time in zip(measured.codecs, times, strict=True)
    ]


def _time(measured: Measured, codec: MeasuredCodec) -> Time:
    rate = _number(f"{codec.name}: decode rate", codec.decode_rate, zero=False)
    decode = _number("raw bytes", measured.raw_bytes, zero=False) / rate
    fill = decode / _number("layers", measured.layers, zero=False)
    found = break_even_bandwidth(
        measured.prefill_seconds,
        measured.raw_bytes,
        _number(f"{codec.name}: ratio", codec.ratio, zero=False),
        decode_rate=rate,
        latency=measured.latency,
        fill=fill,
    )
    mbps = None if found.value is None else found.value / 1e6
    return Time(
        prefill_seconds=measured.prefill_seconds,
        decode_seconds=decode,
        fill_seconds=fill,
        break_even_mbps=mbps,
        decode_bound=decode + fill >= measured.prefill_seconds - measured.latency,
        beats_raw_below_mbps=rate * 8 / 1e6 if codec.ratio > 1 else None,
        verdict=(
            f"loading is faster over any link above {mbps:.3g} Mb/s"
            if mbps is not None
            else f"prefill is faster over any link: {found.reason}"
        ),
        basis=f"Prefill and decoding: measured on {measured.device}. The link: a model.",
    )


def _dollars(measured: Measured, codec: MeasuredCodec, base: PriceBase) -> Dollars:
    prefill, kind, words = _prefill_price(measured, base)
    decode = device_cost(measured.raw_bytes / codec.decode_rate, base.device.value)
    load = load_cost(measured.raw_bytes / codec.ratio, base.egress.value, decode)
    free = break_even_egress(prefill, measured.raw_bytes, codec.ratio).value
    verdict: Verdict = "load" if load < prefill else "prefill"
    return Dollars(
        prefill_usd=prefill,
        decode_usd=decode,
        load_usd=load,
        egress_usd_per_gb=base.egress.value,
        break_even_usd_per_gb=break_even_egress(
            prefill, measured.raw_bytes, codec.ratio, decode
        ).value,
        break_even_free_decode_usd_per_gb=free or 0.0,
        break_even_ratio=break_even_ratio(
            prefill, measured.raw_bytes, base.egress.value, decode
        ).value,
        verdict="unknown" if kind == "upper bound" and verdict == "load" else verdict,
        prefill_basis=kind,
        basis=f"{words} Decoding: its seconds on {measured.device}, as measured, at "
        f"${base.device.value:.2f} an hour, as if the {base.device_name} waited for it. "
        f"Egress: ${base.egress.value:g}/GB ({base.egress.source}).",
    )


def _prefill_price(measured: Measured, base: PriceBase) -> tuple[float, Basis, str]:
    """Dollars of the document's prefill at `base`, what kind of figure that is, and in words."""
    rent = base.device.value
    if base.api_input is not None:
        price = base.api_input
        return (
            token_cost(measured.tokens, price.value),
            "list price",
            f"Prefill: {measured.tokens:,} tokens at ${price.value:g} per million "
            f"({'derived from ' if price.derived else ''}{price.source}); an estimate, "
            f"since nobody sells {measured.model} at just that price.",
        )
    if base.device_name.lower() in measured.device.lower():
        return (
            device_cost(measured.prefill_seconds, rent),
            "measured",
            f"Prefill: {measured.prefill_seconds:.3g} s measured on {measured.device} at "
            f"${rent:.2f} an hour.",
        )
    if base.compute is not None and measured.prefill_flops is not None:
        speed = base.compute.value * TERA * base.compute.utilisation
        seconds = _number("prefill operations", measured.prefill_flops, zero=False) / speed
        return (
            device_cost(seconds, rent),
            "model",
            f"Prefill: a model, no {base.device_name} was measured: "
            f"{measured.prefill_flops / TERA:.3g} TFLOP at {base.compute.utilisation:.0%} of "
            f"{base.compute.value:g} TFLOP/s = {seconds * 1e3:.3g} ms at ${rent:.2f} an hour.",
        )
    return (
        device_cost(measured.prefill_seconds, rent),
        "upper bound",
        f"Prefill: an upper bound, no {base.device_name} was measured: the "
        f"{measured.prefill_seconds:.3g} s of {measured.device} at ${rent:.2f} an hour.",
    )
