"""When does loading a captured document's KV cache beat computing it again? :func:`breakeven` puts
what a run measured and what the price book says into the formulas of :mod:`kvzip.choice.cost`.

Dollars and time to first token are two questions with two answers; each verdict in dollars names
its price base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import msgspec

from kvzip.choice.cost import (
    TERA,
    CodecFigures,
    beats_raw_bandwidth,
    break_even_bandwidth,
    break_even_egress,
    break_even_ratio,
    break_even_reads,
    device_cost,
    load_cost,
    number,
    pipeline_fill,
    storage_share,
    token_cost,
)
from kvzip.errors import KVZipError
from kvzip.eval.money.prices import PriceBase
from kvzip.eval.quantities import duration, significant
from kvzip.eval.quantities import rate as in_words


class Measured(msgspec.Struct, frozen=True):
    """What a run measured of one document: the input of :func:`breakeven`."""

    model: str
    device: str
    """The machine that prefilled and decoded, e.g. its CPU's or GPU's name."""
    tokens: int
    layers: int
    raw_bytes: int
    prefill_seconds: float
    codecs: tuple[CodecFigures, ...]
    prefill_flops: float | None = None
    """Operations of the prefill (:func:`kvzip.choice.cost.prefill_flops`); lets a device that is
    not at hand be modelled."""
    latency: float = 0.0
    """Seconds before the first byte and for the first step on the loaded cache."""
    decoder: str = ""
    """The machine that decoded, and what it decoded, where that is not `device` and this
    document."""


Basis = Literal["list price", "measured", "model", "upper bound"]
Verdict = Literal["load", "prefill", "unknown"]


class Use(msgspec.Struct, frozen=True):
    """How a stored cache is used; without storage and its price, loads only."""

    reads: float = 1.0
    """Loads of one stored cache in the time it is kept."""
    hours: float = 0.0
    """How long it is kept. 0: storage is left out."""


class Dollars(msgspec.Struct, frozen=True):
    """One load against one prefill, in dollars, at one price base."""

    prefill_usd: float
    decode_usd: float
    storage_usd: float
    """Storage that one read bears."""
    load_usd: float
    """Egress of the encoded bytes, the storage that a read bears, and the decoder's compute."""
    egress_usd_per_gb: float
    """The base's own egress price."""
    break_even_usd_per_gb: float | None
    """Egress price at which both cost the same; None where decoding and storage alone cost as
    much."""
    break_even_free_decode_usd_per_gb: float | None
    """The same if decoding cost nothing: no codec of this ratio does better. None where storage
    alone costs as much as the prefill."""
    break_even_ratio: float | None
    """Ratio at which both cost the same at the base's egress price."""
    break_even_reads: float | None
    """Reads that pay back the first prefill, encoding it, and all storage; None where a load saves
    nothing."""
    verdict: Verdict
    """"load" where it is cheaper at the base's egress price, "prefill" where it is not, "unknown"
    where the prefill's cost is an upper bound and the load is below it."""
    prefill_basis: Basis
    basis: str
    """In words: what was measured, what is a price, what is a model."""

    @property
    def turns_on_decoding(self) -> bool:
        """Whether only the decoder's seconds, charged as the device's, make the prefill cheaper."""
        free = self.load_usd - self.decode_usd
        return self.verdict == "prefill" and free < self.prefill_usd


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
    """10^6 bits per second up to which the codec is faster than sending raw bytes that need no
    decoding. None for a codec that saves nothing."""
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


def breakeven(
    measured: Measured, bases: Iterable[PriceBase], use: Use | None = None
) -> list[BreakEven]:
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
            base.name,
            base.title,
            codec.name,
            codec.ratio,
            _dollars(measured, codec, base, use or Use()),
            time,
        )
        for base in bases
        for codec, time in zip(measured.codecs, times, strict=True)
    ]


def _time(measured: Measured, codec: CodecFigures) -> Time:
    """One load with the codec against one prefill, in seconds: the same at every price base."""
    rate = number(f"{codec.name}: decode rate", codec.decode_rate, zero=False)
    decode = number("raw bytes", measured.raw_bytes, zero=False) / rate
    fill = pipeline_fill(measured.raw_bytes, measured.layers, rate)
    found = break_even_bandwidth(
        measured.prefill_seconds,
        measured.raw_bytes,
        number(f"{codec.name}: ratio", codec.ratio, zero=False),
        decode_rate=rate,
        latency=measured.latency,
        fill=fill,
    )
    mbps = None if found.value is None else found.value / 1e6
    beats_raw = beats_raw_bandwidth(measured.raw_bytes, codec.ratio, rate, fill)
    return Time(
        prefill_seconds=measured.prefill_seconds,
        decode_seconds=decode,
        fill_seconds=fill,
        break_even_mbps=mbps,
        decode_bound=decode + fill >= measured.prefill_seconds - measured.latency,
        beats_raw_below_mbps=None if beats_raw is None else beats_raw / 1e6,
        verdict=(
            f"loading is faster over any link above {in_words(found.value)}"
            if found.value is not None
            else f"prefill is faster over any link: {found.reason}"
        ),
        basis=(
            f"Prefill and decoding: measured on {measured.device}. The link: a model."
            if not measured.decoder
            else f"Prefill: measured on {measured.device}. Decoding: on {measured.decoder}. The "
            "link: a model."
        ),
    )


