"""Where numbers go on a device: new arrays, arrays that a caller gave, or pages of a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvzip.codecs.native.cuda.arrays import View, cut, empty, view_of
from kvzip.codecs.native.cuda.device import Device
from kvzip.codecs.native.cuda.work import Target, pages_of
from kvzip.container import plan
from kvzip.container.blocks import Blocks
from kvzip.container.decoding import arrays_in_order
from kvzip.container.index import Key
from kvzip.container.plan import Request
from kvzip.dtypes import DType
from kvzip.errors import UsageError
from kvzip.layout import KV, LayerLayout
from kvzip.overlap import check_apart

Targets = dict[Key, list[Target]]
"""Where each part of each layer goes: to one target, or in a paged cache to one for each row of the
batch."""


def new_targets(
    device: Device, blocks: Blocks, request: Request
) -> tuple[list[tuple[Any, Any]], Targets]:
    """New arrays for what is wanted, a (K, V) pair for each layer asked for."""
    arrays: dict[Key, Any] = {}
    targets: Targets = {}
    for key, shape, first in plan.extents(blocks.layout, blocks.header.block_tokens, request):
        array, view = empty(device, shape, blocks.form)
        targets[key] = [_target(view, first, array)]
        layer, part = request.cuts[key[0]], key[1]
        begin, batched = layer.first - first, layer.parts[part].batch is not None
        arrays[key] = cut(array, begin, begin + layer.stored, batched)
    return [(arrays[i, "k"], arrays[i, "v"]) for i in request.layers], targets


def _target(view: View, first: int, owner: Any) -> Target:
    shape, strides = view.shape, view.strides
    if len(shape) == 3:
        shape, strides = (1, *shape), (0, *strides)
    b, h, t, _ = strides
    batch, heads, tokens, dim = shape
    return Target(view.address, (b, h, t), (batch, heads, tokens, dim), first, owner=owner)


def given_targets(
    device: Device,
    form: DType,
    cuts: Mapping[int, LayerLayout],
    out: Sequence[Any],
) -> tuple[list[tuple[Any, Any]], Targets]:
    """Arrays that the caller gave, of the shapes of the cuts, in their order; and a (K, V) pair of
    them for each layer. Raises UsageError unless they fit and lie apart."""
    pairs = _pairs(out, cuts)
    targets: Targets = {}
    views = []
    for (i, layer), pair in zip(cuts.items(), pairs, strict=True):
        for part, array in zip(KV, pair, strict=True):
            view = view_of(array, device, form)
            views.append(view)
            if view.shape != layer.parts[part].shape:
                raise UsageError(
                    f"out for layer {i}: {part} has shape {view.shape}, not "
                    f"{layer.parts[part].shape}"
                )
            targets[i, part] = [_target(view, layer.first, array)]
    check_apart([np.asarray(_Seen(view, form)) for view in views])
    return pairs, targets


class _Seen:
    """Memory of a device as numpy takes it for an array of the host's, which nobody may read."""

    def __init__(self, view: View, form: DType):
        self.__array_interface__ = {
            "version": 3,
            "data": (view.address, False),
            "shape": view.shape,
            "strides": tuple(form.itemsize * n for n in view.strides),
            "typestr": form.uint.str,
        }


def paged_targets(
    device: Device,
    form: DType,
    cuts: Mapping[int, LayerLayout],
    out: Sequence[Any],
    pages: Any,
) -> Targets:
    """The same of a paged cache, one target for each row of the batch.

    `out`: of each layer K and V as [pages, tokens of a page, heads, dim], any strides but for dim.
    `pages`: which page holds each run of positions, [pages] or [batch, pages].
    """
    table = pages_of(pages)
    targets: Targets = {}
    for (i, layer), pair in zip(cuts.items(), _pairs(out, cuts), strict=True):
        for part, array in zip(KV, pair, strict=True):
            rows, heads, _, dim = layer.parts[part].block_shape
            view = view_of(array, device, form)
            if len(view.shape) != 4 or view.shape[2:] != (heads, dim):
                raise UsageError(
                    f"out for layer {i}: {part} has shape {view.shape}, not "
                    f"[pages, tokens of a page, {heads}, {dim}]"
                )
            if any(n > 1 and not s for n, s in zip(view.shape, view.strides, strict=True)):
                raise UsageError("out has the same memory twice")
            if len(table) != rows:
                raise UsageError(f"pages has {len(table)} rows, the file's batch {rows}")
            count, size = view.shape[:2]
            begin, end = layer.first // max(size, 1), -(-layer.cumulative_length // max(size, 1))
            used = table[:, begin:end]
            if layer.stored and (not size or used.shape[1] < end - begin):
                raise UsageError(
                    f"pages has {table.shape[1]} pages of {size} tokens a row, too few for "
                    f"{layer.cumulative_length} positions"
                )
            if used.size and int(used.max()) >= count:
                raise UsageError(f"pages names page {used.max()}; out for layer {i} has {count}")
            if len(np.unique(used)) != used.size:
                raise UsageError("pages names a page twice")
            stride, token, head, _ = view.strides
            shape = (1, heads, layer.cumulative_length, dim)
            targets[i, part] = [
                Target(view.address, (0, head, token), shape, 0, row, size, stride, array)
                for row in table
            ]
    # Of a cache, which is large, and whose parts lie in each other's gaps, no more is looked at.
    firsts = [row for rows in targets.values() for row in rows[:1]]
    begins = [target.address for target in firsts if math.prod(target.shape)]
    if len(set(begins)) != len(begins):
        raise UsageError("out has the same memory twice")
    return targets


def _pairs(out: Sequence[Any], cuts: Mapping[int, LayerLayout]) -> list[tuple[Any, Any]]:
    """Keys and values of each layer as a caller gave them. Raises UsageError."""
    if len(out) != len(cuts):
        raise UsageError(f"out has {len(out)} layers, not {len(cuts)}")
    ordered = (arrays_in_order(i, cut, a) for (i, cut), a in zip(cuts.items(), out, strict=True))
    return [(k, v) for k, v in ordered]
