"""Whether arrays share memory."""

from __future__ import annotations

import numpy as np

from kvzip.dtypes import Bits

_MOST_WORK = 10_000
"""Steps that are taken at most to find it out."""


def overlap(a: Bits, b: Bits, otherwise: bool) -> bool:
    """Whether a byte of one array is the other's, too; `otherwise` where strides that no cache has
    make it too hard to tell."""
    try:
        # numpy takes any number of steps, and its stub two.
        return np.shares_memory(a, b, max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return otherwise
