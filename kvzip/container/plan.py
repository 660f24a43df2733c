"""Which blocks of a file are decoded for a request, in which order, and how much memory that takes.

Nothing here reads, allocates or decodes: a layout, an index and a request go in; rows of the index,
chains of them and sizes of memory come out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvzip.container.index import Index, Key
from kvzip.dtypes import DType
from kvzip.errors import UsageError
from kvzip.layout import PARTS, LayerLayout, Layout
from kvzip.options import integer, items
from kvzip.snapshot import Part

Needs = Callable[[int, Part], Sequence[Key]]
"""Which parts of other layers a block needs: :meth:`kvzip.Codec.needs`."""


# --- what is wanted ------------------------------------------------------------------------


class Request(NamedTuple):
    """What is wanted of a file."""

    layers: Sequence[int]
    """The numbers of layers, from 0 on, in the order in which they are asked for."""
    cuts: Mapping[int, LayerLayout]
    """For each of these layers, what is wanted of it."""

    def raw_bytes(self, index: Index, rows: Iterable[int], form: DType) -> int:
        """How many raw bytes of these blocks are wanted; none of those in other layers."""
        found = 0
        for row in rows:
            layer, part = index.key[row]
            cut = self.cuts.get(layer)
            if cut is not None:
                begin = max(index.position[row], cut.first)
                end = min(index.position[row] + index.tokens[row], cut.cumulative_length)
                found += max(0, end - begin) * cut.token_numbers(part)
        return found * form.itemsize


def requested(layout: Layout, layers: Iterable[Any] | None = None, tokens: Any = None) -> Request:
    """The request that a caller names: numbers of layers, which count from the last one where they
    are negative, and (first, last + 1) of the positions; None stands for all.

    Raises UsageError for layers or positions that there are not.
    """
    count = len(layout.layers)
    wanted = list(range(count))
    if layers is not None:
        given = items("layers", layers, "a sequence of layers' numbers")
        wanted = [_layer_number(i, count) for i in given]
    whole = {i: layout.layers[i] for i in wanted}
    if tokens is None:
        return Request(wanted, whole)
    begin, end = _token_range(tokens)
    if not 0 <= begin <= end <= layout.tokens:
        raise UsageError(f"tokens {begin}:{end} are not within 0:{layout.tokens}")
    return Request(wanted, {i: layer.cut(begin, end) for i, layer in whole.items()})


def _layer_number(given: Any, count: int) -> int:
    i = integer("a layer's number", given)
    if not -count <= i < count:
        raise UsageError(f"there is no layer {i}: the file has {count}")
    return i % count


def _token_range(given: Any) -> tuple[int, int]:
    try:
        begin, end = given
    except (TypeError, ValueError):
        raise UsageError(f"tokens is {given!r}: it must be (first, last + 1)") from None
    return integer("the first of tokens", begin), integer("the end of tokens", end)


# --- memory --------------------------------------------------------------------------------


class Extent(NamedTuple):
    """Memory for one part of one layer."""

    key: Key
    shape: tuple[int, int, int, int]
    """[batch, heads, tokens, dim]"""
    first: int
    """The position of the first of its tokens."""


def extents(layout: Layout, block_tokens: int, request: Request) -> list[Extent]:
    """Memory for what is wanted: for the whole blocks that hold it, which are then decoded where
    they stay, unless what is wanted is the smaller part of them. Keys, then values of each layer,
    in the order in which layers are asked for."""
    found = []
    for i in request.layers:
        layer, cut = layout.layers[i], request.cuts[i]
        first, end = cut.first, cut.cumulative_length
        if cut.stored and cut is not layer:
            begin = max(layer.first, first // block_tokens * block_tokens)
            after = min(layer.cumulative_length, -(-end // block_tokens) * block_tokens)
            if 2 * cut.stored >= after - begin:  # less is not worth keeping all for
                first, end = begin, after
        for part in PARTS:
            batch, heads, _, dim = layer.batched_shape(part)
            found.append(Extent((i, part), (batch, heads, end - first, dim), first))
    return found


# --- blocks --------------------------------------------------------------------------------


def rows_by_part(layout: Layout, index: Index, request: Request) -> dict[Key, Sequence[int]]:
    """The rows of the blocks that hold anything wanted, for each part of each layer that is."""
    found: dict[Key, Sequence[int]] = {}
    for i, cut in request.cuts.items():
        whole = cut is layout.layers[i]
        for part in PARTS:
            blocks = index.rows[i, part][1:]
            found[i, part] = (
                blocks if whole else _within(index, blocks, cut.first, cut.cumulative_length)
            )
    return found


def rows(layout: Layout, index: Index, request: Request) -> list[int]:
    """The rows to decode where no block needs another."""
    return list(itertools.chain.from_iterable(rows_by_part(layout, index, request).values()))


def chains(layout: Layout, index: Index, request: Request, needs: Needs) -> list[list[int]]:
    """The rows to decode where blocks need others, as chains: each block stands behind those of the
    same tokens that it needs, and no chain needs another."""
    position, tokens = index.position, index.tokens
    # Blocks of a chain end at the same token, wherever their layers begin.
    found: dict[int, list[int]] = {
        position[row] + tokens[row]: [] for row in rows(layout, index, request)
    }
    needed: set[Key] = set()
    left = [(i, part) for i, cut in request.cuts.items() if cut.stored for part in PARTS]
    while left:
        key = left.pop()
        if key not in needed:
            needed.add(key)
            left += needs(*key)
    for key in sorted(needed):  # the order of the file: what is needed comes before
        for row in index.rows[key][1:]:
            chain = found.get(position[row] + tokens[row])
            if chain is not None:
                chain.append(row)
    return list(found.values())


def last_uses(index: Index, needs: Needs) -> dict[Key, int]:
    """The last row whose block needs each part of a layer, for the parts that any does."""
    found = {}
    for row, key in enumerate(index.key):
        for other in needs(*key):
            found[other] = row
    return found


def entries_read(layout: Layout, index: Index, request: Request, needs: Needs | None) -> set[int]:
    """The rows of all entries that a request reads, tables too. `needs`: None where no block needs
    another."""
    blocks = (
        rows(layout, index, request)
        if needs is None
        else itertools.chain.from_iterable(chains(layout, index, request, needs))
    )
    found: set[int] = set()
    for row in blocks:
        found |= {row, index.tables_row(row)}
    return found


def batches(rows: Sequence[int], workers: int, threaded: bool) -> list[Sequence[int]]:
    """Rows that are decoded by one job, for so many workers. `threaded`: whether a job has threads
    of its own."""
    # A few to a job: handing over a job takes as long as a block of the fastest codec. Jobs with
    # threads come one after the other: they decode what comes as it comes.
    size = 64 if threaded else max(1, min(16, len(rows) // (4 * workers)))
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _within(index: Index, rows: Iterable[int], begin: int, end: int) -> list[int]:
    """Those of the blocks that hold any of these positions."""
    if begin >= end:
        return []
    position, tokens = index.position, index.tokens
    return [r for r in rows if position[r] < end and position[r] + tokens[r] > begin]
