"""`make large` (tests/soak/large.py) with files that are small."""

from __future__ import annotations

import pytest
from soak import large


def test_every_step_on_a_small_file(tmp_path):
    file = large.LargeFile(tmp_path, layers=3, tokens=600, beyond=False)
    for step in large.LargeFile.STEPS:
        step(file)
    assert {*tmp_path.iterdir()} == {tmp_path / "store"}


def test_a_file_that_is_too_short_is_noticed(tmp_path):
    file = large.LargeFile(tmp_path, layers=2, tokens=300)
    with pytest.raises(AssertionError, match="too short"):
        file.save()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("codec", ["raw", "channel", "planes", "zstd", "lz4"])
@pytest.mark.drawn(2)
def test_a_small_part(codec, whole, tmp_path):
    large.large_part(tmp_path, codec, rows=5000, whole=whole)
