"""Golden files of the predictive codec are read by what their profile predicts, and by nothing in
its place. That they stay readable: `tests/container/test_golden.py`."""

from __future__ import annotations

import golden_files
import pytest
from golden_files import NOW
from predictive_profiles import kinds

import kvzip
from kvzip.codecs.common.rotation import ROUNDINGS, is_side_by_side

FILES = sorted(
    name
    for name, line in golden_files.manifest(NOW).items()
    if name.startswith("predictive-") and name.endswith(".kvz")
)


def profile_of(name: str) -> kvzip.Profile:
    return kvzip.Profile.load(NOW / golden_files.manifest(NOW)[name]["profile"])


@pytest.mark.parametrize("name", FILES)
def test_golden_files_are_predicted(name):
    """The profile's arithmetic is what a file is read by, not `channel` or `raw` in its place."""
    profile = profile_of(name)
    damaged = {name: array.copy() for name, array in profile.tensors.items()}
    damaged["1.bias"] += 1 << 10
    other = kvzip.Profile(damaged, profile.description)
    made = kvzip.encode(golden_files.written(name), "predictive", other)
    assert len(made) != (NOW / name).stat().st_size


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_golden_pairs_before_rope_are_among_them(rounding):
    name = golden_files.PREDICTIVE_BEFORE_ROPE[rounding]
    profile = profile_of(name)
    assert 4 in kinds(NOW / name, profile)[1, "k"]
    with kvzip.open(NOW / name, profile) as reader:
        assert reader._blocks.stored(reader.index.rows[1, "k"][1])[2] == rounding
    assert profile.description["version"] == (2 if is_side_by_side(rounding) else 1)
