"""Densities give probabilities that add up to one, on the grids of all formats."""

from __future__ import annotations

import numpy as np
import pytest

from kvzip import dtypes
from kvzip.statistics import densities


def every_number(dtype):
    form = dtypes.get(dtype)
    return np.arange(1 << form.bits, dtype=np.uint32).astype(form.uint)


@pytest.mark.parametrize("dtype", [n for n in dtypes.NAMES if dtypes.get(n).bits <= 16])
@pytest.mark.parametrize(("p", "s"), [(0.0, 1.0), (3.7, 0.01), (-1e3, 40.0), (1e-6, 1e-9)])
def test_probabilities_of_all_bit_patterns_add_up_to_one(dtype, p, s):
    numbers = every_number(dtype)
    low, high = (e[:, np.newaxis] for e in densities.edges(numbers, dtype))
    weights = np.random.default_rng(1).dirichlet(np.ones(len(densities.COMPONENTS)))[np.newaxis]
    where = np.full((len(numbers), 1), p), np.full((len(numbers), 1), s)
    bits = densities.code_length(low, high, *where, weights, dtypes.get(dtype).bits)
    total = np.exp2(-bits.astype(np.float64)).sum()
    # Patterns that are no numbers have only their even share, so it is 1 to the last digits.
    assert total == pytest.approx(1, abs=2e-4)
    assert np.isfinite(bits).all()


@pytest.mark.parametrize("dtype", [n for n in dtypes.NAMES if dtypes.get(n).bits <= 32])
def test_neighbours_share_an_edge(dtype):
    """On the grid of any format, subnormals and both zeros included."""
    form = dtypes.get(dtype)
    rng = np.random.default_rng(0)
    some = np.concatenate([rng.integers(0, 1 << form.bits, 500), [0, 1, 1 << (form.bits - 1)]])
    ordered = np.sort(dtypes.to_ordered(some.astype(form.uint), dtype))
    real = dtypes.finite(dtypes.from_ordered(ordered, dtype), dtype)
    next_ordered = ordered + form.uint.type(1)
    above = dtypes.from_ordered(next_ordered, dtype)
    both = real & dtypes.finite(above, dtype) & (next_ordered > ordered)
    low, high = densities.edges(dtypes.from_ordered(ordered, dtype), dtype)
    assert np.array_equal(high[both], densities.edges(above, dtype)[0][both])
    assert (low[real] < high[real]).sum() >= real.sum() - 2  # half of a smallest step may vanish
    assert not low[~real].any()
    assert not high[~real].any()


def test_a_mixture_costs_what_the_distribution_does():
    """Against the differential entropy of a normal distribution on a grid much finer than it."""
    rng = np.random.default_rng(3)
    step, count = 2.0**-8, 4000
    at = np.round(rng.normal(size=(count, 4)) / step) * step
    low, high = at - step / 2, at + step / 2
    weights = densities.mixture(low, high)
    assert weights.sum(axis=1) == pytest.approx(np.ones(4))
    fresh = np.round(rng.normal(size=(count, 4)) / step) * step
    ones = np.zeros_like(fresh), np.ones_like(fresh)
    bits = densities.code_length(fresh - step / 2, fresh + step / 2, *ones, weights, 16).mean()
    true = 0.5 * np.log2(2 * np.pi * np.e) - np.log2(step)
    assert true - 0.03 < bits < true + 0.03


@pytest.mark.parametrize("freedom", [1.6, 3.0, 5.0, 20.0])
def test_students_t_is_scaled_to_a_mean_deviation_of_one(freedom):
    """By its share below each edge; what lies beyond the last edge counts as there."""
    edges = np.geomspace(1e-4, 1e3, 20_000)
    below = densities.student_t(freedom, edges)
    assert (np.diff(below) >= 0).all()
    middle = (edges[1:] + edges[:-1]) / 2
    mean = (middle * np.diff(below)).sum() + edges[-1] * (1 - below[-1])
    # A tail of 1.6 degrees of freedom is long: part of its mean lies beyond the grid.
    assert mean == pytest.approx(1, abs=0.1 if freedom < 2 else 1e-3)
