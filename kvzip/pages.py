"""Pages: a few tokens of one layer, of some or of all, as engines move them between memories.

A page is coded by `channel` with a profile's tables, which it does not hold: all that it takes to
decode it is the page and the profile. Nothing is kept from one page to the next. docs/format.md
has the bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvzip import checksum, dtypes
from kvzip.codec import Coded, Context, get_codec
from kvzip.codecs.channel.profile import stated
from kvzip.dtypes import Bits, DType
from kvzip.errors import (
    CorruptError,
    FormatError,
    ProfileError,
    UnsupportedError,
    UsageError,
    told_as,
)
from kvzip.layout import KV, Origin
from kvzip.options import integer, pairs
from kvzip.overlap import check_apart
from kvzip.profile import Profile, check_profile
from kvzip.version import check_format, newer

MAGIC = b"KVZP"
VERSION = 1
MOST_TOKENS = 1 << 13
"""The most tokens that a page holds. A block of them is below 4 GiB, whatever its model."""

# Magic, version, zeros, first layer, layers, tokens, zeros, profile; then the checksum.
_HEADER = struct.Struct("<4sHHIIII8s")
_CHECKSUM = struct.Struct("<Q")
_LENGTHS_AT = _HEADER.size + _CHECKSUM.size
_ALIGNMENT = 16
_NOWHERE = Origin()
_NO_TABLES = memoryview(b"")


def encode_page(layers: Sequence[tuple[Any, Any]], profile: Profile, *, first: int = 0) -> bytes:
    """The same tokens of one or more layers that follow each other, as bytes.

    `layers`: a (K, V) pair each, arrays or CPU tensors [heads, tokens, dim] of any strides; arrays
    of integers hold bits of the profile's dtype. `profile`: one with tables of `channel`
    (``Profile.fit(snapshots, codec="channel")``). `first`: the number of the first of the layers.

    Raises ProfileError when the profile is another model's or has no tables, UsageError when the
    arrays do not fit each other, UnsupportedError when they are of another dtype.
    """
    coder = _Coder(profile)
    given = [
        dtypes.as_bits(array, coder.form.name)[0]
        for k_v in pairs("layers", layers)
        for array in k_v
    ]
    tokens = given[0].shape[1] if given and given[0].ndim == 3 else 0
    blocks, digests = [], []
    parts = coder.parts(first, len(given) // 2, tokens)
    for (i, part, shape), array in zip(parts, given, strict=True):
        if array.shape != shape:
            raise UsageError(
                f"layer {i}: {part} has shape {array.shape}; the profile's has {shape}"
            )
        block = array[np.newaxis]
        blocks.append(coder.codec.encode(block, coder.context(i, part, block)))
        digests.append(checksum.of_numbers(block))
    identity = bytes.fromhex(profile.id)[:8]
    start = _HEADER.pack(MAGIC, VERSION, 0, first, len(blocks) // 2, tokens, 0, identity)
    lengths = np.array([len(block) for block in blocks], "<u4").tobytes()
    head = start + _CHECKSUM.pack(_digest(start, lengths, digests)) + lengths
    return b"".join([_padded(head), *map(_padded, blocks)])


def decode_page(
    data: Any,
    profile: Profile,
    out: Sequence[tuple[Any, Any]] | None = None,
    threads: int = 1,
) -> list[tuple[Bits, Bits]]:
    """(K, V) of each layer of a page, bit-exact: arrays of unsigned integers that hold the bits,
    [heads, tokens, dim].

    `data`: the page, any buffer. `out`: writable arrays or CPU tensors of these shapes and any
    strides, which are filled and given back as such arrays. Raises CorruptError or FormatError for
    what is no whole page, UnsupportedError for one that a newer version may read, ProfileError when
    it was made with another profile.
    """
    coder = _Coder(profile)
    with told_as(UsageError, f"a {type(data).__name__} is no page, whose bytes lie side by side"):
        page = memoryview(data).cast("B")
    found = _read(page, profile)
    parts = list(coder.parts(found.first, found.layers, found.tokens))
    for length, (_, _, shape) in zip(found.lengths, parts, strict=True):
        most = coder.codec.max_decoded_size(length, coder.form)
        if math.prod(shape) * coder.form.itemsize > most:
            raise CorruptError("the page claims more than its bytes can hold")
    arrays = _places(out, [shape for _, _, shape in parts], coder.form)
    blocks, at = [], found.begin
    for (i, part, _), length, array in zip(parts, found.lengths, arrays, strict=True):
        block = array[np.newaxis]
        blocks.append(Coded(page[at : at + length], block, coder.context(i, part, block)))
        at += _aligned(length)
    try:
        digests = coder.codec.decode_many(blocks, integer("threads", threads, 1))
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}, or the page is damaged") from None
    if _digest(page[: _HEADER.size], page[_LENGTHS_AT : found.end], digests) != found.checksum:
        raise CorruptError("the page is damaged: its checksum does not match")
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def max_page_size(
    profile: Profile, tokens: int, *, first: int = 0, layers: int | None = None
) -> int:
    """The most bytes that a page of so many tokens takes, whatever the numbers are.

    `first`, `layers`: the number of the first layer that it holds, and how many; by default all of
    the profile's. Raises as :func:`encode_page`.
    """
    coder = _Coder(profile)
    first = integer("first", first, 0)
    count = len(coder.layers) - first if layers is None else integer("layers", layers, 1)
    size = _aligned(_LENGTHS_AT + 8 * count)
    for _, _, shape in coder.parts(first, count, tokens):
        size += _aligned(coder.codec.max_encoded_size(math.prod(shape) * coder.form.itemsize))
    return size


def is_page(data: memoryview) -> bool:
    """Whether bytes begin like a page."""
    return data[: len(MAGIC)] == MAGIC


class PageInfo(NamedTuple):
    """What a page holds."""

    length: int
    """Bytes of the page; what it lies in may be longer."""
    dtype: str
    shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    """[heads, tokens, dim] of each layer's keys, and of its values."""
    profile: Profile
    """The one that it was made with."""
    first: int
    """The number of the first layer."""


