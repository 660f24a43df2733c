"""A snapshot: keys and values of all layers of one KV cache, as raw bits, and their origin.

On disk it is a safetensors file: tensors ``layers.<i>.k`` and ``layers.<i>.v`` as they lie in the
cache, ``token_ids``, and under the metadata key ``kvzip`` the :class:`Description` as JSON.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits
from kvzip.errors import FormatError, UsageError
from kvzip.files import replacing
from kvzip.layout import PARTS, LayerLayout, Layout, Origin, Part
from kvzip.options import items, pairs, same_from_json
from kvzip.tensors import TensorFile

__all__ = [
    "PARTS",
    "Description",
    "Layer",
    "LayerLayout",
    "Layout",
    "Origin",
    "Part",
    "Snapshot",
    "batched",
    "sha256_raw",
]

VERSION = 1
"""The version of snapshot files."""


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metadata of a snapshot file."""

    layout: Layout
    origin: Origin = Origin()
    version: int = VERSION


class _Version(msgspec.Struct):
    """What is looked at first in a description, which may be one that is not known here."""

    version: int = VERSION


def batched(part: Bits) -> Bits:
    """Keys or values as [batch, heads, tokens, dim], a batch of one where they have none."""
    return part if part.ndim == 4 else part[np.newaxis]


class Layer:
    """Keys and values of one layer as raw bits, and their layout.

    Those of a snapshot that was loaded from a file are read when they are first used.
    """

    __slots__ = ("_read", "k", "layout", "v")

    k: Bits
    v: Bits

    def __init__(self, k: Bits, v: Bits, layout: LayerLayout):
        self.k, self.v, self.layout = k, v, layout
        self._read: Callable[[Part], Bits] | None = None

    @classmethod
    def unread(cls, layout: LayerLayout, read: Callable[[Part], Bits]) -> Layer:
        """A layer whose parts `read` gives, of the layout's shapes."""
        layer = cls.__new__(cls)
        layer.layout, layer._read = layout, read
        return layer

    def __getattr__(self, name: str) -> Any:
        """Only asked for what has no value yet."""
        if name not in PARTS or self._read is None:
            raise AttributeError(name)
        found = self._read(name)
        setattr(self, name, found)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Layer, (self.k, self.v, self.layout)

    def __iter__(self) -> Iterator[Bits]:
        return iter((self.k, self.v))

    def part(self, part: Part) -> Bits:
        return self.k if part == "k" else self.v

    def once(self, part: Part) -> Bits:
        """As :meth:`part`; what is read from a file for this is not kept."""
        if self._read is not None and part not in self._held():
            return self._read(part)
        return self.part(part)

    def _held(self) -> tuple[Part, ...]:
        """The parts that are in memory."""
        if self._read is None:
            return PARTS
        held: list[Part] = []
        for part in PARTS:
            with suppress(AttributeError):
                object.__getattribute__(self, part)
                held.append(part)
        return tuple(held)


