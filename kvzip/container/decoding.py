"""Decoding what a request wants, on the CPU: blocks go from a file into memory and are checked.

What a damaged block is told of depends on what is to blame: :func:`fill`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvzip import dtypes
from kvzip.codec import Codec, Coded
from kvzip.container import plan
from kvzip.container.blocks import Blocks
from kvzip.container.index import Key
from kvzip.container.plan import Request
from kvzip.dtypes import Bits
from kvzip.errors import CorruptError, KVZipError, UnsupportedError, UsageError
from kvzip.layout import LayerLayout, Layout
from kvzip.options import items
from kvzip.overlap import check_apart
from kvzip.snapshot import Layer, Snapshot

Spare = dict[tuple[tuple[int, ...], np.dtype[Any]], list[Bits]]
_NOTHING = slice(0)
_WIDEST = 8
"""Bytes of the widest numbers."""

# A file has many of these two. They are part of no cycle: the collector need not look at them.


class Place(msgspec.Struct, gc=False):
    """Where a part's numbers go: [batch, heads, tokens or rows, dim], from the position `first`
    on."""

    array: Bits
    first: int
    given: Bits | None = None
    """The array in the part's own shape, where it is what was asked for and nothing else."""

    def cut(self, cut: LayerLayout, name: str) -> Bits:
        """What is wanted of the numbers, in its own shape."""
        if self.given is not None:
            return self.given
        array, part = self.array, cut.parts[name]
        if array.shape[2] != part.block_shape[2]:
            first, stop = cut.span(name)
            array = array[:, :, first - self.first : stop - self.first]
        return part.from_block(array)


class Target(Coded, gc=False):
    """A block on its way out of a file."""

    row: int
    tables: memoryview
    """The bytes of its part's tables."""
    beside: Bits | None = None
    """Where those of its numbers belong that were asked for, if not in `out` itself."""
    cut: slice = _NOTHING
    """Which of the block's tokens those are."""


class Chain(NamedTuple):
    """How far the blocks of one token range are decoded, and what the next one may need."""

    decoded: list[int]
    """The rows that were decoded, in order."""
    done: dict[Key, Bits]
    """The numbers of those that others may need."""
    scratch: dict[str, Any]


