"""What an open file holds: its header and index, and for each block its bytes, tables and context.

Here it is told what is to blame when a file is damaged. Nothing is decoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import checksum, dtypes, metrics
from kvzip.codec import Codec, Context
from kvzip.codecs import _native
from kvzip.container import plan
from kvzip.container.format import (
    PartInfo,
    Preamble,
    ids_between,
    unpacked_header,
    unpacked_ids,
)
from kvzip.container.index import ALIGNMENT, Index, Key
from kvzip.container.source import OpenFile, Source
from kvzip.errors import CancelledError, CorruptError, FormatError, ProfileError
from kvzip.kept import cached_property
from kvzip.layout import LayerLayout, Layout, PartLayout
from kvzip.profile import Profile

FIRST_READ = 48 << 10
"""Bytes that are read at first: enough for the header and the index of most files."""
_NOTHING = memoryview(b"")
_TOGETHER = 24 << 10
"""Bytes of neighbouring entries that are read from a file at once: to read each takes longer."""
SMALL = 16 << 10
"""Bytes of the entries whose stored bytes are always compared with their checksum, at most."""


def beginning(source: Source) -> memoryview:
    """The first bytes of a file."""
    return source.read(0, min(source.size, FIRST_READ))


class Blocks:
    """The blocks of an open file as they are stored.

    Reads the header and the index; `first`: its :func:`beginning`. Raises FormatError,
    CorruptError, UnsupportedError.
    """

    def __init__(self, source: Source, profile: Profile | None, first: memoryview):
        self.source = source
        self.find_profile: Callable[[str], Profile] | None = None
        """Where the file's profile is looked for, by its SHA-256, when none was given."""
        self.cancelled = False
        """Whether nothing more is to be read."""
        size = source.size
        preamble = Preamble.read(first)
        if preamble.file_length != size:
            problem = "cut short" if size < preamble.file_length else "longer than it says"
            raise CorruptError(f"the file is {problem}: {size:,} bytes of {preamble.file_length:,}")
        end = preamble.blocks_at
        if end > size:
            raise FormatError("the file's index is out of bounds")
        start = first[:end] if end <= len(first) else source.read(0, end)
        header, ids, records = preamble.taken_apart(start)
        self.header, self.codecs = unpacked_header(header)
        # One that the file does not name may be of another model.
        self.profile = None if self.header.profile is None else profile
        self.layout = self.header.layout
        self._layouts: dict[int, Layout] = {}
        self.index = Index(records, end, size, self.layout, self.header.block_tokens)
        self._check_sizes()
        self.token_ids = unpacked_ids(ids, self.header)
        self._ids = self.token_ids
        if self._ids is not None and self._ids.ndim == 1:
            self._ids = self._ids[np.newaxis]

    def _check_sizes(self) -> None:
        """Raise FormatError if a block claims more numbers than its bytes can stand for."""
        shortest, block_tokens = self.index.shortest, self.header.block_tokens
        for layer in self.header.stored_layout.distinct:
            for part in layer.parts.values():
                lines = part.block_shape[2]
                if part.tokens is not None:
                    lines = min(lines, block_tokens)
                for codec in self.codecs.all:
                    if lines * part.line_bytes > codec.max_decoded_size(shortest, part.form):
                        self._check_each_size()
                        return

    def _check_each_size(self) -> None:
        for key, rows in self.index.rows.items():
            part, room = self.part(key), self.codecs[key].max_decoded_size
            for row in rows[1:]:
                claimed = self.index.tokens[row] * part.line_bytes
                if claimed and claimed > room(self.index.length[row], part.form):
                    raise FormatError(
                        f"entry {row} of the index claims more than its bytes can hold"
                    )

    def check_profile(self) -> None:
        """Raise ProfileError unless the profile is the one that the file names. Where none was
        given, it is looked for first."""
        need = self.header.profile
        if need is not None and self.profile is None and self.find_profile is not None:
            self.profile = self.find_profile(need)
        have = None if self.profile is None else self.profile.id
        if need is None or need == have:
            return
        of = f" (a profile of {self.header.origin.model})" if self.header.origin.model else ""
        found = (
            "none was given: give profile= or --profile, or take it from a store that has it "
            f"(kvzip get --store STORE --key profiles/{need} -o FILE.kvprofile)"
            if have is None
            else f"the one given is {have}"
        )
        raise ProfileError(f"the file was written with profile {need}{of}; {found}")

    @property
    def codec(self) -> Codec:
        """The file's own codec; that of a part is in `codecs`."""
        return self.codecs.own

    def decoded_on(self, device: Any) -> bool:
        """Whether a GPU decodes all parts itself."""
        others = self.header.other_codecs or self.header.grids
        return self.codec.decodes_on(device) and not others

    @property
    def form(self) -> dtypes.DType:
        """The format of the keys and values."""
        return dtypes.get(self.layout.dtype)

    def layout_of(self, layer: int) -> Layout:
        """The layout of one layer alone. Equal ones are one object: they come layer by layer."""
        number = self.header.stored_layout.layers[layer]
        found = self._layouts.get(number)
        if found is None:
            alone = (self.layout.layers[layer],)
            found = self._layouts[number] = Layout(self.layout.dtype, alone)
        return found

    def part(self, key: Key) -> PartLayout:
        """The layout of a part."""
        layer, name = key
        return self.layout.layers[layer].parts[name]

    def part_infos(self) -> tuple[PartInfo, ...]:
        """What the parts of each name take up, by the layers' kinds, formats, codecs and grids, and
        by whether they are keys before RoPE. Of parts with a grid the first bytes of their tables
        are read, which say if it is used; of keys that may be stored before RoPE, the first byte of
        their first block."""
        found: dict[tuple[str, str, str, str, str | None, str | None, bool], list[int]] = {}
        for key, rows in self.index.rows.items():
            part, kind = self.part(key), self.layout.layers[key[0]].kind
            on_grid, codec = self.codecs.grids.get(key), self.codecs[key]
            grid = unused = None
            if on_grid is not None:
                offset, length = self.index.span(rows.start)
                if on_grid.is_unused(self.source.read(offset, min(length, 8))):
                    codec, unused = on_grid.rest, str(on_grid.grid)
                else:
                    codec, grid = on_grid.codes, str(on_grid.grid)
            before_rope = on_grid is None and self._before_rope(key, codec)
            what = (kind, key[1], part.dtype, codec.codec_id, grid, unused, before_rope)
            sums = found.setdefault(what, [0] * 3)
            sums[0] += 1
            sums[1] += part.nbytes
            sums[2] += sum(self.index.span(row)[1] for row in rows)
        return tuple(PartInfo(*what, *sums) for what, sums in found.items())

    def _before_rope(self, key: Key, codec: Codec) -> bool:
        """Whether a part is stored as keys before RoPE."""
        rows = self.index.rows[key]
        if self.layout.layers[key[0]].rope is None or len(rows) < 2:
            return False
        offset, length = self.index.span(rows[1])
        first = partial(self.source.read, offset, min(length, 1))
        return codec.is_before_rope(key[1], first)

    # --- which blocks ----------------------------------------------------------------------

    def needs(self, layer: int, part: str) -> tuple[Key, ...]:
        """The parts whose same tokens must be decoded before a part's, by the same codec."""
        codec, there = self.codecs[layer, part], self.index.rows
        return tuple(
            key for key in codec.needs(layer, part) if key in there and self.codecs[key] is codec
        )

    @cached_property
    def last_uses(self) -> dict[Key, int]:
        """The last row whose block needs each part of a layer, for the parts that any does."""
        return plan.last_uses(self.index, self.needs)

    def wanted(self, request: plan.Request) -> list[tuple[Codec, dict[Key, Sequence[int]]]]:
        """The rows of each part that is wanted, by the codecs that decode them."""
        by_part = plan.rows_by_part(self.layout, self.index, request)
        if len(self.codecs.all) == 1:
            return [(self.codec, by_part)]
        found: dict[int, tuple[Codec, dict[Key, Sequence[int]]]] = {}
        for key, rows in by_part.items():
            codec = self.codecs[key]
            found.setdefault(id(codec), (codec, {}))[1][key] = rows
        return list(found.values())

    def entries_read(self, request: plan.Request) -> set[int]:
        """The rows of all entries that a request reads, tables too."""
        blocks: set[int] = set()
        for codec, by_part in self.wanted(request):
            if codec.independent:
                blocks.update(*by_part.values())
            else:
                blocks.update(*plan.chains(self.index, by_part, self.needs))
        return blocks | {self.index.tables_row(row) for row in blocks}

    def ids_up_to(self, cuts: Collection[LayerLayout]) -> NDArray[Any] | None:
        """The ids of all positions up to the end of what is wanted of layers, since layers hold
        positions, too. None where there are none, or where nothing that is wanted tells of the rows
        that they are of."""
        ids = self.token_ids
        if ids is None:
            return None
        if not cuts:  # without layers there is no batch
            return ids.reshape(-1)[:0]
        end, rows_known, before = 0, ids.ndim == 1, None
        for cut in cuts:
            if cut is not before:  # most are one object
                before = cut
                rows_known = rows_known or cut.batch is not None
                if cut.counts_tokens:
                    end = max(end, cut.cumulative_length)
        if not rows_known:
            return None
        return ids if end == ids.shape[-1] else ids[..., :end]

    # --- bytes -----------------------------------------------------------------------------

    def stored(self, row: int, checked: bool = False) -> memoryview:
        """The stored bytes of an entry. The numbers' checksum tells whether they are good, that of
        the stored bytes, what is to blame: taking both always would cost an eighth of the fastest
        codec's time, and `checked` does it. Some bits of what is stored may say nothing of the
        numbers; so both are taken of small entries, where it costs little, and of a part on a grid,
        which has such bits often. Neither is of the zeros behind the bytes, which are looked at
        here. Raises CorruptError."""
        if self.cancelled:
            self.check_cancelled()
        index = self.index
        length = index.length[row]
        if not length and not checked:
            return _NOTHING  # as the tables of most codecs
        taken = self.source.read(index.offset[row], length + -length % ALIGNMENT)
        if metrics.listening():
            metrics.count("read_bytes", len(taken), codec=self.codec.codec_id)
        expected = None
        if length <= SMALL or checked or index.key[row] in self.codecs.grids:
            expected = index.stored_checksum[row]
        try:
            return _native.stored(taken, length, expected)
        except ValueError as error:
            raise CorruptError(f"{index.name(row)} is damaged: {error}") from None

    def together(
        self, rows: Sequence[int], checked: bool = False
    ) -> Iterator[dict[int, memoryview]]:
        """The stored bytes of entries of one codec, in the order of the file, as :meth:`stored`
        gives those of each. Neighbours are read and looked at together: all that are in memory; of
        a file as long as they are small; elsewhere each entry comes for itself."""
        index, most = self.index, 0
        if getattr(self.source, "in_memory", False):
            most = self.source.size
        elif isinstance(self.source, OpenFile):
            most = _TOGETHER
        else:
            for row in rows:
                yield {row: self.stored(row, checked)}
            return
        limit = SMALL
        if checked or (rows and index.key[rows[0]] in self.codecs.grids):
            limit = self.source.size
        for begin, length, run in index.runs(rows, most):
            self.check_cancelled()
            taken = self.source.read(begin, length)
            if metrics.listening():
                metrics.count("read_bytes", length, codec=self.codec.codec_id)
            try:
                yield index.stored(taken, begin, run, limit)
            except ValueError:
                for row in run:  # one of them tells which it is
                    yield {row: self.stored(row, checked)}

    def check_cancelled(self) -> None:
        """Raise CancelledError if nothing more is to be read."""
        if self.cancelled:
            raise CancelledError("reading the file was cancelled")

    def check_stored(self, row: int, data: memoryview) -> None:
        """Raise CorruptError, which names the entry, if these are not its bytes."""
        if checksum.of_bytes(data) != self.index.stored_checksum[row]:
            raise CorruptError(f"{self.index.name(row)} is damaged: its checksum does not match")

    # --- what blocks need beside their bytes -----------------------------------------------

    def tables(self, key: Key, checked: bool = False) -> tuple[memoryview, Any]:
        """A part's tables as they are stored and as blocks use them. Raises CorruptError."""
        row = self.index.rows[key].start
        data = self.stored(row, checked)
        return data, self.loaded(row, data)

    def loaded(self, row: int, data: memoryview) -> Any:
        """A part's tables, of which these are the bytes, as blocks use them. Raises CorruptError,
        which names them."""
        try:
            return self.load_tables(row, data)
        except CorruptError as error:
            self.check_stored(row, data)
            raise CorruptError(f"{self.index.name(row)}: {error}") from None

    def load_tables(self, row: int, data: memoryview) -> Any:
        """A part's tables, of which these are the bytes, as blocks use them. Raises
        CorruptError."""
        layer, name = key = self.index.key[row]
        held, begin = self.layout.layers[layer], self.index.position[row]
        part, origin = held.parts[name], self.header.origin
        context = Context(part.form, layer, name, begin, origin, None, self.profile, held.rope)
        return self.codecs[key].load_tables(data, part.block_shape, context)

    def context(self, row: int, *more: Any) -> Context:
        """The context of a block. `more`: its part's tables, and the fields that follow."""
        layer, name = self.index.key[row]
        begin = self.index.position[row]
        held = self.layout.layers[layer]
        part, ids = held.parts[name], None
        if self._ids is not None and part.tokens is not None and held.counts_tokens:
            ids = ids_between(self._ids, begin, begin + self.index.tokens[row])
        origin, profile = self.header.origin, self.profile
        return Context(part.form, layer, name, begin, origin, ids, profile, held.rope, *more)
