"""Byte planes or bit planes, each coded by itself: what is alike in a number comes together."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.byte_coders import Bytes, get_coder
from kvzip.codec import Codec, Context
from kvzip.codecs import _native
from kvzip.dtypes import Bits, DType
from kvzip.errors import CorruptError, UnsupportedError
from kvzip.layout import PartLayout
from kvzip.version import newer

_PLANE = struct.Struct("<BI")
_STORED, _CODED = 0, 1


class PlanesCodec(Codec):
    """Planes of a block, each through a general coder, or stored where that does not help.

    `mode`: "byte" or "bit". `order`: "channel" puts a channel's tokens side by side,
    "token" leaves the numbers as they lie. `coder`: "zstd" or "lz4", with its `level`.
    """

    codec_id = "planes"
    fallback = "raw"

    def takes(self, part: PartLayout, kind: str, name: str) -> bool:
        return True

    def __init__(
        self, mode: str = "byte", order: str = "channel", coder: str = "zstd", level: int = 1
    ):
        if mode not in ("byte", "bit"):
            raise UnsupportedError(f"planes: mode is byte or bit, not {mode!r}")
        if order not in ("channel", "token"):
            raise UnsupportedError(f"planes: order is channel or token, not {order!r}")
        self.mode, self.order, self.coder = mode, order, coder
        self._coder = get_coder(coder, level)
        self.level = self._coder.level

    def encode(self, block: Bits, context: Context) -> bytes:
        ordered = block.transpose(0, 1, 3, 2) if self.order == "channel" else block
        flat = np.ascontiguousarray(ordered).reshape(-1)
        head, body = [], []
        for plane in self._split(flat):
            coded: bytes | memoryview = self._coder.encode(plane)
            kind = _CODED if len(coded) < plane.nbytes else _STORED
            if kind == _STORED:
                coded = plane.data
            if len(coded) >= 1 << 32:
                raise UnsupportedError("a plane has 4 GiB or more: give a smaller block_tokens")
            head.append(_PLANE.pack(kind, len(coded)))
            body.append(coded)
        return b"".join([*head, *body])

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        planes = [
            np.frombuffer(piece, np.uint8) if size is None else self._coder.decode(piece, size)
            for piece, size in self._pieces(data, out.size, out.dtype.itemsize)
        ]
        flat = self._join(np.stack(planes), out.size, out.dtype)
        target = out.transpose(0, 1, 3, 2) if self.order == "channel" else out
        target[...] = flat.reshape(target.shape)

    on_device = True

    def needs_sound_bytes(self, device: Any) -> bool:
        from kvzip.codecs.native.cuda.nvcomp import decoder_of

        return decoder_of(device, self.coder) is not None

    def decode_on_device(
        self, work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]
    ) -> None:
        from kvzip.codecs.native.cuda.nvcomp import Chunk, decoder_of
        from kvzip.codecs.native.cuda.work import Block, bytes_at
        from kvzip.codecs.planes.gpu import merge

        found, coded = [Block._make(block) for block in blocks.tolist()], []
        stored: list[list[int | None]] = []  # addresses of a block's planes, None of coded ones
        for block in found:
            numbers = math.prod(work.shape(block.part)) * block.tokens
            itemsize = contexts[block.part].dtype.itemsize
            pieces = self._pieces(bytes_at(block.host, block.length), numbers, itemsize)
            before = block.length - sum(len(piece) for piece, _ in pieces)
            planes: list[int | None] = []
            for piece, size in pieces:
                host, address = block.host + before, block.address + before
                planes.append(address if size is None else None)
                if size is not None:
                    coded.append(Chunk(host, address, len(piece), size, block.row))
                before += len(piece)
            stored.append(planes)
        decoder = decoder_of(work.device, self.coder)
        if decoder is not None:
            places = iter(decoder.decode(work, self._coder, coded))
        else:
            with ThreadPoolExecutor() as pool:
                decoded = pool.map(
                    lambda c: self._coder.decode(bytes_at(c.host, c.length), c.size), coded
                )
                places = iter([work.put(plane) for plane in decoded])
        for block, planes in zip(found, stored, strict=True):
            merge(
                work,
                [next(places) if plane is None else plane for plane in planes],
                bits=self.mode == "bit",
                by_channel=self.order == "channel",
                itemsize=contexts[block.part].dtype.itemsize,
                part=block.part,
                first=block.first,
                tokens=block.tokens,
            )

    def _pieces(
        self, data: memoryview, numbers: int, width: int
    ) -> list[tuple[memoryview, int | None]]:
        """The planes of so many numbers, as they are stored; and of those that are coded the bytes
        that they are. Raises CorruptError."""
        count, size = (width, numbers) if self.mode == "byte" else (8 * width, -(-numbers // 8))
        at = count * _PLANE.size
        if len(data) < at:
            raise CorruptError("planes are cut short")
        pieces: list[tuple[memoryview, int | None]] = []
        for i in range(count):
            kind, length = _PLANE.unpack_from(data, i * _PLANE.size)
            piece, at = data[at : at + length], at + length
            if kind == _CODED:
                pieces.append((piece, size))
            elif kind == _STORED and len(piece) == size:
                pieces.append((piece, None))
            elif kind not in (_STORED, _CODED):
                raise UnsupportedError(newer(f"a plane of kind {kind}"))
            else:
                raise CorruptError(f"plane {i} is not stored whole")
        if at != len(data):
            raise CorruptError("planes do not fill their block")
        return pieces

    def _split(self, flat: Bits) -> Bytes:
        """Planes of the numbers, most significant first, each an array of bytes."""
        planes: Bytes
        if self.mode == "bit" and flat.itemsize == 8:
            low, high = np.ascontiguousarray(flat.view("<u4").reshape(-1, 2).T)
            planes = np.concatenate([_native.split_bits(high), _native.split_bits(low)])
        elif self.mode == "bit":
            planes = _native.split_bits(flat)
        else:
            planes = np.ascontiguousarray(
                flat.view(np.uint8).reshape(flat.size, flat.itemsize).T[::-1]
            )
        return planes

    def _join(self, planes: Bytes, size: int, dtype: np.dtype[np.generic]) -> Bits:
        """The `size` numbers that these planes are of; the inverse of `_split`."""
        joined: Bits
        if self.mode == "bit" and dtype.itemsize == 8:
            halves = [_native.join_bits(half, size) for half in (planes[32:], planes[:32])]
            joined = np.stack(halves, axis=1).reshape(-1).view(dtype)
            return joined
        if self.mode == "bit":
            joined = _native.join_bits(planes, size)
            return joined
        return np.ascontiguousarray(planes[::-1].T).reshape(-1).view(dtype)

    def max_encoded_size(self, raw_bytes: int) -> int:
        # 64 planes at most, of which bit planes each round up to a byte
        return raw_bytes + 64 * (_PLANE.size + 1)

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return encoded_bytes * self._coder.max_expansion
