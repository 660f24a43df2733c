"""One replay of a sweep: a trace on a fleet, with one codec and one strategy."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.eval.money.arguments import shape_of
from kvzip.eval.money.prices import default_prices
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.provenance import now
from kvzip.eval.results.stored import load
from kvzip.eval.results.sweep import TrafficRow
from kvzip.eval.results.traffic import FleetRow
from kvzip.eval.sweep.points import TrafficPoint
from kvzip.eval.sweep.rows import head_of
from kvzip.eval.traffic import trace as traces
from kvzip.eval.traffic.capacity import stack_distances
from kvzip.eval.traffic.fleet import CodecUse, Fleet, tier_of
from kvzip.eval.traffic.replay import NO_CODEC, WITHOUT_STORE, row
from kvzip.eval.traffic.setting import setting

_FIGURES = set(FleetRow.__struct_fields__) & set(TrafficRow.__struct_fields__)
_FIGURES -= {"strategy", "codec", "tiers"}


def measure(point: TrafficPoint, folder: str) -> TrafficRow:
    """Replay one point. `folder` is not used: nothing is kept but the row.

    Whatever goes wrong becomes a row that says "failed" and why, and has no figures.
    """
    began = time.perf_counter()
    head = head_of(point)
    figures: dict[str, Any]
    try:
        trace, distances = _trace(point.trace, point.spread)
        fleet, codec = _fleet(point, trace)
        found = row(trace, fleet, codec, point.strategy, distances)
        figures = {"status": "ok"} | {name: getattr(found, name) for name in _FIGURES}
        figures["gpus"] = fleet.gpus
        for name in ("read_bytes", "written_bytes"):
            figures[name] = float(sum(getattr(tier, name) for tier in found.tiers))
    except Exception as error:
        figures = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    ended: dict[str, Any] = {"date": now(), "seconds": time.perf_counter() - began}
    return TrafficRow(**head | figures | ended)


@lru_cache(maxsize=2)
def _trace(path: str, spread: bool) -> tuple[traces.Trace, NDArray[np.int64]]:
    """The trace and its stack distances."""
    found = traces.read_trace(path)
    return traces.spread(found) if spread else found, stack_distances(found.blocks)


def _fleet(point: TrafficPoint, trace: traces.Trace) -> tuple[Fleet, CodecUse]:
    from kvzip.choice.auto import MEASURED

    book = default_prices()
    made = setting(
        trace=trace,
        model=point.model,
        shape=shape_of(point.model, book),
        dtype=point.dtype,
        base=book.base(point.prices),
        book=book,
        inputs=load(MEASURED, Inputs),
        codecs=[point.codec] if point.ratio is None else ["raw"],
        decode=point.decode,
        gpus=point.gpus or None,
        tiers_text=point.tiers,
        policy=point.policy,
    )
    codec = made.codecs[0]
    if point.ratio is not None:
        codec = CodecUse(name=point.codec, ratio=point.ratio, decoder="none")
    if point.strategy in WITHOUT_STORE:
        codec = NO_CODEC
    fleet = made.fleet
    if point.capacity_blocks is not None:
        size = point.capacity_blocks * fleet.bytes_per_token * traces.BLOCK_TOKENS
        host = tier_of("host", size, fleet.gpus, book)
        others = [tier for tier in fleet.tiers if tier.name != "host"]
        where = sum(tier.name == "gpu" for tier in others)
        fleet = msgspec.structs.replace(fleet, tiers=(*others[:where], host, *others[where:]))
    return fleet, codec
