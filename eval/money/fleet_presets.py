"""Fleets by name, from one reader to the paper's 80 million agents and beyond."""

from __future__ import annotations

import math

import msgspec

from kvzip.choice.cost import GB, TERA, prefill_at_peak, token_cost
from kvzip.errors import KVZipError
from kvzip.eval.money import paper as stated
from kvzip.eval.money.fleet import Fleet
from kvzip.eval.money.prices import PriceBook, default_prices

MODEL = "qwen3-4b"
"""Whose caches all these fleets read, an entry of the price book."""


def presets(prices: PriceBook | None = None, itemsize: float = 2) -> dict[str, Fleet]:
    """Fleets by name, of caches with `itemsize` bytes a number. Those beside the paper's are made
    up, to span the scales."""
    book = prices or default_prices()
    the_paper = _paper(book, itemsize)
    rented = _rented(book, itemsize)
    return {
        "paper-80m": the_paper,
        "one-reader": msgspec.structs.replace(rented, readers=1.0),
        "team": msgspec.structs.replace(
            rented,
            readers=50.0,
            reads_per_reader=100.0,
            documents=200,
            reads_per_write=50.0,
            node_bytes=50 * GB,
        ),
        "company": msgspec.structs.replace(
            rented,
            readers=1e5,
            reads_per_reader=20.0,
            documents=100_000,
            zipf=0.9,
            reads_per_write=100.0,
            regions=3,
            nodes_per_region=4,
            node_bytes=4e12,
        ),
        "world": msgspec.structs.replace(
            rented,
            readers=1e9,
            reads_per_reader=10.0,
            documents=100_000_000,
            zipf=0.9,
            reads_per_write=1000.0,
            regions=20,
            nodes_per_region=500,
            node_bytes=30e12,
            node_bandwidth=400e9,
        ),
    }


def _paper(book: PriceBook, itemsize: float) -> Fleet:
    """The paper's 80 million agents, each of which reads one document once. Nobody keeps it near
    them: what is shipped is paid for with every read."""
    base = book.base("paper-m1pro")
    if base.api_input is None:
        raise KVZipError("preset.paper-m1pro has no api_input price")
    prefill = token_cost(stated.LONG, base.api_input.value)
    return Fleet(
        readers=stated.AGENTS,
        node_bytes=0.0,
        raw_bytes=stated.RAW_BYTES * itemsize / 2,
        prefill_seconds=stated.PREFILL[stated.LONG],
        reuse_seconds=stated.REUSE[stated.LONG],
        prefill_usd=prefill,
        cached_usd=prefill * stated.CACHED_PRICE,
        device_usd_per_hour=base.device.value,
        egress=base.egress.value,
        storage=0.0 if base.storage is None else base.storage.value,
    )


def _rented(book: PriceBook, itemsize: float) -> Fleet:
    """The same fleet with documents of 8,192 tokens that prefills on rented H100s, whose nodes have
    drives and keep all."""
    h100 = book.base("h100-rented")
    shape = book.model[MODEL]
    if h100.compute is None or h100.storage is None:
        raise KVZipError("preset.h100-rented has no compute or no storage")
    speed = h100.compute.value * TERA * h100.compute.utilisation
    model = prefill_at_peak(shape.parameters, shape.layers, shape.width, speed)
    return msgspec.structs.replace(
        _paper(book, itemsize),
        node_bytes=math.inf,
        node_storage=book.storage["nvme"].value,
        prefill_seconds=model.seconds(8192),
        raw_bytes=itemsize * shape.numbers_per_token * 8192,
        reuse_seconds=0.01,
        prefill_usd=None,
        cached_usd=None,
        device_usd_per_hour=h100.device.value,
        egress=h100.egress.value,
        storage=h100.storage.value,
        node_bandwidth=100e9,
        internal=2 * book.egress["aws-zones"].value,  # asked for each way, and both are its own
    )
