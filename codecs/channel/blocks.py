"""How a block of `channel` begins (spec.md); block_coder.cpp has what follows."""

from __future__ import annotations

RAW, CODED, UNTURNED = 0, 2, 3
"""The first byte: numbers as they are; coded ones; keys before RoPE, which are in a coded block
behind their exceptions."""
HEADER = 16
"""Bytes before the numbers of a block that is stored as it is, or before exceptions."""
MAX_EXPANSION = 1024
"""A coded block has a byte for so many of its numbers at least, padded if need be: so a few bytes
cannot claim gigabytes."""
