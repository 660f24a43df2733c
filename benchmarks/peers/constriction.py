"""constriction's rANS coder over sign and exponent, a table for each channel; mantissas raw.

The library has coders and no format, so this is the plainest one around its coder: the design of
kvzip's `channel` without its engineering. Tables are made from the block and travel in it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, ClassVar

import constriction
import numpy as np
import zstandard
from numpy.typing import NDArray

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits, DType
from kvzip.errors import UnsupportedError
from kvzip.eval.results.bench import Order

_LENGTHS = struct.Struct("<II")
_RANGE = np.dtype([("first", "<u2"), ("width", "<u2")])


class Constriction(Peer):
    name, package = "constriction", "constriction"
    setting = "ANS, categorical per channel; mantissa raw"
    order: ClassVar[Order] = "channel"

    def __init__(self, form: DType) -> None:
        super().__init__(form)
        if not form.is_float:
            raise UnsupportedError(f"not for {form.name}, which has no exponent")
        self._zip = zstandard.ZstdCompressor(level=3)
        self._unzip = zstandard.ZstdDecompressor()

    def encode(self, numbers: Bits) -> bytes:
        symbols = self._symbols(numbers)
        first = symbols.min(axis=1)
        ranges = np.empty(len(symbols), _RANGE)
        ranges["first"], ranges["width"] = first, symbols.max(axis=1) - first + 1
        symbols = symbols - first[:, np.newaxis]
        counts = [np.bincount(row) for row in symbols]
        # A byte for each count: its root, since the coder loses little where counts are small.
        roots = [np.ceil(255 * np.sqrt(c / c.max())).astype(np.uint8) for c in counts]
        tables = self._zip.compress(ranges.tobytes() + b"".join(r.tobytes() for r in roots))
        coder = constriction.stream.stack.AnsCoder()
        for row, model in zip(symbols[::-1], reversed(list(_models(roots))), strict=True):
            coder.encode_reverse(row, model)
        coded = coder.get_compressed().tobytes()
        bits = np.unpackbits(numbers.astype(f">u{self.form.itemsize}").view(np.uint8))
        mantissas = np.packbits(bits.reshape(-1, self.form.bits)[:, -self.form.mantissa_bits :])
        head = _LENGTHS.pack(len(tables), len(coded))
        return b"".join([head, tables, coded, mantissas.tobytes()])

    def decode(self, data: bytes, shape: Shape) -> Bits:
        form, (channels, tokens) = self.form, shape
        table_bytes, coded_bytes = _LENGTHS.unpack_from(data)
        at = _LENGTHS.size + table_bytes
        tables = self._unzip.decompress(data[_LENGTHS.size : at])
        ranges = np.frombuffer(tables, _RANGE, channels)
        roots = np.frombuffer(tables, np.uint8, offset=ranges.nbytes)
        coder = constriction.stream.stack.AnsCoder(
            np.frombuffer(data, np.uint32, coded_bytes // 4, at)
            if at % 4 == 0
            else np.frombuffer(data[at : at + coded_bytes], np.uint32)
        )
        symbols = np.empty(shape, form.uint)
        each = np.split(roots, np.cumsum(ranges["width"].astype(int))[:-1])
        for row, first, model in zip(symbols, ranges["first"], _models(each), strict=True):
            row[:] = coder.decode(model, tokens) + first
        packed = np.frombuffer(data, np.uint8, offset=at + coded_bytes)
        count = channels * tokens * form.mantissa_bits
        bits = np.zeros((channels * tokens, form.bits), np.uint8)
        bits[:, -form.mantissa_bits :] = np.unpackbits(packed, count=count).reshape(
            -1, form.mantissa_bits
        )
        numbers = np.packbits(bits).view(f">u{form.itemsize}").astype(form.uint).reshape(shape)
        sign, exponent = symbols & 1, symbols >> 1
        numbers |= (sign << (form.bits - 1)) | (exponent << form.mantissa_bits)
        return numbers

    def _symbols(self, numbers: Bits) -> NDArray[np.int32]:
        """Exponent and sign, the sign lowest: so a channel of both signs has one range."""
        top = numbers >> self.form.mantissa_bits
        exponent = top & ((1 << self.form.exponent_bits) - 1)
        return ((exponent << 1) | (top >> self.form.exponent_bits)).astype(np.int32)


def _models(roots: Any) -> Iterator[Any]:
    """The coder's models, one from each channel's table."""
    for row in roots:
        weights = np.square(row, dtype=np.float32)
        yield constriction.stream.model.Categorical(weights, perfect=False)


PEERS = (Constriction,)
