"""An engine's chunk of a cache, one tensor, as a .kvz file and back, in place.

Engines hand over chunks as tensors of a few layouts, and tell a reader no more than the shape.
So how a tensor is cut into keys and values of layers follows from its shape alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from kvzip import api, dtypes
from kvzip.codec import Codec, get_codec
from kvzip.dtypes import Bits
from kvzip.errors import UnsupportedError
from kvzip.load.documents import Bytes, open_document
from kvzip.snapshot import Layer, Layout, Origin, Snapshot

if TYPE_CHECKING:
    import torch


class Turned(NamedTuple):
    """What RoPE made of the keys of a chunk, which is [2, layers, heads, tokens, dim]."""

    first: int
    """Position of its first token."""
    ropes: Sequence[int | None]
    """Of each layer, which of the origin's RoPE parameters turned its keys; None: none did."""


def codec_for_chunks(codec: Codec, log: logging.Logger) -> Codec:
    """The codec, if it can be used on chunks; else channel, of which `log` warns."""
    if not codec.needs_profile:
        return codec
    log.warning(
        "codec %r needs whole layers and their positions, which an engine's chunks do not tell: "
        "channel is used in its place",
        codec.codec_id,
    )
    return get_codec("channel")


def most_stored(nbytes: int) -> int:
    """More bytes than :func:`encode` makes of a chunk that has so many."""
    return 2 * nbytes + (1 << 20)


def pairs(array: Bits) -> list[tuple[Bits, Bits]]:
    """A tensor as keys and values of layers, [heads, tokens, dim] each, or [1, tokens, channels]:
    views of it.

    [2, layers, heads, tokens, dim], [2, layers, tokens, channels], [2, tokens, channels] and
    [tokens, 2, channels] hold keys and values. Any other shape, like MLA's [1, layers, tokens,
    channels], has no such halves: of each layer one half of the channels goes as keys, the other
    as values.
    """
    shape = tuple(array.shape)
    if len(shape) == 5 and shape[0] == 2:
        return [(array[0, i], array[1, i]) for i in range(shape[1])]
    if len(shape) == 4 and shape[0] == 2:
        return [(array[0, i][None], array[1, i][None]) for i in range(shape[1])]
    if len(shape) == 3 and shape[0] == 2:
        return [(array[0][None], array[1][None])]
    if len(shape) == 3 and shape[1] == 2:
        return [(array[:, 0][None], array[:, 1][None])]
    count = math.prod(shape)
    if count < 2:
        raise UnsupportedError(f"a tensor of shape {shape} has nothing to compress")
    if len(shape) < 2 or shape[-1] < 2:
        array = array.reshape(1, -1) if count % 2 else array.reshape(-1, 2)
    half = array.shape[-1] // 2
    layers = array.reshape(-1, *array.shape[-2:])
    return [(layer[None, :, :half], layer[None, :, half:]) for layer in layers]


def _bits(tensor: torch.Tensor) -> tuple[Bits, str]:
    """A tensor's bits; integers pass for numbers of one of our formats that is as wide."""
    if tensor.dtype.is_floating_point:
        return dtypes.as_bits(tensor)
    wide = {1: "fp8_e4m3fn", 2: "fp16", 4: "fp32"}.get(tensor.element_size())
    if wide is None:
        raise UnsupportedError(f"a tensor of {tensor.dtype} holds no numbers of ours")
    return dtypes.as_bits(tensor, wide)


def _snapshot(
    tensor: torch.Tensor, origin: Origin | None = None, turned: Turned | None = None
) -> Snapshot:
    bits, name = _bits(tensor)
    made = Snapshot.from_arrays(pairs(bits), name, origin=origin or Origin())
    if turned is None or tensor.ndim != 5 or len(turned.ropes) != len(made.layers):
        return made
    length = turned.first + tensor.shape[3]
    layers = [
        Layer(layer.parts, replace(layer.layout, cumulative_length=length, rope=rope))
        for layer, rope in zip(made.layers, turned.ropes, strict=True)
    ]
    return Snapshot(layers, name, origin=made.origin)


def _numbers(layout: Layout) -> list[object]:
    """What numbers there are, wherever in a sequence."""
    return [layout.dtype, *(layer.parts for layer in layout.layers)]


def layout(tensor: torch.Tensor) -> Layout:
    """Layout of the file that a tensor becomes; its numbers are not looked at."""
    return _snapshot(tensor).layout


def bound(tensor: torch.Tensor) -> int:
    """The most bytes that :func:`encode` makes of a tensor: hardly more than it has."""
    return _bound(layout(tensor))


def _bound(layout: Layout) -> int:
    return api.max_encoded_size(layout, "raw")


def encode(
    tensor: torch.Tensor,
    codec: Codec,
    threads: int = 1,
    origin: Origin | None = None,
    turned: Turned | None = None,
) -> bytes:
    """A CPU tensor of any strides as the bytes of a .kvz file, which says what turned its keys
    where that is told; what fills a tensor from it need not know that. What the codec makes larger
    is stored as it is."""
    snapshot = _snapshot(tensor, origin, turned)
    data = api.encode(snapshot, codec, threads=threads)
    if len(data) <= tensor.nbytes or len(data) <= _bound(snapshot.layout):
        return data
    return api.encode(snapshot, "raw", threads=threads)


def decode(
    data: Bytes, tensor: torch.Tensor, threads: int = 1, origin: Origin | None = None
) -> None:
    """Fill a CPU tensor of any strides from the bytes of a .kvz file.

    `origin`: where it must come from, by its revision. Raises CorruptError, FormatError, and
    UnsupportedError when the numbers are of another shape or of other weights.
    """
    bits, name = _bits(tensor)
    with open_document(data, threads=threads) as document:
        reader = document.source
        found = reader.header.origin
        if origin is not None and found.revision != origin.revision:
            raise UnsupportedError(
                f"the chunk is of other weights: {found.model} {found.revision or '(not pinned)'}, "
                f"not {origin.model} {origin.revision or '(not pinned)'}"
            )
        stored, wanted = reader.layout, layout(tensor)
        if _numbers(stored) != _numbers(wanted):
            raise UnsupportedError(
                f"the chunk holds {stored.dtype} {stored.layers[0].k} in {len(stored.layers)} "
                f"layers, the buffer {name} {wanted.layers[0].k} in {len(wanted.layers)}"
            )
        reader.decode(out=pairs(bits))
