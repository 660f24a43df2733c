"""Codecs that hand a block as it lies to a general coder."""

from __future__ import annotations

import numpy as np

from kvzip.byte_coders import get_coder
from kvzip.codec import Codec, Context
from kvzip.dtypes import Bits, DType
from kvzip.layout import PartLayout


class WholeBlockCodec(Codec):
    """One piece of a general coder's output a block; the coder has the codec's name."""

    fallback = None

    def takes(self, part: PartLayout, kind: str, name: str) -> bool:
        return True

    def __init__(self, level: int):
        self._coder = get_coder(self.codec_id, level)
        self.level = self._coder.level

    def encode(self, block: Bits, context: Context) -> bytes:
        return self._coder.encode(np.ascontiguousarray(block).reshape(-1).view(np.uint8))

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        out[...] = self._coder.decode(data, out.nbytes).view(out.dtype).reshape(out.shape)

    def max_encoded_size(self, raw_bytes: int) -> int:
        return self._coder.bound(raw_bytes)

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return encoded_bytes * self._coder.max_expansion
