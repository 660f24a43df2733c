"""Regions: which tokens share a predictor, as the greatest of linear scores of small integers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvzip.statistics.clusters import far_apart, k_means
from kvzip.statistics.gaussian import Doubles
from kvzip.statistics.ridge import held_factor

DIRECTIONS = 32
_STEPS = 25


class Scores:
    """`centre` int8 [regions, inputs] and `bias` int32 [regions]."""

    def __init__(self, weights: Doubles, bias: Doubles):
        """From scores `weights.T @ input + bias`, [inputs, regions] and [regions]."""
        weights = weights - weights.mean(axis=1, keepdims=True)  # what is common decides nothing
        step = max(np.abs(weights).max(initial=0.0), 1e-30) / 127
        self.centre = np.rint(weights.T / step).astype(np.int8)
        self.bias = np.clip(np.rint((bias - bias.max()) / step), -(2**30), 2**30).astype(np.int32)

    def regions(self, inputs: NDArray[np.int8]) -> NDArray[np.intp]:
        """The region of each token, inputs [tokens, inputs]."""
        scores = inputs.astype(np.float32) @ self.centre.T.astype(np.float32)
        found: NDArray[np.intp] = (scores + self.bias.astype(np.float32)).argmax(axis=1)
        return found


def find(inputs: NDArray[np.int8], weights: Doubles, left: Doubles, regions: int) -> Scores:
    """Regions of tokens that are predicted alike: k-means over the principal directions of the
    prediction, whitened by the covariance `left` [outputs, outputs] of what it leaves.

    `inputs` [tokens, inputs] is a sample, `weights` [inputs, outputs] the predictor of all.
    """
    values = inputs.astype(np.float32)
    values -= (mean := values.mean(axis=0))
    floor = 1e-6 * np.trace(left) / len(left) + 1e-30
    # Of fewer tokens than channels, and of constant ones, `left` is definite by its floor alone.
    whitened = np.linalg.solve(held_factor(left, floor), weights.T).T
    spread = whitened.T @ (values.T @ values / len(values)).astype(np.float64) @ whitened
    _, directions = np.linalg.eigh(spread)
    onto = whitened @ directions[:, -DIRECTIONS:]
    points = values @ onto.astype(np.float32)
    rng = np.random.default_rng(0)
    few = points[rng.permutation(len(points))[:8192]].astype(np.float64)
    centres = k_means(points, far_apart(few, regions, rng), _STEPS)
    return Scores(onto @ centres.T, -(centres**2).sum(axis=1) / 2 - mean @ onto @ centres.T)
