"""Blocks of `predictive` as jobs for a GPU: all token ranges of a part of a layer at the same time,
and parts one after the other. What ranges take along from part to part stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.common.device_angles import Kind, all_angles
from kvzip.codecs.common.rotation import is_side_by_side, is_wide, rotation_of
from kvzip.codecs.native.cuda.device import Kernel, Memory
from kvzip.codecs.native.cuda.work import Block, bytes_at
from kvzip.codecs.predictive.codec import (
    HEADER,
    MOST_TOKENS,
    by_channel,
    channel_on_device,
    check_known,
    entries,
)
from kvzip.codecs.predictive.gpu_model import LayerOnDevice, ModelOnDevice, on_device, shared_bytes
from kvzip.codecs.predictive.rotation import pairs_of
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
_RANGE = np.dtype(
    [
        ("position", "<u8"),
        ("inputs", "<u8"),
        ("residual", "<u8"),
        ("products", "<u8"),
        ("energy", "<u8"),
        ("states", "<u8"),
        ("regions", "<u8"),
        ("at", "<u8"),
        ("tiles", "<u8"),
        ("entries", "<u8"),
        ("rows", "<u4"),
        ("tokens", "<u4"),
        ("next_part", "<u4"),
        ("predicted", "<u4"),
        ("coded", "<u4"),
        ("reserved", "<u4"),
    ]
)
"""`DeviceRange` of device_ranges.hpp."""
_TILE = 32
_CHAIN_WARPS = 8
"""Warps of a block, at most, that decode; up to four more multiply."""
_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
_LEAST_SHARED = 99 << 10
"""Shared memory that a block may have, by compute capability, and of all others."""


class _Ranges:
    """Token ranges on their way through the layers."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}
        """Which of `states` a range has, by the position behind its last token."""
        self.states = np.zeros(0, _RANGE)
        self.entries: list[NDArray[np.int32]] = []
        """Of each range's tokens the rows in the layers' tables, or -1."""
        self.owners: list[Memory] = []

    def copy(self) -> _Ranges:
        """The same, to go on with; what is on the device is shared."""
        found = _Ranges()
        found.places, found.states = dict(self.places), self.states.copy()
        found.entries, found.owners = list(self.entries), list(self.owners)
        return found


def decode(work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]) -> None:
    """As :meth:`kvzip.codec.Codec.decode_on_device`."""
    if not len(blocks):
        return
    rows = list(map(Block._make, blocks.tolist()))
    any_context = contexts[rows[0].row]
    profile = any_context.profile
    model = None if profile is None else on_device(work.device, profile)
    ranges = any_context.scratch.get("predictive", _Ranges()).copy()
    steps: list[tuple[Context, list[int]]] = []
    at = 0
    for _, same in groupby(rows, key=attrgetter("part")):
        some = list(same)
        context = contexts[some[0].row]
        start = context.start - some[0].first
        ends = [start + block.first + block.tokens for block in some]
        if steps and (steps[-1][0].layer, steps[-1][0].part) == (context.layer, context.part):
            steps[-1][1].extend(ends)
        else:
            steps.append((context, ends))
    for context, ends in steps:
        step = _Step(work, model, ranges, context)
        step.run(blocks[at : at + len(ends)], rows[at : at + len(ends)], ends, contexts)
        at += len(ends)
    any_context.scratch["predictive"] = ranges
    for owner in ranges.owners:
        work.hold(owner)


