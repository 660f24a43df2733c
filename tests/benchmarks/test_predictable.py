"""The document that `make bench-gpu` has predicted."""

from __future__ import annotations

from support import assert_same

import kvzip
from kvzip.benchmarks.predictable import predictable


def test_it_is_predicted_by_about_as_much_as_a_real_one():
    snapshot, profile = predictable(4, 2, 32, 128)
    blob = kvzip.encode(snapshot, "predictive", profile, threads=1)
    assert_same(kvzip.decode(blob, profile, threads=1), snapshot)
    plain = len(kvzip.encode(snapshot, "channel", threads=1, grids=False))
    assert 0.7 * plain < len(blob) < 0.92 * plain
