"""LZ4's block format at its default: the fastest of the general compressors."""

from __future__ import annotations

from typing import ClassVar

import lz4.block

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits
from kvzip.eval.results.bench import Order


class Lz4(Peer):
    name, setting, package = "lz4", "block, default", "lz4"
    order: ClassVar[Order] = "token"

    def encode(self, numbers: Bits) -> bytes:
        data: bytes = lz4.block.compress(numbers)
        return data

    def decode(self, data: bytes, shape: Shape) -> bytes:
        numbers: bytes = lz4.block.decompress(data)
        return numbers


PEERS = (Lz4,)
