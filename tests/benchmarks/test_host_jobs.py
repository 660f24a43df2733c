"""What a processor does for a GPU, timed without one."""

from __future__ import annotations

import pytest

import kvzip
from kvzip.benchmarks.host_jobs import measure
from kvzip.benchmarks.predictable import predictable


@pytest.mark.parametrize("codec", ["channel", "predictive", "raw"])
def test_host_jobs_are_timed_without_a_gpu(tmp_path, codec):
    snapshot, profile = predictable(layers=3, heads=2, dim=16, tokens=300)
    path = tmp_path / "doc.kvz"
    path.write_bytes(kvzip.encode(snapshot, codec, profile, block_tokens=100))
    found = measure(str(path), profile, runs=2)
    assert 0 < found["least"] <= found["median"]
    assert found["a layer"] == found["least"] / 3
