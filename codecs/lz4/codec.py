"""LZ4 on the numbers as they lie: fast, and all but useless on floating-point numbers."""

from __future__ import annotations

from kvzip.codecs.common.whole import WholeBlockCodec


class Lz4Codec(WholeBlockCodec):
    """One LZ4 block a block. `level`: 1 (fast) to 12 (high compression)."""

    codec_id = "lz4"

    def __init__(self, level: int = 1):
        super().__init__(level)
