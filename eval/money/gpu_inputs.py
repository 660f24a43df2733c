"""What `make bench-gpu` measured, in place of what the price book says of a GPU's decoders and of
its link to the host."""

from __future__ import annotations

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.money.prices import Price, PriceBook
from kvzip.eval.results.gpu import COPY, KERNELS, LINK, GpuResult, GpuRow

PCIE = "host-to-h100"
"""The entry of `link` that stands for PCIe."""


def with_gpu(book: PriceBook, measured: GpuResult) -> PriceBook:
    """The price book with the rates of one run, at its greatest length. What the run did not
    measure stays. Raises KVZipError when it has none of them."""
    decoder, link = dict(book.decoder), dict(book.link)
    for name, codec in ((KERNELS, "channel"), (COPY, "raw")):
        if row := _last(measured, name):
            decoder[codec] = _price(measured, row, row.gbps, "GB/s")
    if row := _last(measured, LINK):
        link[PCIE] = _price(measured, row, 8 * row.gbps, "Gb/s")
    if decoder == book.decoder and link == book.link:
        raise KVZipError(
            f"the result of {measured.gpu} has no row that a model takes: measure again with "
            f"{measured.writer}"
        )
    return msgspec.structs.replace(book, decoder=decoder, link=link)


def _last(measured: GpuResult, name: str) -> GpuRow | None:
    rows = [row for row in measured.rows if row.name == name]
    return max(rows, key=lambda row: row.tokens) if rows else None


def _price(measured: GpuResult, row: GpuRow, value: float, unit: str) -> Price:
    source = (
        f"{measured.gpu}, {measured.dtype}, {row.tokens:,} tokens, median of {row.runs}: {row.name}"
    )
    return Price(value, unit, measured.date[:10], source, basis="measured")
