"""pcodec on the numbers' bits as integers: its own float modes look for decimals and multiples."""

from __future__ import annotations

from typing import ClassVar

from pcodec import ChunkConfig, standalone

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits, DType
from kvzip.eval.results.bench import Order


class Pcodec(Peer):
    name, setting, package = "pcodec", "level 8, unsigned integers", "pcodec"
    order: ClassVar[Order] = "channel"

    def __init__(self, form: DType) -> None:
        super().__init__(form)
        self._config = ChunkConfig(compression_level=8, enable_8_bit=True)

    def encode(self, numbers: Bits) -> bytes:
        data: bytes = standalone.simple_compress(numbers.reshape(-1), self._config)
        return data

    def decode(self, data: bytes, shape: Shape) -> Bits:
        numbers: Bits = standalone.simple_decompress(data)
        return numbers


PEERS = (Pcodec,)
