"""Densities of numbers around what is expected: Student's t, and a mixture on a dtype's own grid.

Where the mixture expects a number y at p with a spread s, its probability is F((high-p)/s) -
F((low-p)/s), with low and high the midpoints between y and its neighbours on the grid. F is a
mixture of distributions with mean 0 and fixed relative scales; each channel has its own weights. A
small share of all probability is spread evenly over the dtype's bit patterns, NaNs and infinities
among them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits

Doubles = NDArray[np.float64]

_LOGISTIC = (0.016, 0.06, 0.2, 0.6, 1.5, 4.0)
_NORMAL = (0.5, 0.8, 1.25)
COMPONENTS = (
    *((1 / scale, 0.0) for scale in _LOGISTIC),
    *((1.5976 / scale, 0.07056 / scale**3) for scale in _NORMAL),
)
"""(a, b) of the distributions F(z) = 1 / (1 + exp(-a z - b z^3)), z in units of s. With b = 0 they
are logistic; the others are normal to 0.0002 (Page 1977, Applied Statistics 26)."""
EVEN = 2.0**-12
"""The share of probability that all bit patterns have alike."""
_GRID = np.concatenate([np.linspace(0, 60, 60001), np.geomspace(60.01, 4096, 20000)])
"""Where Student's t is integrated."""
_FAR = 1e10  # no z beyond
_PRIOR = 300.0  # numbers of the average channel that stand behind each channel's own
_TURNS = 24  # of expectation maximisation


def student_t(freedom: float, edges: Doubles) -> Doubles:
    """The share of numbers with |z| below each edge, where z has Student's t distribution of so
    many degrees of freedom (Student 1908, Biometrika 6), scaled to a mean deviation of 1."""
    density = (1 + _GRID**2 / freedom) ** (-(freedom + 1) / 2)
    share = _integral(density, _GRID)
    mean = _integral(density * _GRID, _GRID)[-1] / share[-1]
    return np.asarray(np.interp(edges * mean, _GRID, share / share[-1]))


def _integral(values: Doubles, grid: Doubles) -> Doubles:
    """The integral up to each point of the grid, by trapezoids."""
    steps = np.diff(grid) * (values[1:] + values[:-1]) / 2
    return np.concatenate([[0.0], np.cumsum(steps)])


def edges(bits: Bits, dtype: str) -> tuple[Doubles, Doubles]:
    """Where each number's part of the real line begins and ends: the midpoints to its neighbours.

    The outermost finite numbers' parts reach to infinity; a number that is not finite has none,
    and gets low = high = 0. Formats have at most 32 bits, so that midpoints are exact.
    """
    if bits.dtype.itemsize < 4:
        low, high = _all_edges(dtype)
        return low[bits], high[bits]
    return _edges(bits, dtype)


@cache
def _all_edges(dtype: str) -> tuple[Doubles, Doubles]:
    """The edges of every number of a format of 8 or 16 bits."""
    form = dtypes.get(dtype)
    return _edges(np.arange(1 << form.bits, dtype=form.uint), dtype)


def _edges(bits: Bits, dtype: str) -> tuple[Doubles, Doubles]:
    """What `edges` gives, from the numbers themselves."""
    real = dtypes.finite(bits, dtype)
    # What is not finite stands aside as zero until the end.
    safe = np.where(real, bits, bits.dtype.type(0))
    place, one = dtypes.to_ordered(safe, dtype), bits.dtype.type(1)
    value = dtypes.to_float64(safe, dtype)

    below, above = place - one, place + one

    def middle(ordered: Bits, is_there: NDArray[np.bool_], beyond: float) -> Doubles:
        neighbour = dtypes.from_ordered(ordered, dtype)
        near = is_there & dtypes.finite(neighbour, dtype)
        other = dtypes.to_float64(np.where(near, neighbour, bits.dtype.type(0)), dtype)
        return np.where(real, np.where(near, (value + other) / 2, beyond), 0.0)

    return middle(below, below < place, -np.inf), middle(above, above > place, np.inf)


def code_length(
    low: Doubles, high: Doubles, p: NDArray[Any], s: NDArray[Any], weights: Doubles, bits: int
) -> NDArray[np.float32]:
    """Ideal bits of numbers with edges `low`, `high` that are expected at `p` with spread `s`.

    All [tokens, channels]; `weights`: [channels, components]; `bits`: width of the dtype.
    """
    found = np.empty(low.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in np.array_split(np.arange(len(low)), max(1, low.size >> 17)):
            a, b = (low[rows] - p[rows]) / s[rows], (high[rows] - p[rows]) / s[rows]
            share = _share(a, b, weights)
            found[rows] = -np.log2(share * (1 - EVEN) + EVEN * 2.0**-bits)
    return found


def _share(low: NDArray[Any], high: NDArray[Any], weights: NDArray[Any]) -> Doubles:
    """F(high) - F(low), F the mixture."""
    # On the negative side, where F is small, differences keep their digits.
    mirrored = low + high > 0
    a, b = (
        np.clip(np.where(mirrored, -x, y), -_FAR, _FAR).astype(np.float64)
        for x, y in ((high, low), (low, high))
    )
    cubes = a * a * a, b * b * b  # numpy's power takes a hundred times as long
    total = np.zeros_like(a)
    for k, component in enumerate(COMPONENTS):
        if weights[:, k].any():
            share = _below(b, cubes[1], *component)
            share -= _below(a, cubes[0], *component)
            total += np.multiply(share, weights[:, k], out=share)
    return np.asarray(np.maximum(total, 0))


def _below(x: Doubles, cube: Doubles, one: float, three: float) -> Doubles:
    """F(x) of one component."""
    found = x * -one
    if three:
        found -= three * cube
    np.exp(found, out=found)
    found += 1
    return np.divide(1, found, out=found)


def mixture(low: NDArray[Any], high: NDArray[Any]) -> Doubles:
    """Weights [channels, components] that code numbers in the fewest bits, given where their parts
    of the line begin and end in units of their spreads, [numbers, channels].

    Expectation maximisation; a channel of few numbers keeps to the average one.
    """
    kinds = np.eye(len(COMPONENTS))
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [_share(low, high, kinds[k : k + 1]).astype(np.float32) for k in range(len(kinds))]
    shares = np.stack(parts)  # [components, numbers, channels]
    pooled = np.full((len(kinds), 1), 1 / len(kinds), np.float32)
    thin = shares[:, :, :: max(1, low.shape[1] // 32)]
    for _ in range(_TURNS):
        pooled = _better(thin, pooled).mean(axis=1, keepdims=True)
    weights = np.repeat(pooled, low.shape[1], axis=1)
    lean = _PRIOR / (_PRIOR + len(low))
    for _ in range(_TURNS):
        weights = (1 - lean) * _better(shares, weights) + lean * pooled
    # Nothing is impossible because a calibration did not see it.
    whole = weights.T.astype(np.float64) + 1e-4
    return np.asarray(whole / whole.sum(axis=1, keepdims=True))


def _better(shares: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """One turn: the mean of the numbers' responsibilities, [components, channels]."""
    # What even probability gives, about.
    total = np.full(shares.shape[1:], np.float32(EVEN * 2.0**-16))
    for share, weight in zip(shares, weights, strict=True):
        total += share * weight
    np.divide(1, total, out=total)
    found = weights * [np.einsum("tc,tc->c", share, total) for share in shares]
    return np.asarray(found / np.maximum(found.sum(axis=0), 1e-30), np.float32)
