"""What a trace is replayed on: GPUs, the tiers of a store, and how each codec is used there.

The defaults are put together from the price book: :func:`tier_of`. docs/fleet.md has the model.
(:mod:`kvzip.eval.money.fleet` is about made-up readers of documents, by formulas.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from kvzip.choice.cost import GB, PrefillModel, number
from kvzip.errors import UsageError
from kvzip.eval.money.arguments import store_size
from kvzip.eval.money.prices import PriceBook, pick
from kvzip.eval.results.traffic import Input, Strategy
from kvzip.eval.traffic.eviction import POLICIES, PolicyName
from kvzip.eval.traffic.trace import Trace

STRATEGIES: dict[Strategy, str] = {
    "recompute": "no store: a GPU computes every prompt",
    "gpu": "no store beside what the tier gpu keeps by itself, as an engine's prefix cache does",
    "load": "what is found is loaded, the rest is computed",
    "choose": "load or recompute, whichever is expected to be done first",
    "overlap": "a GPU computes from the front while the rest is loaded from the back (Cake)",
}
Decoder = Literal["none", "host", "device"]
"""Who decodes: nobody, cores of the host, or the GPU."""
BUSY_AT_MOST = 0.75
"""The share of the time for which GPUs may be busy without a store, where their number is not
given."""

MOST_GPUS = 1_000_000


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """A place that keeps blocks. Sizes are those of all machines together."""

    name: str
    bytes: float
    """Infinite: it keeps all."""
    bandwidth: float = math.inf
    """Of one link to the host, bits per second; infinite where it has none of its own."""
    links: int = 1
    latency: float = 0.0
    """Seconds before the first byte."""
    encoded: bool = True
    """Whether its blocks are encoded, or as the model computes them."""
    usd_per_gb_month: float = 0.0
    usd_per_gb_read: float = 0.0


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The machines and the model that a trace is replayed on."""

    model: str
    layers: int
    bytes_per_token: float
    """Raw bytes that a token leaves in the cache."""
    prefill: PrefillModel
    gpus: int
    """Places that prefill, each of `gpus_each` GPUs; "a GPU", where it waits or works, is one of
    them."""
    gpus_each: int = 1
    gpu_usd_per_hour: float
    pcie: float
    """Bits per second between host and GPUs, for each place."""
    cores: int
    """Of the host, for each place: what decodes."""
    tiers: tuple[Tier, ...]
    """The fastest first."""
    policy: PolicyName = "lru"

    def check(self) -> Fleet:
        """This fleet. Raises KVZipError that names what cannot be."""
        for name in ("layers", "bytes_per_token", "gpus", "gpus_each", "cores"):
            number(name, getattr(self, name), zero=False)
        if self.gpus > MOST_GPUS:
            raise UsageError(
                f"{self.gpus:,} GPUs are more than a replay takes ({MOST_GPUS:,}): look at the "
                "lengths in the trace, or name --gpus"
            )
        number("pcie", self.pcie, zero=False, infinite=True)
        number("rent of a GPU", self.gpu_usd_per_hour)
        pick("policy", POLICIES, self.policy)
        if not self.tiers:
            raise UsageError("a store has one tier at least: gpu, host, nvme or object")
        for tier in self.tiers:
            number(f"{tier.name}: bytes", tier.bytes, zero=False, infinite=True)
            number(f"{tier.name}: bandwidth", tier.bandwidth, zero=False, infinite=True)
            number(f"{tier.name}: links", tier.links, zero=False)
            for name in ("latency", "usd_per_gb_month", "usd_per_gb_read"):
                number(f"{tier.name}: {name}", getattr(tier, name))
        return self


class CodecUse(msgspec.Struct, frozen=True, kw_only=True):
    """A codec as a fleet uses it. Rates are raw bytes per second."""

    name: str
    ratio: float
    decoder: Decoder = "host"
    decode_rate: float = math.inf
    """Of one core of the host, or of one GPU."""
    encode_rate: float = math.inf
    """Of one core."""
    profile_bytes: float = 0.0
    """In the memory of whoever decodes."""

    def check(self) -> CodecUse:
        """This use. Raises KVZipError that names what cannot be."""
        number(f"{self.name}: ratio", self.ratio, zero=False)
        for name in ("decode_rate", "encode_rate"):
            number(f"{self.name}: {name}", getattr(self, name), zero=False, infinite=True)
        number(f"{self.name}: profile", self.profile_bytes)
        return self


