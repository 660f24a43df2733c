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

import numpy as np
from numpy.typing import NDArray

from kvzip.errors import UsageError
from kvzip.eval.results.traffic import Capacity
from kvzip.eval.traffic.trace import Trace

NEVER = np.iinfo(np.int64).max
"""The distance of a block that was not used before."""


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


def needed_capacity(trace: Trace, distances: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """For every block of every request, the least capacity, in blocks, at which it and all blocks
    before it in its prompt are found; `NEVER` where there is none. int64, [accesses].

    `distances`: the trace's stack distances, where they are known already.
    """
    found = stack_distances(trace.blocks) if distances is None else distances.copy()
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


def curve(needed: NDArray[np.int64], points: int = 120) -> list[tuple[float, float]]:
    """(capacity in blocks, hit rate) at capacities that grow by a constant factor, from 1 to that
    at which no more are found. `needed`: of :func:`needed_capacity`."""
    ordered = np.sort(needed)
    found = ordered[ordered < NEVER]
    most = int(found[-1]) if len(found) else 1
    sizes = np.unique(np.round(np.geomspace(1, most, points)))
    rates = np.searchsorted(ordered, sizes, "right") / len(ordered)
    return list(zip(sizes.tolist(), rates.tolist(), strict=True))
