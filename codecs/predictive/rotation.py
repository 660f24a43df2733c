"""What turned the keys of a token range, for pairs that are coded as they were before RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.common.rotation import rotation_of
from kvzip.dtypes import Bits

Angles = NDArray[np.float32]
"""Cosines and sines, [tokens, 2, pairs]."""


def pairs_of(tensors: Mapping[str, NDArray[Any]], layer: int) -> int:
    """How many pairs of a head RoPE turns, as a profile says."""
    return len(tensors.get(f"{layer}.step", ()))


class Rotations:
    """The rotations of one token range, each made once: layers may have different ones."""

    def __init__(self) -> None:
        self._known: dict[tuple[int | None, int, bool], Angles | None] = {}

    def of(self, context: Context, shape: tuple[int, ...], wide: bool) -> Angles | None:
        """What turned a block, [rows, heads, tokens, dim], as the origin says, unless it is `wide`
        rounded to bf16; None where it does not say, and for values."""
        if context.part != "k":
            return None
        name = context.rope, shape[3], wide
        if name not in self._known:
            self._known[name] = _angles(context, shape, wide)
        return self._known[name]

    def found(
        self, chain: _native.PredictiveChain, block: Bits, context: Context, pairs: int
    ) -> tuple[Angles | None, int]:
        """What turned these keys, the chain's next part, and its rounding (`ROUNDINGS`); 0 where
        they were not turned so. `pairs`: how many the profile has."""
        for wide in (False, True):
            angles = self.of(context, block.shape, wide)
            if angles is None or angles.shape[2] != pairs:
                break
            if rounding := chain.rounding(context.layer, 0, block, angles, wide):
                return angles, rounding
        return None, 0


def _angles(context: Context, shape: tuple[int, ...], wide: bool) -> Angles | None:
    rotation = rotation_of(context, shape[3])
    if rotation is None:
        return None
    if wide:
        return rotation.wide_angles_of(context.start, shape[2])
    return dtypes.to_float32(rotation.angles_of(context.start, shape[2]), "bf16")