def page_info(data: memoryview, profile: Profile | None) -> PageInfo:
    """What a page, and its profile, say of it. Raises as :func:`decode_page`, but for damage to
    what is not its header."""
    coder = _Coder(profile)
    length = len(data)
    if length >= _LENGTHS_AT:
        end = _LENGTHS_AT + 8 * _HEADER.unpack_from(data)[4]
        if end > length:
            raise CorruptError("the page is cut short")
        lengths = np.frombuffer(data[_LENGTHS_AT:end], "<u4").tolist()
        length = _aligned(end) + sum(map(_aligned, lengths))
    found = _read(data[:length], coder.profile)
    shapes = [shape for _, _, shape in coder.parts(found.first, found.layers, found.tokens)]
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    return PageInfo(length, coder.form.name, pairs, coder.profile, found.first)


class _Coder:
    """The codec with a profile's tables, and the numbers that they are for."""

    def __init__(self, profile: Any):
        if profile is None:
            raise ProfileError("a page needs the profile that it was made with: give profile=")
        check_profile(profile)
        found = stated(profile)
        if found is None:
            raise ProfileError(
                'the profile has no tables of channel: Profile.fit(..., codec="channel") makes one'
            )
        self.profile, self.codec = profile, get_codec("channel")
        self.form, self.layers = dtypes.get(found.dtype), found.layers

    def parts(
        self, first: int, count: int, tokens: int
    ) -> Iterator[tuple[int, str, tuple[int, int, int]]]:
        """Layer, part and shape of each block of a page, in its order."""
        first, count = integer("first", first, 0), integer("layers", count, 1)
        tokens = integer("the tokens of a page", tokens, 1, MOST_TOKENS)
        if first + count > len(self.layers):
            raise ProfileError(
                f"the profile has {len(self.layers)} layers, not {first + count}: it is of another "
                "model"
            )
        for i in range(first, first + count):
            for part in KV:
                if part not in self.layers[i]:
                    raise ProfileError(f"the profile has no tables for layer {i} {part}")
                heads, dim = self.layers[i][part]
                yield i, part, (heads, tokens, dim)

    def context(self, layer: int, part: str, block: Bits) -> Context:
        bare = Context(self.form, layer, part, 0, _NOWHERE, None, self.profile)
        tables = self.codec.load_tables(_NO_TABLES, block.shape, bare)
        return Context(self.form, layer, part, 0, _NOWHERE, None, self.profile, tables=tables)