class Snapshot:
    """Keys and values of every layer, raw bits, with the ids of their tokens.

    ``layers[i].k`` and ``.v`` are numpy arrays of uint8, uint16 or uint32, shape [heads, tokens,
    dim] or [batch, heads, tokens, dim]; ``dtype`` names the format of the bits ("bf16", "fp16",
    "fp32", "fp8_e4m3fn", "fp8_e5m2"). ``token_ids``: uint32, [tokens] or [batch, tokens], or None.
    A batch of one may be given without its axis. Snapshots are equal when their bits, layouts and
    token ids are, wherever they come from.

    Raises UsageError when shapes, bits or token ids do not fit each other.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dtype: str,
        token_ids: NDArray[Any] | None = None,
        origin: Origin = Origin(),  # noqa: B008 - frozen
    ):
        self.layers, self.origin = list(_checked_layers(layers)), origin
        self.layout = Layout(dtype, tuple(layer.layout for layer in self.layers))
        self.token_ids: NDArray[np.uint32] | None = token_ids
        self.check()

    def check(self) -> None:
        """Raise UsageError unless the snapshot can be written and read: what it holds may have
        been replaced since it was made."""
        if not isinstance(self.layout, Layout):
            raise UsageError(f"the snapshot's layout is {self.layout!r}: it must be a Layout")
        self.layers = _checked_layers(self.layers)
        uint = dtypes.get(self.dtype).uint
        if self.layout.layers != tuple(layer.layout for layer in self.layers):
            raise UsageError("the snapshot's layers are not those of its layout")
        for i, layer in enumerate(self.layers):
            for part in layer._held():  # what is not read yet is as the file's header says
                found, shape = layer.part(part), layer.layout.shape(part)
                if not isinstance(found, np.ndarray):
                    raise UsageError(f"layer {i}: {part} is a {type(found).__name__}, no array")
                if type(found) is not np.ndarray:  # a subclass (np.ma) need not copy as arrays do
                    found = np.asarray(found)
                    setattr(layer, part, found)
                if found.shape != shape:
                    raise UsageError(f"layer {i}: {part} has shape {found.shape}, not {shape}")
                if found.dtype != uint:
                    raise UsageError(f"layer {i}: {part} is {found.dtype}, no bits of {self.dtype}")
        if not isinstance(self.origin, Origin):
            raise UsageError(f"origin is {self.origin!r}: it must be a kvzip.Origin")
        if self.token_ids is not None:
            self.token_ids = _checked_ids(self.token_ids, self.layout)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        if self.layout != other.layout or (self.token_ids is None) != (other.token_ids is None):
            return False
        if not np.array_equal(self.token_ids, other.token_ids):  # type: ignore[arg-type]
            return False
        return all(
            np.array_equal(a.once(part), b.once(part))
            for a, b in zip(self.layers, other.layers, strict=True)
            for part in PARTS
        )

    __hash__ = None  # type: ignore[assignment]

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
        Raises UsageError for what is no array, UnsupportedError for another dtype.
        """
        built = []
        for k, v in pairs("layers", layers):
            kb, dtype = dtypes.as_bits(k, dtype)
            vb, dtype = dtypes.as_bits(v, dtype)
            if kb.ndim not in (3, 4):
                raise UsageError(f"shape {kb.shape}: want [heads, tokens, dim] or a batch")
            built.append(Layer(kb, vb, LayerLayout(kb.shape, vb.shape, kb.shape[-2])))
        if dtype is None:
            raise UsageError("a snapshot needs at least one layer")
        return cls(built, dtype, token_ids, origin)

    @classmethod
    def from_cache(cls, cache: Any, token_ids: Any = None, model: Any = None) -> Snapshot:
        """From a transformers `Cache` that a forward pass has filled.

        `model` is the model (its id, RoPE parameters and layer kinds are noted, and the fingerprint
        that it has now: call this before the model is changed) or its id.
        A batch of one comes without the batch axis. Quantised layers and layers of linear
        attention raise UnsupportedError, and so do ids that stand for images or sound.
        """
        from kvzip.load.hf import snapshot_of_cache

        found: Snapshot = snapshot_of_cache(cache, token_ids, model)
        return found

    # --- on disk ---------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all, one layer in memory at a time.

        Raises UsageError for what could not be read again, and OSError.
        """
        self.check()
        form = dtypes.get(self.dtype)
        parts = [
            (f"layers.{i}.{part}", layer, part)
            for i, layer in enumerate(self.layers)
            for part in PARTS
        ]
        described = Description(self.layout, self.origin)
        note = same_from_json("the snapshot's description", described).decode()
        header: dict[str, Any] = {"__metadata__": {"kvzip": note}}
        at = 0

        def place(name: str, kind: str, shape: tuple[int, ...], itemsize: int) -> None:
            nonlocal at
            end = at + math.prod(shape) * itemsize
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
                file.write(np.ascontiguousarray(layer.once(part)).data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> Snapshot:
        """Open a safetensors snapshot; each part of a layer is read when it is first used.

        A part that is read later, after the file was changed or cut short, is a CorruptError, and
        one that cannot be read any more a StoreError. With `mmap` nothing is copied: parts are
        looked at where they lie in the file, which takes no memory of its own. But a file that is
        cut short while it is mapped ends the process (SIGBUS), and one that is changed changes the
        numbers: map only what nobody writes to.

        Raises FormatError when it is not a snapshot, or one of another version, CorruptError when
        it is cut short, and the OSError of the path.
        """
        file = TensorFile(path, mapped=mmap)
        note = file.metadata.get("kvzip")
        if note is None:
            raise FormatError(
                f"{file.name} is a safetensors file, but not a snapshot of a KV cache"
            )
        try:
            version = msgspec.json.decode(note, type=_Version).version
            if version != VERSION:
                raise FormatError(
                    f"{file.name} is a snapshot of version {version}; this reads {VERSION}"
                )
            description = msgspec.json.decode(note, type=Description)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise FormatError(f"{file.name}: its description makes no sense: {error}") from None
        layout = description.layout
        form = dtypes.get(layout.dtype)

        def layer(i: int) -> Layer:
            for part in PARTS:
                shape = layout.layers[i].shape(part)
                if not file.has(f"layers.{i}.{part}", form.safetensors, shape, form.itemsize):
                    raise FormatError(
                        f"{file.name}: tensor layers.{i}.{part} is missing or not as described"
                    )
            return Layer.unread(
                layout.layers[i], lambda part: file.read(f"layers.{i}.{part}", form.uint)
            )

        layers = [layer(i) for i in range(len(layout.layers))]
        ids = None
        if "token_ids" in file.entries:
            if not file.has("token_ids", "I64", file.entries["token_ids"].shape, 8):
                raise FormatError(f"{file.name}: its token ids are not as described")
            ids = file.read("token_ids", np.dtype("<i8"))
        try:
            return cls(layers, layout.dtype, ids, description.origin)
        except UsageError as error:
            raise FormatError(f"{file.name}: {error}") from None

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

        The prompt must go on beyond it: with a cache as long as the prompt `generate` would give
        wrong tokens, and the cache raises KVZipError (where the model rotates its keys).
        `kvzip.load.hf.load_cache` compares the prompt's ids, too.
        """
        from kvzip.load.hf import cache_of_snapshot

        return cache_of_snapshot(self, config)


