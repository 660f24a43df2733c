"""Linear predictors of one layer from sums of products, and their integers.

A region's sums are one matrix G of [1 ; x ; y]: a one, inputs, targets. All that a predictor is
made from (weights, what they leave, on which other documents) comes out of such matrices, so that
documents are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.predictive.blas import side_by_side
from kvzip.statistics.gaussian import cholesky
from kvzip.statistics.ridge import divided, held_factor, residual, shrinkage, solved

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCKS = 128, 16  # inputs to which the errors of those before go at once, and of these again
FARTHEST = 16.0
SHRINK_TOKENS = 2000  # of all regions that count in each one's regression and covariance


def normalised(targets: Floats, mean: Floats, deviation: Floats) -> Floats:
    """In deviations; numbers far outside of what is usual must not drown the others."""
    with np.errstate(over="ignore"):
        steps: Floats = np.clip((targets - mean) / deviation, -FARTHEST, FARTHEST)
    return steps


@dataclass
class Predictor:
    """What a region needs, in floating point: inputs as the codec's small integers, targets in
    units of `Sums.deviation` around `Sums.mean`."""

    rounded: NDArray[np.int8]  # [inputs, outputs]
    scale: Doubles  # [outputs]
    bias: Doubles  # [outputs]
    covariance: Doubles  # of what is left


class Sums:
    """G of each region and fold; folds are documents apart, to predict one from the others."""

    def __init__(self, inputs: int, mean: Floats, deviation: Floats, regions: int, folds: int):
        self.inputs, self.mean, self.deviation = inputs, mean, deviation
        size = inputs + 1 + len(mean)
        self.total = np.zeros((regions, folds, size, size), np.float32)
        self.count = np.zeros((regions, folds))

    def add(self, region: int, fold: int, inputs: NDArray[np.int8], targets: Floats) -> None:
        """Tokens of one region and fold: inputs [tokens, inputs], targets [tokens, outputs]."""
        rows = np.empty((len(inputs), self.total.shape[-1]), np.float32)
        rows[:, 0] = 1
        rows[:, 1 : self.inputs + 1] = inputs
        rows[:, 1 : self.inputs + 1] *= 1 / 16  # sums stay where float32 is exact enough
        rows[:, self.inputs + 1 :] = normalised(targets, self.mean, self.deviation)
        self.total[region, fold] += rows.T @ rows
        self.count[region, fold] += len(rows)

    def factor(self, total: Floats) -> Floats:
        """Of a ridge regression the lower factor of the products of [1 ; x]. With the one first,
        the rest is the factor of x around its mean."""
        i = self.inputs
        variance = np.trace(total[1 : i + 1, 1 : i + 1]) / max(i, 1)
        held = variance * shrinkage(i, self.count.sum()) + 1e-9
        penalty = np.full(i + 1, held, np.float32)
        penalty[0] = 1e-9 * total[0, 0] + 1e-9
        return held_factor(total[: i + 1, : i + 1], penalty)

    def solve(self, total: Floats) -> Floats:
        """The weights of a ridge regression, [1 + inputs, outputs]."""
        i = self.inputs + 1
        return solved(self.factor(total), total[:i, i:])

    def left(self, weights: Floats, total: Floats) -> Doubles:
        """Products with each other of what the weights leave of the outputs."""
        i = self.inputs + 1
        found = residual(weights, total[:i, :i], total[:i, i:], total[i:, i:]).astype(np.float64)
        own = np.diag_indices(len(found))
        found[own] = np.maximum(found[own], 0)  # rounding may leave less than nothing
        return found

    def predictors(self, rounding: float) -> tuple[list[Predictor], float]:
        """One a region, and the bits a number that the regions save over one alone (estimated on
        documents apart, as if all were normal). `rounding`: bits a number that rounded weights may
        cost."""
        regions, folds = self.count.shape
        count = self.count.sum(axis=1)
        whole = self.total.sum(axis=(0, 1))
        tokens = count.sum()
        width = len(self.mean)
        left, common = np.zeros((regions, width, width)), np.zeros((width, width))
        for f in range(folds):
            apart = self.total[:, f].sum(axis=0)
            rest, rest_tokens = whole - apart, tokens - self.count[:, f].sum()
            if rest_tokens < 1:  # one fold alone
                rest, rest_tokens = whole.copy(), tokens
            common += self.left(self.solve(rest), apart)
            del apart
            if regions > 1:
                rest *= np.float32(SHRINK_TOKENS / rest_tokens)
                for r, found in enumerate(side_by_side(partial(self._apart, rest, f), regions)):
                    left[r] += found
        if regions == 1:
            left[0] = common
        common /= tokens
        mean = left.sum(axis=0) / tokens
        shrink = SHRINK_TOKENS if regions > 1 else 0
        covariances = [(left[r] + shrink * mean) / (count[r] + shrink) for r in range(regions)]
        del left
        whole *= np.float32(shrink / tokens)

        def made(r: int) -> tuple[Predictor, float]:
            volume = log_volume(covariances[r])
            return self._predictor(r, whole, covariances[r], rounding), count[r] / tokens * volume

        predictors, volumes = zip(*side_by_side(made, regions), strict=True)
        return list(predictors), (log_volume(common) - sum(volumes)) / width

    def _apart(self, rest: Floats, fold: int, region: int) -> Doubles:
        """Of a region's tokens in one fold, what a predictor leaves that was made from those in the
        others, and from `rest`, which is of all regions."""
        weights = self.solve(self._with(rest, region, without=fold))
        return self.left(weights, self.total[region, fold])

    def _with(self, shared: Floats, region: int, without: int | None = None) -> Floats:
        """G of `shared` and of a region, of all its folds or without one."""
        total = shared.copy()
        for fold, own in enumerate(self.total[region]):
            if fold != without:
                total += own
        return total

    def _predictor(
        self, region: int, shared: Floats, covariance: Doubles, rounding: float
    ) -> Predictor:
        """A region's, from its own tokens and what is `shared` by all. `covariance`: of what such a
        predictor leaves, to which is added what rounding does."""
        total, i = self._with(shared, region), self.inputs + 1
        factor = self.factor(total)
        rounded, scale, added = round_weights(
            solved(factor, total[:i, i:])[1:],
            factor[1:, 1:],
            total[0, 0],
            conditional_variance(covariance),
            rounding,
        )
        covariance[np.diag_indices(len(covariance))] += added
        # The constant comes last and takes up what rounding did to the mean.
        spared = total[0, i:] - total[0, 1:i] @ (rounded * scale)
        bias = (spared / total[0, 0]).astype(np.float64)
        return Predictor(rounded, scale.astype(np.float64) / 16, bias, covariance)


def log_volume(covariance: Doubles) -> float:
    """Half of the determinant's binary logarithm: bits of a normal vector, but for a constant."""
    return float(np.log2(np.diag(cholesky(covariance))).sum())


