"""Plain tensors to bytes and back, for whoever moves opaque buffers between machines and tiers.

Mooncake, NIXL (Dynamo), llm-d and others carry bytes and ask nothing about them. Before a buffer of
keys and values goes on its way it becomes a smaller one, and after that it is what it was, bit for
bit:

.. code-block:: python

    from kvzip.load import buffers

    blob = buffers.encode(k, v, axes="thd")  # arrays or CPU tensors, [tokens, heads, dim]
    k, v = buffers.decode(blob, axes="thd")
    buffers.decode(blob, axes="thd", out=(k_page, v_page))  # into memory that is there already

A blob is a .kvz file (docs/format.md); with ``profile=`` it is a page, which has no header and no
tables, and suits buffers of a few tokens. `decode` tells them apart. No function here keeps
anything: threads may call them at once, on tensors that no other thread changes meanwhile.
"""

from __future__ import annotations

import itertools
import math
import mmap
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, overload

import numpy as np

from kvzip import api, dtypes
from kvzip.codec import Codec, get_codec
from kvzip.container import stated_length
from kvzip.container.sealed import is_sealed
from kvzip.container.sink import Memory
from kvzip.dtypes import Bits
from kvzip.errors import UnsupportedError, UsageError
from kvzip.options import integer, items, text
from kvzip.pages import decode_page, encode_page, is_page, max_page_size, page_info
from kvzip.profile import Profile
from kvzip.snapshot import Layer, LayerLayout, Layout, PartLayout, Snapshot

_AS_IT_IS = "raw"
"""The codec of what another one would make larger."""
_RAW = (bytes, bytearray, memoryview, mmap.mmap, array)
_LETTERS = {"l": "layers", "h": "heads", "t": "tokens", "d": "dim"}


@overload
def encode(
    k: Any,
    v: Any = None,
    *,
    axes: str = "htd",
    dtype: Any = None,
    shape: Sequence[int] | None = None,
    v_shape: Sequence[int] | None = None,
    codec: str | Codec | Mapping[str, Any] = "channel",
    profile: Profile | None = None,
    layer: int = 0,
    threads: int = 1,
    out: None = None,
) -> bytes: ...


@overload
def encode(
    k: Any,
    v: Any = None,
    *,
    axes: str = "htd",
    dtype: Any = None,
    shape: Sequence[int] | None = None,
    v_shape: Sequence[int] | None = None,
    codec: str | Codec | Mapping[str, Any] = "channel",
    profile: Profile | None = None,
    layer: int = 0,
    threads: int = 1,
    out: Any,
) -> memoryview: ...


def encode(
    k: Any,
    v: Any = None,
    *,
    axes: str = "htd",
    dtype: Any = None,
    shape: Sequence[int] | None = None,
    v_shape: Sequence[int] | None = None,
    codec: str | Codec | Mapping[str, Any] = "channel",
    profile: Profile | None = None,
    layer: int = 0,
    threads: int = 1,
    out: Any = None,
) -> bytes | memoryview:
    """Keys and values of the same tokens, of one layer or of several, as bytes.

    `k`, `v`: arrays, CPU tensors or anything with DLPack, of any strides, no copy is made; or
    buffers of bytes, with `dtype` and `shape` (and `v_shape`, if that of the values differs). `v`
    is None where one tensor holds all (the latents of MLA). `axes` has a letter for each axis of
    theirs, in their order: "t" tokens and "d" dim, and if there are any, "h" heads and "l" layers.
    `dtype` names the format of what is no float by itself: integers that hold bits. `codec`: any
    that needs no profile. `profile`: with tables of `channel`
    (``Profile.fit(snapshots, codec="channel")``): a page is made, and `layer` is the number of its
    first layer. `threads`: 0 for all cores. `out`: registered memory, or what else the bytes are to
    lie in: a writable buffer or CPU tensor of bytes side by side, apart from `k` and `v`. The part
    that they take is returned, from its first byte on; `max_size` says how many they may take.

    Raises UsageError when shapes and axes do not fit each other or `out` is too small (bytes of it
    may be written then), UnsupportedError for other formats, ProfileError when the profile is
    another model's or has no tables.
    """
    order = _Axes(axes)
    given = [(k, shape)] if v is None else [(k, shape), (v, v_shape or shape)]
    bits = []
    for one, its in given:
        found, dtype = _bits(one, dtype, its)
        bits.append(order.layers(found))
    if len({len(layers) for layers in bits}) > 1:
        raise UsageError(f"k has {len(bits[0])} layers and v {len(bits[1])}")
    layers = list(zip(*bits, strict=True))
    if profile is not None and v is None:
        raise UnsupportedError(
            "a page holds keys and values: encode a lone tensor without profile="
        )
    memory = None
    if out is not None:
        memory = Memory(out, itertools.chain.from_iterable(layers), "kvzip.load.buffers.max_size")
    if profile is None:
        snapshot = _snapshot(layers, dtype)
        writer = api.writer_of(snapshot, _codec(codec), None)
        if memory is None:
            blob = writer.encode(threads)
            if _is_bound(len(blob), snapshot):
                return blob
            return api.writer_of(snapshot, get_codec(_AS_IT_IS), None).encode(threads)
        with suppress(UsageError):  # there is too little room, which may do for what is shorter
            length = writer.write(memory, threads)
            if _is_bound(length, snapshot):
                return memory.first(length)
        memory.seek(0)
        as_it_is = api.writer_of(snapshot, get_codec(_AS_IT_IS), None)
        return memory.first(as_it_is.write(memory, threads))
    page = encode_page(layers, profile, first=layer)
    return page if memory is None else memory.first(memory.write(page))


