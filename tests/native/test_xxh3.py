"""The compiled XXH3-64 is xxhash's, for every length and however the bytes come."""

from __future__ import annotations

import random

import pytest
import xxhash

from kvzip.codecs import _native

# Where the algorithm changes, and around its blocks of 1,024 bytes.
LENGTHS = [
    *range(300),
    *(1024 * k + d for k in (1, 2, 9) for d in (-64, -63, -1, 0, 1, 63, 64, 65)),
]


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_it_is_what_xxhash_says(level):
    before = _native.simd()
    if not _native.set_simd(level):
        pytest.skip(f"this processor has no {level}")
    try:
        rng = random.Random(1)
        for length in LENGTHS:
            data = rng.randbytes(length)
            cuts = sorted(rng.randrange(length + 1) for _ in range(rng.randrange(4)))
            pieces = [data[i:j] for i, j in zip([0, *cuts], [*cuts, length], strict=True)]
            assert _native.xxh3_64(*pieces) == xxhash.xxh3_64_intdigest(data), length
    finally:
        _native.set_simd(before)
