"""The shapes of densities that a profile offers, and the choice among them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.statistics.densities import student_t

Doubles = NDArray[np.float64]

CELLS = 64
SHAPES = (1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 100.0)
"""Degrees of freedom of Student's t, from heavy tails to nearly normal."""
START = 5
"""The shape that stands for all until numbers are counted."""
_FACTORS = 2.0 ** (np.arange(-24, 25) / 8)


def sine_table() -> NDArray[np.int16]:
    """A full turn in 4,096 steps, 2^14 is 1."""
    return np.round(np.sin(2 * np.pi * np.arange(4096) / 4096) * (1 << 14)).astype(np.int16)


def cell_edges() -> Doubles:
    """|z| at the edges of the cells of a density's table, 1 is the mean deviation."""
    return np.array([(8 + i % 8) / 16 * 2.0 ** (i // 8) - 0.5 for i in range(CELLS + 1)])


def densities() -> tuple[NDArray[np.uint32], Doubles]:
    """The share of numbers below |z| at the cells' edges and in each cell, 2^23 is a half; by
    shape, each with a mean deviation of 1."""
    edges = cell_edges()
    tables = [student_t(shape, edges) for shape in SHAPES]
    table = np.round(np.array(tables) * (1 << 23)).astype(np.int64)
    # No cell is empty, and the last edge is all there is.
    table = np.maximum.accumulate(table + np.arange(len(edges)), axis=1)
    table = np.minimum(table, (1 << 23) - np.arange(len(edges))[::-1])
    table[:, 0], table[:, -1] = 0, 1 << 23
    return table.astype(np.uint32), np.diff(table, axis=1) / (1 << 24)


class Chooser:
    """Finds the factor on the scale and the shape that code counted numbers in the fewest bits."""

    def __init__(self) -> None:
        edges, (_, shares) = cell_edges(), densities()
        middle = (edges[1:] + edges[:-1]) / 2
        density = np.log2(shares / np.diff(edges))  # [shapes, cells], per unit of |z|
        # A number at z costs what it would at z / factor, and log2(factor) more.
        self.costs = np.array(
            [[math.log2(f) - np.interp(middle / f, middle, d) for d in density] for f in _FACTORS]
        )

    def __call__(
        self, counts: NDArray[Any], shape: NDArray[np.int64] | None = None
    ) -> tuple[Doubles, NDArray[np.int64]]:
        """Factor and shape of each row of counts [channels, cells]. `shape`: chosen already."""
        spent = np.einsum("fsc,nc->fns", self.costs, counts, optimize=True)
        if shape is None:
            shape = spent.min(axis=0).argmin(axis=1)
        own = np.take_along_axis(spent, shape[None, :, None], axis=2)[..., 0]
        return _FACTORS[own.argmin(axis=0)], shape
