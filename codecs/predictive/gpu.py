"""Blocks of `predictive` as jobs for a GPU: all token ranges of a part of a layer at the same time,
and parts one after the other. What ranges take along from part to part stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.common.rotation import is_side_by_side, is_wide, rounds_products
from kvzip.codecs.native.cuda.device import Kernel, Memory, up
from kvzip.codecs.native.cuda.work import bytes_at
from kvzip.codecs.predictive.codec import (
    CHANNEL,
    CODED,
    HEADER,
    RAW,
    UNTURNED,
    by_channel,
    channel_on_device,
    check_known,
    entries,
    section,
)
from kvzip.codecs.predictive.gpu_model import LayerOnDevice, ModelOnDevice, on_device, shared_bytes
from kvzip.codecs.predictive.rotation import Rotations, pairs_of
from kvzip.errors import CorruptError
from kvzip.layout import KV

_SPACE = "kvzip::predictive"
_JOB = np.dtype(
    [
        ("layer", "<u8"),
        ("inputs", "<u8"),
        ("residual", "<u8"),
        ("products", "<u8"),
        ("energy", "<u8"),
        ("states", "<u8"),
        ("entries", "<u8"),
        ("regions", "<u8"),
        ("at", "<u8"),
        ("tiles", "<u8"),
        ("first_states", "<u8"),
        ("low", "<u8"),
        ("header", "<u8"),
        ("counts", "<u8"),
        ("bytes", "<u8"),
        ("position", "<u8"),
        ("rotation", "<u8"),
        ("tokens", "<u4"),
        ("row_tokens", "<u4"),
        ("part", "<u4"),
        ("first_token", "<u4"),
        ("values", "<u4"),
        ("begins", "<u4"),
        ("ends", "<u4"),
        ("row", "<u4"),
        ("rounds_products", "<u4"),
        ("reserved", "<u4"),
    ]
)
"""`RangeJob` of device_jobs.hpp."""
_MOST_COUNT_BITS = 17
_TILE = 32
_CHAIN_WARPS = 8
"""Warps of a block, at most, that decode; up to four more multiply."""
_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
_LEAST_SHARED = 99 << 10
"""Shared memory that a block may have, by compute capability, and of all others."""


class _Range(NamedTuple):
    """A token range on its way through the layers."""

    shape: tuple[int, int]
    """Rows of the batch, and tokens of each."""
    position: int
    entries: NDArray[np.int32]
    """Of each token its row in the layers' tables, or -1."""
    memory: Mapping[str, int]
    """Addresses on the device, by the names of `RangeJob`; nothing when no more can be predicted:
    a part did not follow the one before it."""
    owner: Memory | None
    next_part: int = 0
    coded: bool = False
    """Whether there are states of rANS."""

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]


def decode(work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]) -> None:
    """As :meth:`kvzip.codec.Codec.decode_on_device`."""
    if not len(blocks):
        return
    any_context = next(iter(contexts.values()))
    profile = any_context.profile
    model = None if profile is None else on_device(work.device, profile)
    ranges: dict[int, _Range] = dict(any_context.scratch.get("predictive", {}))
    angles: dict[tuple[Any, ...], int] = {}
    found = [(contexts[int(block["row"])], block) for block in blocks]
    for (layer, part), some in groupby(found, key=lambda f: (f[0].layer, f[0].part)):
        step = _Step(work, model, ranges, layer, KV.index(part), angles)
        for context, block in some:
            step.add(block, context)
        step.run()
    any_context.scratch["predictive"] = ranges
    for found_range in ranges.values():
        if found_range.owner is not None:
            work.hold(found_range.owner)


