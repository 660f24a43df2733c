"""A profile as a GPU takes it (device_jobs.hpp): unpacked, in the order in which threads read it,
and brought to the device once.

On the device it takes about (i + 1/2) n^2 bytes a layer and region, for n channels that are
predicted from i layers as wide, and the tables of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvzip.codecs.native.cuda.device import Device, Memory, up
from kvzip.codecs.predictive.codec import native_model
from kvzip.profile import Profile

_CHANNEL = np.dtype(
    [
        ("bias", "<i4"),
        ("weight_scale", "<i4"),
        ("within_scale", "<i4"),
        ("mean", "<i4"),
        ("input_scale", "<i4"),
        ("unit", "<i2"),
        ("shape", "<u2"),
        ("inverse", "<i4", 2),
    ]
)
_CELL = np.dtype([("from", "<i4"), ("rise", "<i4"), ("start", "<f4"), ("slope", "<f4")])
_LAYER = np.dtype(
    [
        ("channels", "<u8"),
        ("places", "<u8"),
        ("weight", "<u8"),
        ("far", "<u8", 2),
        ("far_start", "<u8", 2),
        ("near", "<u8", 2),
        ("pair_tables", "<u8"),
        ("step", "<u8"),
        ("table", "<u8"),
        ("centre", "<u8"),
        ("centre_bias", "<u8"),
        ("inputs", "<u8"),
        ("sine", "<u8"),
        ("cells", "<u8"),
        ("guesses", "<u8"),
        ("far_steps", "<u4", 2),
        ("channel_count", "<u4", 2),
        ("first_column", "<u4", 2),
        ("heads", "<u4", 2),
        ("dim", "<u4", 2),
        ("columns", "<u4"),
        ("regions", "<u4"),
        ("pairs", "<u4"),
        ("input_count", "<u4"),
        ("input_width", "<u4"),
        ("output", "<u4"),
        ("table_rows", "<u4"),
        ("table_bytes", "<u4"),
        ("group", "<u4"),
        ("lanes", "<u4"),
        ("near_words", "<u4"),
        ("shape_count", "<u4"),
        ("row_bytes", "<u4"),
        ("residual_bytes", "<u4"),
        ("side_by_side", "<u4"),
        ("reserved", "<u4"),
    ]
)
"""`DeviceChannel`, `DeviceCell` and `DeviceLayer` of device_jobs.hpp."""

_CELLS, _GUESSES = 64, 512
_HALF = (1 << 23) - (1 << 9)
_STAGED = 32 << 20
"""Bytes that go to the device at a time."""

_FOUR = np.uint32
"""Four neighbours, which stay together: NumPy moves one number at a time."""

Bytes = NDArray[np.int8]


class Columns(NamedTuple):
    """Where a layer's channels stand in what a GPU keeps of them: keys from column 0 on, values
    from `values` on."""

    keys: int
    channels: int
    values: int
    width: int

    @classmethod
    def of(cls, layer: Mapping[str, Any]) -> Columns:
        keys, values = (int(np.prod(layer[part])) for part in ("k", "v"))
        first = up(keys, 32)
        return cls(keys, keys + values, first, max(up(first + values, 64), 64))

    def spread(self, array: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        """The channels of an axis, in coding order, at their columns; zeros elsewhere."""
        axis %= array.ndim
        shape, before = list(array.shape), (slice(None),) * axis
        shape[axis] = self.width
        found = np.zeros(shape, array.dtype)
        values = slice(self.values, self.values + self.channels - self.keys)
        found[*before, : self.keys] = array[*before, : self.keys]
        found[*before, values] = array[*before, self.keys : self.channels]
        return found


class LayerOnDevice(NamedTuple):
    """What the host needs to know of a layer."""

    address: int
    """Of its DeviceLayer."""
    shapes: tuple[tuple[int, int], tuple[int, int]]
    """Heads and dim of keys and of values."""
    columns: int
    regions: int
    has_inputs: bool
    has_table: bool
    residual_bytes: int
    """Of a token, in a block of chain.cuh."""
    side_by_side: bool
    """Whether RoPE turns numbers 2i and 2i + 1 of a head together."""


class ModelOnDevice(NamedTuple):
    """A profile on a device."""

    layers: list[LayerOnDevice]
    group: int
    lanes: int
    shapes: int
    """How many densities there are."""
    row_bytes: int
    """Of what a token's layers tell later ones, at any time."""
    nbytes: int
    """Of the device's memory that it takes up."""
    owners: list[Memory]


