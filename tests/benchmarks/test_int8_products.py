"""`predictive` next to its products."""

from __future__ import annotations

import pytest

from kvzip.benchmarks.predictable import predictable
from kvzip.benchmarks.products import measure, shapes

pytest.importorskip("torch")


def test_products_are_those_of_the_profile_and_are_timed_with_the_codec(tmp_path):
    snapshot, profile = predictable(layers=3, heads=2, dim=16, tokens=40)
    # The second layer is predicted from one layer, the third from two; each has 64 channels.
    assert list(shapes(profile)) == [(32, 64), (64, 64), (32, 64), (128, 64), (32, 64)]
    snapshot.save(tmp_path / "doc.safetensors")
    found = measure(profile, str(tmp_path / "doc.safetensors"), runs=1)
    assert list(found) == ["products", "decode", "encode"]
    assert all(spent > 0 for spent in found.values())