def rooms(fleet: Fleet, codec: CodecUse, block_tokens: int) -> list[float]:
    """How many blocks each tier has room for: ``floor((bytes - profile) * ratio / raw block)``."""
    block = fleet.bytes_per_token * block_tokens
    found = []
    for tier in fleet.tiers:
        ratio = codec.ratio if tier.encoded else 1.0
        left = max(tier.bytes - profile_in(tier, fleet, codec), 0.0)
        found.append(float(math.floor(left * ratio / block + 1e-9)) if left < math.inf else left)
    return found


def profile_in(tier: Tier, fleet: Fleet, codec: CodecUse) -> float:
    """What a codec's profile takes of a tier: it lies once in the host's memory, or in that of
    every GPU, where it is decoded."""
    held = {"host": ("host", 1), "device": ("gpu", fleet.gpus * fleet.gpus_each)}
    name, copies = held.get(codec.decoder, ("", 0))
    return codec.profile_bytes * copies if name == tier.name else 0.0


def gpus_needed(trace: Trace, prefill: PrefillModel) -> int:
    """The fewest GPUs that compute all prompts in the trace's time and are busy for
    `BUSY_AT_MOST` of it."""
    seconds = float(prefill.each(trace.inputs).sum())
    length = float(trace.seconds[-1]) if trace.requests else 0.0
    return max(math.ceil(seconds / length / BUSY_AT_MOST), 1) if length > 0 else 1


# --- tiers, as a person names them ---------------------------------------------------------------

_PER_GPU = {"gpu": 20 * GB, "host": 180 * GB, "nvme": 3840 * GB}
"""Bytes of each tier for each GPU, where none are given: what the weights leave of 80 GB; memory of
a host with eight GPUs and 2 TB, less what it needs itself; one drive."""
_OBJECT_LATENCY = 0.03
"""Seconds until an object store's first byte."""


def tiers(text: str, gpus: int, book: PriceBook) -> tuple[Tier, ...]:
    """The tiers that a list names: "gpu,host:400GB,nvme:8TB,object". Raises UsageError."""
    found: dict[str, Tier] = {}
    for item in text.split(","):
        name, _, size = item.strip().partition(":")
        if name not in ("gpu", "host", "nvme", "object") or name in found:
            raise UsageError(
                f"tiers {text!r}: write gpu, host, nvme and object, each once at most, with "
                "commas between, and a size after a colon, such as host:400GB"
            )
        found[name] = tier_of(name, store_size(size) if size else None, gpus, book)
    return tuple(found[name] for name in ("gpu", "host", "nvme", "object") if name in found)


def tier_of(name: str, size: float | None, gpus: int, book: PriceBook) -> Tier:
    """The tier of that name for so many GPUs, from the price book."""
    room = size if size is not None else _PER_GPU.get(name, math.inf) * gpus
    if name == "gpu":
        return Tier(name=name, bytes=room, encoded=False)
    if name == "host":
        return Tier(name=name, bytes=room, usd_per_gb_month=book.storage["dram"].value)
    if name == "nvme":
        return Tier(
            name=name,
            bytes=room,
            bandwidth=book.link["nvme-gen4"].value * 1e9,
            links=gpus,
            usd_per_gb_month=book.storage["nvme"].value,
        )
    return Tier(
        name=name,
        bytes=room,
        bandwidth=book.link["ethernet-100"].value * 1e9,
        latency=_OBJECT_LATENCY,
        usd_per_gb_month=book.storage["s3"].value,
        usd_per_gb_read=book.egress["s3-same-region"].value,
    )


def tier_inputs(found: Sequence[Tier], book: PriceBook) -> list[Input]:
    """The numbers of the tiers, each with where it comes from."""
    inputs = []
    prices = {
        "host": book.storage["dram"],
        "nvme": book.storage["nvme"],
        "object": book.storage["s3"],
    }
    links = {"nvme": book.link["nvme-gen4"], "object": book.link["ethernet-100"]}
    for tier in found:
        size = tier.bytes if math.isfinite(tier.bytes) else None
        inputs.append(
            Input(f"{tier.name}, size", size, "bytes", "given", "--tiers, or its default")
        )
        if link := links.get(tier.name):
            source = f"price book: {link.source}"
            inputs.append(Input(f"{tier.name}, link", link.value, link.unit, "stated", source))
        if tier.latency:
            inputs.append(
                Input(f"{tier.name}, latency", tier.latency, "s", "assumed", "docs/fleet.md")
            )
        if price := prices.get(tier.name):
            inputs.append(
                Input(f"{tier.name}, rent", price.value, price.unit, "price", price.source)
            )
    return inputs
