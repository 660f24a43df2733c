"""A snapshot: keys and values of all layers of one KV cache, as raw bits, and their origin.

On disk it is a safetensors file: tensors ``layers.<i>.k`` and ``layers.<i>.v`` as they lie in the
cache, ``token_ids``, and under the metadata key ``kvzip`` the :class:`Description` as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits
from kvzip.errors import CorruptError, FormatError, UnsupportedError
from kvzip.files import replacing

Part = Literal["k", "v"]
PARTS: tuple[Part, Part] = ("k", "v")


class LayerLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and kind of one layer. Shapes are [heads, tokens, dim] or [batch, heads, tokens, dim].

    A `sliding` layer keeps only the last tokens of `cumulative_length`; `window` is how many
    positions a query of it sees, its own included. The stored tokens are the last ones.
    """

    k: tuple[int, ...]
    v: tuple[int, ...]
    cumulative_length: int
    kind: Literal["full", "sliding"] = "full"
    window: int | None = None
    rope: int | None = None
    """Index into the description's list of RoPE parameters; None: no rotation is known."""

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

    def check(self) -> None:
        """Raise FormatError unless the fields fit each other."""
        ok = (
            len(self.k) == len(self.v)
            and len(self.k) in (3, 4)
            and all(0 <= n < 2**31 for n in (*self.k, *self.v))
            and self.k[:-3] == self.v[:-3]
            and self.k[-2] == self.v[-2]
            and self.stored <= self.cumulative_length < 2**31
            and (self.kind == "full") == (self.window is None)
            and (self.window is None or self.window > 0)
            and (self.rope is None or self.rope >= 0)
        )
        if not ok:
            raise FormatError(f"a layer's shape or kind makes no sense: {self}")


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Format, shapes and kinds of all layers: what a buffer for a cache must hold."""

    dtype: str
    layers: tuple[LayerLayout, ...]

    @property
    def raw_bytes(self) -> int:
        return self.numbers * dtypes.get(self.dtype).itemsize

    @property
    def numbers(self) -> int:
        """How many numbers all keys and values are."""
        return sum(_product(s.shape(part)) for s in self.layers for part in PARTS)

    @property
    def tokens(self) -> int:
        """True length of the sequence, cropped tokens included."""
        return max((s.cumulative_length for s in self.layers), default=0)

    def lacking(self, count: int) -> int | None:
        """The first layer that lacks some of what a cache of the first `count` tokens, less the
        one that is left to compute, needs: a sliding layer the `window - 1` before it. None: no
        layer does."""
        for i, layer in enumerate(self.layers):
            if layer.first > (0 if layer.window is None else max(0, count - layer.window + 1)):
                return i
        return None

    def check(self) -> None:
        """Raise FormatError or UnsupportedError unless every field makes sense."""
        dtypes.get(self.dtype)
        checked = None
        for layer in self.layers:  # most are alike, and comparing is faster
            if layer != checked:
                layer.check()
                checked = layer


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a cache comes from."""

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


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metadata of a snapshot file."""

    layout: Layout
    origin: Origin = Origin()
    version: int = 1


def batched(part: Bits) -> Bits:
    """Keys or values as [batch, heads, tokens, dim], a batch of one where they have none."""
    return part if part.ndim == 4 else part[np.newaxis]


def _product(shape: Sequence[int]) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


class Layer:
    """Keys and values of one layer as raw bits, and their layout."""

    __slots__ = ("k", "layout", "v")

    def __init__(self, k: Bits, v: Bits, layout: LayerLayout):
        self.k, self.v, self.layout = k, v, layout

    def __iter__(self) -> Iterator[Bits]:
        return iter((self.k, self.v))

    def part(self, part: Part) -> Bits:
        return self.k if part == "k" else self.v


class Snapshot:
    """Keys and values of every layer, raw bits, with the ids of their tokens.

    ``layers[i].k`` and ``.v`` are numpy arrays of uint8, uint16 or uint32, shape [heads, tokens,
    dim] or [batch, heads, tokens, dim]; ``dtype`` names the format of the bits ("bf16", "fp16",
    "fp32", "fp8_e4m3fn", "fp8_e5m2"). ``token_ids``: uint32, [tokens] or [batch, tokens], or None.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dtype: str,
        token_ids: NDArray[Any] | None = None,
        origin: Origin = Origin(),  # noqa: B008 - frozen
    ):
        self.layers, self.origin = list(layers), origin
        form = dtypes.get(dtype)
        uint = form.uint
        self.layout = Layout(form.name, tuple(layer.layout for layer in layers))
        self.layout.check()
        for i, layer in enumerate(self.layers):
            for part in PARTS:
                found = layer.part(part)
                if found.shape != layer.layout.shape(part):
                    raise FormatError(f"layer {i}: {part} has shape {found.shape}")
                if found.dtype != uint:
                    raise FormatError(f"layer {i}: {part} is {found.dtype}, not bits of {dtype}")
        self.token_ids = None if token_ids is None else np.ascontiguousarray(token_ids, np.uint32)

    @property
    def dtype(self) -> str:
        return self.layout.dtype

    @property
    def tokens(self) -> int:
        """True length of the sequence, tokens that sliding windows dropped included."""
        return self.layout.tokens

    @property
    def raw_bytes(self) -> int:
        return self.layout.raw_bytes

    def __repr__(self) -> str:
        return (
            f"<Snapshot {self.origin.model or 'of an unnamed model'}: {len(self.layers)} layers, "
            f"{self.tokens} tokens, {self.dtype}, {self.raw_bytes:,} bytes>"
        )

    # --- from memory -----------------------------------------------------------------------

    @classmethod
    def from_arrays(
        cls,
        layers: Sequence[tuple[Any, Any]],
        dtype: str | None = None,
        token_ids: Any = None,
        origin: Origin = Origin(),  # noqa: B008 - frozen
    ) -> Snapshot:
        """From one (K, V) pair a layer: numpy, CPU torch, or anything with DLPack; no copy.

        `dtype` is needed when the arrays are integers that hold bits. All layers count as full.
        """
        built = []
        for k, v in layers:
            kb, dtype = dtypes.as_bits(k, dtype)
            vb, dtype = dtypes.as_bits(v, dtype)
            if kb.ndim < 3:
                raise UnsupportedError(f"shape {kb.shape}: want [heads, tokens, dim] or a batch")
            built.append(Layer(kb, vb, LayerLayout(kb.shape, vb.shape, kb.shape[-2])))
        if dtype is None:
            raise UnsupportedError("a snapshot needs at least one layer")
        return cls(built, dtype, None if token_ids is None else np.asarray(token_ids), origin)

    @classmethod
    def from_cache(cls, cache: Any, token_ids: Any = None, model: Any = None) -> Snapshot:
        """From a transformers `Cache` that a forward pass has filled.

        `model` is the model (its id, RoPE parameters and layer kinds are noted) or its id.
        A batch of one comes without the batch axis. Quantised layers and layers of linear
        attention raise UnsupportedError.
        """
        from kvzip.load.hf import snapshot_of_cache

        found: Snapshot = snapshot_of_cache(cache, token_ids, model)
        return found

    # --- on disk ---------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all, one layer in memory at a time."""
        form = dtypes.get(self.dtype)
        parts = [
            (f"layers.{i}.{part}", layer, part)
            for i, layer in enumerate(self.layers)
            for part in PARTS
        ]
        note = msgspec.json.encode(Description(self.layout, self.origin)).decode()
        header: dict[str, Any] = {"__metadata__": {"kvzip": note}}
        at = 0

        def place(name: str, kind: str, shape: tuple[int, ...], itemsize: int) -> None:
            nonlocal at
            end = at + _product(shape) * itemsize
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": (at, end)}
            at = end

        # The widest numbers first, so that all lie at multiples of their size.
        if self.token_ids is not None:
            place("token_ids", "I64", self.token_ids.shape, 8)
        for name, layer, part in parts:
            place(name, form.safetensors, layer.layout.shape(part), form.itemsize)
        packed = msgspec.json.encode(header)
        packed += b" " * (-len(packed) % 8)
        with replacing(path) as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            if self.token_ids is not None:
                file.write(self.token_ids.astype("<i8").data)
            for _, layer, part in parts:
                file.write(np.ascontiguousarray(layer.part(part)).data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Open a safetensors snapshot; the numbers are mapped, not read, until they are used.

        Raises FormatError when it is not a snapshot, CorruptError when it is cut short.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            # The library checks the header against the file: sizes, gaps and overlaps.
            with safe_open(path, framework="numpy") as checked:
                note = (checked.metadata() or {}).get("kvzip")
        except SafetensorError as error:
            kind = CorruptError if "Incomplete" in str(error) else FormatError
            raise kind(f"{path} is not a whole safetensors file: {error}") from None
        if note is None:
            raise FormatError(f"{path} is a safetensors file, but not a snapshot of a KV cache")
        try:
            description = msgspec.json.decode(note, type=Description)
        except msgspec.MsgspecError as error:
            raise FormatError(f"{path}: bad description: {error}") from None
        layout = description.layout
        layout.check()
        with path.open("rb") as file:
            start = 8 + (length := int.from_bytes(file.read(8), "little"))
            header = json.loads(file.read(length))
        memory = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))

        def view(name: str, dtype: np.dtype[Any], kind: str, shape: Sequence[int]) -> Any:
            entry = header.get(name)
            if entry is None or entry["dtype"] != kind or list(shape) != entry["shape"]:
                raise FormatError(f"{path}: tensor {name} is missing or not as described")
            begin, end = entry["data_offsets"]
            return memory[start + begin : start + end].view(dtype).reshape(shape)

        form = dtypes.get(layout.dtype)

        def part(i: int, name: Part) -> Bits:
            shape = layout.layers[i].shape(name)
            found: Bits = view(f"layers.{i}.{name}", form.uint, form.safetensors, shape)
            return found

        layers = [Layer(part(i, "k"), part(i, "v"), layer) for i, layer in enumerate(layout.layers)]
        ids = None
        if entry := header.get("token_ids"):
            ids = view("token_ids", np.dtype("<i8"), "I64", entry["shape"])
        return cls(layers, layout.dtype, ids, description.origin)

    # --- to a framework --------------------------------------------------------------------

    def tensors(self) -> list[tuple[Any, Any]]:
        """One (K, V) pair of torch tensors a layer, in the snapshot's shapes (copies)."""
        return [
            (
                dtypes.as_tensor(np.array(layer.k), self.dtype),
                dtypes.as_tensor(np.array(layer.v), self.dtype),
            )
            for layer in self.layers
        ]

    def to_cache(self, config: Any) -> Any:
        """A transformers `DynamicCache` for a model of that config, holding every token.

        A cache as long as the prompt makes `generate` give wrong tokens without an error: the
        prompt must go on beyond it. `kvzip.load.hf.load_cache` checks that; this does not.
        """
        from kvzip.load.hf import cache_of_snapshot

        return cache_of_snapshot(self, config)


def sha256_raw(snapshot: Snapshot) -> str:
    """SHA-256 of all numbers' bytes: layer by layer, keys before values, in C order."""
    digest = hashlib.sha256()
    for layer in snapshot.layers:
        for array in layer:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
