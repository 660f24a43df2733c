"""ZipNN: byte groups with Huffman, made for weights."""

from __future__ import annotations

from typing import ClassVar

from zipnn import ZipNN

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits, DType
from kvzip.errors import UnsupportedError
from kvzip.eval.results.bench import Order

_TAKES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")


class Zipnn(Peer):
    name, setting, package = "zipnn", "byte input of the numbers' type, one thread", "zipnn"
    order: ClassVar[Order] = "channel"

    def __init__(self, form: DType) -> None:
        super().__init__(form)
        if form.name not in _TAKES:
            raise UnsupportedError(f"not for {form.name}")
        self._zipnn = ZipNN(input_format="byte", bytearray_dtype=form.torch, threads=1)

    def encode(self, numbers: Bits) -> bytes:
        # It reorders bits within its input, so it must have a copy.
        data: bytes = self._zipnn.compress(numbers.tobytes())
        return data

    def decode(self, data: bytes, shape: Shape) -> bytes:
        numbers: bytes = self._zipnn.decompress(data)
        return numbers


PEERS = (Zipnn,)