def on_device(device: Device, profile: Profile) -> ModelOnDevice:
    """The profile on a device, brought there when it is first asked for and kept as long as the
    profile is. Raises ProfileError for one that makes no sense."""
    kept: dict[Device, ModelOnDevice] = profile.made.setdefault("predictive on devices", {})
    found = kept.get(device)
    if found is None:
        found = kept[device] = _Upload(device, profile).run()
    return found


class _Upload:
    """A profile on its way to a device."""

    def __init__(self, device: Device, profile: Profile):
        self.device, self.tensors = device, profile.tensors
        self.model = native_model(profile)  # which checks it
        self.layers: Sequence[Mapping[str, Any]] = profile.description["layers"]
        self.group, self.lanes = profile.description["group"], profile.description["lanes"]
        self.columns = [Columns.of(layer) for layer in self.layers]
        self.outputs, self.row_bytes = _outputs(self.layers, self.columns)
        self.owners: list[Memory] = []
        self._stream = device.stream()
        self._pinned = device.pinned(1 << 16)

    def run(self) -> ModelOnDevice:
        cells, guesses = densities(self.tensors["densities"])
        common = self._put({"sine": self.tensors["sine"], "cells": cells, "guesses": guesses})
        records = np.zeros(len(self.layers), _LAYER)
        for i in range(len(self.layers)):
            for name, value in (self._layer(i, len(cells)) | common).items():
                records[i][name] = value
        address = self._put({"": records})[""]
        layers = [
            self._known(record, address + n * _LAYER.itemsize) for n, record in enumerate(records)
        ]
        nbytes = sum(memory.size for memory in self.owners)
        return ModelOnDevice(
            layers, self.group, self.lanes, len(cells), self.row_bytes, nbytes, self.owners
        )

    def _put(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """The device's addresses of copies of arrays."""
        flat = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()]
        ends = np.cumsum([up(a.size, 256) for a in flat], dtype=np.int64).tolist()
        memory = self.device.allocate(ends[-1])
        self.owners.append(memory)
        size = min(ends[-1], _STAGED)
        if self._pinned.array.size < size:
            self._pinned = self.device.pinned(size)
        starts = [0, *ends[:-1]]
        for begin, array in zip(starts, flat, strict=True):
            for at in range(0, array.size, _STAGED):
                some = array[at : at + _STAGED]
                self._pinned.array[: some.size] = some
                to = memory.address + begin + at
                self.device.upload(self._stream, to, self._pinned.address, some.size)
                self.device.synchronize(self.device.record(self._stream))
        return {n: memory.address + at for n, at in zip(arrays, starts, strict=True)}

    def _layer(self, i: int, shapes: int) -> dict[str, Any]:
        """The fields of a layer's record."""
        layer, mine = self.layers[i], self.columns[i]
        tensors = {
            name.partition(".")[2]: array
            for name, array in self.tensors.items()
            if name.partition(".")[0] == str(i)
        }
        inputs = [(self.outputs[a], self.columns[a].width) for a in layer["inputs"]]
        regions, table = len(tensors["bias"]), tensors.get("table")
        pairs = len(tensors["step"])
        arrays = {
            "channels": _channels(mine, tensors, regions),
            "places": _places(mine, layer, tensors["order"]),
            "weight": self._weights(i, tensors["weight"]),
            "pair_tables": _pair_tables(tensors),
            "step": tensors["step"],
            "inputs": np.array(inputs, "<u4").reshape(-1, 2),
        }
        if table is not None:
            arrays["table"] = mine.spread(table)
        if regions > 1:
            arrays["centre"] = self._inputs(i, unpacked(tensors["centre"])[:regions])
            arrays["centre_bias"] = tensors["centre_bias"]
        within = unpacked(tensors["within"])[:, : mine.channels, : mine.channels]
        within = mine.spread(mine.spread(within, -1), -2)
        parts = [
            _Within(within, first, count, self.group)
            for first, count in ((0, mine.keys), (mine.values, mine.channels - mine.keys))
        ]
        for n, part in enumerate(parts):
            arrays |= {
                f"far{n}": part.far(),
                f"far_start{n}": part.starts(),
                f"near{n}": part.near(),
            }
        found: dict[str, Any] = self._put(arrays)
        for name in ("far", "far_start", "near"):
            found[name] = [found.pop(f"{name}{n}") for n in range(2)]
        return found | {
            "far_steps": [part.starts()[-1] for part in parts],
            "channel_count": [mine.keys, mine.channels - mine.keys],
            "first_column": [0, mine.values],
            "heads": [layer["k"][0], layer["v"][0]],
            "dim": [layer["k"][1], layer["v"][1]],
            "columns": mine.width,
            "regions": regions,
            "pairs": pairs,
            "input_count": len(inputs),
            "input_width": sum(width for _, width in inputs),
            "output": self.outputs[i],
            "table_rows": 0 if table is None else len(table),
            "table_bytes": 0 if table is None else table.itemsize,
            "group": self.group,
            "lanes": self.lanes,
            "near_words": near_words(self.group),
            "shape_count": shapes,
            "row_bytes": self.row_bytes,
            # So that rows of shared memory meet other banks.
            "residual_bytes": mine.width + 16,
            "side_by_side": self.model.side_by_side(i),
        }

    def _inputs(self, i: int, matrix: Bytes) -> Bytes:
        """The inputs of a layer, [..., inputs], at the columns of the layers that they are from."""
        found, at = [], 0
        for a in self.layers[i]["inputs"]:
            theirs = self.columns[a]
            found.append(theirs.spread(matrix[..., at : at + theirs.channels]))
            at += up(theirs.channels, 4)
        return np.concatenate([np.zeros((*matrix.shape[:-1], 0), np.int8), *found], axis=-1)

    def _weights(self, i: int, weight: Bytes) -> Bytes:
        """As products.cuh takes them."""
        mine = self.columns[i]
        whole = unpacked(weight)[:, : mine.channels]
        found = [mine.spread(self._inputs(i, region), -2) for region in whole]
        # Rows r and r + 8 of 16; inputs by threads, by the two products, by halves of a product.
        fours = np.array(found, np.int8).view(_FOUR)
        cut = fours.reshape(len(found), mine.width // 16, 2, 8, -1, 4, 2, 2)
        return np.ascontiguousarray(cut.transpose(0, 1, 4, 6, 3, 5, 7, 2)).view(np.int8)

    def _known(self, record: Any, address: int) -> LayerOnDevice:
        heads, dim = record["heads"].tolist(), record["dim"].tolist()
        return LayerOnDevice(
            address,
            ((heads[0], dim[0]), (heads[1], dim[1])),
            int(record["columns"]),
            int(record["regions"]),
            bool(record["input_width"]),
            bool(record["table_bytes"]),
            int(record["residual_bytes"]),
            bool(record["side_by_side"]),
        )


def shared_bytes(group: int, lanes: int, shapes: int, warps: int) -> int:
    """Shared memory of a block of chain.cuh (`ChainMemory`) in which so many warps decode, without
    its residuals."""
    staged = group * (4 * near_words(group) + _CHANNEL.itemsize + 4)
    densities = shapes if shapes <= 16 else warps
    parts = (
        2 * 4096,
        3 * 32 * 4,
        32 * 8,
        lanes * 32 * 8,
        3 * up(group, 8) * 36 * 4,
        2 * up(staged, 16),
        densities * _CELLS * _CELL.itemsize,
        densities * _GUESSES,
    )
    return sum(up(n, 16) for n in parts)


def near_words(group: int) -> int:
    """Words of four bytes that hold a group's channels, wherever the group begins."""
    return group // 4 if group % 4 == 0 else group // 4 + 1


def unpacked(blocks: Bytes) -> Bytes:
    """[..., b, g, 4, 4] to [..., outputs, inputs]."""
    *front, b, g, _, _ = blocks.shape
    fours = np.ascontiguousarray(blocks).view(_FOUR)[..., 0].swapaxes(-2, -1)
    return np.ascontiguousarray(fours).view(np.int8).reshape(*front, 4 * b, 4 * g)


def densities(shares: NDArray[np.uint32]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Cells of each density, [shapes, cells], and in which a search begins, [shapes, 512]: by the
    share that is left above, 32 steps an octave."""
    edges = (shares.astype(np.uint64) * np.uint64(_HALF) >> np.uint64(23)).astype(np.int64)
    octave, eighth = np.divmod(np.arange(_CELLS + 1), 8)
    z = (8 + eighth) * 2.0 ** (12 + octave) - 32768
    cells = np.zeros((len(edges), _CELLS), _CELL)
    cells["from"], cells["rise"] = edges[:, :-1], np.diff(edges)
    cells["start"] = z[:-1]
    cells["slope"] = np.diff(z) / np.maximum(np.diff(edges), 1)
    step = np.arange(_GUESSES) + 1  # the upper end of each
    tail = 2.0 ** (7 + step // 32) * (1 + step % 32 / 32)
    guesses = [np.searchsorted(e, _HALF - tail, side="right") - 1 for e in edges]
    return cells, np.clip(guesses, 0, _CELLS - 1).astype(np.uint8)


def _outputs(
    layers: Sequence[Mapping[str, Any]], columns: Sequence[Columns]
) -> tuple[list[int], int]:
    """Where in a token's row each layer has what it tells later ones, as long as one of them is to
    come; and how many bytes a row has."""
    last = list(range(len(layers)))
    for i, layer in enumerate(layers):
        for a in layer["inputs"]:
            last[a] = i
    found: list[int] = []
    end = 0
    for i, mine in enumerate(columns):
        taken = sorted((found[a], columns[a].width) for a in range(i) if last[a] >= i)
        at = 0
        for begin, size in taken:
            if begin - at >= mine.width:
                break
            at = begin + size
        found.append(at)
        end = max(end, at + mine.width)
    return found, end


def _channels(mine: Columns, tensors: Mapping[str, NDArray[Any]], regions: int) -> NDArray[Any]:
    found = np.zeros((regions, mine.width), _CHANNEL)
    for name in ("bias", "weight_scale", "within_scale", "mean", "input_scale", "unit"):
        found[name] = mine.spread(tensors[name])
    found["shape"] = mine.spread(tensors["density"])
    inverse = mine.spread(tensors["inverse"])
    found["inverse"][..., 0] = inverse[:regions]
    found["inverse"][..., 1] = inverse[-regions:]
    return found


def _places(
    mine: Columns, layer: Mapping[str, Any], order: NDArray[np.int32]
) -> NDArray[np.uint32]:
    """Of each column the head, above the number's place within it."""
    parts = []
    for part, channels in (("k", order[: mine.keys]), ("v", order[mine.keys :])):
        head, place = np.divmod(channels, max(layer[part][1], 1))
        parts.append(head.astype(np.uint32) << np.uint32(16) | place.astype(np.uint32))
    return mine.spread(np.concatenate(parts))


def _pair_tables(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.int32]:
    inverse, slope = tensors["pair_inverse"], tensors["pair_slope"]
    return np.concatenate([inverse, slope[:, :, None]], axis=2).astype("<i4")


class _Within:
    """The part of `within`, [regions, columns, columns], that one part's channels read."""

    def __init__(self, within: Bytes, first: int, channels: int, group: int):
        self.first, self.group = first, group
        self.groups = -(-channels // group)
        self.across = up(group, 8)
        room = self.groups * group + self.across
        rows = within[:, first : first + room]
        lacking = room - rows.shape[1]
        self.rows = np.pad(rows, ((0, 0), (0, lacking), (0, 64)))

    def _far_columns(self, g: int) -> int:
        return (self.first + (g - 1) * self.group) // 4 * 4 if g else self.first

    def _steps(self, g: int) -> int:
        return -(-self._far_columns(g) // 32)

    def starts(self) -> NDArray[np.uint32]:
        """Where each group's weights begin, in products of matrices, and the end."""
        counts = [self._steps(g) * (self.across // 8) for g in range(self.groups)]
        return np.cumsum([0, *counts]).astype(np.uint32)

    def far(self) -> Bytes:
        """What groups read of all columns but those of the group before: [regions, steps, 32
        threads, 8]."""
        found = [np.zeros((len(self.rows), 0, 256), np.int8)]
        for g in range(self.groups):
            steps, end = self._steps(g), self._far_columns(g)
            begin = g * self.group
            block = np.zeros((len(self.rows), self.across, 32 * steps), np.int8)
            mine = self.rows[:, begin : begin + self.group]
            block[:, : mine.shape[1], :end] = mine[..., :end]
            cut = block.view(_FOUR).reshape(len(block), self.across // 8, 8, steps, 2, 4)
            fours = np.ascontiguousarray(cut.transpose(0, 3, 1, 2, 5, 4))
            found.append(fours.view(np.int8).reshape(len(block), -1, 256))
        return np.concatenate(found, axis=1)

    def near(self) -> Bytes:
        """What groups read of the group before: [regions, groups, group, near_words, 4]."""
        size = 4 * near_words(self.group)
        found = np.zeros((len(self.rows), self.groups, self.group, size), np.int8)
        for g in range(1, self.groups):
            at, end = self._far_columns(g), self.first + g * self.group
            mine = self.rows[:, g * self.group : (g + 1) * self.group, at:end]
            found[:, g, :, : end - at] = mine
        return found
