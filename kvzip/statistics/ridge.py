"""Ridge regression from sums of products: weights W with which inputs x say the targets y, x W.

Gram is the sum of the products of inputs with each other, [inputs, inputs], cross that of inputs
with targets, [inputs, targets], own that of targets with each other. Any of them may be divided by
the number of tokens, if all are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floating = NDArray[Any]
"""Numbers of 32 or 64 bits."""
_SMALL = 64


def shrinkage(inputs: int, tokens: float) -> float:
    """The penalty on weights as a share of their inputs' variance. Few tokens say little of many
    inputs; then weights are held back."""
    return max(1e-4, 0.02 * inputs / max(tokens, 1))


def ridge(gram: Floating, cross: Floating, penalty: Any) -> Floating:
    """Weights [inputs, targets] of least squared error, each input's weights held back by its
    penalty (Hoerl and Kennard 1970, Technometrics 12), in the precision of `gram` and `cross`.
    `penalty`: [inputs], in gram's units."""
    return solved(held_factor(gram, penalty), cross)


def held_factor(gram: Floating, penalty: Any) -> Floating:
    """The :func:`factor` of `gram` with the penalties of :func:`ridge` on its diagonal: in double
    precision, and with ten times as much and so on, where rounding has left none otherwise."""
    lower, diagonal = gram.copy(), np.diag_indices(len(gram))
    lower[diagonal] += penalty
    try:
        factor(lower)
        return lower
    except np.linalg.LinAlgError:
        held = gram.astype(np.float64)
    least = 1e-12 * max(np.abs(gram[diagonal]).max(initial=0.0), 1e-30)
    times = 1.0
    while True:
        held[diagonal] = gram[diagonal] + times * np.maximum(penalty, least)
        try:
            return np.asarray(np.linalg.cholesky(held), gram.dtype)
        except np.linalg.LinAlgError:
            if times > 1e13:
                raise
            times *= 10


def solved(lower: Floating, right: Floating) -> Floating:
    """The X of `lower` `lower`^T X = `right`, for a lower triangle."""
    found = right.copy()
    _divide(lower, found, transposed=False)
    _divide(lower, found, transposed=True)
    return found


def divided(lower: Floating, right: Floating) -> Floating:
    """The X of `lower` X = `right`, for a lower triangle."""
    found = right.copy()
    _divide(lower, found, transposed=False)
    return found


def factor(gram: Floating) -> None:
    """Put in the place of `gram` the lower triangle whose product with its transpose it is, in the
    same precision. Raises numpy.linalg.LinAlgError where it is not definite. By halves: of
    thousands of rows it takes a quarter of the time of NumPy's."""
    n = len(gram)
    if n <= _SMALL:
        gram[...] = np.linalg.cholesky(gram)
        return
    half = n // 2
    first, below, last = gram[:half, :half], gram[half:, :half], gram[half:, half:]
    factor(first)
    turned = divided(first, gram[:half, half:])
    below[...] = turned.T
    last -= turned.T @ turned  # of which NumPy computes a half, as it is one array
    gram[:half, half:] = 0
    factor(last)


def _divide(lower: Floating, right: Floating, transposed: bool) -> None:
    """:func:`divided` in place. By halves, since NumPy solves no triangles and products are what
    processors do fastest."""
    n = len(lower)
    if n <= _SMALL:
        inverse = np.linalg.inv(lower)
        right[...] = (inverse.T if transposed else inverse) @ right
        return
    half = n // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    if transposed:
        _divide(last, right[half:], transposed)
        right[:half] -= below.T @ right[half:]
        _divide(first, right[:half], transposed)
    else:
        _divide(first, right[:half], transposed)
        right[half:] -= below @ right[:half]
        _divide(last, right[half:], transposed)


def residual(weights: Floating, gram: Floating, cross: Floating, own: Floating) -> Floating:
    """Products with each other of what the weights leave of the targets, [targets, targets]."""
    half = weights.T @ (gram @ weights - cross - cross)
    return np.asarray(own + (half + half.T) / 2)
