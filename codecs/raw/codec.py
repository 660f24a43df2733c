"""The numbers as they are: what every other codec is measured against."""

from __future__ import annotations

import numpy as np

from kvzip.codec import Codec, Context
from kvzip.dtypes import Bits, DType
from kvzip.errors import CorruptError


class RawCodec(Codec):
    """No compression: a block's bytes in the order batch, heads, tokens, dim."""

    codec_id = "raw"

    def encode(self, block: Bits, context: Context) -> bytes:
        return block.tobytes()

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        if len(data) != out.nbytes:
            raise CorruptError(f"{len(data)} bytes for a block of {out.nbytes}")
        out[...] = np.frombuffer(data, out.dtype).reshape(out.shape)

    def max_encoded_size(self, raw_bytes: int) -> int:
        return raw_bytes

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return encoded_bytes
