"""Zstandard on the numbers as they lie: the first thing anyone tries."""

from __future__ import annotations

from kvzip.codecs.common.whole import WholeBlockCodec


class ZstdCodec(WholeBlockCodec):
    """One Zstandard frame a block. `level`: 1 to 22."""

    codec_id = "zstd"

    def __init__(self, level: int = 3):
        super().__init__(level)