class _Page(NamedTuple):
    """A page's header, checked."""

    first: int
    layers: int
    tokens: int
    checksum: int
    lengths: list[int]
    """Bytes of each block."""
    end: int
    """Where the lengths end in the page."""
    begin: int
    """Where the first block begins in the page."""


def _read(page: memoryview, profile: Profile) -> _Page:
    """Check a page's header, its lengths and the zeros between its blocks, which are not read.

    Raises FormatError for what is no page or one of another version, ProfileError if it was made
    with another profile, CorruptError if it is damaged.
    """
    if bytes(page[: len(MAGIC)]) != MAGIC[: len(page)] or not len(page):
        raise FormatError("this is not a page")
    if len(page) < _LENGTHS_AT:
        raise CorruptError("the page is cut short")
    _, version, zeros, first, layers, tokens, more_zeros, made_with = _HEADER.unpack_from(page)
    check_format("the page", version, VERSION, "encode its numbers anew")
    if made_with != bytes.fromhex(profile.id)[:8]:
        raise ProfileError(
            f"the page was made with profile {made_with.hex()}..., not with {profile.id}"
        )
    if zeros or more_zeros:
        raise FormatError(newer("the page has fields that are set") + ", or it is damaged")
    end = _LENGTHS_AT + 8 * layers
    begin = _aligned(end)
    if not 1 <= tokens <= MOST_TOKENS or not layers or begin > len(page):
        raise CorruptError("the page's header makes no sense")
    lengths = np.frombuffer(page[_LENGTHS_AT:end], "<u4").tolist()
    if begin + sum(map(_aligned, lengths)) != len(page):
        raise CorruptError("the page is cut short, or longer than it says")
    gaps, start = [page[end:begin]], begin
    for length in lengths:
        gaps.append(page[start + length : start + _aligned(length)])
        start += _aligned(length)
    if any(map(any, gaps)):
        raise CorruptError("what lies between the page's blocks is not zeros")
    (digest,) = _CHECKSUM.unpack_from(page, _HEADER.size)
    return _Page(first, layers, tokens, digest, lengths, end, begin)


def _places(
    out: Sequence[tuple[Any, Any]] | None, shapes: Sequence[tuple[int, int, int]], form: DType
) -> list[Bits]:
    """The arrays to decode into, of these shapes: new ones, or those of `out` as bits. Raises
    UsageError when `out` does not fit, or has the same memory twice."""
    if out is None:
        return [np.empty(shape, form.uint) for shape in shapes]
    given = [dtypes.as_bits(array, form.name)[0] for k_v in pairs("out", out) for array in k_v]
    if [a.shape for a in given] != list(shapes) or not all(a.flags.writeable for a in given):
        raise UsageError(f"out must be writable arrays of the shapes {list(shapes)}, in pairs")
    check_apart(given)
    return given


def _digest(start: Any, lengths: Any, digests: Sequence[int]) -> int:
    """The checksum of everything in a page; numbers enter it by their own checksums."""
    return checksum.of_bytes(start, lengths, np.array(digests, "<u8"))


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _padded(data: bytes) -> bytes:
    return data + bytes(_aligned(len(data)) - len(data))
