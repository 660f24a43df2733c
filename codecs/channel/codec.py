"""Static rANS over sign and exponent, with a table for each channel; mantissas apart.

Mantissa bits of keys and values are nearly uniform, sign and exponent are not, and how they are
distributed differs from channel to channel. spec.md has the format and the reasons for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Codec, Coded, Context
from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import (
    CODED,
    HEADER,
    MAX_EXPANSION,
    RAW,
    UNTURNED,
    largest_tables,
    most_tables,
)
from kvzip.codecs.channel.fit import fit
from kvzip.codecs.channel.profile import (
    BEFORE_ROPE,
    MORE,
    SAMPLE,
    chosen_of_profile,
    fields,
    rows,
    stated,
    tables_of,
    takes,
)
from kvzip.codecs.channel.rotation import Keys, sampled, unturned
from kvzip.codecs.common.rotation import ROUNDINGS, rotation_of
from kvzip.dtypes import Bits, DType
from kvzip.errors import CorruptError, KVZipError, UnsupportedError, UsageError
from kvzip.layout import PartLayout
from kvzip.version import newer

_RAW_HEAD = bytes(HEADER)
_MODES = frozenset((RAW, CODED, UNTURNED))
# Tokens that tell what keys before RoPE take at least.
_FEW = 32
# Under which a part of few tokens is kept, as coded by its tables, for its block if that is all;
# and keys before RoPE, for their blocks.
_CODED, _KEYS = "coded", "keys"


class ChannelCodec(Codec):
    """Entropy-codes sign and exponent per layer, keys or values, head and channel.

    The tables are made from the part itself and travel in the file, shared by its blocks; or they
    are the profile's, where it has any, and the file has none. A profile's tables fit a document
    less well than its own, and take neither room in a file nor time to make.
    """

    codec_id = "channel"

    def __init__(self, keys: str = "before_rope"):
        """`keys`: "before_rope" codes keys of bf16 that RoPE turned as they were before, where that
        takes less; "cached" codes all as they are in the cache, which is faster."""
        if keys not in ("before_rope", "cached"):
            raise UnsupportedError(f"channel: keys is before_rope or cached, not {keys!r}")
        self.keys = keys

    def takes(self, part: PartLayout, kind: str, name: str) -> bool:
        return takes(part)

    def uses(self, profile: Any) -> bool:
        return stated(profile) is not None

    @classmethod
    def fit(
        cls,
        snapshots: Sequence[Any],
        progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> Any:
        for name in settings:
            raise UsageError(f"channel learns its tables without settings; {name!r} is given")
        return fit(snapshots, progress)

    def make_tables(self, part: Bits, context: Context) -> bytes:
        form = context.dtype
        if not part.size:
            return b""
        keys = unturned(part, context) if self.keys == "before_rope" else None
        array = rows(part) if keys is None else keys.array
        before = None if keys is None else keys.cut(0, SAMPLE)
        chosen = chosen_of_profile(rows(part[:, :, :SAMPLE]), before, context)
        if chosen is not None:
            if chosen:
                context.scratch[_KEYS] = keys
            return chosen
        made: bytes = _native.channel_tables(array, *fields(form))
        if len(made) > most_tables(part.nbytes):
            return b""
        if made and part.shape[2] <= SAMPLE:
            tables = _native.ChannelTables(made, part.shape[1], part.shape[3], *fields(form))
            coded = tables.encode(array, b"" if keys is None else keys.head(part, 0))
            if coded is None or len(made) + len(coded) >= len(_RAW_HEAD) + part.nbytes:
                return b""  # few tokens are smaller without, since tables go into the file, too
            context.scratch[_CODED] = part, coded
        if made and keys is not None:
            context.scratch[_KEYS] = keys
        return made

    def load_tables(
        self, data: memoryview, shape: tuple[int, ...], context: Context
    ) -> _native.ChannelTables | None:
        _, heads, _, dim = shape
        if not len(data):
            return tables_of(context, heads, dim)
        if data == BEFORE_ROPE:
            return tables_of(context, heads, dim, before_rope=True)
        if len(data) > largest_tables(shape[1] * shape[3]):
            raise CorruptError("tables of an impossible size")
        # They are read when a block needs them, without Python's lock.
        return _native.ChannelTables(data, heads, dim, *fields(context.dtype))

    def encode(self, block: Bits, context: Context) -> bytes:
        part, coded = context.scratch.get(_CODED, (None, None))
        found: bytes | None = coded if part is block else self._coded(block, context)
        if found is None or len(found) > len(_RAW_HEAD) + block.nbytes:
            return _RAW_HEAD + block.tobytes()
        return found

    def _coded(self, block: Bits, context: Context) -> bytes | None:
        """A block as its tables code it; None where there are none, or where they cannot."""
        keys: Keys | None = context.scratch.get(_KEYS)
        if not context.tables:
            return None
        coded: bytes | None
        if keys is None:
            coded = context.tables.encode(rows(block))
        else:
            begin = context.start - keys.first
            numbers = keys.cut(begin, begin + block.shape[2])
            coded = context.tables.encode(numbers, keys.head(block, begin))
        return coded

    def least_bytes(self, block: Bits, context: Context, enough: float = math.inf) -> float:
        """What a block that is a part of its own takes at least: as with a table for each channel
        that knows its numbers, and costs nothing. Of keys before RoPE a few tell; otherwise as many
        tokens as show that it is `enough` bytes."""
        bits: float = _native.bits_by_channel(block, *fields(context.dtype), 8.0 * enough)
        few = sampled(block, context, _FEW) if self.keys == "before_rope" else None
        if few is not None:
            share = (1 - MORE) * block.size / few.before.size
            before: float = _native.bits_by_channel(
                few.before, *fields(context.dtype), 8.0 * enough / share
            )
            bits = min(bits, share * before)
        return bits / 8

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        self.decode_many([Coded(data, out, context)])

    def is_before_rope(self, part: str, first: Callable[[], Any]) -> bool:
        return part == "k" and self.keys == "before_rope" and bytes(first()) == BEFORE_ROPE

    threaded = True

    def decode_many(self, blocks: Iterable[Coded], threads: int = 1) -> list[int]:
        copied = []
        decoding = _native.ChannelDecoding(threads)
        try:
            for block in blocks:
                out, data, context = block.out, block.data, block.context
                more: tuple[Any, ...] = ()
                if len(data) and data[0] not in _MODES:
                    raise UnsupportedError(newer(f"a block of mode {data[0]} of channel"))
                if len(data) > 1 and data[0] == UNTURNED:
                    if data[1] not in ROUNDINGS:
                        raise UnsupportedError(newer(f"keys before RoPE of rounding {data[1]}"))
                    more = rotation_of(context, out.shape[3]), context.start
                if not decoding.add(context.tables, data, out, *more):
                    copied.append((out, np.empty(out.shape, out.dtype)))
                    decoding.add(context.tables, data, copied[-1][1], *more)
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

    encodes_on_device = True

    def encode_on_device(self, device: Any, parts: Sequence[Any]) -> list[Any]:
        from kvzip.codecs.channel import gpu_encoding

        return gpu_encoding.encode(self, device, parts)

    def max_encoded_size(self, raw_bytes: int) -> int:
        return len(_RAW_HEAD) + raw_bytes

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return (encoded_bytes + 1) * MAX_EXPANSION

    def max_tables_size(self, shape: tuple[int, ...], dtype: DType) -> int:
        part_bytes = math.prod(shape) * dtype.itemsize
        return min(largest_tables(shape[1] * shape[3]), most_tables(part_bytes))
