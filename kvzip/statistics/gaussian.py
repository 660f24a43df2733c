"""What channels say of each other, by their covariance, as if all were normal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def cholesky(covariance: Doubles, added: float = 1e-4) -> Doubles:
    """The lower factor of a covariance [channels, channels].

    `added` is the share of its own variance that each channel gets on top, so that a covariance
    of few tokens is definite and channels are not expected too exactly; more where that is not
    enough.
    """
    covariance = (covariance + covariance.T) / 2
    diagonal = np.diag(covariance)
    floor = max(diagonal.max(initial=0.0) * 1e-9, 1e-30)
    for share in added * 10.0 ** np.arange(6):
        try:
            found = np.linalg.cholesky(covariance + np.diag(np.maximum(diagonal * share, floor)))
        except np.linalg.LinAlgError:
            continue
        return np.asarray(found)
    return np.diag(np.sqrt(np.maximum(diagonal, floor)))


class Conditional(NamedTuple):
    """What each channel is expected to be from those before, and what is left of it."""

    coefficients: Doubles
    """[channels, channels]; below the diagonal."""
    variance: Doubles
    """What variance is left, [channels]."""
    shared: Doubles
    """The covariance that is left between the two of each pair, [pairs]."""


def conditional(
    lower: Doubles, pairs: Sequence[tuple[int, int]], starts: Sequence[int] | None = None
) -> Conditional:
    """Each channel from the channels of the groups before its own.

    `lower` [channels, channels] is the Cholesky factor of their covariance. The rows of its
    inverse, with a unit diagonal, are minus the coefficients on the channels before (Pourahmadi
    1999, Biometrika 86). `starts`: where groups begin, and the end. Without, only the two of a pair
    are a group.
    """
    if starts is None:
        seconds = {b for _, b in pairs}
        starts = [c for c in range(len(lower) + 1) if c not in seconds]
    spread = np.diag(lower).copy()
    coefficients: Doubles = -np.tril(np.linalg.inv(lower / spread), -1)
    variance = spread**2
    covariance = np.zeros(lower.shape)
    for a, b in itertools.pairwise(starts):
        # The channels of a group see what comes before it, and not each other.
        own = np.linalg.inv(np.eye(b - a) - coefficients[a:b, a:b])
        coefficients[a:b, :a] = own @ coefficients[a:b, :a]
        coefficients[a:b, a:b] = 0.0
        covariance[a:b, a:b] = (own * variance[a:b]) @ own.T
    firsts, others = (np.array([pair[i] for pair in pairs], np.intp) for i in (0, 1))
    return Conditional(coefficients, np.diag(covariance).copy(), covariance[firsts, others])


def turned(
    a: NDArray[Any],
    b: NDArray[Any],
    c: NDArray[Any],
    sin: NDArray[Any],
    cos: NDArray[Any],
    least: float = 0.0,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """What RoPE's turn makes of a pair of channels with variances `a` and `b` and covariance `c`:
    the first's variance, the second's given the first, and the slope of the second on the first.

    The covariance is that of R C R', R the turn; the rest is a Schur complement. All arrays
    broadcast with each other. `least`: what variance there is at least.
    """
    first = np.maximum(a * cos**2 - 2 * c * sin * cos + b * sin**2, least)
    both = (a - b) * sin * cos + c * (cos**2 - sin**2)
    rest = np.maximum(a * b - c * c, 1e-6 * a * b + least) / first
    return first, rest, both / first
