"""Ridge regression from sums of products: weights W with which inputs x say the targets y, x W.

Gram is the sum of the products of inputs with each other, [inputs, inputs], cross that of inputs
with targets, [inputs, targets], own that of targets with each other. Any of them may be divided by
the number of tokens, if all are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def shrinkage(inputs: int, tokens: float) -> float:
    """The penalty on weights as a share of their inputs' variance. Few tokens say little of many
    inputs; then weights are held back."""
    return max(1e-4, 0.02 * inputs / max(tokens, 1))


def ridge(gram: Doubles, cross: Doubles, penalty: Any) -> Doubles:
    """Weights [inputs, targets] of least squared error, each input's weights held back by its
    penalty (Hoerl and Kennard 1970, Technometrics 12). `penalty`: [inputs], in gram's units."""
    return np.asarray(np.linalg.solve(gram + np.diag(penalty), cross), np.float64)


def residual(weights: Doubles, gram: Doubles, cross: Doubles, own: Doubles) -> Doubles:
    """Products with each other of what the weights leave of the targets, [targets, targets]."""
    said = weights.T @ cross
    return own - said - said.T + weights.T @ gram @ weights