class _Step:
    """All blocks of one part of one layer, which `context` is of."""

    def __init__(self, work: Any, model: ModelOnDevice | None, ranges: _Ranges, context: Context):
        self.work, self.ranges, self.context = work, ranges, context
        self.model = model or ModelOnDevice([], 2, 1, 1, 0, 0, [])
        self.part = KV.index(context.part)
        self._itemsize = context.dtype.itemsize

    def run(
        self,
        blocks: NDArray[Any],
        rows: Sequence[Block],
        ends: Sequence[int],
        contexts: Mapping[int, Context],
    ) -> None:
        """Have these blocks decoded: what needs nothing, and then what is predicted, step by step.
        `rows` are the same blocks; `ends`, the position behind the last token of each. Raises
        CorruptError, or UnsupportedError for one that only a later version knows."""
        work, shape = self.work, self.work.shape(rows[0].part)
        layer = self._layer(shape[1:])
        self._begin(rows, ends, shape[0], contexts)
        which = [self.ranges.places[end] for end in ends]
        if layer is not None and layer.has_table:
            self._put_entries(which)
        try:
            found, raw, plain, unknown, unturned, states, begun = _native.predictive_jobs(
                blocks.view(np.uint8),
                np.array(which, np.int64),
                self.ranges.states.view(np.uint8),
                2 * self.context.layer + self.part,
                shape,
                self._itemsize,
                0 if layer is None else layer.address,
                self.model.lanes,
                1 if layer is None else layer.regions,
                self.context.layer + 1 == len(self.model.layers) and self.part == 1,
            )
        except ValueError as error:
            raise CorruptError(str(error)) from None
        for n in unknown:
            check_known(bytes(bytes_at(rows[n].host, min(rows[n].length, HEADER))))
            raise CorruptError("a block of unknown kind, or one that nothing predicts")
        for n in raw:
            work.copy_block(self._itemsize, rows[n], HEADER)
        self._by_channel(blocks[plain], [rows[n] for n in plain], contexts)
        jobs = found.view(_JOB)[:, 0]
        if len(begun):
            jobs["first_states"][begun] += np.uint64(work.put(states, 16))
        if len(unturned):
            self._turn(jobs, unturned.tolist(), rows, ends)
        if len(jobs):
            assert layer is not None
            if not self.part:
                self._predict(jobs, layer)
            work.then()
            work.run(self._chain(jobs, layer), jobs)
        work.then()

    def _layer(self, shape: tuple[int, int]) -> LayerOnDevice | None:
        """The profile's layer, if it has such a part."""
        layers, at = self.model.layers, self.context.layer
        return layers[at] if at < len(layers) and layers[at].shapes[self.part] == shape else None

    def _begin(
        self,
        rows: Sequence[Block],
        ends: Sequence[int],
        batch: int,
        contexts: Mapping[int, Context],
    ) -> None:
        """Make the ranges that these blocks are the first of. At the first part of all they get
        memory, in one piece; those that begin later cannot be predicted."""
        known = self.ranges.places
        new = [n for n, end in enumerate(ends) if end not in known]
        if not new:
            return
        states = np.zeros(len(new), _RANGE)
        states["rows"], states["tokens"] = batch, [rows[n].tokens for n in new]
        states["position"] = [ends[n] - rows[n].tokens for n in new]
        states["next_part"] = 2 * self.context.layer + self.part
        if self.model.layers and not states["next_part"][0]:
            states["predicted"] = batch * states["tokens"].astype(np.int64) <= MOST_TOKENS
            self._give_memory(states)
        for n in new:
            known[ends[n]] = len(known)
            context, tokens = contexts[rows[n].row], batch * rows[n].tokens
            tensors = {} if context.profile is None else context.profile.tensors
            self.ranges.entries.append(entries(tensors, context.token_ids, tokens))
        self.ranges.states = np.concatenate([self.ranges.states, states])

    def _give_memory(self, states: NDArray[Any]) -> None:
        model = self.model
        layers = model.layers
        tokens = states["rows"].astype(np.int64) * states["tokens"] * states["predicted"]
        regions = max(layer.regions for layer in layers)
        tiles = np.array([_most_tiles(n, regions) for n in tokens.tolist()])
        sizes = {
            "inputs": tokens * model.row_bytes,
            "residual": tiles * (_TILE * max(layer.residual_bytes for layer in layers)),
            "products": tiles * (max(layer.columns for layer in layers) * _TILE * 4),
            "energy": 4 * tokens,
            "states": 8 * tokens * model.lanes,
            "regions": tokens,
            "at": 4 * tokens,
            "tiles": 16 + 16 * tiles,
        }
        total = 0
        for name, size in sizes.items():
            ends = np.cumsum(-(-size // 256) * 256)
            states[name] = total + np.concatenate([[0], ends[:-1]])
            total += int(ends[-1])
        memory = self.work.device.allocate(total)
        for name in sizes:
            states[name] += np.uint64(memory.address)
        self.ranges.owners.append(memory)

    def _put_entries(self, which: Sequence[int]) -> None:
        """Have the rows that tokens have in tables on the device."""
        found = [self.ranges.entries[n] for n in which]
        at = self.work.put(np.concatenate(found))
        for n, own in zip(which, found, strict=True):
            self.ranges.states["entries"][n] = at
            at += own.nbytes

    def _turn(
        self,
        jobs: NDArray[Any],
        unturned: Sequence[tuple[int, int, int]],
        rows: Sequence[Block],
        ends: Sequence[int],
    ) -> None:
        """Tell jobs where the device finds what turned their keys; of each its number, that of its
        block, and how keys are rounded. Raises CorruptError."""
        context, dim = self.context, self.work.shape(rows[0].part)[2]
        rotation = rotation_of(context, dim)
        if rotation is None or rotation.pairs != pairs_of(context.profile.tensors, context.layer):
            raise CorruptError("pairs before RoPE, and nothing that says how they are turned")
        for job, n, rounding in unturned:
            if is_side_by_side(rounding) != self.model.layers[context.layer].side_by_side:
                raise CorruptError("pairs before RoPE that are not the profile's")
            if job < len(jobs):  # one without tokens has no job
                kind, tokens = Kind(rotation, is_wide(rounding), floats=True), rows[n].tokens
                found = all_angles(self.work.device, kind, ends[n] - tokens, tokens)
                self.work.hold(found.memory)
                jobs["rotation"][job] = found.address

    def _by_channel(
        self, blocks: NDArray[Any], rows: Sequence[Block], contexts: Mapping[int, Context]
    ) -> None:
        """Have blocks decoded that `channel` coded."""
        if not len(blocks):
            return
        tables = {}
        for block, row in zip(blocks, rows, strict=True):
            data = bytes_at(row.host, row.length)
            if any(data[1:HEADER]):
                raise CorruptError("a block of unknown kind")
            stored, rest = by_channel(data)
            before = np.uint64(len(data) - len(rest))
            for name in ("host", "address"):
                block[name] += before
            block["length"] -= before
            tables[row.row] = stored, contexts[row.row]
        channel_on_device(self.work, blocks, tables)

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
        form = self.context.dtype
        name = f"predictive_chain_{'bf16' if form.bits == 32 else form.name}"
        return Kernel("predictive/chain.cuh", name, _SPACE, threads, 1, blocks, shared, arguments)


def _most_shared(architecture: str) -> int:
    number = architecture.removeprefix("sm_")
    return _SHARED.get(int(number), _LEAST_SHARED) if number.isdecimal() else _LEAST_SHARED


def _most_tiles(tokens: int, regions: int) -> int:
    """How many tiles so many tokens make at most: those of a tile are of one region."""
    if regions == 1:
        return -(-tokens // _TILE)
    return min(tokens, tokens // _TILE + regions)
