"""A chunk of vLLM's CPU pool, one row of bytes, as what is stored of it, and back.

A row holds one cell for each worker, which holds the chunk's blocks of each layer, as
``shared_offload_region.py`` of vLLM 0.32.0 and 0.33.0 has it. Where a profile of the model's cache
is given, and the layers are keys and values, layers that follow each other become a page
(:mod:`kvzip.pages`); any other row becomes a .kvz file of numbers that mean nothing. Either way
each byte of the row but its padding comes back as it was, whatever the numbers are: nothing is
taken on trust.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from kvzip import dtypes, metrics
from kvzip.codec import Codec
from kvzip.codecs.channel.profile import stated
from kvzip.dtypes import Bits
from kvzip.errors import CorruptError, ProfileError, UnsupportedError
from kvzip.load import chunks
from kvzip.load.vllm.names import fp8_format, index_of
from kvzip.pages import decode_page, encode_page, is_page, page_info
from kvzip.profile import Profile
from kvzip.snapshot import Origin

if TYPE_CHECKING:
    from vllm.v1.kv_offload.config import OffloadingConfig

_LAYOUTS = {"LBHNC": "hn", "LBNHC": "nh", "BLHNC": "hn", "BLNHC": "nh"}
"""vLLM's names of layouts, of layer, block, head, token and content (a key, then its value), and
the order of heads and tokens within a block."""
_CHANNELS = 64
"""How numbers that mean nothing are put side by side."""


@dataclass(frozen=True)
class _Layer:
    """Where one layer lies in each worker's cell."""

    number: int
    """Which of the model's layers it is."""
    start: int
    """Its first number within a cell, or within a block where layers lie within blocks."""
    heads: int
    """Of one worker."""
    dims: tuple[int, int]
    """Numbers of a key, and of a value."""


