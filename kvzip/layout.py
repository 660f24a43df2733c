"""What a cache is, without its numbers: the shapes and kinds of its layers, and its origin.

Everything here is checked when it is made, from Python or from a file, so that whatever can be
written can be read: wrong values raise UsageError, which a reader turns into FormatError.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
from msgspec.structs import force_setattr

from kvzip import dtypes
from kvzip.errors import UsageError
from kvzip.options import integer, items, json_value, text

Part = Literal["k", "v"]
PARTS: tuple[Part, Part] = ("k", "v")
_MOST = 2**31 - 1
"""How many tokens, heads or channels a layer may have: what an index can say."""


class LayerLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and kind of one layer. Shapes are [heads, tokens, dim] or [batch, heads, tokens, dim].

    A `sliding` layer keeps only the last tokens of `cumulative_length`; `window` is how many
    positions a query of it sees, its own included. The stored tokens are the last ones.
    Raises UsageError unless the fields fit each other.
    """

    k: tuple[int, ...]
    v: tuple[int, ...]
    cumulative_length: int
    kind: Literal["full", "sliding"] = "full"
    window: int | None = None
    rope: int | None = None
    """Index into the description's list of RoPE parameters; None: no rotation is known."""

    def __post_init__(self) -> None:
        k, v, length = self.k, self.v, self.cumulative_length
        if type(k) is not tuple or type(v) is not tuple or {*map(type, (*k, *v, length))} != {int}:
            k = self._set("k", _shape("k", k))
            v = self._set("v", _shape("v", v))
            length = self._set("cumulative_length", integer("cumulative_length", length))
        if type(self.kind) is not str:
            self._set("kind", text("kind", self.kind))
        for name in ("window", "rope"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                self._set(name, integer(name, value))
        fits = (
            len(k) == len(v)
            and len(k) in (3, 4)
            and min(k) >= 0 <= min(v)
            and max(k) <= _MOST >= max(v)
            and k[:-3] == v[:-3]
            and k[-2] == v[-2]
            and k[-2] <= length <= _MOST
            and (
                self.window is None
                if self.kind == "full"
                else self.kind == "sliding" and self.window is not None
            )
            and (self.window is None or 0 < self.window < 2**63)
            and (self.rope is None or 0 <= self.rope < 2**31)
        )
        if not fits:
            raise UsageError(f"a layer's shape or kind makes no sense: {self}")

    def _set(self, name: str, value: Any) -> Any:
        force_setattr(self, name, value)
        return value

    @property
    def stored(self) -> int:
        """Tokens that are held."""
        return self.k[-2]

    @property
    def first(self) -> int:
        """Position of the first token that is held."""
        return self.cumulative_length - self.stored

    def shape(self, part: Part) -> tuple[int, ...]:
        return self.k if part == "k" else self.v

    def batched_shape(self, part: Part) -> tuple[int, ...]:
        """The shape as [batch, heads, tokens, dim], a batch of one where the layer has none."""
        shape = self.shape(part)
        return shape if len(shape) == 4 else (1, *shape)

    def token_numbers(self, part: Part) -> int:
        """How many numbers one token has, in all rows of the batch."""
        *outer, _, dim = self.shape(part)
        return math.prod(outer) * dim

    def cut(self, start: int, stop: int) -> LayerLayout:
        """The layer with only the tokens that it holds of positions start to stop."""
        if start <= self.first and stop >= self.cumulative_length:
            return self
        begin, end = (min(max(p, self.first), self.cumulative_length) for p in (start, stop))
        count = max(end - begin, 0)
        return msgspec.structs.replace(
            self,
            k=(*self.k[:-2], count, self.k[-1]),
            v=(*self.v[:-2], count, self.v[-1]),
            cumulative_length=min(stop, self.cumulative_length),
        )


def _shape(name: str, value: Any) -> tuple[int, ...]:
    return tuple(integer(f"a size in {name}", size) for size in items(name, value, "a shape"))


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Format, shapes and kinds of all layers: what a buffer for a cache must hold.

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
        for i, layer in enumerate(layers):
            if type(layer) is not LayerLayout:
                raise UsageError(f"layer {i} is {layer!r}: it must be a LayerLayout")
            if layer.k[:-3] != layers[0].k[:-3]:
                raise UsageError(
                    f"layer {i} has shape {layer.k}, layer 0 {layers[0].k}: "
                    "all layers must be of one batch"
                )

    @property
    def raw_bytes(self) -> int:
        return self.numbers * dtypes.get(self.dtype).itemsize

    @property
    def numbers(self) -> int:
        """How many numbers all keys and values are."""
        return sum(math.prod(s.shape(part)) for s in self.layers for part in PARTS)

    @property
    def tokens(self) -> int:
        """True length of the sequence, cropped tokens included."""
        return max((s.cumulative_length for s in self.layers), default=0)

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """The shape of all tokens' ids: [tokens] or [batch, tokens]."""
        return (*(self.layers[0].k[:-3] if self.layers else ()), self.tokens)

    def lacking(self, count: int) -> int | None:
        """The first layer that lacks some of what a cache of the first `count` tokens, less the
        one that is left to compute, needs: a sliding layer the `window - 1` before it. None: no
        layer does."""
        for i, layer in enumerate(self.layers):
            if layer.first > (0 if layer.window is None else max(0, count - layer.window + 1)):
                return i
        return None


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
        if not isinstance(rope, list) or not all(isinstance(found, dict) for found in rope):
            raise UsageError(f"the origin's rope is {self.rope!r}: it must be dicts, one a kind")
        force_setattr(self, "rope", tuple(rope))
        software = json_value("the origin's software", self.software)
        if not isinstance(software, dict):
            raise UsageError(f"the origin's software is {software!r}: it must be a dict")
        for key, value in software.items():
            text(f"the origin's software[{key!r}]", value)
        force_setattr(self, "software", software)
