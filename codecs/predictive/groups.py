"""Groups: the order of a layer's channels, so that those of one group tell little of each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvzip.statistics.gaussian import Doubles

MOST = 64
"""Channels of a group, at most."""


def default_group(width: int) -> int:
    """Channels of a group for a layer so wide: the wider, the less one group's share of what a
    channel is predicted from."""
    return 8 if width < 1024 else 16 if width <= 8192 else MOST


def default_lanes(widths: Sequence[int], group: int) -> int:
    """rANS states of a token. Each costs 8 bytes a token, so that there are many only where a
    token has many numbers."""
    wanted = min(group // 2, sum(widths) // 8192)
    # A stream of 32 tokens counts its words in 16 bits.
    needed = max(widths, default=0) // 1024
    lanes = 1 << max(wanted.bit_length() - 1, (max(needed, 1) - 1).bit_length(), 0)
    return min(lanes, 1 << ((group // 2).bit_length() - 1))


def starts(parts: Sequence[int], group: int) -> list[int]:
    """Where groups begin, and the end; `parts`: channels of keys and of values."""
    found: list[int] = []
    first = 0
    for channels in parts:
        found += range(first, first + channels, group)
        first += channels
    return [*found, first]


def arrange(
    covariance: Doubles, pairs: Sequence[tuple[int, int]], keys: int, group: int
) -> NDArray[np.intp]:
    """Which channel stands at each place: first the pairs of keys, then the rest of the keys, then
    the values.

    `covariance` [channels, channels] is of what other layers leave. Group after group is filled
    with those that tell least of each other, given all groups before.
    """
    turned = {c for pair in pairs for c in pair}
    kinds = [
        [[a, b] for a, b in pairs],
        [[c] for c in range(keys) if c not in turned],
        [[c] for c in range(keys, len(covariance))],
    ]
    left = np.array(covariance, np.float64)
    left += np.diag(1e-6 * np.diag(left) + 1e-30)
    own = np.diag(left).copy()
    places: list[int] = []
    held: list[int] = []  # of the group that is being filled
    for kind in kinds:
        if kind is kinds[2]:
            held = []
        items = np.array(kind, np.intp)
        waiting = np.ones(len(items), bool)
        while waiting.any():
            room = (group - len(held)) // (items.shape[1] if len(items) else 1)
            if not room:
                _condition(left, held, own)
                held = []
                continue
            chosen = _least_alike(left, items, waiting, held, room)
            waiting[chosen] = False
            for i in chosen:
                places += items[i].tolist()
                held += items[i].tolist()
    return np.array(places, np.intp)


def _least_alike(
    left: Doubles, items: NDArray[np.intp], waiting: NDArray[np.bool_], held: list[int], room: int
) -> list[int]:
    """At most `room` items, one after the other; the first is the one that tells most."""
    unit = np.sqrt(np.diag(left))
    # A channel of which nothing is left is alike by rounding alone, and may seem to be anything.
    alike = np.clip(left / np.outer(unit, unit), -1, 1) ** 2
    # Of items: the sum over their channels.
    size = items.shape[1]
    rows = sum(alike[items[:, a]] for a in range(size))
    between = np.asarray(sum(rows[:, items[:, b]] for b in range(size)))
    chosen: list[int] = []
    cost = rows[:, held].sum(axis=1) if held else -(between * waiting).sum(axis=1)
    for _ in range(min(room, int(waiting.sum()))):
        open_ = waiting.copy()
        open_[chosen] = False
        best = int(np.where(open_, cost, np.inf).argmin())
        cost = between[best].copy() if not held and not chosen else cost + between[best]
        chosen.append(best)
    return chosen


def _condition(left: Doubles, known: Sequence[int], own: Doubles) -> None:
    """Take out what the known channels say of the others."""
    among = left[np.ix_(known, known)]
    said = np.linalg.solve(among, left[known])
    left -= left[:, known] @ said
    # What is known has nothing left, and rounding leaves nobody less than nothing.
    size = np.arange(len(left))
    left[size, size] = np.maximum(left[size, size], 1e-6 * own)
