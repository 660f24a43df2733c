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
from kvzip.dtypes import Bits, DType

_HEAD = struct.Struct("<BBHI8x")
_EXCEPTION = np.dtype([("pair", "<u4"), ("numbers", "<u2", 2)])
_ALIGNED = 16
# Tokens on which it is tried, and which tell whether keys take less before RoPE. Of their pairs,
# and of all, so many may have no numbers before RoPE.
TRIED, _MISSING = 128, 0.01


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
        _, numbers = in_block(self.missing, self.pairs, self.array.shape[2], begin, tokens)
        row, pair = np.divmod(numbers, self.pairs)
        head, token = np.divmod(row, tokens)
        at = *np.divmod(head, heads), token
        first, apart = (2 * pair, 1) if is_side_by_side(self.rounding) else (pair, self.pairs)
        keys = np.stack([block[(*at, first)], block[(*at, first + apart)]], axis=1)
        return head_of(self.rounding, numbers, keys)


def in_block(
    missing: NDArray[Any], pairs: int, tokens: int, begin: int, count: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of these pairs, counted in [batch, heads, tokens, pairs], are of tokens `begin` to
    `begin + count`, and how these are counted in [batch, heads, count, pairs]."""
    row, pair = np.divmod(missing.astype(np.int64), pairs)
    head, token = np.divmod(row, tokens)
    token -= begin
    there = (token >= 0) & (token < count)
    return there, ((head * count + token) * pairs + pair)[there]


def head_of(rounding: int, pairs: NDArray[Any], keys: NDArray[Any]) -> bytes:
    """What stands before a coded block of keys before RoPE: how they are turned, and the pairs that
    have none, in order, by their numbers in the block, with their own keys, [pairs, 2]."""
    exceptions = np.empty(len(pairs), _EXCEPTION)
    exceptions["pair"], exceptions["numbers"] = pairs, keys
    data = exceptions.tobytes()
    start = _HEAD.pack(UNTURNED, rounding, 0, len(exceptions))
    return start + data + bytes(-len(data) % _ALIGNED)


class Sampled(NamedTuple):
    """Keys of a part's last tokens, which say whether and how all were turned."""

    rotation: _native.Rotation
    cached: Bits
    before: Bits
    rounding: int
    missing: NDArray[np.uint64]
    """The pairs that have no keys before RoPE, counted as those of `Keys`."""


def sampled(part: Bits, context: Context, tokens: int = TRIED) -> Sampled | None:
    """Of so many tokens; None where keys before RoPE are not to be had."""
    rotation = rotation_of(context, part.shape[3])
    if rotation is None or not part.size:
        return None
    start = max(0, part.shape[2] - tokens)
    cached = rows(part[:, :, start:])
    before = cached.copy()
    most = most_missing(cached.size // cached.shape[3] * rotation.pairs)
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
    rotation = few.rotation
    pairs = part.size // part.shape[3] * rotation.pairs
    if not take_less(few, pairs, context.dtype):
        return None
    array: Bits = few.before
    missing: NDArray[np.uint64] | None = few.missing
    if few.cached.shape != part.shape:  # there are more tokens
        part, whole = rows(part), 2 * rotation.pairs == part.shape[3]
        array = np.empty(part.shape, part.dtype) if whole else part.copy()
        most = most_missing(pairs)
        missing = rotation.unturn(part, context.start, few.rounding, array, most)
    if missing is None:
        return None
    return Keys(array, few.rounding, rotation.pairs, context.start, missing)


def take_less(few: Sampled, pairs: int, form: DType) -> bool:
    """Whether a part of so many pairs is thought to take less before RoPE."""
    exceptions = 8 * _EXCEPTION.itemsize * len(few.missing)
    return not pairs >> 32 and own_bits(few.before, form) + exceptions < own_bits(few.cached, form)


def most_missing(pairs: int) -> int:
    """How many of so many pairs may have no keys before RoPE."""
    return int(_MISSING * pairs)
