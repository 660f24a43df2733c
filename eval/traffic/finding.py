"""Which blocks of each request are found in which tier; in the order of the requests, whatever
their times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.eval.traffic.capacity import stack_distances
from kvzip.eval.traffic.eviction import POLICIES, PolicyName
from kvzip.eval.traffic.trace import BLOCK_TOKENS, Trace


class Found(msgspec.Struct, frozen=True):
    """What a store of some tiers finds of a trace.

    `blocks`, `tokens`: int64, [requests, tiers], found blocks, and tokens in them, by the first
    tier that has them. `misses`: by tier, accesses of blocks that it did not have, and has
    afterwards. `held`: by tier, the most different blocks that it ever had. `waits`: for each
    request the earlier ones that computed blocks which it finds, each once, in order.
    """

    blocks: NDArray[np.int64]
    tokens: NDArray[np.int64]
    misses: list[int]
    held: list[int]
    waits: list[list[int]]
    accesses: int
    """Blocks of all requests."""


def find(
    trace: Trace,
    rooms: Sequence[float],
    policy: PolicyName = "lru",
    distances: NDArray[np.int64] | None = None,
) -> Found:
    """Replay a trace against tiers with room for so many blocks each, the fastest first.

    `distances`: the trace's stack distances, where they are known already.
    """
    there = [_in_tier(trace, room, policy, distances) for room in rooms]
    level = np.full(len(trace.blocks), len(rooms))
    for tier in reversed(range(len(rooms))):
        level[there[tier]] = tier
    request = np.repeat(np.arange(trace.requests), np.diff(trace.starts))
    prefix = _unbroken(level < len(rooms), trace, request)
    blocks = np.zeros((trace.requests, len(rooms)), np.int64)
    tokens = np.zeros_like(blocks)
    at = request[prefix], level[prefix]
    np.add.at(blocks, at, 1)
    np.add.at(tokens, at, tokens_of_blocks(trace, request)[prefix])
    return Found(
        blocks,
        tokens,
        [int((~held).sum()) for held in there],
        [int(min(room, trace.distinct)) for room in rooms],
        _computed_by(trace, prefix),
        len(trace.blocks),
    )


def prompt_tokens(trace: Trace) -> NDArray[np.int64]:
    """Tokens of each prompt, [requests]: its length, and no fewer than its blocks say."""
    full = np.maximum(np.diff(trace.starts) - 1, 0) * BLOCK_TOKENS
    return np.maximum(trace.inputs, full + 1)


def tokens_of_blocks(trace: Trace, request: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each block of each request, [accesses]; the last of a prompt may be shorter."""
    before = (np.arange(len(trace.blocks)) - trace.starts[request]) * BLOCK_TOKENS
    return np.minimum(prompt_tokens(trace)[request] - before, BLOCK_TOKENS)


def _in_tier(
    trace: Trace, room: float, policy: PolicyName, distances: NDArray[np.int64] | None
) -> NDArray[np.bool_]:
    """Whether a tier has each block when it is used, [accesses]."""
    if room < 1:
        return np.zeros(len(trace.blocks), np.bool_)
    if policy == "lru" or room >= trace.distinct:
        found = stack_distances(trace.blocks) if distances is None else distances
        return found <= min(room, trace.distinct)
    cache = POLICIES[policy](math.floor(room))
    return np.fromiter(map(cache.touch, trace.blocks.tolist()), np.bool_, len(trace.blocks))


def _unbroken(
    there: NDArray[np.bool_], trace: Trace, request: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether a block and all before it in its request are there, [accesses]."""
    gone = np.cumsum(~there)
    before = np.concatenate([[0], gone])[trace.starts[:-1]]
    return gone == before[request] if len(gone) else there


def _computed_by(trace: Trace, prefix: NDArray[np.bool_]) -> list[list[int]]:
    """For each request, the earlier ones that computed last what it finds."""
    last = [-1] * trace.distinct
    blocks, hits = trace.blocks.tolist(), prefix.tolist()
    found = []
    for i, (begin, end) in enumerate(zip(trace.starts[:-1], trace.starts[1:], strict=True)):
        waits = set()
        for block, hit in zip(blocks[begin:end], hits[begin:end], strict=True):
            if hit:
                waits.add(last[block])
            else:
                last[block] = i
        found.append(sorted(waits))
    return found