class Rows:
    """Rows of one engine's pool as what is stored of them.

    `config`: vLLM's of the offloading. `copies`: how many cells a row has. `codec`: of rows that
    do not become pages. `origin`: where the numbers come from, by its revision.
    """

    def __init__(
        self,
        config: OffloadingConfig,
        copies: int,
        profile: Profile | None,
        codec: Codec,
        origin: Origin,
    ):
        self._config, self._copies, self._profile = config, copies, profile
        self._codec, self._origin = codec, origin
        self._each = config.cache.blocks_per_chunk
        self._layout = str(config.kv_cache_layout)
        name = fp8_format(config.model.dtype) or config.model.dtype
        try:
            self._form = dtypes.get(name)
        except UnsupportedError:
            self._form = dtypes.get("bytes")
        self._groups: list[list[_Layer]] | None = None
        self.why_no_pages = ""
        """Why rows do not become pages, where a profile was given."""
        if profile is not None:
            try:
                self._groups = [self._placed(g) for g in range(len(config.groups))]
            except (UnsupportedError, ProfileError) as error:
                self.why_no_pages = str(error)

    @property
    def makes_pages(self) -> bool:
        """Whether rows become pages, which it takes the profile to read."""
        return self._groups is not None

    def _placed(self, number: int) -> list[_Layer]:
        """The layers of a group. Raises UnsupportedError where the profile does not say how these
        bytes are numbers, or of other ones."""
        config, parallel, group = self._config, self._config.parallel, self._config.groups[number]
        if self._layout not in _LAYOUTS or config.canonical_layout:
            canonical = "canonical_layout of " * config.canonical_layout
            raise UnsupportedError(f"the order {canonical}{self._layout} is not known")
        if parallel.pp_size * parallel.pcp_size * parallel.dcp_size > 1:
            raise UnsupportedError("layers or tokens are cut over workers")
        known = stated(self._profile)
        if known is None:
            raise ProfileError(
                'the profile has no tables of channel: Profile.fit(..., codec="channel") makes one'
            )
        if dtypes.get(known.dtype) is not self._form:
            raise ProfileError(
                f"the profile is of {known.dtype} and the cache of {config.model.dtype}"
            )
        found, start = list[_Layer](), 0
        for name in group.layer_names:
            i = index_of(name, len(known.layers))
            parts = known.layers[i]
            if set(parts) != {"k", "v"} or parts["k"][0] != parts["v"][0]:
                raise UnsupportedError(f"layer {i} is no pair of keys and values in the profile")
            heads, dims = parts["k"][0], (parts["k"][1], parts["v"][1])
            if heads % self._copies:
                raise UnsupportedError(f"{heads} heads on {self._copies} workers are repeated")
            found.append(_Layer(i, start, heads // self._copies, dims))
            start += heads // self._copies * sum(dims) * group.tokens_per_block * self._run
        if start * self._form.itemsize * (self._each // self._run) != self._cell:
            raise UnsupportedError(
                f"the profile's layers of group {number} take "
                f"{start * self._form.itemsize * (self._each // self._run):,} bytes and a worker's "
                f"part of the row {self._cell:,}: it is of another cache, or the group's layers do "
                "not fill the row"
            )
        return sorted(found, key=lambda layer: layer.number)

    @property
    def _cell(self) -> int:
        """Bytes of one worker's part of a row."""
        return self._config.worker_kv_bytes_per_block * self._each

    @property
    def _run(self) -> int:
        """How many blocks of one layer lie side by side."""
        return self._each if self._layout.startswith("L") else 1

    def _views(self, row: Bits, group: int) -> Iterator[tuple[_Layer, Bits, Bits]]:
        """Keys and values of each layer, [workers, heads, blocks, tokens, dim]: views of a row."""
        assert self._groups is not None
        layers, tokens = self._groups[group], self._config.groups[group].tokens_per_block
        used = row[: self._copies * self._cell].view(self._form.uint)
        cells = used.reshape(self._copies, self._each // self._run, -1)
        for layer in layers:
            lines = {"h": layer.heads, "n": tokens}
            order = _LAYOUTS[self._layout]
            count = self._run * math.prod(lines.values()) * sum(layer.dims)
            own = cells[:, :, layer.start : layer.start + count]
            shape = (self._copies, self._each, *(lines[axis] for axis in order), sum(layer.dims))
            blocks = own.reshape(shape)
            view = blocks.transpose(0, 2 + order.index("h"), 1, 2 + order.index("n"), 4)
            yield layer, view[..., : layer.dims[0]], view[..., layer.dims[0] :]

    def _runs(self, group: int) -> Iterator[tuple[int, int]]:
        """The group's layers that follow each other in the model: from where to where in it."""
        assert self._groups is not None
        numbers = [layer.number for layer in self._groups[group]]
        breaks = [n for n, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
        yield from pairwise([0, *breaks, len(numbers)])

    # --- coding ----------------------------------------------------------------------------

    def encode(self, row: Bits, group: int) -> bytes:
        """What is stored of a row, [bytes], of a group's layers."""
        if self._groups is None:
            return chunks.encode(self._tensor(row), self._codec, 1, self._origin)
        assert self._profile is not None
        timer, found = metrics.Timer(), list[tuple[Bits, Bits]]()
        for layer, k, v in self._views(row, group):
            k, v = (
                part.reshape(self._copies * layer.heads, -1, dim)
                for part, dim in zip((k, v), layer.dims, strict=True)
            )
            found.append((k, v))
        layers = self._groups[group]
        data = b"".join(
            encode_page(found[a:b], self._profile, first=layers[a].number)
            for a, b in self._runs(group)
        )
        if timer.wanted:
            metrics.count("encoded_bytes", self._copies * self._cell, codec="channel")
            metrics.count("written_bytes", len(data), codec="channel")
            timer.done("encode_seconds", codec="channel")
        return data

    def decode(self, data: bytes, row: Bits, group: int) -> None:
        """Fill a row, [bytes], from what was stored of it. Raises KVZipError; then what the row
        holds is undefined."""
        if self._groups is None:
            chunks.decode(data, self._tensor(row), 1, self._origin)
            return
        timer = metrics.Timer()
        views = list(self._views(row, group))
        rest = memoryview(data)
        for a, b in self._runs(group):
            rest = self._decode_page(rest, views[a:b])
        if rest:
            raise CorruptError("more is stored than the chunk's layers")
        if timer.wanted:
            metrics.count("read_bytes", len(data), codec="channel")
            metrics.count("decoded_bytes", self._copies * self._cell, codec="channel")
            timer.done("decode_seconds", codec="channel")

    def _decode_page(
        self, data: memoryview, views: Sequence[tuple[_Layer, Bits, Bits]]
    ) -> memoryview:
        """Fill some layers from the page that bytes begin with; the bytes after it."""
        if not is_page(data):
            raise CorruptError("what is stored is no page where one should be")
        info = page_info(data, self._profile)
        wanted = []
        for layer, k, v in views:
            heads, tokens = self._copies * layer.heads, k.shape[2] * k.shape[3]
            wanted.append(((heads, tokens, k.shape[4]), (heads, tokens, v.shape[4])))
        if info.first != views[0][0].number or list(info.shapes) != wanted:
            raise CorruptError("the page holds other layers, or more or fewer tokens")
        found = decode_page(data[: info.length], info.profile)
        for (_, *parts), given in zip(views, found, strict=True):
            for part, got in zip(parts, given, strict=True):
                part[...] = got.reshape(part.shape)
        return data[info.length :]

    def _tensor(self, row: Bits) -> torch.Tensor:
        """A whole row as numbers that mean nothing: [2, 1, tokens, channels]."""
        form: Any = getattr(torch, self._form.torch)
        return torch.from_numpy(row).view(form).view(2, 1, -1, _CHANNELS)
