"""What channels say of each other adds up to their covariance."""

from __future__ import annotations

import numpy as np
import pytest

from kvzip.statistics.gaussian import cholesky, conditional, turned


def covariance_of(channels, tokens, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(tokens, channels)) @ rng.normal(size=(channels, channels))
    return rows.T @ rows / tokens


@pytest.mark.parametrize("tokens", [3, 200])
def test_a_factor_is_that_of_the_covariance_and_a_little_on_its_diagonal(tokens):
    """One of fewer tokens than channels, too, which is singular."""
    covariance = covariance_of(12, tokens)
    lower = cholesky(covariance)
    assert np.allclose(lower, np.tril(lower))
    extra = np.diag(lower @ lower.T) / np.diag(covariance) - 1
    assert np.allclose(extra, 1e-4, rtol=1e-6)
    off = ~np.eye(12, dtype=bool)
    assert np.allclose((lower @ lower.T)[off], covariance[off])


def test_dead_channels_have_a_factor():
    covariance = covariance_of(6, 100)
    covariance[2] = covariance[:, 2] = 0
    assert np.isfinite(cholesky(covariance)).all()
    assert np.isfinite(cholesky(np.zeros((4, 4)))).all()


@pytest.mark.parametrize("angle", [0.0, 0.3, 2.0, -1.1])
def test_a_turned_pair_has_the_covariance_of_what_is_turned(angle):
    covariance = covariance_of(2, 50, seed=3)
    sin, cos = np.sin(angle), np.cos(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    expected = turn @ covariance @ turn.T
    (a, c), (_, b) = covariance
    first, rest, slope = turned(a, b, c, sin, cos)
    assert first == pytest.approx(expected[0, 0])
    assert slope == pytest.approx(expected[0, 1] / expected[0, 0])
    assert rest == pytest.approx(np.linalg.det(expected) / expected[0, 0])


def test_each_channel_alone_leaves_what_the_determinant_says():
    covariance = covariance_of(8, 300)
    known = conditional(np.linalg.cholesky(covariance), [])
    assert np.log(known.variance).sum() == pytest.approx(np.linalg.slogdet(covariance)[1])
    left = (np.eye(8) - known.coefficients) @ covariance @ (np.eye(8) - known.coefficients).T
    assert np.allclose(left, np.diag(known.variance), atol=1e-9)
