"""Ridge regression by factors: the weights that plain equations have, in both precisions."""

import numpy as np
import pytest

from kvzip.statistics.ridge import factor, residual, ridge


@pytest.mark.parametrize("inputs", [1, 128, 129, 300])
@pytest.mark.parametrize(("dtype", "close"), [(np.float64, 1e-9), (np.float32, 1e-3)])
def test_weights_solve_the_equations(inputs, dtype, close):
    rng = np.random.default_rng(inputs)
    x = rng.normal(size=(1000, inputs)) @ rng.normal(size=(inputs, inputs))
    y = rng.normal(size=(1000, 7))
    gram, cross = (x.T @ x).astype(dtype), (x.T @ y).astype(dtype)
    kept = gram.copy(), cross.copy()
    penalty = np.full(inputs, 0.01 * np.trace(gram) / inputs, dtype)
    found = ridge(gram, cross, penalty)
    assert found.dtype == dtype
    wanted = np.linalg.solve(x.T @ x + np.diag(penalty.astype(float)), x.T @ y)
    assert np.abs(found - wanted).max() <= close * np.abs(wanted).max()
    assert np.array_equal(gram, kept[0]) and np.array_equal(cross, kept[1])
    left = residual(found, gram, cross, (y.T @ y).astype(dtype))
    rest = y - x @ found
    assert np.abs(left - rest.T @ rest).max() <= 10 * close * np.abs(rest.T @ rest).max()


def test_a_factor_is_a_triangle_whose_square_is_the_matrix():
    x = np.random.default_rng(0).normal(size=(700, 515))
    gram = x.T @ x
    lower = gram.copy()
    factor(lower)
    assert not np.triu(lower, 1).any()
    assert np.allclose(lower @ lower.T, gram)
    with pytest.raises(np.linalg.LinAlgError):
        factor(gram - 2 * np.eye(515) * np.trace(gram))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_rounding_has_spoilt_is_solved_all_the_same(dtype):
    """Inputs that say the same, and no penalty: a factor there is none, and weights that fit."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 60))
    gram = (x.T @ x).astype(dtype)
    gram -= np.eye(60, dtype=dtype) * gram.trace() * 1e-7
    cross = gram @ rng.normal(size=(60, 3)).astype(dtype)
    with pytest.raises(np.linalg.LinAlgError):
        factor(gram.copy())
    found = ridge(gram, cross, np.zeros(60))
    assert np.linalg.norm(gram @ found - cross) < 1e-3 * np.linalg.norm(cross)