class Decoding:
    """One request on its way out of a file, by the CPU.

    `chains`: by its first row, how far earlier requests decoded each chain, which are told there
    how far this one does. `thorough`: stored bytes are checked even where the numbers decoded from
    them are.
    Raises UsageError when `out` does not fit the request.
    """

    def __init__(
        self,
        blocks: Blocks,
        request: Request,
        out: Sequence[Any] | None,
        chains: dict[int, Chain],
        thorough: bool = False,
    ):
        self.blocks, self.request = blocks, request
        self._chains, self._thorough = chains, thorough
        self._places = (
            new_places(blocks, request) if out is None else given_places(blocks, request, out)
        )
        self._in_memory = getattr(blocks.source, "in_memory", False)
        self._tables: dict[Key, tuple[memoryview, Any]] = {}
        self._spare: Spare = {}
        """Memory that blocks were decoded into of which not all was asked for."""

    def jobs(self, workers: int) -> list[tuple[int | None, Callable[[], Sequence[int]]]]:
        """What decodes the request, for so many workers: jobs that return the rows that they have
        decoded. A job's number, if it has one: those of the same number in other requests go on
        from each other."""
        jobs: list[tuple[int | None, Callable[[], Sequence[int]]]] = []
        for codec, by_part in self.blocks.wanted(self.request):
            if not codec.independent:
                chains = plan.chains(self.blocks.index, by_part, self.blocks.needs)
                jobs += [(chain[0], partial(self._decode_chain, chain)) for chain in chains]
                continue
            rows = list(itertools.chain.from_iterable(by_part.values()))
            threaded = self.blocks.codecs.threaded
            threads = workers if threaded else 1
            some = [] if self.request.whole else [r for r in rows if not self._has_place(r)]
            if some:
                rows = sorted({*rows}.difference(some))
            jobs += [
                (None, partial(self._decode_rows, codec, batch, threads))
                for batch in plan.batches(rows, workers, threaded)
                + plan.batches(some, workers, threaded, beside=True)
            ]
        return jobs

    def _has_place(self, row: int) -> bool:
        """Whether all of a block's numbers go into the result's memory."""
        index = self.blocks.index
        place = self._places[index.key[row]]
        offset = index.position[row] - place.first
        room: int = place.array.shape[2]
        return 0 <= offset <= room - index.tokens[row]

    def raw_bytes(self, rows: Iterable[int]) -> int:
        """How many raw bytes of these blocks were asked for."""
        return self.request.raw_bytes(self.blocks.index, rows)

    def snapshot(self) -> Snapshot:
        """What was asked for, once it is decoded."""
        blocks, request, layers = self.blocks, self.request, []
        for i in request.layers:
            cut = request.cuts[i]
            parts = {name: self._places[i, name].cut(cut, name) for name in cut.parts}
            layers.append(Layer(parts, cut))
        layout, ids = blocks.layout, blocks.ids_up_to(request.cuts.values())
        if request.whole and len(request.layers) == 1:
            layout = blocks.layout_of(request.layers[0])
        elif not request.whole or request.layers != list(range(len(layout.layers))):
            layout = Layout(layout.dtype, tuple([layer.layout for layer in layers]))
        return Snapshot.checked(layers, layout, ids, blocks.header.origin)

    # --- jobs ------------------------------------------------------------------------------

    def _decode_rows(self, codec: Codec, rows: Sequence[int], threads: int) -> Sequence[int]:
        """Decode blocks of one codec that need no other; return them."""
        targets: Iterable[Target] = self._targets(codec, rows)
        if threads == 1 and self._in_memory:
            targets = [*targets]  # all at once, while Python's code is in the caches
        work = fill(self.blocks, codec, targets, min(threads, len(rows)))
        if not self.request.whole:
            for target in work:
                if target.beside is not None:
                    out = target.out
                    self._spare.setdefault((out.shape, out.dtype), []).append(out)
        return rows

    def _decode_chain(self, rows: list[int]) -> Sequence[int]:
        """Decode blocks of which each may need those before it; return them."""
        last = self.blocks.last_uses
        key_of, needs = self.blocks.index.key, self.blocks.needs
        codec = self.blocks.codecs[key_of[rows[0]]]
        chain = self._resumed(rows)
        for row in rows[len(chain.decoded) :]:
            key = key_of[row]
            earlier = {k: chain.done[k] for k in needs(*key) if k in chain.done}
            (target,) = self._targets(codec, [row], earlier, chain.scratch)
            fill(self.blocks, codec, [target])
            chain.done[key] = target.out
            for old in [k for k in chain.done if last.get(k, 0) <= row]:
                del chain.done[old]
        self._chains[rows[0]] = chain._replace(decoded=rows)
        return rows

    def _resumed(self, rows: list[int]) -> Chain:
        """Where to begin with a chain: after what was decoded before, if it goes on from there."""
        chain = self._chains.pop(rows[0], None)
        index = self.blocks.index
        if chain is None or not plan.goes_on(index, rows, chain.decoded, self.request):
            return Chain([], {}, {})
        return chain

    def _targets(self, codec: Codec, rows: Sequence[int], *more: Any) -> Iterator[Target]:
        """Everything to decode blocks of a codec, straight into place if there is place for all of
        one. `more`: what their contexts have beside their tables."""
        blocks, index = self.blocks, self.blocks.index
        key_of, position, tokens_of = index.key, index.position, index.tokens
        tables, has_tables = self._tables, codec.has_tables
        coming, read = self._stored(rows), {}
        key = place = None
        for row in rows:
            if blocks.cancelled:
                blocks.check_cancelled()
            if key_of[row] is not key:
                key = key_of[row]
                place = self._places.get(key)
                known = tables.get(key)
                if known is None:
                    first = index.rows[key].start
                    while first not in read:
                        read = next(coming)
                    data = read[first]
                    known = data, blocks.loaded(first, data) if has_tables else None
                    tables[key] = known
                stored, loaded = known
            out = beside = None
            cut = _NOTHING
            if place is not None:
                array, tokens = place.array, tokens_of[row]
                offset, room = position[row] - place.first, array.shape[2]
                if room == tokens and not offset:
                    out = array
                elif offset >= 0 and offset + tokens <= room:
                    out = array[:, :, offset : offset + tokens]
                elif offset + tokens > 0 and offset < room:
                    cut = slice(max(0, -offset), min(tokens, room - offset))
                    beside = array[:, :, offset + cut.start : offset + cut.stop]
            if out is None:
                out = _empty_block(blocks, row, self._spare)
            while row not in read:
                read = next(coming)
            context = blocks.context(row, loaded, *more)
            yield Target(read[row], out, context, row, stored, beside, cut)

    def _stored(self, rows: Iterable[int]) -> Iterator[dict[int, memoryview]]:
        """The stored bytes of blocks, and before them of those of their parts' tables that are not
        loaded; entries that are read together are given together."""
        index, wanted, before = self.blocks.index, [], None
        key_of = index.key
        for row in rows:
            key = key_of[row]
            if key is not before:
                before = key
                if key not in self._tables:
                    wanted.append(index.rows[key].start)
            wanted.append(row)
        return self.blocks.together(wanted, self._thorough)


