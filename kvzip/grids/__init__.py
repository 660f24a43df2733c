"""Numbers that are stored wide and take only values of a narrower format: found, narrowed, and
widened back to the same bits. spec.md has the arithmetic.

The container does not use grids yet: no file has one. A writer would call :func:`find` for a part
and, if a grid is found, store the arrays of the :class:`Found` as parts of their own, with its
`grid` in the header; a reader would call :func:`widen`.
"""

from kvzip.grids.find import find
from kvzip.grids.grid import Found, Grid
from kvzip.grids.widen import widen

__all__ = ["Found", "Grid", "find", "widen"]