class _Step:
    """All blocks of one part of one layer."""

    def __init__(
        self,
        work: Any,
        model: ModelOnDevice | None,
        ranges: dict[int, _Range],
        layer: int,
        part: int,
        angles: dict[tuple[Any, ...], int],
    ):
        self.work, self.ranges, self._angles = work, ranges, angles
        self.model = model or ModelOnDevice([], 2, 1, 1, 0, 0, [])
        self.layer, self.part = layer, part
        self._jobs: list[NDArray[Any]] = []
        self._by_channel: list[Any] = []
        self._tables: dict[int, tuple[memoryview, Context]] = {}
        self._itemsize = 0
        self._kernel = ""

    # --- blocks ----------------------------------------------------------------------------

    def add(self, block: Any, context: Context) -> None:
        """Look at a block: what kind it is, and whether its sections fit it. Raises
        CorruptError, or UnsupportedError for one that only a later version knows."""
        form, tokens = context.dtype, int(block["tokens"])
        self._itemsize = form.itemsize
        self._kernel = "bf16" if form.bits == 32 else form.name
        batch, heads, dim = self.work.shape(int(block["part"]))
        shape = batch, heads, tokens, dim
        numbers = math.prod(shape)
        data = bytes_at(int(block["host"]), int(block["length"]))
        check_known(bytes(data[:HEADER]))
        if len(data) < HEADER or (any(data[1:HEADER]) and data[0] == RAW):
            raise CorruptError("a block of unknown kind")
        end = context.start + tokens
        before = self._followed(end, (batch, tokens), context)
        kind, here = data[0], int(block["address"])
        job, now = None, before._replace(next_part=before.next_part + 1)
        if before.memory:
            if self._lacks(heads, dim):
                raise CorruptError("the profile is of another model")
            job = self._job(block, before)
        if kind in (CODED, UNTURNED) and job is not None:
            low = 2 * numbers if form.bits == 32 else 0
            at = HEADER + section(data[HEADER:], low)
            job["low"] = here + HEADER
            if not before.coded:
                states, size = _states(data[at:], before.tokens * self.model.lanes)
                job["first_states"] = self.work.put(states, 16)
                at += size
                now = now._replace(coded=True)
            job["header"], job["counts"], job["bytes"] = here, here + at, len(data) - at
            job["ends"] = before.next_part + 1 == 2 * len(self.model.layers)
            if kind == UNTURNED:
                job["rounds_products"] = rounds_products(data[2])
                job["rotation"] = self._rotation(context, shape, data[2])
            if data[1] > _MOST_COUNT_BITS or (kind == CODED and data[2]) or data[3]:
                raise CorruptError("counts of words that make no sense")
            if not before.tokens and (len(data) > at or any(data[1:HEADER])):
                raise CorruptError("words of no token")
        elif kind == RAW:
            if len(data) - HEADER != numbers * form.itemsize:
                raise CorruptError("numbers of another size")
            strides = heads * tokens * dim, tokens * dim, dim
            part, first = int(block["part"]), int(block["first"])
            self.work.copy(form.itemsize, here + HEADER, strides, part, first, tokens)
        elif kind == CHANNEL:
            self._add_by_channel(block, data, context)
        else:
            raise CorruptError("a block of unknown kind, or one that nothing predicts")
        self.ranges[end] = now
        if job is not None and before.tokens:
            self._jobs.append(job)

    def _rotation(self, context: Context, shape: tuple[int, ...], rounding: int) -> int:
        """Where the device finds what turned a block's keys. Raises CorruptError."""
        pairs, wide = pairs_of(context.profile.tensors, self.layer), is_wide(rounding)
        name = context.part, context.start, shape[2], context.rope, shape[3], pairs, wide
        if name not in self._angles:
            angles = Rotations().of(context, shape, wide)
            if angles is None or angles.shape[2] != pairs:
                raise CorruptError("pairs before RoPE, and nothing that says how they are turned")
            self._angles[name] = self.work.put(angles)
        if is_side_by_side(rounding) != self.model.layers[self.layer].side_by_side:
            raise CorruptError("pairs before RoPE that are not the profile's")
        return self._angles[name]

    def _add_by_channel(self, block: Any, data: memoryview, context: Context) -> None:
        if any(data[1:HEADER]):
            raise CorruptError("a block of unknown kind")
        tables, rest = by_channel(data)
        coded, before = block.copy(), np.uint64(len(data) - len(rest))
        for name in ("host", "address"):
            coded[name] += before
        coded["length"] -= before
        self._by_channel.append(coded)
        self._tables[int(block["row"])] = tables, context

    def _followed(self, end: int, shape: tuple[int, int], context: Context) -> _Range:
        """The token range that a block is of, if it goes on with it; else one without memory."""
        number = 2 * self.layer + self.part
        found = self.ranges.get(end)
        if found is None:
            found = _Range(shape, context.start, np.empty(0, np.int32), {}, None)
            if number == 0 and self.model.layers:
                found = self._begun(found, context)
        if found.next_part != number or found.shape != shape:
            found = found._replace(memory={}, shape=shape)
        return found._replace(next_part=number)

    def _begun(self, found: _Range, context: Context) -> _Range:
        """A range with memory of its own."""
        model, tokens = self.model, found.tokens
        regions = max((layer.regions for layer in model.layers), default=1)
        tiles = _most_tiles(tokens, regions)
        columns = max((layer.columns for layer in model.layers), default=0)
        residual = max((layer.residual_bytes for layer in model.layers), default=0)
        sizes = {
            "inputs": tokens * model.row_bytes,
            "residual": tiles * _TILE * residual,
            "products": tiles * columns * _TILE * 4,
            "energy": 4 * tokens,
            "states": 8 * tokens * model.lanes,
            "regions": tokens,
            "at": 4 * tokens,
            "tiles": 16 + 16 * tiles,
        }
        ends = np.cumsum([up(size, 256) for size in sizes.values()]).tolist()
        memory = self.work.device.allocate(ends[-1])
        starts = [memory.address + at for at in (0, *ends[:-1])]
        own = entries(context.profile.tensors, context.token_ids, tokens)
        addresses = dict(zip(sizes, starts, strict=True))
        return found._replace(entries=own, memory=addresses, owner=memory)

    def _lacks(self, heads: int, dim: int) -> bool:
        """Whether the profile has no such part."""
        layers = self.model.layers
        return self.layer >= len(layers) or layers[self.layer].shapes[self.part] != (heads, dim)

    # --- jobs ------------------------------------------------------------------------------

    def _job(self, block: Any, of: _Range) -> NDArray[Any]:
        layer = self.model.layers[self.layer]
        job = np.zeros(1, _JOB)
        for name, address in of.memory.items():
            job[name] = address
        if layer.regions == 1:
            job["at"] = 0
        if layer.has_table and of.tokens:
            job["entries"] = self.work.put(of.entries)
        job["layer"], job["position"] = layer.address, of.position
        job["tokens"], job["row_tokens"] = of.tokens, of.shape[1]
        job["part"], job["first_token"] = block["part"], block["first"]
        job["values"], job["begins"] = self.part, of.next_part == 0
        job["row"] = block["row"]
        return job

    def run(self) -> None:
        """Have everything run: what needs nothing, and then what is predicted, step by step."""
        work = self.work
        if self._by_channel:
            channel_on_device(work, np.array(self._by_channel), self._tables)
        if self._jobs:
            jobs = np.concatenate(self._jobs)
            layer = self.model.layers[self.layer]
            if not self.part:
                self._predict(jobs, layer)
            work.then()
            work.run(self._chain(jobs, layer), jobs)
        work.then()

    def _tiles(self, jobs: NDArray[Any], layer: LayerOnDevice) -> int:
        """Tiles of a range, at most."""
        return _most_tiles(int(jobs["tokens"].max()), layer.regions)

    def _predict(self, jobs: NDArray[Any], layer: LayerOnDevice) -> None:
        """Tokens in their order, and what earlier layers say of all channels."""
        if layer.regions > 1:
            blocks = min(-(-int(jobs["tokens"].max()) // 4), 64)
            arguments = ("jobs", "count", blocks)
            source = "predictive/arrange.cuh"
            regions = Kernel(source, "predictive_regions", _SPACE, 128, 1, blocks, 0, arguments)
            self.work.run(regions, jobs)
            self.work.then()
            arguments2 = ("jobs", "count")
            self.work.run(
                Kernel(source, "predictive_arrange", _SPACE, 256, 1, 1, 1024, arguments2), jobs
            )
            self.work.then()
        if layer.has_inputs:
            blocks = -(-self._tiles(jobs, layer) // 4) * (layer.columns // 64)
            arguments = ("jobs", "count", blocks)
            source = "predictive/products.cuh"
            kernel = Kernel(source, "predictive_products", _SPACE, 128, 1, blocks, 0, arguments)
            self.work.run(kernel, jobs)

    def _chain(self, jobs: NDArray[Any], layer: LayerOnDevice) -> Kernel:
        model = self.model
        warps = max(n for n in range(1, _CHAIN_WARPS + 1) if model.lanes % n == 0)
        beside = 4 if layer.columns >= 1024 else 2 if layer.columns >= 512 else 1
        residuals = _TILE * layer.residual_bytes
        shared = shared_bytes(model.group, model.lanes, model.shapes, warps)
        fits = shared + residuals <= _most_shared(self.work.device.architecture)
        shared += residuals if fits else 0
        blocks = self._tiles(jobs, layer)
        arguments = ("jobs", "count", "parts", "flags", blocks, warps, self._itemsize, int(fits))
        threads = 32 * (warps + beside)
        name = f"predictive_chain_{self._kernel}"
        return Kernel("predictive/chain.cuh", name, _SPACE, threads, 1, blocks, shared, arguments)


def _most_shared(architecture: str) -> int:
    number = architecture.removeprefix("sm_")
    return _SHARED.get(int(number), _LEAST_SHARED) if number.isdecimal() else _LEAST_SHARED


def _most_tiles(tokens: int, regions: int) -> int:
    """How many tiles so many tokens make at most: those of a tile are of one region."""
    if regions == 1:
        return -(-tokens // _TILE)
    return min(tokens, tokens // _TILE + regions)


def _states(data: memoryview, count: int) -> tuple[NDArray[np.uint64], int]:
    """The states that a token range begins with, and how many bytes they take up. Raises
    CorruptError."""
    try:
        states, size = _native.predictive_states(np.frombuffer(data, np.uint8), count)
    except ValueError as error:
        raise CorruptError(str(error)) from None
    return np.frombuffer(states, np.uint64), size
