"""Damage that no checksum shows, as an attacker would do it."""

from __future__ import annotations

import struct

from kvzip import checksum


def first_stored(blob: bytes | bytearray) -> int:
    """Where the index of a .kvz file ends: what codecs wrote comes behind it (docs/format.md)."""
    header, count, ids = struct.unpack_from("<III", blob, 12)
    return int(40 + header + ids + 48 * count)


def reseal(blob: bytes | bytearray) -> bytes:
    """The .kvz file with checksums of its stored bytes that are true again, so that what was
    changed meets the codec's decoder. The checksums of raw numbers stay."""
    blob = bytearray(blob)
    header_length, count, ids_length = struct.unpack_from("<III", blob, 12)
    at = 40 + header_length + ids_length
    for row in range(at, min(at + 48 * count, len(blob) - 47), 48):
        offset, length = struct.unpack_from("<QQ", blob, row + 16)
        stored = blob[offset : offset + length] if offset < len(blob) else b""
        struct.pack_into("<Q", blob, row + 32, checksum.of_bytes(bytes(stored)))
    return sealed_index(blob)


def sealed_index(blob: bytearray) -> bytes:
    """The .kvz file with a checksum of header and index that is true again."""
    end = first_stored(blob)
    end += -end % 64
    digest = checksum.of_bytes(bytes(blob[:32]) + bytes(blob[40:end]))
    struct.pack_into("<Q", blob, 32, digest)
    return bytes(blob)
