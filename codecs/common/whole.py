"""Codecs that hand a block as it lies to a general coder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

    def decodes_on(self, device: Any) -> bool:
        from kvzip.codecs.native.cuda.nvcomp import decoder_of

        return decoder_of(device, self.codec_id) is not None

    def needs_sound_bytes(self, device: Any) -> bool:
        return True

    def decode_on_device(
        self, work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]
    ) -> None:
        from kvzip.codecs.native.cuda.nvcomp import Chunk, decoder_of
        from kvzip.codecs.native.cuda.work import Block

        decoder = decoder_of(work.device, self.codec_id)
        if decoder is None:
            super().decode_on_device(work, blocks, contexts)
            return
        found, chunks = [Block._make(block) for block in blocks.tolist()], []
        for block in found:
            numbers = math.prod(work.shape(block.part)) * block.tokens
            size = numbers * contexts[block.part].dtype.itemsize
            chunks.append(Chunk(block.host, block.address, block.length, size, block.row))
        places = decoder.decode(work, self._coder, chunks)
        for block, place in zip(found, places, strict=True):
            work.copy_block(contexts[block.part].dtype.itemsize, block._replace(address=place))

    def max_encoded_size(self, raw_bytes: int) -> int:
        return self._coder.bound(raw_bytes)

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return encoded_bytes * self._coder.max_expansion
