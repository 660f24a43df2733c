"""Our codecs run the suite that everybody's can run: `kvzip.testing.CodecContract`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import CODECS, NEED_PROFILE, UNLIKE_DTYPES

import kvzip
from kvzip.testing import CodecContract

pytestmark = pytest.mark.drawn(2)


class TestCodecs(CodecContract):
    codecs = tuple(spec for spec in CODECS if spec not in ("raw", "lz4", "channel"))


class TestChannel(CodecContract):
    codecs = ("channel",)
    unlike_dtypes = UNLIKE_DTYPES


class TestRaw(CodecContract):
    codecs = ("raw",)
    least_ratio = 0.0


class TestLz4(CodecContract):
    codecs = ("lz4",)
    most_growth = 1.005
    """LZ4 alone cannot store: its own bound is 1 in 255."""


def test_codecs_without_a_test_do_not_exist():
    """A codec that needs a profile has a suite of its own."""
    tested = {spec.partition(":")[0] for spec in CODECS}
    assert tested == set(kvzip.codec_names()) - NEED_PROFILE
    for name in NEED_PROFILE:
        assert [*Path(__file__).parent.glob(f"test_{name}*.py")]
