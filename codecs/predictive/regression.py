"""Linear predictors of one layer from sums of products, and their integers.

A region's sums are one matrix G of [x ; 1 ; y]: inputs, a one, targets. All that a predictor is
made from (weights, what they leave, on which other documents) comes out of such matrices, so that
documents are read once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

ANGLES = 32
BLOCK = 96  # inputs that are rounded before the error goes on to the others
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
        rows[:, : self.inputs] = inputs
        rows[:, : self.inputs] *= 1 / 16  # sums stay where float32 is exact enough
        rows[:, self.inputs] = 1
        rows[:, self.inputs + 1 :] = normalised(targets, self.mean, self.deviation)
        self.total[region, fold] += rows.T @ rows
        self.count[region, fold] += len(rows)

    def solve(self, total: Doubles) -> Doubles:
        """Weights [inputs + 1, outputs]; few tokens say little of many inputs: then they are held
        back."""
        i = self.inputs
        if not i:
            means: Doubles = total[:1, 1:] / max(total[0, 0], 1)
            return means
        ridge = np.trace(total[:i, :i]) / i * max(1e-4, 0.02 * i / max(self.count.sum(), 1)) + 1e-9
        damping = np.full(i + 1, ridge)
        damping[i] = 1e-9 * total[i, i] + 1e-9
        inputs, targets = total[: i + 1, : i + 1], total[: i + 1, i + 1 :]
        return np.asarray(np.linalg.solve(inputs + np.diag(damping), targets), np.float64)

    def left(self, weights: Doubles, total: Doubles) -> Doubles:
        """Products of what the weights leave."""
        i = self.inputs + 1
        cross = weights.T @ total[:i, i:]
        return total[i:, i:] - cross - cross.T + weights.T @ total[:i, :i] @ weights

    def predictors(self) -> tuple[list[Predictor], float]:
        """One a region, and the bits a number that the regions save over one alone (estimated on
        documents apart, as if all were normal)."""
        regions, folds = self.count.shape
        count = self.count.sum(axis=1)
        whole = self.total.sum(axis=(0, 1), dtype=np.float64)
        tokens = count.sum()
        width = len(self.mean)
        left, common = np.zeros((regions, width, width)), np.zeros((width, width))
        for f in range(folds):
            apart = self.total[:, f].astype(np.float64)
            rest, rest_tokens = whole - apart.sum(axis=0), tokens - self.count[:, f].sum()
            if rest_tokens < 1:  # one fold alone
                rest, rest_tokens = whole, tokens
            shared = self.solve(rest)
            common += self.left(shared, apart.sum(axis=0))
            for r in range(regions):
                weights = shared
                if regions > 1:
                    own = self.total[r].sum(axis=0, dtype=np.float64) - apart[r]
                    weights = self.solve(own + rest * (SHRINK_TOKENS / rest_tokens))
                left[r] += self.left(weights, apart[r])
        common /= tokens
        mean = left.sum(axis=0) / tokens
        made, saved = [], 0.0
        for r in range(regions):
            own = self.total[r].sum(axis=0, dtype=np.float64)
            shrink = 0
            if regions > 1:
                shrink = SHRINK_TOKENS
                own += whole * (shrink / tokens)
            covariance = (left[r] + shrink * mean) / (count[r] + shrink)
            i = self.inputs
            ones = own[i, :i]
            centred = own[:i, :i] - np.outer(ones, ones) / own[i, i]
            rounded, scale = round_weights(self.solve(own)[:i], centred)
            # The constant comes last and takes up what rounding did to the mean.
            spared = own[i, i + 1 :] - ones @ (rounded * scale)
            made.append(Predictor(rounded, scale / 16, spared / own[i, i], covariance))
            saved += count[r] / tokens * _log_volume(covariance)
        return made, (_log_volume(common) - saved) / width


def _log_volume(covariance: Doubles) -> float:
    return float(np.log2(np.diag(cholesky(covariance))).sum())


def round_weights(weights: Doubles, gram: Doubles) -> tuple[NDArray[np.int8], Doubles]:
    """Weights [inputs, outputs] as int8 and a scale for each output.

    One input after the other is rounded, and the error spread over the inputs to come so that it
    shows least in the outputs (Frantar et al. 2022, GPTQ, arXiv 2210.17323).
    """
    scale = np.maximum(np.abs(weights).max(axis=0, initial=0.0), 1e-30) / 127
    rounded = np.zeros(weights.shape, np.int8)
    n = len(weights)
    if not n:
        return rounded, scale
    left = weights.copy()
    damped = gram + np.eye(n) * (max(np.trace(gram) / n, 1e-9) * 1e-3)
    inverse = np.linalg.inv(damped)
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        errors = np.empty((end - begin, weights.shape[1]))
        for i in range(begin, end):
            rounded[i] = np.clip(np.rint(left[i] / scale), -127, 127)
            errors[i - begin] = (left[i] - rounded[i] * scale) / factor[i, i]
            left[i + 1 : end] -= np.outer(factor[i, i + 1 : end], errors[i - begin])
        left[end:] -= factor[begin:end, end:].T @ errors
    return rounded, scale


def within(
    lower: Doubles, pairs: Sequence[tuple[int, int]], starts: Sequence[int] | None = None
) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """Each channel from the channels of the groups before its own, by the Cholesky factor of their
    covariance: coefficients [channels, channels], what variance is left, and of each pair (first,
    second) the covariance left and the second's variance.

    `starts`: where groups begin, and the end. Without, only the two of a pair are a group.
    """
    if starts is None:
        seconds = {b for _, b in pairs}
        starts = [c for c in range(len(lower) + 1) if c not in seconds]
    spread = np.diag(lower).copy()
    # L^-1 with a unit diagonal: a row is minus the coefficients on the channels before.
    coefficients: Doubles = -np.tril(np.linalg.inv(lower / spread), -1)
    variance = spread**2
    covariance = np.zeros(lower.shape)
    for a, b in itertools.pairwise(starts):
        # The channels of a group see what comes before it, and not each other.
        own = np.linalg.inv(np.eye(b - a) - coefficients[a:b, a:b])
        coefficients[a:b, :a] = own @ coefficients[a:b, :a]
        coefficients[a:b, a:b] = 0.0
        covariance[a:b, a:b] = (own * variance[a:b]) @ own.T
    variance = np.diag(covariance).copy()
    firsts, others = (np.array([pair[i] for pair in pairs], np.intp) for i in (0, 1))
    return coefficients, variance, covariance[firsts, others], variance[others]


def cholesky(covariance: Doubles) -> Doubles:
    """Its lower factor; a covariance of too few tokens is made definite first."""
    covariance = (covariance + covariance.T) / 2
    diagonal = np.diag(covariance)
    floor = max(diagonal.max(initial=0.0) * 1e-9, 1e-30)
    for share in 10.0 ** np.arange(-4, 1):
        try:
            found = np.linalg.cholesky(covariance + np.diag(np.maximum(diagonal * share, floor)))
        except np.linalg.LinAlgError:
            continue
        return np.asarray(found)
    return np.diag(np.sqrt(np.maximum(diagonal, floor)))


def turned(a: Doubles, b: Doubles, c: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Pairs of variances a, b and covariance c, turned by the middle of each angle's cell:
    deviation of the first, of the second given the first, slope. Each [pairs, ANGLES]."""
    angle = (np.arange(ANGLES) + 0.5) * 2 * np.pi / ANGLES
    sin, cos = np.sin(angle), np.cos(angle)
    a, b, c = a[:, None], b[:, None], c[:, None]
    first = np.maximum(a * cos**2 - 2 * c * sin * cos + b * sin**2, 1e-30)
    both = (a - b) * sin * cos + c * (cos**2 - sin**2)
    rest = np.maximum(a * b - c * c, 1e-6 * a * b + 1e-30) / first
    return np.sqrt(first), np.sqrt(rest), both / first


def packed(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """[outputs, inputs] in blocks of four by four, [outputs/4, inputs/4, 4, 4]."""
    whole = np.pad(matrix, [(0, -n % 4) for n in matrix.shape])
    rows, columns = whole.shape
    return np.ascontiguousarray(whole.reshape(rows // 4, 4, columns // 4, 4).transpose(0, 2, 1, 3))


def int32(values: Any) -> NDArray[np.int32]:
    return np.asarray(np.clip(np.round(values), -(2**31) + 1, 2**31 - 1), np.int32)


def inverse(deviations: Any) -> NDArray[np.int32]:
    """2^28 / mean deviation in units."""
    return rescaled((1 << 28) / np.maximum(deviations, 1e-9), 1.0)


def rescaled(inverses: NDArray[Any], factors: Any) -> NDArray[np.int32]:
    """Inverses of deviations that are greater by these factors."""
    return np.asarray(np.clip(np.round(inverses / factors), 1, 1 << 26), np.int32)
