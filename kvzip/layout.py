"""What a cache is, without its numbers: the parts, shapes and kinds of its layers, and its origin.

Everything here is checked when it is made, from Python or from a file, so that whatever can be
written can be read: wrong values raise UsageError, which a reader turns into FormatError.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec.structs import force_setattr

from kvzip import dtypes
from kvzip.dtypes import Bits, DeviceBits
from kvzip.errors import UnsupportedError, UsageError
from kvzip.kept import cached_property
from kvzip.options import integer, items, json_value, text

Held = TypeVar("Held", Bits, DeviceBits)
"""Where a part's bits are: in an array, or on a GPU."""

Kind = Literal["full", "sliding", "latent", "state", "cross"]
KINDS: tuple[Kind, ...] = ("full", "sliding", "latent", "state", "cross")
KV = ("k", "v")
"""The parts of a layer of plain attention, in their order."""
_MOST = 2**31 - 1
"""How many tokens, heads or channels a layer may have: what an index can say."""
_MOST_PARTS = 64
_MOST_LAYERS = 1 << 16
_AXES = "bhtrd"
_AS_KV = {3: "htd", 4: "bhtd"}


# Layers keep what is asked of them for each block of a file: most of a model's are one object.
class PartLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Format, shape and axes of one part of a layer: its keys, its values, a state, ...

    `axes` has a letter for each axis of `shape`, none twice: "b" batch, "h" heads, "t" tokens, "r"
    rows, which a part without tokens has in their place, "d" dim, the channels. "b" comes first.
    Keys and values of caches are "htd" or "bhtd"; what loads them refuses others. Raises UsageError
    unless the fields fit each other, UnsupportedError for a format that is not one of ours.
    """

    dtype: str
    shape: tuple[int, ...]
    axes: str

    def __post_init__(self) -> None:
        name = dtypes.get(self.dtype).name
        if self.dtype is not name:
            force_setattr(self, "dtype", name)
        shape = self.shape
        if type(shape) is not tuple or {*map(type, shape)} - {int}:
            shape = tuple(integer("a size", size) for size in items("shape", shape, "a shape"))
            force_setattr(self, "shape", shape)
        if type(self.axes) is not str:
            force_setattr(self, "axes", text("axes", self.axes))
        if (wrong := _wrong_axes(self.axes, shape)) is not None:
            raise UsageError(f"a part of axes {self.axes!r} and shape {list(shape)}: {wrong}")

    @cached_property
    def form(self) -> dtypes.DType:
        """The format of the numbers."""
        return dtypes.get(self.dtype)

    @cached_property
    def numbers(self) -> int:
        """How many numbers the part has."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """How many bytes its numbers are."""
        return self.numbers * self.form.itemsize

    @property
    def batch(self) -> int | None:
        """How many rows the batch has; None when it has no axis of the batch."""
        return self.shape[0] if self.axes.startswith("b") else None

    @cached_property
    def tokens(self) -> int | None:
        """How many tokens it holds; None when it has no axis of tokens."""
        return self.size("t") if "t" in self.axes else None

    def size(self, axis: str) -> int:
        """The size of an axis, by its letter; 1 for one that there is not."""
        at = self.axes.find(axis)
        return 1 if at < 0 else self.shape[at]

    @cached_property
    def block_shape(self) -> tuple[int, int, int, int]:
        """The shape in which codecs see the part, [batch, heads, tokens or rows, dim], with a size
        of 1 for each axis that it has not."""
        if self.axes == "bhtd":
            return self.shape  # type: ignore[return-value] # four, as the axes are
        if self.axes == "htd":
            return (1, *self.shape)  # type: ignore[return-value]
        lines = self.size("t") if "t" in self.axes else self.size("r")
        return self.size("b"), self.size("h"), lines, self.size("d")

    @cached_property
    def line_numbers(self) -> int:
        """How many numbers one token (or row) has, in all rows of the batch."""
        batch, heads, _, dim = self.block_shape
        return batch * heads * dim

    @cached_property
    def line_bytes(self) -> int:
        """How many bytes these are."""
        return self.line_numbers * self.form.itemsize

    def as_block(self, array: Held) -> Held:
        """A view of an array of the part's shape (but for the number of its tokens) in the shape of
        blocks: [batch, heads, tokens or rows, dim]."""
        axes = self.axes
        if axes == "bhtd":
            return array
        if axes == "htd":
            return array[np.newaxis]
        order = [axes.find(a) for a in ("b", "h", "t" if "t" in axes else "r", "d")]
        view: Held = array.transpose([at for at in order if at >= 0])
        block: Held = view[tuple(slice(None) if at >= 0 else np.newaxis for at in order)]
        return block

    def from_block(self, block: Bits) -> Bits:
        """A view of a block, [batch, heads, tokens or rows, dim], in the part's axes: the inverse
        of :meth:`as_block`."""
        axes = self.axes
        if axes == "bhtd":
            return block
        if axes == "htd":
            alone: Bits = block[0]
            return alone
        letters = "bhtd" if "t" in axes else "bhrd"
        kept = [a for a in letters if a in axes]
        # The ellipsis: even of no axes it is an array that is looked at, and not a number.
        view: Bits = block[(*(slice(None) if a in axes else 0 for a in letters), ...)]
        turned: Bits = view.transpose([kept.index(a) for a in axes])
        return turned

    def cut(self, tokens: int) -> PartLayout:
        """The part with so many tokens. It must have an axis of them."""
        at = self.axes.index("t")
        shape = (*self.shape[:at], tokens, *self.shape[at + 1 :])
        return msgspec.structs.replace(self, shape=shape)


class LayerLayout(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, dict=True
):
    """Parts and kind of one layer.

    `parts`: by their names, in their order; "k" and "v" are keys and values. A layer that shares
    another's cache has none. All parts with tokens hold the same ones, the last of
    `cumulative_length`. `kind`:

    - "full": all tokens, each with keys and values;
    - "sliding": only the last tokens; `window` is how many positions a query sees, its own
      included;
    - "latent": for each token one latent for all heads (MLA) in place of keys and values; it may
      have a `window`, too;
    - "state": no tokens, but what all of `cumulative_length` tokens have left behind (linear
      attention, Mamba);
    - "cross": keys and values of an encoder's tokens, which the decoder's do not count.

    `state_length`: how many tokens the parts without an axis of tokens have seen, so that they are
    good at that length only. None: such parts are constants (the scale of a tensor), or there are
    none. Raises UsageError unless the fields fit each other.
    """

    parts: dict[str, PartLayout]
    cumulative_length: int
    kind: Kind = "full"
    window: int | None = None
    rope: int | None = None
    """Index into the description's list of RoPE parameters; None: no rotation is known."""
    state_length: int | None = None

    def __post_init__(self) -> None:
        if type(self.cumulative_length) is not int:
            length = integer("cumulative_length", self.cumulative_length)
            force_setattr(self, "cumulative_length", length)
        # One object for equal words: by that files leave out what is as usual.
        kind = self.kind if type(self.kind) is str else text("kind", self.kind)
        force_setattr(self, "kind", sys.intern(kind))
        for name in ("window", "rope", "state_length"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                force_setattr(self, name, integer(name, value))
        force_setattr(self, "parts", _checked_parts(self.parts))
        wrong = _wrong_in(self)
        if wrong is not None:
            raise UsageError(f"a layer of kind {self.kind}: {wrong}")

    @classmethod
    def of_kv(
        cls,
        k: tuple[int, ...],
        v: tuple[int, ...],
        dtype: Any,
        cumulative_length: int,
        kind: Kind = "full",
        window: int | None = None,
        rope: int | None = None,
    ) -> LayerLayout:
        """A layer of keys and values of these shapes, [heads, tokens, dim] or [batch, heads,
        tokens, dim], in one format."""
        parts = {}
        for name, given in zip(KV, (k, v), strict=True):
            shape = tuple(integer(f"a size in {name}", n) for n in items(name, given, "a shape"))
            if len(shape) not in _AS_KV:
                raise UsageError(f"shape {list(shape)}: want [heads, tokens, dim] or a batch")
            parts[name] = PartLayout(dtype, shape, _AS_KV[len(shape)])
        return cls(parts, cumulative_length, kind, window, rope)

    @property
    def k(self) -> tuple[int, ...]:
        """The shape of the keys. Raises UsageError where there are none."""
        return self.part("k").shape

    @property
    def v(self) -> tuple[int, ...]:
        """The shape of the values. Raises UsageError where there are none."""
        return self.part("v").shape

    def part(self, name: str) -> PartLayout:
        """The layout of a part. Raises UsageError where there is none of that name."""
        found = self.parts.get(name)
        if found is None:
            names = ", ".join(self.parts)
            raise UsageError(f"a layer of kind {self.kind} has no part {name!r}; it has {names}")
        return found

    @cached_property
    def stored(self) -> int:
        """Tokens that are held; 0 for a layer of states."""
        return next((p.tokens for p in self.parts.values() if p.tokens is not None), 0)

    @cached_property
    def first(self) -> int:
        """Position of the first token that is held."""
        return self.cumulative_length - self.stored

    @cached_property
    def batch(self) -> int | None:
        """How many rows the batch has; None where there is no axis of the batch."""
        parts = list(self.parts.values())
        if self.state_length is None:  # constants are the same for all rows
            parts = [part for part in parts if part.tokens is not None]
        return next((part.batch for part in parts), None)

    @cached_property
    def counts_tokens(self) -> bool:
        """Whether its tokens are those of the sequence, and not an encoder's."""
        return self.kind != "cross"

    def span(self, part: str) -> tuple[int, int]:
        """The first of the positions that a part holds and the one behind the last; of its rows,
        where it has no tokens."""
        found = self.parts[part]
        if found.tokens is None:
            return 0, found.size("r")
        return self.first, self.cumulative_length

    def cut(self, start: int, stop: int) -> LayerLayout:
        """The layer with only the tokens that it holds of positions start to stop; a layer of
        another sequence's tokens, whole. Raises UnsupportedError when it has states that are good
        at another length than the one at which the range ends."""
        whole = stop >= self.cumulative_length
        length = min(stop, self.cumulative_length)
        if not self.counts_tokens or (whole and (start <= self.first or self.kind == "state")):
            return self
        if not whole and self.state_length not in (None, length):
            raise UnsupportedError(
                f"a layer of kind {self.kind} keeps a state after {self.state_length} tokens, "
                f"which cannot be cut to {length}"
            )
        begin, end = (min(max(p, self.first), self.cumulative_length) for p in (start, stop))
        count = max(end - begin, 0)
        parts = {
            name: part if part.tokens is None else part.cut(count)
            for name, part in self.parts.items()
        }
        return msgspec.structs.replace(self, parts=parts, cumulative_length=length)


def _wrong_axes(axes: str, shape: tuple[int, ...]) -> str | None:
    """What of a part's axes and shape does not fit, in words; None where all does."""
    if axes != _AS_KV.get(len(shape)):  # as most are
        if unknown := sorted(set(axes) - set(_AXES)):
            return f"there is no axis {unknown[0]!r}; there are {', '.join(_AXES)}"
        if len(axes) != len(shape):
            return "there must be a letter for each size"
        if len(axes) != len(set(axes)):
            return "no axis can be there twice"
        if {"t", "r"} <= set(axes):
            return "it has tokens, t, or rows, r, and not both"
        if axes.find("b") > 0:
            return "the batch, b, comes first"
    if shape and not 0 <= min(shape) <= max(shape) <= _MOST:
        return f"sizes are from 0 to {_MOST}"
    return None


def _wrong_in(layer: LayerLayout) -> str | None:
    """What of a layer's fields does not fit the others, in words; None where all does."""
    if layer.kind not in KINDS:
        return f"there is none of that kind; there are {', '.join(KINDS)}"
    length, state, parts = layer.cumulative_length, layer.state_length, layer.parts
    if not 0 <= length <= _MOST:
        return f"cumulative_length is {length}: it must be from 0 to {_MOST}"
    if layer.rope is not None and not 0 <= layer.rope < 2**31:
        return f"rope is {layer.rope}: it must be an index, of 0 or more"
    return (
        _wrong_tokens(layer.kind, length, parts)
        or _wrong_window(layer.kind, layer.window)
        or _wrong_state(layer.kind, length, state, parts)
        or _wrong_batch(state, parts)
    )


def _wrong_tokens(kind: Kind, length: int, parts: Mapping[str, PartLayout]) -> str | None:
    held = {name: part.tokens for name, part in parts.items() if part.tokens is not None}
    first, usual = next(iter(held.items()), ("", 0))
    for name, tokens in held.items():
        if kind == "state":
            return f"its part {name!r} has an axis of tokens, t, and a state has none"
        if tokens != usual:
            return (
                f"its part {name!r} holds {tokens} tokens and {first!r} {usual}: all parts hold "
                "the same tokens"
            )
        if tokens > length:
            return f"its part {name!r} holds {tokens} tokens, of cumulative_length={length}"
    if parts and not held and kind != "state":
        return f"none of its parts ({', '.join(parts)}) has an axis of tokens, t"
    return None


def _wrong_window(kind: Kind, window: int | None) -> str | None:
    if window is None:
        return "it must have a window=" if kind == "sliding" else None
    if kind not in ("sliding", "latent"):
        return f"window is {window}, and only layers of kind sliding and latent have one"
    if not 0 < window < 2**63:
        return f"window is {window}: it must be 1 or more"
    return None


def _wrong_state(
    kind: Kind, length: int, state: int | None, parts: Mapping[str, PartLayout]
) -> str | None:
    if kind == "state" and state != length:
        return f"state_length is {state}: it must be cumulative_length, {length}"
    if state is None:
        return None
    if not 0 <= state <= length:
        return f"state_length is {state}: it must be from 0 to cumulative_length, {length}"
    if all(part.tokens is not None for part in parts.values()):
        return f"state_length is {state}, and it has no part without an axis of tokens"
    return None


def _wrong_batch(state: int | None, parts: Mapping[str, PartLayout]) -> str | None:
    # What is neither of tokens nor a state is constant, the same for all rows.
    batches = {n: p.batch for n, p in parts.items() if p.tokens is not None or state is not None}
    first, usual = next(iter(batches.items()), ("", None))
    for name, batch in batches.items():
        if batch != usual:
            return (
                f"its part {name!r} has {_batch_in_words(batch)} and {first!r} "
                f"{_batch_in_words(usual)}: all parts are of one batch"
            )
    return None


def _batch_in_words(batch: int | None) -> str:
    return "no axis of the batch" if batch is None else f"a batch of {batch}"


def _checked_parts(given: Any) -> dict[str, PartLayout]:
    if not isinstance(given, Mapping) or len(given) > _MOST_PARTS:
        raise UsageError(
            f"a layer's parts are {given!r}: they must be a dict of {_MOST_PARTS} at most"
        )
    for name, part in given.items():
        if type(part) is not PartLayout:
            raise UsageError(f"part {name!r} is {part!r}: it must be a PartLayout")
        if not (isinstance(name, str) and name.isascii() and name.isidentifier()):
            raise UsageError(f"a part is called {name!r}: a name is letters, digits and _")
    return dict(given)


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Parts and kinds of all layers: what a buffer for a cache must hold.

    `dtype` is the format of the cache, which its keys and values are in; each part has its own.
    Raises UsageError when the layers are of different batches, UnsupportedError for other formats.
    """

    dtype: str
    layers: tuple[LayerLayout, ...]

    def __post_init__(self) -> None:
        name = dtypes.get(self.dtype).name
        if self.dtype is not name:
            force_setattr(self, "dtype", name)
        layers = self.layers
        if type(layers) is not tuple:
            layers = tuple(items("layers", layers, "a sequence of LayerLayouts"))
            force_setattr(self, "layers", layers)
        if len(layers) > _MOST_LAYERS:
            raise UsageError(f"{len(layers):,} layers: {_MOST_LAYERS:,} at most can be handled")
        before = first = None
        for i, layer in enumerate(layers):
            if layer is before:  # most are alike
                continue
            before = layer
            if type(layer) is not LayerLayout:
                raise UsageError(f"layer {i} is {layer!r}: it must be a LayerLayout")
            if layer.parts:
                first = first or layer
                if layer.batch != first.batch:
                    raise UsageError(
                        f"layer {i} has a batch of {layer.batch}, others of {first.batch}: "
                        "all layers must be of one batch"
                    )

    def parts(self) -> Iterator[tuple[int, str, PartLayout]]:
        """Every part: the number of its layer, its name, its layout; in the order of a file."""
        for i, layer in enumerate(self.layers):
            for name, part in layer.parts.items():
                yield i, name, part

    @cached_property
    def raw_bytes(self) -> int:
        """Bytes of all numbers."""
        return sum(part.nbytes for _, _, part in self.parts())

    @cached_property
    def numbers(self) -> int:
        """How many numbers all parts have."""
        return sum(part.numbers for _, _, part in self.parts())

    @cached_property
    def tokens(self) -> int:
        """True length of the sequence, cropped tokens included."""
        most, before = 0, None
        for layer in self.layers:
            if layer is not before and layer.counts_tokens:  # most are one object
                most = max(most, layer.cumulative_length)
            before = layer
        return most

    @cached_property
    def batch(self) -> int | None:
        """How many rows the batch has; None where there is no axis of the batch."""
        return next((layer.batch for layer in self.layers if layer.parts), None)

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """The shape of all tokens' ids: [tokens] or [batch, tokens]."""
        return (self.tokens,) if self.batch is None else (self.batch, self.tokens)

    @property
    def plain(self) -> bool:
        """Whether every layer is keys and values of the layout's format, and nothing else."""
        return all(
            layer.counts_tokens
            and tuple(layer.parts) == KV
            and all(
                p.dtype == self.dtype and p.axes in _AS_KV.values() for p in layer.parts.values()
            )
            for layer in self.layers
        )

    @property
    def state_length(self) -> int | None:
        """After how many tokens all states were kept, which can only be gone on from there; None
        where there are none, or not of one length."""
        lengths = {layer.state_length for layer in self.layers} - {None}
        return lengths.pop() if len(lengths) == 1 else None

    def lacking(self, count: int) -> int | None:
        """The first layer that lacks some of what a cache of the first `count` tokens, less the
        one that is left to compute, needs: a sliding layer the `window - 1` before it, a state the
        length that it is good at. None: no layer does."""
        for i, layer in enumerate(self.layers):
            needed = 0 if layer.window is None else max(0, count - layer.window + 1)
            if layer.state_length not in (None, count):
                return i
            if layer.first > needed and layer.parts and layer.kind not in ("state", "cross"):
                return i
        return None

    @property
    def least_prefix(self) -> int | None:
        """The least count of first tokens at which :meth:`lacking` finds nothing; None if there is
        none."""
        least = 0
        for layer in self.layers:
            if layer.state_length is not None:
                least = max(least, layer.state_length)
            elif layer.first and layer.window is not None:
                least = max(least, layer.first + layer.window - 1)
        return least if least <= self.tokens and self.lacking(least) is None else None


def _told(layer: LayerLayout) -> bytes:
    """What files say of a layer, which is the same of equal ones."""
    return msgspec.json.encode(layer)


class StoredLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layout as files say it: each distinct layer once, in the order in which they come, and for
    every layer which of them it is. Raises UsageError for any that is not of this form."""

    dtype: str
    distinct: tuple[LayerLayout, ...]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = list(dict.fromkeys(self.layers))
        if numbers != list(range(len(numbers))):
            raise UsageError("the layers are not numbered in the order in which they come")
        count = len(self.distinct)
        if len(numbers) != count or (count > 1 and len({*map(_told, self.distinct)}) != count):
            raise UsageError("the distinct layers are not those that there are")

    @classmethod
    def of(cls, layout: Layout) -> StoredLayout:
        """The stored form of a layout."""
        numbers: dict[bytes, int] = {}
        distinct: list[LayerLayout] = []
        layers: list[int] = []
        for layer in layout.layers:
            number = numbers.setdefault(_told(layer), len(distinct))
            if number == len(distinct):
                distinct.append(layer)
            layers.append(number)
        return cls(layout.dtype, tuple(distinct), tuple(layers))

    def layout(self) -> Layout:
        """The layout, in which equal layers are one object."""
        return Layout(self.dtype, tuple([self.distinct[i] for i in self.layers]))


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a cache comes from. Raises UsageError for what a file cannot hold."""

    model: str = ""
    """Model id: a hub id, a folder, or a file, as the person who captured it gave it."""
    revision: str = ""
    """What pins the weights: a commit or a hash of the weights' file."""
    architecture: str = ""
    rope: tuple[dict[str, Any], ...] = ()
    """The distinct RoPE parameters (theta, kind, scaling) that layers point to."""
    text: str = ""
    """Name of the text and the range of its tokens."""
    software: dict[str, str] = {}
    """Versions of what computed the cache, and the device it ran on."""

    def __post_init__(self) -> None:
        for name in ("model", "revision", "architecture", "text"):
            value = getattr(self, name)
            if type(value) is not str or not value.isascii():
                force_setattr(self, name, text(f"the origin's {name}", value))
        rope = json_value("the origin's rope", self.rope) if self.rope else []
        if not isinstance(rope, list) or {*map(type, rope)} - {dict}:
            raise UsageError(f"the origin's rope is {self.rope!r}: it must be dicts, one a kind")
        force_setattr(self, "rope", tuple(rope))
        software = json_value("the origin's software", self.software)
        if not isinstance(software, dict):
            raise UsageError(f"the origin's software is {software!r}: it must be a dict")
        for key, value in software.items():
            if type(value) is not str:
                text(f"the origin's software[{key!r}]", value)
        force_setattr(self, "software", software)
