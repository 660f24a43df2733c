"""How much slower a predicting codec is on a wider model: a model, where only one was measured.

Of a number's time a share goes into products with what it is predicted from, which grows with the
numbers of a layer and token; all else stays. `predictive` on made-up caches of 384, 1,024 and 2,048
such numbers lies on that line within 6 % (docs/speed-notes.md, *How speed follows the width*)."""

from __future__ import annotations

from collections.abc import Collection

from kvzip.codec import get_codec

MEASURED_AT = 384.0
"""Numbers of a layer and token at which products take the shares below."""
SHARE_AVX512, SHARE_AVX2 = 0.34, 0.52
"""Of a decoder's and an encoder's time, on processors with AVX-512 and without."""


def slowdown(codec: str, numbers: float, measured: float, simd: Collection[str]) -> float:
    """How many times as long a codec takes for a number, ``(1 + s (n / 384 - 1)) / (1 + s (m / 384
    - 1))``.

    `numbers`, n: of a layer and token; `measured`, m: those of the model that its speed was
    measured on, by a processor with the instructions `simd`, which decide the share s. 1 for a
    codec that needs no profile."""
    if not get_codec(codec).needs_profile:
        return 1.0
    share = SHARE_AVX512 if any(name.startswith("avx512") for name in simd) else SHARE_AVX2
    return _time(share, numbers) / _time(share, measured)


def _time(share: float, numbers: float) -> float:
    return 1 + share * (numbers / MEASURED_AT - 1)
