"""The numbers as they are: what every other codec is measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Codec, Context
from kvzip.dtypes import Bits, DType
from kvzip.errors import CorruptError
from kvzip.layout import PartLayout


class RawCodec(Codec):
    """No compression: a block's bytes in the order batch, heads, tokens, dim."""

    codec_id = "raw"
    fallback = None
    verbatim = True

    def takes(self, part: PartLayout, kind: str, name: str) -> bool:
        return True

    def encode(self, block: Bits, context: Context) -> bytes:
        return block.tobytes()

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        if len(data) != out.nbytes:
            raise CorruptError(f"{len(data)} bytes for a block of {out.nbytes}")
        out[...] = np.frombuffer(data, out.dtype).reshape(out.shape)

    on_device = True

    def decode_on_device(
        self, work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]
    ) -> None:
        from kvzip.codecs.native.cuda.work import Block

        for block in map(Block._make, blocks.tolist()):
            itemsize = contexts[block.part].dtype.itemsize
            if block.length != math.prod(work.shape(block.part)) * block.tokens * itemsize:
                raise CorruptError("a block of another size than its numbers")
            work.copy_block(itemsize, block)

    def max_encoded_size(self, raw_bytes: int) -> int:
        return raw_bytes

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return encoded_bytes
