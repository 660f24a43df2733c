"""Keys before RoPE: when `channel` codes them so, and what their blocks begin with.

spec.md, "Keys before RoPE", has the bytes and the reasons.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel.blocks import UNTURNED
from kvzip.codecs.channel.profile import own_bits, rows
from kvzip.codecs.common.rotation import ROUNDINGS, is_side_by_side, rotation_of
from kvzip.dtypes import Bits

_HEAD = struct.Struct("<BBHI8x")
_EXCEPTION = np.dtype([("pair", "<u4"), ("numbers", "<u2", 2)])
_ALIGNED = 16
# Tokens on which it is tried, and which tell whether keys take less before RoPE. Of their pairs,
# and of all, so many may have no numbers before RoPE.
_SAMPLE, _MISSING = 128, 0.01


def coded_at(data: Any) -> int:
    """Where in a block of keys before RoPE, behind its exceptions, their own block begins."""
    count: int = _HEAD.unpack_from(data)[3]
    length = _HEAD.size + count * _EXCEPTION.itemsize
    return length + -length % _ALIGNED


class Keys(NamedTuple):
    """A part's keys before RoPE."""

    array: Bits
    """[batch, heads, tokens, dim]."""
    rounding: int
    """How they are turned, one of `ROUNDINGS`."""
    pairs: int
    first: int
    """Position of the first token."""
    missing: NDArray[np.uint64]
    """The pairs that have none, counted in the order of [batch, heads, tokens, pairs]."""

    def cut(self, begin: int, stop: int) -> Bits:
        """Those of some tokens."""
        return self.array[:, :, begin:stop]

    def head(self, block: Bits, begin: int) -> bytes:
        """What stands before a coded block of them: `block`, the same keys behind RoPE, of which
        the first token is number `begin` here."""
        heads, tokens = block.shape[1:3]
        row, pair = np.divmod(self.missing.astype(np.int64), self.pairs)
        head, token = np.divmod(row, self.array.shape[2])
        token -= begin
        there = (token >= 0) & (token < tokens)
        head, token, pair = head[there], token[there], pair[there]
        exceptions = np.empty(len(pair), _EXCEPTION)
        exceptions["pair"] = (head * tokens + token) * self.pairs + pair
        at = *np.divmod(head, heads), token
        first, apart = (2 * pair, 1) if is_side_by_side(self.rounding) else (pair, self.pairs)
        exceptions["numbers"][:, 0] = block[(*at, first)]
        exceptions["numbers"][:, 1] = block[(*at, first + apart)]
        data = exceptions.tobytes()
        start = _HEAD.pack(UNTURNED, self.rounding, 0, len(exceptions))
        return start + data + bytes(-len(data) % _ALIGNED)


class Sampled(NamedTuple):
    """Keys of a part's last tokens, which say whether and how all were turned."""

    rotation: _native.Rotation
    cached: Bits
    before: Bits
    rounding: int
    missing: NDArray[np.uint64]
    """The pairs that have no keys before RoPE, counted as those of `Keys`."""


def sampled(part: Bits, context: Context, tokens: int = _SAMPLE) -> Sampled | None:
    """Of so many tokens; None where keys before RoPE are not to be had."""
    rotation = rotation_of(context, part.shape[3])
    if rotation is None or not part.size:
        return None
    start = max(0, part.shape[2] - tokens)
    cached = rows(part[:, :, start:])
    before = cached.copy()
    most = int(_MISSING * cached.size / cached.shape[3] * rotation.pairs)
    for rounding in ROUNDINGS:
        missing = rotation.unturn(cached, context.start + start, rounding, before, most)
        if missing is not None:
            return Sampled(rotation, cached, before, rounding, missing)
    return None


def unturned(part: Bits, context: Context) -> Keys | None:
    """A part's keys before RoPE; None where they are not to be had, or would take more."""
    few = sampled(part, context)
    if few is None:
        return None
    rotation, first, form = few.rotation, context.start, context.dtype
    pairs = part.size // part.shape[3] * rotation.pairs
    exceptions = 8 * _EXCEPTION.itemsize * len(few.missing)
    if pairs >> 32 or own_bits(few.before, form) + exceptions >= own_bits(few.cached, form):
        return None
    array: Bits = few.before
    missing: NDArray[np.uint64] | None = few.missing
    if few.cached.shape != part.shape:  # there are more tokens
        part, whole = rows(part), 2 * rotation.pairs == part.shape[3]
        array = np.empty(part.shape, part.dtype) if whole else part.copy()
        missing = rotation.unturn(part, first, few.rounding, array, int(_MISSING * pairs))
    return None if missing is None else Keys(array, few.rounding, rotation.pairs, first, missing)
