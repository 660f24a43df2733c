"""How much of a test document the training documents have, too: texts of splits that share no file
may quote each other, as topics of a manual and licences do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 32
"""Tokens in a row that count as a passage: so many come twice by quoting, and hardly by chance."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no token's part in a hash is lost; 2^64 over the golden ratio (Knuth)."""


def passages(documents: Iterable[NDArray[Any]]) -> NDArray[np.uint64]:
    """The hashes of all runs of :data:`RUN` tokens of these documents' token ids, each once,
    sorted."""
    found = [_runs(ids) for ids in documents]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))


def seen(ids: NDArray[Any], known: NDArray[np.uint64]) -> float:
    """The share of a document's tokens that stand in one of these passages."""
    edges = np.zeros(len(ids) + 1, np.int64)
    starts = np.flatnonzero(np.isin(_runs(ids), known))
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + RUN, -1)
    return float((np.cumsum(edges[:-1]) > 0).mean()) if len(ids) else 0.0


def _runs(ids: NDArray[Any]) -> NDArray[np.uint64]:
    """The hash of each run, [tokens - RUN + 1], or none."""
    if len(ids) < RUN:
        return np.zeros(0, np.uint64)
    # One more, so that the token 0 counts, too; mixed, so that sums of tokens do not.
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * _FACTOR
    mixed ^= mixed >> np.uint64(29)
    found = np.zeros(len(ids) - RUN + 1, np.uint64)
    for j in range(RUN):
        found = found * _FACTOR + mixed[j : j + len(found)]
    return found
