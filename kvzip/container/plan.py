"""Which blocks of a file are decoded for a request, in which order, and how much memory that takes.

Nothing here reads, allocates or decodes: a layout, an index and a request go in; rows of the index,
chains of them and sizes of memory come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvzip.container.index import Index, Key
from kvzip.errors import UnsupportedError, UsageError
from kvzip.layout import LayerLayout, Layout
from kvzip.options import integer, items

Needs = Callable[[int, str], Sequence[Key]]
"""Which parts of other layers a block needs: :meth:`kvzip.Codec.needs`."""


# --- what is wanted ------------------------------------------------------------------------


class Request(NamedTuple):
    """What is wanted of a file."""

    layers: Sequence[int]
    """The numbers of layers, from 0 on, in the order in which they are asked for."""
    cuts: Mapping[int, LayerLayout]
    """For each of these layers, what is wanted of it."""
    whole: bool = False
    """Whether that is known to be all of each."""

    def raw_bytes(self, index: Index, rows: Iterable[int]) -> int:
        """How many raw bytes of these blocks are wanted; none of those in other layers."""
        found = 0
        for row in rows:
            layer, part = key = index.key[row]
            cut = self.cuts.get(layer)
            if cut is not None:
                begin, end = cut.span(part)
                lines = index.tokens[row]
                if key not in index.timeless:
                    begin = max(index.position[row], begin)
                    lines = max(0, min(index.position[row] + lines, end) - begin)
                held = cut.parts[part]
                found += lines * held.line_bytes
        return found


def requested(layout: Layout, layers: Iterable[Any] | None = None, tokens: Any = None) -> Request:
    """The request that a caller names: numbers of layers, which count from the last one where they
    are negative, and (first, last + 1) of the positions; None stands for all.

    Raises UsageError for layers or positions that there are not, UnsupportedError for positions at
    whose end a layer has no state.
    """
    count = len(layout.layers)
    wanted = list(range(count))
    if layers is not None:
        given = items("layers", layers, "a sequence of layers' numbers")
        wanted = [_layer_number(i, count) for i in given]
    whole = {i: layout.layers[i] for i in wanted}
    if tokens is None:
        return Request(wanted, whole, True)
    begin, end = _token_range(tokens)
    if not 0 <= begin <= end <= layout.tokens:
        raise UsageError(f"tokens {begin}:{end} are not within 0:{layout.tokens}")
    cuts: dict[int, LayerLayout] = {}
    found: dict[int, LayerLayout] = {}  # most layers are one object
    for i, layer in whole.items():
        if id(layer) not in found:
            found[id(layer)] = _cut(i, layer, begin, end)
        cuts[i] = found[id(layer)]
    return Request(wanted, cuts)


def _cut(i: int, layer: LayerLayout, begin: int, end: int) -> LayerLayout:
    try:
        return layer.cut(begin, end)
    except UnsupportedError as error:
        raise UnsupportedError(f"layer {i}: {error}") from None


def _layer_number(given: Any, count: int) -> int:
    i = given if type(given) is int else integer("a layer's number", given)
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
    """[batch, heads, tokens or rows, dim]"""
    first: int
    """The position of the first of its tokens; 0 of a part that has rows in their place."""


def extents(layout: Layout, block_tokens: int, request: Request) -> list[Extent]:
    """Memory for what is wanted: for the whole blocks that hold it, which are then decoded where
    they stay, unless what is wanted is the smaller part of them. Part after part of each layer, in
    the order in which layers are asked for."""
    found = []
    for i in request.layers:
        layer, cut = layout.layers[i], request.cuts[i]
        first, end = cut.first, cut.cumulative_length
        if cut is not layer and cut.stored:
            begin = max(layer.first, first // block_tokens * block_tokens)
            after = min(layer.cumulative_length, -(-end // block_tokens) * block_tokens)
            if 2 * cut.stored >= after - begin:  # less is not worth keeping all for
                first, end = begin, after
        for name, part in layer.parts.items():
            shape, begin = part.block_shape, 0
            if part.tokens is not None:
                begin = first
                if cut is not layer:
                    batch, heads, _, dim = shape
                    shape = batch, heads, end - first, dim
            found.append(Extent((i, name), shape, begin))
    return found


# --- blocks --------------------------------------------------------------------------------


def rows_by_part(layout: Layout, index: Index, request: Request) -> dict[Key, Sequence[int]]:
    """The rows of the blocks that hold anything wanted, for each part of each layer that is."""
    found: dict[Key, Sequence[int]] = {}
    key_of, rows_of, layers = index.key, index.rows, layout.layers
    for i, cut in request.cuts.items():
        layer = layers[i]
        for part in layer.parts:
            rows = rows_of[i, part]
            key, blocks = key_of[rows.start], rows[1:]
            if cut is not layer and key not in index.timeless:
                found[key] = _within(index, blocks, cut.first, cut.cumulative_length)
            else:
                found[key] = blocks
    return found


def chains(index: Index, by_part: Mapping[Key, Sequence[int]], needs: Needs) -> list[list[int]]:
    """The rows to decode for these rows of parts where blocks need others, as chains: each block
    stands behind those of the same tokens that it needs, and no chain needs another."""
    position, tokens = index.position, index.tokens
    # Blocks of a chain end at the same token, wherever their layers begin.
    found: dict[int, list[int]] = {
        position[row] + tokens[row]: [] for rows in by_part.values() for row in rows
    }
    needed: set[Key] = set()
    left = [key for key, rows in by_part.items() if rows]
    while left:
        key = left.pop()
        if key not in needed:
            needed.add(key)
            left += needs(*key)
    for key in sorted(needed, key=lambda key: index.rows[key].start):  # what is needed comes before
        for row in index.rows[key][1:]:
            chain = found.get(position[row] + tokens[row])
            if chain is not None:
                chain.append(row)
    return list(found.values())


def goes_on(index: Index, rows: Sequence[int], decoded: Sequence[int], request: Request) -> bool:
    """Whether what blocks need others for can go on after the rows that an earlier request decoded:
    those are the first of these rows, and nothing of their layers is wanted. So layer after layer
    costs no more than all at once."""
    return decoded == rows[: len(decoded)] and not any(
        index.key[row][0] in request.cuts for row in decoded
    )


def last_uses(index: Index, needs: Needs) -> dict[Key, int]:
    """The last row whose block needs each part of a layer, for the parts that any does."""
    found = {}
    for row, key in enumerate(index.key):
        for other in needs(*key):
            found[other] = row
    return found


def batches(
    rows: Sequence[int], workers: int, threaded: bool, beside: bool = False
) -> list[Sequence[int]]:
    """Rows that are decoded by one job, for so many workers. `threaded`: whether a job has threads
    of its own. `beside`: whether they are decoded into memory that the next job uses again."""
    # A few to a job: handing over a job takes as long as a block of the fastest codec. Jobs with
    # threads come one after the other: they decode what comes as it comes.
    size = 16 if workers == 1 else max(1, min(16, len(rows) // (4 * workers)))
    if threaded:
        size = 64
    if beside:
        size = min(size, 4 * workers)
    if len(rows) <= size:
        return [rows] if rows else []
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _within(index: Index, rows: Iterable[int], begin: int, end: int) -> list[int]:
    """Those of the blocks that hold any of these positions."""
    if begin >= end:
        return []
    position, tokens = index.position, index.tokens
    return [r for r in rows if position[r] < end and position[r] + tokens[r] > begin]
