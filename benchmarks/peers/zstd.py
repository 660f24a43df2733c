"""Zstandard, at a level that can keep up and at the highest of the usual ones."""

from __future__ import annotations

from typing import ClassVar

import zstandard

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits, DType
from kvzip.eval.results.bench import Order


class Zstd(Peer):
    name, setting, package = "zstd -3", "level 3", "zstandard"
    order: ClassVar[Order] = "token"
    level = 3

    def __init__(self, form: DType) -> None:
        super().__init__(form)
        self._compressor = zstandard.ZstdCompressor(level=self.level)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, numbers: Bits) -> bytes:
        return self._compressor.compress(numbers.data)

    def decode(self, data: bytes, shape: Shape) -> bytes:
        return self._decompressor.decompress(data)


class ZstdSlow(Zstd):
    name, setting = "zstd -19", "level 19"
    order = "channel"
    level = 19


PEERS = (Zstd, ZstdSlow)
