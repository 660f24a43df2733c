"""Hit rates of a store against its capacity, all capacities at once.

A store that evicts what was used least recently (LRU) holds at every capacity what it would hold
at a smaller one, and more (Mattson, Gecsei, Slutz, Traiger 1970). So one number tells of an access
at which capacities it hits: its stack distance, how many different blocks were used since the
block's last use, itself included. A prompt's cache is only of use from its first token on without
a gap: block j of a request counts where blocks 0 to j all hit, from the largest of their distances
on. Every block of a request is used, in order, and is in the store afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip.errors import UsageError
from kvzip.eval.traffic.trace import BLOCK_TOKENS, Trace

NEVER = np.iinfo(np.int64).max
"""The distance of a block that was not used before."""


class Capacity(msgspec.Struct, frozen=True):
    """What a store of `blocks` blocks of raw size keeps when its blocks are `ratio` times as
    small."""

    blocks: float
    ratio: float
    hit_rate: float
    """Blocks that need not be computed, of all blocks of all prompts."""


class Capacities(msgspec.Struct, frozen=True):
    """What stores of several sizes keep of a trace."""

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


def replay(trace: Trace, blocks: Sequence[float], ratios: Sequence[float]) -> Capacities:
    """Replay a trace against an LRU store of each size, with blocks made smaller by each ratio.

    `blocks`: capacities in blocks of raw size. Raises UsageError for sizes and ratios that are not
    above zero.
    """
    needed = needed_capacity(trace)
    return Capacities(
        trace.name,
        trace.requests,
        float(trace.seconds[-1]) if trace.requests else 0.0,
        BLOCK_TOKENS,
        len(trace.blocks),
        trace.distinct,
        float((needed < NEVER).mean()),
        capacities(blocks, ratios, needed),
    )


def stack_distances(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The stack distance of every access; `NEVER` where a block is used for the first time.

    `blocks`: ids from 0 up, [accesses]. A Fenwick tree over time holds a one where a block was
    last used (Bennett and Kruskal 1975), so each access takes log2(accesses) steps.
    """
    count = len(blocks)
    tree = [0] * (count + 1)
    last = [0] * (int(blocks.max()) + 1 if count else 0)
    found = np.full(count, NEVER, np.int64)
    for at, block in enumerate(blocks.tolist(), 1):
        before = last[block]
        if before:
            between, i = 0, at - 1
            while i > 0:
                between += tree[i]
                i &= i - 1
            i = before
            while i > 0:
                between -= tree[i]
                i &= i - 1
            found[at - 1] = between + 1
            i = before
            while i <= count:
                tree[i] -= 1
                i += i & -i
        i = at
        while i <= count:
            tree[i] += 1
            i += i & -i
        last[block] = at
    return found


def needed_capacity(trace: Trace) -> NDArray[np.int64]:
    """For every block of every request, the least capacity, in blocks, at which it and all blocks
    before it in its prompt are found; `NEVER` where there is none. int64, [accesses]."""
    found = stack_distances(trace.blocks)
    for begin, end in zip(trace.starts[:-1], trace.starts[1:], strict=True):
        np.maximum.accumulate(found[begin:end], out=found[begin:end])
    return found


def capacities(
    blocks: Sequence[float], ratios: Sequence[float], needed: NDArray[np.int64]
) -> list[Capacity]:
    """Hit rates for each ratio at each capacity. `needed`: of :func:`needed_capacity`.

    Raises UsageError for capacities and ratios that are not above zero.
    """
    for name, values in (("capacity", blocks), ("ratio", ratios)):
        for value in values:
            if not 0 < value < 2**62:
                raise UsageError(f"a {name} of {value} makes no sense: it must be above zero")
    ordered = np.sort(needed)
    return [
        Capacity(
            size,
            ratio,
            float(np.searchsorted(ordered, np.floor(size * ratio + 1e-9), "right") / len(needed)),
        )
        for size in blocks
        for ratio in ratios
    ]
