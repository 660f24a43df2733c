"""A trace with every codec and every strategy: what is found, how long it takes, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.choice.cost import GB, HOUR, MONTH_HOURS, device_cost, load_cost
from kvzip.eval.results.provenance import machine, now, versions
from kvzip.eval.results.traffic import BASIS, FleetRow, Input, Strategy, TierRow, TrafficResult
from kvzip.eval.traffic import capacity
from kvzip.eval.traffic.finding import Found, find, prompt_tokens
from kvzip.eval.traffic.fleet import CodecUse, Fleet, Tier, profile_in, rooms
from kvzip.eval.traffic.simulate import Outcome, simulate
from kvzip.eval.traffic.trace import BLOCK_TOKENS, Trace

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many runs are done, and how many there are."""


def replay(
    trace: Trace,
    fleet: Fleet,
    codecs: Sequence[CodecUse],
    strategies: Sequence[Strategy],
    *,
    blocks: Sequence[float],
    ratios: Sequence[float],
    dtype: str,
    inputs: Sequence[Input],
    command: str,
    progress: Progress = lambda what, done, total: None,
) -> TrafficResult:
    """Replay a trace with each strategy and codec, and against LRU stores of each size and ratio.

    `blocks`: capacities in blocks of raw size. Raises KVZipError for figures that cannot be.
    """
    distances = capacity.stack_distances(trace.blocks)
    needed = capacity.needed_capacity(trace, distances)
    fleet.check()
    rows = []
    todo = runs(codecs, strategies)
    for done, (strategy, codec) in enumerate(todo):
        progress("replay", done, len(todo))
        rows.append(row(trace, fleet, codec, strategy, distances))
    return TrafficResult(
        command=command,
        date=now(),
        machine=machine(),
        versions=versions(),
        trace=trace.name,
        requests=trace.requests,
        seconds=float(trace.seconds[-1]) if trace.requests else 0.0,
        block_tokens=BLOCK_TOKENS,
        accesses=len(trace.blocks),
        distinct=trace.distinct,
        most=float((needed < capacity.NEVER).mean()),
        capacity=capacity.capacities(blocks, ratios, needed),
        curve=capacity.curve(needed),
        model=fleet.model,
        dtype=dtype,
        block_bytes=fleet.bytes_per_token * BLOCK_TOKENS,
        gpus=fleet.gpus * fleet.gpus_each,
        policy=fleet.policy,
        inputs=list(inputs),
        basis=BASIS,
        rows=rows,
    )


NO_CODEC = CodecUse(name="", ratio=1.0, decoder="none")
"""What strategies without a store take."""
WITHOUT_STORE: frozenset[Strategy] = frozenset({"recompute", "gpu"})


def runs(
    codecs: Iterable[CodecUse], strategies: Iterable[Strategy]
) -> list[tuple[Strategy, CodecUse]]:
    """Each strategy with each codec; those without a store once, without any."""
    found: list[tuple[Strategy, CodecUse]] = []
    for strategy in strategies:
        found += [(strategy, c) for c in ([NO_CODEC] if strategy in WITHOUT_STORE else codecs)]
    return found


def row(
    trace: Trace,
    fleet: Fleet,
    codec: CodecUse,
    strategy: Strategy,
    distances: NDArray[np.int64] | None = None,
) -> FleetRow:
    """The trace with one codec and one strategy.

    `distances`: the trace's stack distances, where they are known already.
    """
    fleet.check()
    codec.check()
    stored = strategy != "recompute"
    if strategy == "gpu":
        own = tuple(tier for tier in fleet.tiers if tier.name == "gpu")
        fleet = msgspec.structs.replace(fleet, tiers=own)
    room = rooms(fleet, codec, BLOCK_TOKENS) if stored else [0.0] * len(fleet.tiers)
    found = find(trace, room, fleet.policy, distances)
    outcome = simulate(trace, found, fleet, codec, strategy)
    # Raw bytes that each tier gave, [tiers].
    given = (found.tokens * outcome.loaded[:, None]).sum(axis=0) * fleet.bytes_per_token
    tiers = [
        _tier_row(tier, room[k], fleet, codec, found, float(given[k]), k, outcome)
        for k, tier in enumerate(fleet.tiers if stored else ())
    ]
    found_tokens, tokens = found.tokens.sum(axis=1), prompt_tokens(trace)
    encodes = stored and any(tier.encoded for tier in fleet.tiers)
    computed = fleet.bytes_per_token * float((tokens - found_tokens).sum()) if encodes else 0.0
    gpu_seconds = outcome.gpu_seconds * fleet.gpus_each
    gpu_usd = device_cost(gpu_seconds, fleet.gpu_usd_per_hour)
    store_usd = sum(tier.usd for tier in tiers)
    p50, p99 = np.percentile(outcome.ttft, [50, 99]).tolist()
    return FleetRow(
        strategy=strategy,
        codec=codec.name,
        ratio=codec.ratio,
        decoder=codec.decoder,
        hit_rate=float(found.blocks.sum() / len(trace.blocks)),
        loaded_share=float((found_tokens * outcome.loaded).sum() / tokens.sum()),
        ttft_mean=float(outcome.ttft.mean()),
        ttft_p50=p50,
        ttft_p99=p99,
        gpu_seconds=gpu_seconds,
        gpu_use=outcome.gpu_seconds / fleet.gpus / outcome.seconds,
        decode_core_seconds=_decoded_by_cores(fleet, codec, given) / codec.decode_rate,
        encode_core_seconds=computed / codec.encode_rate,
        pcie_bytes=sum(
            float(raw) / (codec.ratio if tier.encoded and codec.decoder == "device" else 1.0)
            for tier, raw in zip(fleet.tiers, given, strict=True)
            if tier.name != "gpu"
        ),
        tiers=tiers,
        gpu_usd=gpu_usd,
        store_usd=store_usd,
        usd=gpu_usd + store_usd,
    )


def _decoded_by_cores(fleet: Fleet, codec: CodecUse, given: NDArray[np.float64]) -> float:
    """Raw bytes that cores of the hosts decode."""
    encoded = (raw for tier, raw in zip(fleet.tiers, given, strict=True) if tier.encoded)
    return float(sum(encoded)) if codec.decoder == "host" else 0.0


def _tier_row(
    tier: Tier,
    room: float,
    fleet: Fleet,
    codec: CodecUse,
    found: Found,
    given: float,
    at: int,
    outcome: Outcome,
) -> TierRow:
    """What the tier at `at` did, which gave so many raw bytes."""
    ratio = codec.ratio if tier.encoded else 1.0
    block = fleet.bytes_per_token * BLOCK_TOKENS / ratio
    used = min(tier.bytes, found.held[at] * block + profile_in(tier, fleet, codec))
    month = tier.usd_per_gb_month * outcome.seconds / HOUR / MONTH_HOURS
    busy = outcome.busy.get(tier.name)
    return TierRow(
        tier=tier.name,
        room_blocks=room if math.isfinite(room) else None,
        hit_rate=float(found.blocks[:, at].sum() / max(found.accesses, 1)),
        read_bytes=given / ratio,
        written_bytes=found.misses[at] * block,
        link_use=None if busy is None else busy / tier.links / outcome.seconds,
        usd=used / GB * month + load_cost(given / ratio, tier.usd_per_gb_read),
    )