def _checked_layers(given: Any) -> list[Layer]:
    """The layers as a list. Raises UsageError when they are none."""
    layers = given if type(given) is list else items("layers", given, "a sequence of Layers")
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise UsageError(f"layer {i} is a {type(layer).__name__}: it must be a Layer")
    return layers


def _checked_ids(given: Any, layout: Layout) -> NDArray[Any]:
    """Token ids as uint32 in the layout's shape. Raises UsageError when it is not these."""
    try:
        ids = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"token_ids is no array of integers: {error}") from None
    if ids.size and ids.dtype.kind not in "iu":
        raise UsageError(f"token_ids holds {ids.dtype}, and ids are integers")
    shape = layout.ids_shape
    if ids.shape != shape:
        alone = ((layout.tokens,), (1, layout.tokens))
        if shape not in alone or ids.shape not in alone:
            raise UsageError(
                f"token_ids has shape {list(ids.shape)}, and the tokens {list(shape)}: "
                "give an id for each token, those that sliding windows dropped included"
            )
        ids = ids.reshape(shape)
    if ids.size and ids.dtype != np.uint32 and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
        raise UsageError(
            f"token_ids goes from {ids.min()} to {ids.max()}: ids are from 0 to {2**32 - 1}"
        )
    return np.ascontiguousarray(ids, np.uint32)


def sha256_raw(snapshot: Snapshot) -> str:
    """SHA-256 of all numbers' bytes: layer by layer, keys before values, in C order."""
    digest = hashlib.sha256()
    for layer in snapshot.layers:
        for part in PARTS:
            digest.update(np.ascontiguousarray(layer.once(part)).data)
    return digest.hexdigest()
