"""What turned the keys of a part, as a file's header says."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.errors import FormatError
from kvzip.statistics.rope import frequencies

ROUNDINGS = (1, 2, 3, 4, 5, 6)
"""How RoPE rounds, as blocks of keys before it say: products and sums; sums; sums, of products with
cosines and sines of float32; and likewise of pairs side by side."""
_GREATEST = 2.0**20
"""What cosines and sines are multiplied by at most: products with keys stay within fp32."""


def is_side_by_side(rounding: int) -> bool:
    """Whether a rounding's pairs are 2i and 2i + 1, and not i and i + pairs."""
    return rounding > 3


def is_wide(rounding: int) -> bool:
    """Whether a rounding's cosines and sines are float32, and not bf16."""
    return rounding in (3, 6)


def rotation_of(context: Context, dim: int) -> _native.Rotation | None:
    """What turned the keys of a part, [batch, heads, tokens, dim]; None where the origin doesn't
    note the frequencies: whoever works them out may find others."""
    if context.part != "k" or context.rope is None or context.dtype.name != "bf16":
        return None
    known = context.origin.rope
    if context.rope >= len(known):
        return None
    parameters = known[context.rope]
    if not parameters.get("inv_freq"):
        return None
    try:
        scale = float(parameters.get("attention_scaling", 1.0))
        return _rotation(tuple(parameters["inv_freq"]), scale, dim)
    except (TypeError, ValueError, OverflowError, FormatError):  # a header may say anything
        return None


@lru_cache(maxsize=8)
def _rotation(noted: tuple[Any, ...], scale: float, dim: int) -> _native.Rotation | None:
    with _native.DefaultEnvironment():
        found = np.asarray(frequencies({"inv_freq": noted}, dim), np.float32)
    if not len(found) or not abs(scale) <= _GREATEST:
        return None
    return _native.Rotation(found, scale)
