"""Numbers that are stored wide and take only values of a narrower format: found, narrowed, and
widened back to the same bits. spec.md has the arithmetic.

A writer calls :func:`find` for a sample of a part and, where there is a grid, :func:`narrow` for
each block; a reader calls :func:`widen` (:mod:`kvzip.container.grids`).
"""

from kvzip.grids.find import find, suspicions
from kvzip.grids.grid import HALVES, WIDE, Found, Grid, Narrow
from kvzip.grids.narrow import narrow
from kvzip.grids.widen import widen

__all__ = ["HALVES", "WIDE", "Found", "Grid", "Narrow", "find", "narrow", "suspicions", "widen"]
