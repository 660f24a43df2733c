"""K-means: points told apart by the nearest of a few centres."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def nearest(points: NDArray[Any], centres: NDArray[Any]) -> NDArray[np.intp]:
    """Which centre [centres, dimensions] is nearest to each of the points [points, dimensions]."""
    found: NDArray[np.intp] = (points @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1)
    return found


def k_means(points: NDArray[Any], centres: NDArray[Any], steps: int) -> NDArray[Any]:
    """The centres after so many steps of Lloyd's algorithm (1982, IEEE Trans. Information Theory
    28): each becomes the mean of the points that it is nearest to."""
    centres = centres.copy()
    for _ in range(steps):
        owner = nearest(points, centres)
        for r in range(len(centres)):
            if (mine := owner == r).any():
                centres[r] = points[mine].mean(axis=0)
    return centres


def far_apart(points: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[Any]:
    """Centres to begin with that are far from each other (k-means++: Arthur and Vassilvitskii
    2007), `count` of the points."""
    centres = points[:1]
    distance = ((points - centres[0]) ** 2).sum(axis=1)
    for _ in range(count - 1):
        total = distance.sum()
        chosen = rng.choice(len(points), p=distance / total) if total > 0 else 0
        centres = np.concatenate([centres, points[chosen : chosen + 1]])
        distance = np.minimum(distance, ((points - centres[-1]) ** 2).sum(axis=1))
    return centres
