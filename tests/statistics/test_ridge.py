"""Ridge regression by factors: the weights that plain equations have, in both precisions."""

import numpy as np
import pytest

from kvzip.statistics.ridge import lower_factor, residual, ridge


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
    lower = lower_factor(gram)
    assert not np.triu(lower, 1).any()
    assert np.allclose(lower @ lower.T, gram)
    with pytest.raises(np.linalg.LinAlgError):
        lower_factor(gram - 2 * np.eye(515) * np.trace(gram))


def test_equations_that_are_not_definite_are_solved_all_the_same():
    gram = np.array([[1.0, 2.0], [2.0, 1.0]])
    assert np.allclose(gram @ ridge(gram, np.eye(2), np.zeros(2)), np.eye(2))