def decode(
    data: Any,
    *,
    axes: str = "htd",
    out: Any = None,
    profile: Profile | None = None,
    threads: int = 1,
) -> tuple[Bits, ...]:
    """What :func:`encode` was given, bit-exact: (k, v), or (k,) where v was None.

    `data`: any buffer that begins with what `encode` gave; it may be longer. `axes`: as there, for
    what is given back: they need not be the sender's. `out`: writable arrays, CPU tensors or
    buffers of bytes, as many, which are filled and used; by default new arrays of unsigned
    integers, which hold the bits. `profile`: the one that a page was made with.

    Raises CorruptError or FormatError for what is damaged (`out` may be written to then),
    ProfileError without the right profile, UnsupportedError for a sealed file, UsageError when
    `axes` or `out` does not fit.
    """
    order, view = _Axes(axes), _bytes(data)
    if is_page(view):
        found = page_info(view, profile)
        wholes = order.places(found.dtype, found.shapes, out)
        k, v = map(order.layers, wholes)
        decode_page(view[: found.length], found.profile, list(zip(k, v, strict=True)), threads)
        return tuple(wholes)
    if is_sealed(view):
        raise UnsupportedError("the blob is a sealed file: kvzip.decode reads it with its key")
    with api.open(view[: min(stated_length(view), len(view))], profile, threads) as reader:
        shapes = [_shapes(i, layer) for i, layer in enumerate(reader.layout.layers)]
        wholes = order.places(reader.layout.dtype, shapes, out)
        reader.decode(out=list(zip(*map(order.layers, wholes), strict=True)))
    return tuple(wholes)


def max_size(
    shape: Sequence[int],
    dtype: Any,
    v_shape: Sequence[int] | None = (),
    *,
    axes: str = "htd",
    codec: str | Codec | Mapping[str, Any] = "channel",
    profile: Profile | None = None,
    layer: int = 0,
) -> int:
    """The most bytes that :func:`encode` gives for tensors of these shapes, whatever they hold:
    without a profile hardly more than they have, since what no codec makes smaller is stored as it
    is.

    `v_shape`: that of the values, by default as `shape`; None where v is None. The rest, and the
    errors, as for `encode`.
    """
    order, form = _Axes(axes), dtypes.get(dtype)
    shapes = [shape] if v_shape is None else [shape, v_shape or shape]
    bits = [order.layers(np.broadcast_to(form.uint.type(0), _checked_shape(s))) for s in shapes]
    layers = list(zip(*bits, strict=True))
    if profile is not None:
        tokens = layers[0][0].shape[1] if layers else 0
        return max_page_size(profile, tokens, first=layer, layers=len(layers))
    layout = Layout(
        form.name, tuple(_layout([b.shape for b in pair], form.name) for pair in layers)
    )
    _codec(codec)
    return api.max_encoded_size(layout, _AS_IT_IS)


def _is_bound(length: int, snapshot: Snapshot) -> bool:
    """Whether a blob is no longer than :func:`max_size` says."""
    layout = snapshot.layout
    if length <= sum(part.nbytes for _, _, part in layout.parts()):  # as most are
        return True
    return length <= api.max_encoded_size(layout, _AS_IT_IS)


