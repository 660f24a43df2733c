"""Linear maps from the layers before, by ridge regression on moments that documents add up to.

Vectors are one layer's keys (RoPE undone) and values of a token, in coding order; each has a name,
such as its layer's number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvzip.statistics.documents import inputs_of
from kvzip.statistics.gaussian import cholesky
from kvzip.statistics.ridge import residual, ridge, shrinkage

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Vectors = Mapping[int, Floats]
"""[tokens, width] by name."""
ADDED = 1e-5
"""The share of its own variance that a channel gets on top before a covariance is factored: less
than in a profile, whose coefficients are rounded."""


class Moments:
    """Means and second moments of vectors, summed over tokens."""

    def __init__(self, pairs: Iterable[tuple[int, int]]):
        """`pairs`: names whose products are wanted; of (a, b) and (b, a) either."""
        self.count = 0
        self._shift: dict[int, Floats] = {}
        self._sum: dict[int, Doubles] = {}
        self._product: dict[tuple[int, int], Doubles] = {}
        self._pairs = sorted({(min(p), max(p)) for p in pairs})

    @classmethod
    def of_layers(cls, layers: int) -> Moments:
        """For the prediction of every layer from `inputs_of` it."""
        wanted = [(*inputs_of(layer), layer) for layer in range(layers)]
        return cls((a, b) for names in wanted for a in names for b in names)

    def add(self, vectors: Vectors) -> None:
        """Add the tokens of one document."""
        # Sums of products in float32 are exact enough only around zero.
        if not self._shift:
            names = sorted({name for pair in self._pairs for name in pair})
            self._shift = {name: vectors[name].mean(axis=0) for name in names}
            width = {name: len(shift) for name, shift in self._shift.items()}
            self._sum = {name: np.zeros(width[name]) for name in names}
            self._product = {(a, b): np.zeros((width[a], width[b])) for a, b in self._pairs}
        around = {name: vectors[name] - shift for name, shift in self._shift.items()}
        self.count += len(next(iter(around.values())))
        for name, values in around.items():
            self._sum[name] += values.sum(axis=0, dtype=np.float64)
        for (a, b), total in self._product.items():
            total += around[a].T @ around[b]

    def mean(self, name: int) -> Doubles:
        """The mean of one vector, [width]."""
        return np.asarray(self._shift[name] + self._sum[name] / self.count)

    def covariance(self, a: int, b: int) -> Doubles:
        """The covariance of two vectors, [width of a, width of b]."""
        if a > b:
            return self.covariance(b, a).T
        means = np.outer(self._sum[a], self._sum[b]) / self.count**2
        return np.asarray(self._product[a, b] / self.count - means)

    def covariances(self, rows: Sequence[int], columns: Sequence[int]) -> Doubles:
        """Blocks of several names, side by side."""
        return np.block([[self.covariance(a, b) for b in columns] for a in rows])


@dataclass(frozen=True)
class Linear:
    """y is about bias + x W, x the input vectors one after the other."""

    inputs: tuple[int, ...]
    weights: Floats
    """[inputs' width, outputs]"""
    bias: Floats

    def __call__(self, vectors: Vectors) -> Floats:
        """The expected vectors, [tokens, outputs]."""
        tokens = len(next(iter(vectors.values())))
        found = np.tile(self.bias, (tokens, 1))
        start = 0
        for name in self.inputs:
            stop = start + vectors[name].shape[1]
            found += vectors[name] @ self.weights[start:stop]
            start = stop
        return found


def constant(moments: Moments, target: int) -> Linear:
    """The mean: a prediction from nothing."""
    mean = moments.mean(target).astype(np.float32)
    return Linear((), np.zeros((0, len(mean)), np.float32), mean)


def regress(moments: Moments, inputs: Sequence[int], target: int) -> Linear:
    """A ridge regression, inputs in units of their deviations."""
    inputs = tuple(inputs)
    if not inputs:
        return constant(moments, target)
    gram, cross = moments.covariances(inputs, inputs), moments.covariances(inputs, [target])
    penalty = shrinkage(len(gram), moments.count) * np.maximum(np.diag(gram), 1e-30)
    return linear_map(moments, inputs, target, ridge(gram, cross, penalty))


def linear_map(moments: Moments, inputs: tuple[int, ...], target: int, weights: Doubles) -> Linear:
    """With the bias that makes the mean right."""
    mean = np.concatenate([moments.mean(name) for name in inputs])
    bias = moments.mean(target) - mean @ weights
    return Linear(inputs, weights.astype(np.float32), bias.astype(np.float32))


def left_of(moments: Moments, linear: Linear, target: int) -> Doubles:
    """The covariance of what `linear` leaves of the target, around zero."""
    own = moments.covariance(target, target)
    if not linear.inputs:
        return own
    w = linear.weights.astype(np.float64)
    gram = moments.covariances(linear.inputs, linear.inputs)
    left = residual(w, gram, moments.covariances(linear.inputs, [target]), own)
    mean = np.concatenate([moments.mean(name) for name in linear.inputs])
    off = moments.mean(target) - linear.bias - mean @ w
    return np.asarray((left + left.T) / 2 + np.outer(off, off))


def low_rank(moments: Moments, linear: Linear, target: int, rank: int) -> Linear:
    """The map of so low a rank that loses least, errors counted in units of what `linear` leaves
    (reduced-rank regression: Izenman 1975, J. Multivariate Analysis 5)."""
    left = left_of(moments, linear, target)
    unit = cholesky(left, ADDED)
    gram = moments.covariances(linear.inputs, linear.inputs)
    w = linear.weights.astype(np.float64)
    whitened = np.linalg.solve(unit, w.T)  # [outputs, inputs]
    values, vectors = np.linalg.eigh(whitened @ gram @ whitened.T)
    top = vectors[:, np.argsort(values)[::-1][:rank]]
    kept = unit @ top @ top.T @ whitened
    return linear_map(moments, linear.inputs, target, kept.T)
