"""What `kvzip eval fleet --trace` finds: a trace replayed with each codec and strategy."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.base import Result, above_zero

Strategy = Literal["recompute", "gpu", "load", "choose", "overlap"]
Basis = Literal["counted", "measured", "modelled", "price", "stated", "target", "assumed", "given"]
"""Where a number comes from. Counted: in the trace, exactly; measured: by the clock, on the machine
that the source names; modelled: by a formula; price: of the price book; stated: by its source;
target: what is hoped for, and nobody has measured; assumed: by us; given: by whoever asked."""


class Input(msgspec.Struct, frozen=True):
    """A number that went into the model."""

    name: str
    value: float | None
    """None: no limit."""
    unit: str
    basis: Basis
    source: str


class Capacity(msgspec.Struct, frozen=True):
    """What an LRU store of `blocks` blocks of raw size finds when its blocks are `ratio` times as
    small."""

    blocks: float
    ratio: float
    hit_rate: float
    """Blocks that need not be computed, of all blocks of all prompts."""


class TierRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier did."""

    tier: str
    room_blocks: float | None
    """None: no limit."""
    hit_rate: float
    """Blocks that are found in it, of all blocks of all prompts."""
    read_bytes: float
    written_bytes: float
    link_use: float | None
    """Share of the time that its links were busy reading; None where it has none of its own."""
    usd: float
    """Of what it keeps and what is read."""


class FleetRow(msgspec.Struct, frozen=True, kw_only=True):
    """The trace with one codec and one strategy. Times in seconds."""

    strategy: Strategy
    codec: str
    """"" for "recompute" and "gpu", which have no store."""
    ratio: float
    decoder: str
    """Who decodes: none, host or device."""
    hit_rate: float
    """Blocks that are found in any tier, of all blocks of all prompts."""
    loaded_share: float
    """Prompt tokens that were loaded, of all."""
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    gpu_seconds: float
    gpu_use: float
    """Share of the time that GPUs were held, from the first request to the last answer."""
    decode_core_seconds: float
    encode_core_seconds: float
    """Of cores of the hosts."""
    pcie_bytes: float
    """From hosts to GPUs."""
    tiers: list[TierRow]
    gpu_usd: float
    store_usd: float
    usd: float
    """gpu_usd + store_usd."""


BASIS: dict[str, Basis] = {
    "hit_rate": "counted",
    "loaded_share": "modelled",
    "ratio": "measured",
    **dict.fromkeys(("ttft_mean", "ttft_p50", "ttft_p99", "gpu_seconds", "gpu_use"), "modelled"),
    **dict.fromkeys(("decode_core_seconds", "encode_core_seconds", "pcie_bytes"), "modelled"),
    **dict.fromkeys(("gpu_usd", "store_usd", "usd"), "price"),
    "tiers.room_blocks": "modelled",
    "tiers.hit_rate": "counted",
    **dict.fromkeys(("tiers.read_bytes", "tiers.written_bytes", "tiers.link_use"), "modelled"),
    "tiers.usd": "price",
    "capacity.hit_rate": "counted",
    "curve": "counted",
}
"""The basis of each figure of a result. Dollars are modelled seconds and bytes at prices."""


class TrafficResult(Result, frozen=True, kw_only=True, tag="traffic"):
    """What stores of several sizes, codecs and strategies make of a trace."""

    writer = "kvzip eval fleet --trace"

    trace: str
    requests: int
    seconds: float
    """From the first request to the last."""
    block_tokens: int
    accesses: int
    """Blocks of all prompts."""
    distinct: int
    """How many of them are different ones."""
    most: float
    """The hit rate of a store that has room for all."""
    capacity: list[Capacity]
    """For each size every ratio, in the order asked for."""
    curve: list[tuple[float, float]]
    """(blocks, hit rate) of an LRU store, by size."""
    model: str
    dtype: str
    block_bytes: float
    """Raw."""
    gpus: int
    policy: str
    inputs: list[Input]
    basis: dict[str, Basis]
    rows: list[FleetRow]

    def check(self) -> None:
        if not self.capacity and not self.rows:
            raise KVZipError("there is nothing in it")
        for row in self.capacity:
            above_zero("capacity: blocks", row.blocks)
            above_zero("capacity: ratio", row.ratio)
            _share("capacity: hit_rate", row.hit_rate)
        for _, rate in self.curve:
            _share("curve: hit rate", rate)
        for fleet_row in self.rows:
            _share("hit_rate", fleet_row.hit_rate)
            for name in ("ttft_mean", "ttft_p50", "ttft_p99", "gpu_seconds"):
                above_zero(f"{fleet_row.strategy}: {name}", getattr(fleet_row, name))


def _share(name: str, value: float) -> None:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise KVZipError(f"{name} is {value}; it must be from 0 to 1")