def _dollars(measured: Measured, codec: CodecFigures, base: PriceBase, use: Use) -> Dollars:
    """One load with the codec against one prefill, in dollars at the price base. Raises KVZipError
    when the cache is kept and the base names no storage price."""
    prefill, kind, words = prefill_price(measured, base)
    raw, egress = measured.raw_bytes, base.egress.value
    decode = device_cost(raw / codec.decode_rate, base.device.value)
    encoder = number(f"{codec.name}: encode rate", codec.encode_rate, zero=False, infinite=True)
    encode = device_cost(raw / encoder, base.device.value)
    storage = storage_of(base, use)
    if use.hours > 0 and base.storage is not None:
        words += f" Storage: ${base.storage.value:g}/GB-month ({base.storage.source})."
    load = load_cost(raw / codec.ratio, egress, decode, storage)
    unstored = load_cost(raw / codec.ratio, egress, decode)
    kept = (load - unstored) * use.reads
    free = break_even_egress(prefill, raw, codec.ratio, storage=storage).value
    verdict: Verdict = "load" if load < prefill else "prefill"
    return Dollars(
        prefill_usd=prefill,
        decode_usd=decode,
        storage_usd=load - unstored,
        load_usd=load,
        egress_usd_per_gb=egress,
        break_even_usd_per_gb=break_even_egress(prefill, raw, codec.ratio, decode, storage).value,
        break_even_free_decode_usd_per_gb=free,
        break_even_ratio=break_even_ratio(prefill, raw, egress, decode, storage).value,
        break_even_reads=break_even_reads(prefill, unstored, prefill + encode + kept).value,
        verdict="unknown" if kind == "upper bound" and verdict == "load" else verdict,
        prefill_basis=kind,
        basis=f"{words} Decoding: its seconds on {measured.decoder or measured.device}, as "
        f"measured, at ${base.device.value:.2f} an hour, as if the {base.device_name} waited for "
        f"it. "
        f"Egress: ${egress:g}/GB ({base.egress.source}).",
    )


def storage_of(base: PriceBase, use: Use) -> float:
    """Dollars per GB that one read bears of storing a cache at `base`. Raises KVZipError when the
    cache is kept and the base names no storage price: it is not free."""
    if number("hours kept", use.hours) > 0 and base.storage is None:
        raise KVZipError(f"preset.{base.name} names no storage price")
    return storage_share(base.storage.value if base.storage else 0.0, use.hours, use.reads)


def own_cache_usd(base: PriceBase, prefill_usd: float) -> float | None:
    """Dollars of a read from the provider's own cache in place of a prefill that costs so much at
    its list price; None at a base that names no such price."""
    if base.api_input is None or base.api_cached is None or base.api_input.value == 0:
        return None
    return prefill_usd * base.api_cached.value / base.api_input.value


def _is_device(name: str, measured_on: str) -> bool:
    """Whether the machine's words name that device: "NVIDIA L4" is in "NVIDIA L4 24 GB", and not in
    "NVIDIA L40S"."""
    return re.search(rf"{re.escape(name.lower())}(?![a-z0-9])", measured_on.lower()) is not None


def prefill_price(measured: Measured, base: PriceBase) -> tuple[float, Basis, str]:
    """Dollars of the document's prefill at `base`, what kind of figure that is, and in words."""
    rent = base.device.value
    if base.api_input is not None:
        price = base.api_input
        return (
            token_cost(measured.tokens, price.value),
            "list price",
            f"Prefill: {measured.tokens:,} tokens at ${price.value:g} per million "
            f"({'derived from ' if price.basis == 'derived' else ''}{price.source}); an estimate, "
            f"since nobody sells {measured.model} at just that price.",
        )
    if _is_device(base.device_name, measured.device):
        return (
            device_cost(measured.prefill_seconds, rent),
            "measured",
            f"Prefill: {duration(measured.prefill_seconds)} measured on {measured.device} at "
            f"${rent:.2f} an hour.",
        )
    if base.compute is not None and measured.prefill_flops is not None:
        speed = base.compute.value * TERA * base.compute.utilisation
        seconds = number("prefill operations", measured.prefill_flops, zero=False) / speed
        operations = significant(measured.prefill_flops / TERA)
        return (
            device_cost(seconds, rent),
            "model",
            f"Prefill: a model, no {base.device_name} was measured: "
            f"{operations} TFLOP at {base.compute.utilisation:.0%} of "
            f"{base.compute.value:g} TFLOP/s = {duration(seconds)} at ${rent:.2f} an hour.",
        )
    return (
        device_cost(measured.prefill_seconds, rent),
        "upper bound",
        f"Prefill: an upper bound, no {base.device_name} was measured: the "
        f"{duration(measured.prefill_seconds)} of {measured.device} at ${rent:.2f} an hour.",
    )
