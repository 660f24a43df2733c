"""Static rANS over sign and exponent, with a table for each channel; mantissas apart.

Mantissa bits of keys and values are nearly uniform, sign and exponent are not, and how they are
distributed differs from channel to channel. spec.md has the format and the reasons for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Codec, Coded, Context
from kvzip.codecs import _native
from kvzip.dtypes import Bits, DType
from kvzip.errors import CorruptError, KVZipError

_RAW = bytes(16)
# A coded block is padded to 1/1024 of its numbers, so that a few bytes cannot claim gigabytes.
_MAX_EXPANSION = 1024
# Bits of a channel with a shape of its own: two levels of at most 16 bits for each of 256
# exponents, and what stands beside them.
_MAX_CHANNEL = 2 * 256 * 16 + 100


class ChannelCodec(Codec):
    """Entropy-codes sign and exponent per layer, keys or values, head and channel.

    The tables are made from the part itself and travel in the file, shared by its blocks.
    """

    codec_id = "channel"

    def make_tables(self, part: Bits, context: Context) -> bytes:
        form = context.dtype
        if not part.size:
            return b""
        made: bytes = _native.channel_tables(_rows(part), form.exponent_bits, form.mantissa_bits)
        return made

    def load_tables(
        self, data: memoryview, shape: tuple[int, ...], context: Context
    ) -> _native.ChannelTables | None:
        _, heads, _, dim = shape
        form = context.dtype
        if not len(data):
            return None
        if len(data) > self.max_tables_size(shape, form):
            raise CorruptError("tables of an impossible size")
        # They are read when a block needs them, without Python's lock.
        return _native.ChannelTables(data, heads, dim, form.exponent_bits, form.mantissa_bits)

    def encode(self, block: Bits, context: Context) -> bytes:
        coded: bytes | None = context.tables.encode(_rows(block)) if context.tables else None
        return _RAW + block.tobytes() if coded is None else coded

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        self.decode_many([Coded(data, out, context)])

    threaded = True

    def decode_many(self, blocks: Iterable[Coded], threads: int = 1) -> list[int]:
        copied = []
        decoding = _native.ChannelDecoding(threads)
        try:
            for block in blocks:
                target = _rows(block.out, writing=True)
                decoding.add(block.context.tables, block.data, target)
                if target is not block.out:
                    copied.append((block.out, target))
            checksums: list[int] = decoding.finish()
        except KVZipError:  # of what gives the blocks
            raise
        except ValueError as error:
            raise CorruptError(str(error)) from None
        finally:
            decoding.stop()  # nothing is written to `out` after this
        for out, target in copied:
            out[...] = target
        return checksums

    on_device = True

    def decode_on_device(
        self, work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]
    ) -> None:
        from kvzip.codecs.channel import gpu

        gpu.decode(work, blocks, contexts)

    def max_encoded_size(self, raw_bytes: int) -> int:
        return len(_RAW) + raw_bytes

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return (encoded_bytes + 1) * _MAX_EXPANSION

    def max_tables_size(self, shape: tuple[int, ...], dtype: DType) -> int:
        return 1 + shape[1] * shape[3] * _MAX_CHANNEL // 8


def _rows(block: Bits, writing: bool = False) -> Bits:
    """The block itself where each token's numbers lie side by side, else a copy that does."""
    if block.strides[3] == block.itemsize or block.shape[3] == 1:
        return block
    return np.empty(block.shape, block.dtype) if writing else np.ascontiguousarray(block)
