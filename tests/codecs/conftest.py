"""What the codecs' tests share."""

from __future__ import annotations

import pytest

from kvzip.codecs import _native


@pytest.fixture(autouse=True)
def restore_simd():
    """A test may choose a set of instructions; the next one finds the processor's best again."""
    before = _native.simd()
    yield
    _native.set_simd(before)
