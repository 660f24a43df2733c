"""The contract of codecs, and of caches in files, without a line of code::

    pytest --pyargs kvzip.testing.suite --kvzip-codec mine --kvzip-codec mine:level=9
    pytest --pyargs kvzip.testing.suite --kvzip-snapshot doc.safetensors -k bit_for_bit

Without ``--kvzip-codec``, every installed codec that needs no profile is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import pytest_kvzip
from kvzip.codec import codec_names, get_codec
from kvzip.testing.codecs import CodecContract

GIVEN = tuple(pytest_kvzip.codecs)


class TestCodecs(CodecContract):
    codecs = GIVEN or tuple(n for n in codec_names() if not get_codec(n).needs_profile)
    most_growth = 1.01
    least_ratio = 0.0
    """These two are a codec's own promises, not the library's."""


@pytest.mark.parametrize("snapshot", pytest_kvzip.snapshots)
def test_the_cache_in_a_file_comes_back_bit_for_bit(
    snapshot: str, bit_exact: Callable[..., Any]
) -> None:
    bit_exact(snapshot, GIVEN or None, pytest_kvzip.profiles[-1] if pytest_kvzip.profiles else None)
