"""General byte coders that codecs build on: Zstandard and LZ4, with hostile input in mind."""

from __future__ import annotations

from typing import Any

import lz4.block
import numpy as np
import zstandard
from numpy.typing import NDArray

from kvzip.errors import CorruptError, UnsupportedError
from kvzip.options import integer

Bytes = NDArray[Any]


class Coder:
    """Bytes to bytes. `max_expansion`: raw bytes that one encoded byte can stand for at most."""

    name: str
    max_expansion: int

    def __init__(self, level: int):
        self.level = level

    def encode(self, data: Bytes) -> bytes:
        raise NotImplementedError

    def decode(self, data: memoryview, size: int) -> Bytes:
        """Exactly `size` bytes; raises CorruptError."""
        raise NotImplementedError

    def begins_as_ours(self, data: memoryview, size: int) -> bool:
        """Whether data begin as what `encode` gives for `size` bytes, where others may write them
        in other ways, too."""
        return True

    @staticmethod
    def bound(size: int) -> int:
        """The most bytes that `encode` gives for `size` bytes."""
        raise NotImplementedError


class Zstd(Coder):
    """One Zstandard frame (RFC 8878) without content checksum."""

    name = "zstd"
    # 128 KiB of one repeated byte take a block of 4 bytes (RFC 8878, 3.1.1.2).
    max_expansion = 1 << 15

    def encode(self, data: Bytes) -> bytes:
        return bytes(zstandard.ZstdCompressor(level=self.level).compress(data.data))

    def decode(self, data: memoryview, size: int) -> Bytes:
        out = np.empty(size, np.uint8)
        try:
            # Into memory of the true size, whatever size the frame claims.
            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
                filled = 0
                while filled < size and (count := reader.readinto(out[filled:].data)):
                    filled += count
                more = reader.read(1)
        except zstandard.ZstdError as error:
            raise CorruptError(f"bad Zstandard frame: {error}") from None
        if filled < size or more:
            raise CorruptError(
                f"a Zstandard frame holds {filled}{'+' * bool(more)} bytes, not {size}"
            )
        return out

    def begins_as_ours(self, data: memoryview, size: int) -> bool:
        try:
            frame = zstandard.get_frame_parameters(data)
        except zstandard.ZstdError:
            return False
        return frame.content_size == size and not (frame.dict_id or frame.has_checksum)

    @staticmethod
    def bound(size: int) -> int:
        # ZSTD_COMPRESSBOUND in zstd.h
        return size + (size >> 8) + 128


class Lz4(Coder):
    """One LZ4 block without a stored size; level 1 is the fast mode, above it high compression."""

    name = "lz4"
    # A byte of match length stands for 255 bytes (LZ4 block format).
    max_expansion = 256
    # LZ4_MAX_INPUT_SIZE in lz4.h
    _most = 0x7E000000

    def encode(self, data: Bytes) -> bytes:
        if data.nbytes > self._most:
            raise UnsupportedError(
                f"lz4 takes blocks of at most {self._most:,} bytes, not {data.nbytes:,}: "
                "give a smaller block_tokens"
            )
        if self.level == 1:
            return bytes(lz4.block.compress(data.data, store_size=False))
        return bytes(
            lz4.block.compress(
                data.data, mode="high_compression", compression=self.level, store_size=False
            )
        )

    def decode(self, data: memoryview, size: int) -> Bytes:
        if size > self._most:
            raise CorruptError(f"an LZ4 block cannot hold {size:,} bytes")
        try:
            raw = lz4.block.decompress(data, uncompressed_size=size)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise CorruptError(f"bad LZ4 block: {error}") from None
        if len(raw) != size:
            raise CorruptError(f"an LZ4 block holds {len(raw)} bytes, not {size}")
        return np.frombuffer(raw, np.uint8)

    @staticmethod
    def bound(size: int) -> int:
        # LZ4_COMPRESSBOUND in lz4.h
        return size + size // 255 + 16


def get_coder(name: str, level: int) -> Coder:
    """A coder by name: "zstd" (level 1 to 22) or "lz4" (level 1 to 12)."""
    for coder, top in ((Zstd, 22), (Lz4, 12)):
        if name == coder.name:
            return coder(integer(f"{name}: level", level, 1, top))
    raise UnsupportedError(f"no coder {name!r}: use zstd or lz4")