def conditional_variance(covariance: Doubles) -> Doubles:
    """What variance is left of each channel where all others are known."""
    inverse = divided(cholesky(covariance), np.eye(len(covariance)))
    found: Doubles = 1 / (inverse**2).sum(axis=0)
    return found


def round_weights(
    weights: Floats, lower: Floats, count: float, left: Doubles, rounding: float
) -> tuple[NDArray[np.int8], Floats, Doubles]:
    """Weights [inputs, outputs] as int8, the step of each output's, and the variance that rounding
    adds to what is left of it. `lower`: lower factor of the sums of the inputs' products around
    their mean, over `count` tokens; `left`: what variance is left of each output where all others
    are known, [outputs]; `rounding`: bits a number that rounding may cost, more where not all
    weights would fit in int8.

    One input after the other is rounded, the last one first, and the error spread over the inputs
    to come so that it shows least in the outputs (Frantar et al. 2022, GPTQ, arXiv 2210.17323).
    With the products as L L^T that is to round in each row of L^T (weights - rounded) what the rows
    below leave (Babai's nearest plane; Chen et al. 2025, arXiv 2507.18553), so nothing is inverted.
    What is left in row i is even within half a step, so that steps s add s^2 / 12 sum(L_ii^2) /
    count to the variance v, which costs log2(1 + that / v) / 2 bits.
    """
    finest = np.maximum(np.abs(weights).max(axis=0, initial=0.0), 1e-30) / 127
    rounded = np.zeros(weights.shape, np.int8)
    diagonal = np.diag(lower)
    shown = float((diagonal.astype(np.float64) ** 2).sum()) / (12 * count)
    wide = np.sqrt((4.0**rounding - 1) * left / max(shown, 1e-30))
    scale = np.maximum(finest, wide.astype(np.float32))
    errors = np.zeros_like(weights)

    def round_rows(begin: int, end: int, wanted: Floats, blocks: Sequence[int]) -> None:
        """Rows whose weights, with what the rows after `end` leave, are `wanted`."""
        size = blocks[0] if blocks else 1
        for last in range(end, begin, -size):
            first = max(last - size, begin)
            some = wanted[first - begin : last - begin]
            if last < end:
                shares = lower[last:end, first:last] / diagonal[first:last]
                some += shares.T @ errors[last:end]
            if blocks:
                round_rows(first, last, some, blocks[1:])
            else:
                rounded[first] = np.clip(np.rint(some[0] / scale), -127, 127)
                errors[first] = weights[first] - rounded[first] * scale

    round_rows(0, len(weights), weights.copy(), BLOCKS)
    return rounded, scale, scale.astype(np.float64) ** 2 * shown
