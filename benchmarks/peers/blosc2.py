"""Blosc2: the shuffle filter splits numbers into byte planes, zstd codes each plane apart.

Planes coded apart (ALWAYS_SPLIT) beat planes in one stream by a tenth of the ratio; bytedelta,
bitshuffle (but for numbers of one byte), lz4 and other block sizes were worse. Of the levels, 1 is
the fast one and 9 the small one; 2 and 5 are slower than 1 and larger too.
"""

from __future__ import annotations

from typing import ClassVar

import blosc2

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits
from kvzip.eval.results.bench import Order


class Blosc(Peer):
    name, package = "blosc2 -1", "blosc2"
    setting = "shuffle (8 bits: bitshuffle), zstd, clevel 1, split"
    order: ClassVar[Order] = "channel"
    level = 1

    def encode(self, numbers: Bits) -> bytes:
        planes = blosc2.Filter.SHUFFLE if self.form.itemsize > 1 else blosc2.Filter.BITSHUFFLE
        data: bytes = blosc2.compress2(
            numbers,
            codec=blosc2.Codec.ZSTD,
            clevel=self.level,
            filters=[planes],
            splitmode=blosc2.SplitMode.ALWAYS_SPLIT,
            typesize=self.form.itemsize,
            nthreads=1,
        )
        return data

    def decode(self, data: bytes, shape: Shape) -> bytes:
        numbers: bytes = blosc2.decompress2(data, nthreads=1)
        return numbers


class BloscSlow(Blosc):
    name = "blosc2 -9"
    setting = "shuffle (8 bits: bitshuffle), zstd, clevel 9, split"
    level = 9


PEERS = (Blosc, BloscSlow)
