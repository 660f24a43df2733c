"""How a block of `channel` begins (spec.md), where block_coder.cpp has what follows; and how long
tables are."""

from __future__ import annotations

RAW, CODED, UNTURNED = 0, 2, 3
"""The first byte: numbers as they are; coded ones; keys before RoPE, which are in a coded block
behind their exceptions."""
HEADER = 16
"""Bytes before the numbers of a block that is stored as it is, or before exceptions."""
MAX_EXPANSION = 1024
"""A coded block has a byte for so many of its numbers at least, padded if need be: so a few bytes
cannot claim gigabytes."""


# Bits of a channel with a shape of its own: two levels of at most 16 bits for each of 256
# exponents, and what stands beside them.
_MAX_CHANNEL = 2 * 256 * 16 + 100


def largest_tables(channels: int) -> int:
    """The most bytes that tables of so many channels can have."""
    return 1 + channels * _MAX_CHANNEL // 8


def most_tables(part_bytes: int) -> int:
    """The most bytes of tables that go into a file with a part of so many raw bytes, so that it is
    known beforehand how long a file can become. Longer ones are left out, and hardly pay: a model's
    take 8 % of 8 tokens in fp8, and less of more or of wider numbers."""
    return max(256, part_bytes // 8)