# --- where numbers go ------------------------------------------------------------------------


def new_places(blocks: Blocks, request: Request) -> dict[Key, Place]:
    """One piece of new memory for all parts: a large one gets large pages, and faults less often.
    Raises KVZipError when there is not enough."""
    layers, end, found = blocks.layout.layers, 0, []
    for key, shape, first in plan.extents(blocks.layout, blocks.header.block_tokens, request):
        form = layers[key[0]].parts[key[1]].form
        found.append((key, shape, first, form.uint, end))
        # Each begins where its numbers may lie.
        end += -(-math.prod(shape) * form.itemsize // _WIDEST) * _WIDEST
    try:
        memory = np.empty(end // _WIDEST, np.uint64)
    except MemoryError:
        raise KVZipError(f"not enough memory for {end:,} bytes") from None
    return {
        key: Place(np.ndarray(shape, uint, memory, at), first)
        for key, shape, first, uint, at in found
    }


def given_places(blocks: Blocks, request: Request, out: Sequence[Any]) -> dict[Key, Place]:
    """The arrays that a caller gave, for each layer asked for one a part: a pair, or a mapping by
    the parts' names. Raises UsageError unless they are in the processor's memory, writable, of the
    shapes of what is wanted, and apart."""
    if len(out) != len(request.layers):
        raise UsageError(f"out has {len(out)} layers, not {len(request.layers)}")
    places: dict[Key, Place] = {}
    index = blocks.index
    for i, arrays in zip(request.layers, out, strict=True):
        cut = request.cuts[i]
        ordered = arrays_in_order(i, cut, arrays)
        for (name, part), given in zip(cut.parts.items(), ordered, strict=True):
            if type(given) is not np.ndarray:
                where = getattr(getattr(given, "device", None), "type", "cpu")
                if where != "cpu":
                    raise UsageError(
                        f"out for layer {i} is on {where}: without device= it must be on cpu"
                    )
            array, _ = dtypes.as_bits(given, part.dtype)
            if array.shape != part.shape or not array.flags.writeable:
                raise UsageError(f"out for layer {i}: want a writable array of {part.shape}")
            first = 0 if part.tokens is None else cut.first
            key = index.key[index.rows[i, name].start]  # the same object, not one more
            places[key] = Place(part.as_block(array), first, array)
    check_apart([place.array for place in places.values()])
    return places


def arrays_in_order(i: int, cut: LayerLayout, arrays: Any) -> Sequence[Any]:
    """What a caller gave for a layer, in the order of its parts. Raises UsageError."""
    names = tuple(cut.parts)
    if isinstance(arrays, tuple):
        given: Sequence[Any] = arrays
    elif isinstance(arrays, Mapping):
        if set(arrays) != set(names):
            raise UsageError(f"out for layer {i} has {sorted(arrays)}, and its parts are {names}")
        given = [arrays[name] for name in names]
    else:
        given = items(f"out for layer {i}", arrays, "an array for each part, or a mapping")
    if len(given) != len(names):
        wanted = ", ".join(names)
        raise UsageError(f"out for layer {i} has {len(given)} arrays, not those of {wanted}")
    return given


def _empty_block(blocks: Blocks, row: int, spare: Spare) -> Bits:
    """Memory for a block's numbers that nobody gave; spare one, where one is of its size: new pages
    take longer to be had than the fastest codec takes to decode into them."""
    part = blocks.part(blocks.index.key[row])
    batch, heads, _, dim = part.block_shape
    shape, numbers = (batch, heads, blocks.index.tokens[row], dim), part.form.uint
    try:
        return spare[shape, numbers].pop()
    except (KeyError, IndexError):
        return np.empty(shape, numbers)


# --- decoding and blame ----------------------------------------------------------------------


class _Coming:
    """Blocks on their way to a codec, which may come to them one after the other."""

    def __init__(self, targets: Iterable[Target]):
        self.taken: list[Target] = []
        self.left: Iterator[Target] = iter(targets)
        self.ended = False
        """Whether all of them are taken."""
        self.failed = False
        """Whether the next one could not be had, which an error from here tells."""
        if isinstance(targets, list):
            self.taken, self.left, self.ended = targets, iter(()), True

    def __iter__(self) -> Iterator[Target]:
        return iter(self.taken) if self.ended else self._one_by_one()

    def _one_by_one(self) -> Iterator[Target]:
        try:
            for target in self.left:
                self.taken.append(target)
                yield target
        except (CorruptError, UnsupportedError):
            self.failed = True
            raise
        self.ended = True


def fill(blocks: Blocks, codec: Codec, targets: Iterable[Target], threads: int = 1) -> list[Target]:
    """Decode blocks of one codec that do not need each other, and check their numbers; the blocks.

    `targets`: a list, or an iterator, of which the blocks are taken as the codec comes to them.
    Raises CorruptError that names the block, or its tables where those are to blame;
    UnsupportedError for a block that is whole and that this codec does not know; KVZipError for a
    codec that leaves blocks out.
    """
    coming = _Coming(targets)
    work = coming.taken
    try:
        found = codec.decode_many(iter(coming), threads)
    except (CorruptError, UnsupportedError) as error:
        if coming.failed:
            raise
        if len(work) > 1:
            for target in [*work, *coming.left]:
                fill(blocks, codec, [target])  # one of them tells more
            return work
        _blame_stored(blocks, work[0])
        raise type(error)(f"{blocks.index.name(work[0].row)}: {error}") from None
    if not coming.ended or len(found) != len(work):
        raise KVZipError(f"codec {codec.codec_id!r} does not decode all blocks that it is given")
    checksums = blocks.index.raw_checksum
    for target, checksum in zip(work, found, strict=True):
        if checksum != checksums[target.row]:
            _blame_stored(blocks, target)
            raise CorruptError(
                f"{blocks.index.name(target.row)} decodes to other numbers than were encoded"
            )
    for target in work:
        if target.beside is not None:
            target.beside[...] = target.out[:, :, target.cut]
    return work


def check_block(blocks: Blocks, row: int) -> None:
    """Decode a block that needs no other, for nothing but to raise the CorruptError that tells
    what is wrong with it, if anything is."""
    key = blocks.index.key[row]
    stored, loaded = blocks.tables(key)
    out, context = _empty_block(blocks, row, {}), blocks.context(row, loaded)
    fill(blocks, blocks.codecs[key], [Target(blocks.stored(row), out, context, row, stored)])


def _blame_stored(blocks: Blocks, target: Target) -> None:
    """Raise CorruptError if it is stored bytes that are wrong."""
    blocks.check_stored(blocks.index.tables_row(target.row), target.tables)
    blocks.check_stored(target.row, target.data)
