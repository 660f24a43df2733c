"""OpenZL: exponents apart from sign and fraction, which are noise.

Exponents go through Huffman for speed or FSE for size. Sign and fraction are stored as they are,
fp16's without the 5 bits that fill them up to two bytes. A number of 8 bits is coded whole.
"""

from __future__ import annotations

from typing import Any, ClassVar

import openzl.ext as zl

from kvzip.benchmarks.peer import Peer, Shape
from kvzip.dtypes import Bits, DType
from kvzip.errors import UnsupportedError
from kvzip.eval.results.bench import Order

_SPLIT = {
    "bf16": zl.nodes.BFloat16Deconstruct,
    "fp16": zl.nodes.Float16Deconstruct,
    "fp32": zl.nodes.Float32Deconstruct,
}


class OpenZLHuffman(Peer):
    name, package = "OpenZL Huffman", "openzl"
    setting = "exponents: Huffman; sign and fraction: stored"
    order: ClassVar[Order] = "channel"
    coder: ClassVar[Any] = zl.graphs.Huffman

    def __init__(self, form: DType) -> None:
        super().__init__(form)
        if form.itemsize > 1 and form.name not in _SPLIT:
            raise UnsupportedError(f"not for {form.name}")
        self._graph = zl.Compressor()
        self._graph.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        self._graph.select_starting_graph(self._start(form))
        self._compressor, self._decompressor = zl.CCtx(), zl.DCtx()
        # Else the graph is forgotten after the first block.
        self._compressor.set_parameter(zl.CParam.StickyParameters, 1)
        self._compressor.ref_compressor(self._graph)

    def _start(self, form: DType) -> Any:
        graph, coder = self._graph, self.coder()
        if form.itemsize == 1:
            return zl.nodes.ConvertNumToSerialLE()(graph, coder)
        rest = zl.graphs.Store()
        if form.name == "fp16":
            rest = zl.nodes.ConvertStructToNumLE()(graph, zl.graphs.Bitpack())
        return _SPLIT[form.name]()(graph, rest, coder)

    def encode(self, numbers: Bits) -> bytes:
        data: bytes = self._compressor.compress([zl.Input(zl.Type.Numeric, numbers.reshape(-1))])
        return data

    def decode(self, data: bytes, shape: Shape) -> Bits:
        [output] = self._decompressor.decompress(data)
        numbers: Bits = output.content.as_nparray()
        return numbers


class OpenZLFse(OpenZLHuffman):
    name = "OpenZL FSE"
    setting = "exponents: FSE; sign and fraction: stored"
    coder = zl.graphs.Fse


PEERS = (OpenZLHuffman, OpenZLFse)