class _Axes:
    """The axes of a caller's tensors, and how they become [heads, tokens, dim] of each layer."""

    def __init__(self, axes: str):
        self.axes = text("axes", axes)
        if len({*axes}) != len(axes) or not {"t", "d"} <= {*axes} <= {*_LETTERS}:
            words = ", ".join(f"{a} {name}" for a, name in _LETTERS.items())
            raise UsageError(
                f"axes is {axes!r}: it must have t and d, each letter once, and of these ({words}) "
                "only"
            )

    def layers(self, whole: Bits) -> list[Bits]:
        """Views [heads, tokens, dim] of a tensor, one a layer. Raises UsageError."""
        if whole.ndim != len(self.axes):
            raise UsageError(
                f"a tensor of shape {list(whole.shape)} has not the axes {self.axes!r}"
            )
        present = [self.axes.index(a) for a in "lhtd" if a in self.axes]
        view = whole.transpose(present)
        if "l" not in self.axes:
            view = view[np.newaxis]
        if "h" not in self.axes:
            view = view[:, np.newaxis]
        return list(view)

    def places(
        self, form: str, layers: Sequence[Sequence[tuple[int, ...]]], out: Any
    ) -> list[Bits]:
        """For k, and v if there is one, a whole tensor of the caller's axes: a new one, or that of
        `out`. `layers`: shapes [heads, tokens, dim] of each layer's. Raises UsageError where a
        tensor of these axes cannot hold them, or `out` is none."""
        if not layers or any(shapes != layers[0] for shapes in layers):
            raise UsageError("the blob's layers are of different shapes: kvzip.decode reads it")
        if "l" not in self.axes and len(layers) > 1:
            raise UsageError(f"the blob holds {len(layers)} layers: give axes with an l")
        wanted = [self._shape(len(layers), *shape) for shape in layers[0]]
        if out is None:
            return [np.empty(shape, dtypes.get(form).uint) for shape in wanted]
        given = items("out", out, "as many buffers as were encoded")
        if len(given) != len(wanted):
            raise UsageError(f"out has {len(given)} tensors, and {len(wanted)} were encoded")
        found = [_bits(one, form, s)[0] for one, s in zip(given, wanted, strict=True)]
        for one, its in zip(found, wanted, strict=True):
            if one.shape != its or not one.flags.writeable:
                raise UsageError(f"out must be writable and of shape {list(its)}, {self.axes!r}")
        return found

    def _shape(self, layers: int, heads: int, tokens: int, dim: int) -> tuple[int, ...]:
        sizes = {"l": layers, "h": heads, "t": tokens, "d": dim}
        if "h" not in self.axes and heads != 1:
            raise UsageError(f"the blob holds {heads} heads: give axes with an h")
        return tuple(sizes[a] for a in self.axes)


def _codec(codec: str | Codec | Mapping[str, Any]) -> Codec:
    """The codec. Raises UnsupportedError for one that cannot be used on tensors by themselves."""
    found = get_codec(codec)
    if found.needs_profile:
        raise UnsupportedError(
            f"codec {found.codec_id!r} needs whole layers and their positions, which tensors do "
            "not tell: use channel"
        )
    return found


def _bytes(data: Any) -> memoryview:
    """A buffer's bytes. Raises UsageError for what is none."""
    try:
        return memoryview(data).cast("B")
    except (TypeError, ValueError, BufferError) as error:
        raise UsageError(f"data must be a buffer of bytes side by side: {error}") from None


def _checked_shape(shape: Any) -> tuple[int, ...]:
    return tuple(integer("a size", n, 0) for n in items("shape", shape, "a shape"))


def _bits(given: Any, dtype: Any, shape: Sequence[int] | None) -> tuple[Bits, str]:
    """A tensor's bits as an array, no copy, and the name of its format. `shape`: that of a buffer
    of bytes, which has none itself."""
    if not isinstance(given, _RAW):
        return dtypes.as_bits(given, None if dtype is None else dtypes.get(dtype).name)
    if dtype is None or shape is None:
        raise UsageError("a buffer of bytes says nothing of itself: give dtype= and shape=")
    form, sizes, held = dtypes.get(dtype), _checked_shape(shape), _bytes(given)
    if len(held) != math.prod(sizes) * form.itemsize:
        raise UsageError(
            f"a buffer of {len(held):,} bytes is no {form.name} of shape {list(sizes)}"
        )
    return np.frombuffer(held, form.uint).reshape(sizes), form.name


def _layout(shapes: Sequence[tuple[int, ...]], dtype: str) -> LayerLayout:
    """The layout of a layer of keys and values, or of one tensor in their place."""
    if len(shapes) == 2:
        return LayerLayout.of_kv(shapes[0], shapes[1], dtype, shapes[0][1])
    parts = {"latent": PartLayout(dtype, tuple(shapes[0]), "htd")}
    return LayerLayout(parts, shapes[0][1], "latent")


def _snapshot(layers: Sequence[tuple[Bits, ...]], dtype: str) -> Snapshot:
    built = []
    for pair in layers:
        layout = _layout([bits.shape for bits in pair], dtype)
        built.append(Layer(dict(zip(layout.parts, pair, strict=True)), layout))
    return Snapshot(built, dtype)


def _shapes(i: int, layer: LayerLayout) -> tuple[tuple[int, ...], ...]:
    """The shapes of a layer's tensors. Raises UsageError for one that is not of this module's."""
    if [*layer.parts] not in (["k", "v"], ["latent"]) or any(
        part.axes != "htd" for part in layer.parts.values()
    ):
        raise UsageError(f"layer {i} of the blob is none of plain tensors: kvzip.decode reads it")
    return tuple(part.shape for part in layer.parts.values())
