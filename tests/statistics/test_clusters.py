"""K-means finds clusters that are there."""

from __future__ import annotations

import numpy as np

from kvzip.statistics.clusters import far_apart, k_means, nearest


def test_clusters_far_from_each_other_are_found():
    rng = np.random.default_rng(0)
    true = 30 * rng.normal(size=(5, 3))
    kind = rng.integers(0, 5, 600)
    points = true[kind] + rng.normal(size=(600, 3))
    centres = k_means(points, far_apart(points, 5, rng), steps=10)
    owner = nearest(points, centres)
    for r in range(5):
        [found] = set(owner[kind == r])
        assert np.allclose(centres[found], points[kind == r].mean(axis=0))


def test_points_that_are_all_alike_have_centres():
    points = np.ones((20, 2))
    centres = k_means(points, far_apart(points, 3, np.random.default_rng(0)), steps=3)
    assert np.array_equal(centres, np.ones((3, 2)))


def test_a_step_never_makes_distances_greater():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(400, 4))
    centres, before = points[:6], np.inf
    for _ in range(8):
        total = ((points - centres[nearest(points, centres)]) ** 2).sum()
        assert total <= before + 1e-9
        before, centres = total, k_means(points, centres, steps=1)
