"""A snapshot: the parts (keys, values, ...) of all layers of a cache as raw bits, and its origin.

On disk it is a safetensors file: tensors ``layers.<i>.<part>`` (``layers.0.k``) as they lie in the
cache, ``token_ids``, and under the metadata key ``kvzip`` the :class:`Description` as JSON.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.dtypes import Bits, DeviceBits
from kvzip.errors import CorruptError, FormatError, UsageError, extra_told
from kvzip.files import replacing
from kvzip.layout import Kind, LayerLayout, Layout, Origin, PartLayout, StoredLayout
from kvzip.options import boolean, items, pairs, same_from_json
from kvzip.parsing import from_json
from kvzip.tensors import TensorFile, check_header
from kvzip.version import check_format

__all__ = [
    "Description",
    "Layer",
    "LayerLayout",
    "Layout",
    "Origin",
    "PartLayout",
    "Snapshot",
    "sha256_raw",
]

VERSION = 3
"""The version of snapshot files."""
_IDS = np.dtype(np.uint32)


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metadata of a snapshot file."""

    layout: StoredLayout
    origin: Origin = Origin()
    version: int = VERSION


class _Version(msgspec.Struct):
    """What is looked at first in a description, which may be one that is not known here."""

    version: int = 0


Read = Callable[..., Bits]
"""Reads a part by its name; of a slice, too, only these of its numbers, in C order."""


class Layer:
    """The parts of one layer as raw bits, and their layout.

    Those of a snapshot that was loaded from a file are read when they are first used, and those in
    a GPU's memory are copied then.
    """

    __slots__ = ("_held", "_on_device", "_read", "layout")

    def __init__(self, parts: Mapping[str, Bits | DeviceBits], layout: LayerLayout):
        self.layout = layout
        self._held: dict[str, Bits] = {}
        self._on_device: dict[str, DeviceBits] = {}
        self._read: Read | None = None
        for name, bits in parts.items():
            if isinstance(bits, DeviceBits):
                self._on_device[name] = bits
            else:
                self._held[name] = bits

    @classmethod
    def of_kv(cls, k: Bits | DeviceBits, v: Bits | DeviceBits, layout: LayerLayout) -> Layer:
        """A layer of keys and values."""
        return cls({"k": k, "v": v}, layout)

    @classmethod
    def unread(cls, layout: LayerLayout, read: Read) -> Layer:
        """A layer whose parts `read` gives, of the layout's shapes; or the numbers of a part that
        a slice picks, in C order."""
        layer = cls({}, layout)
        layer._read = read
        return layer

    @property
    def parts(self) -> Mapping[str, Bits]:
        """The bits of each part by its name, in the layout's order."""
        return Parts(self)

    @property
    def kind(self) -> Kind:
        """What the layer keeps: see :class:`kvzip.layout.LayerLayout`."""
        return self.layout.kind

    @property
    def k(self) -> Bits:
        """The keys. Raises UsageError where the layer has none."""
        return self.part("k")

    @k.setter
    def k(self, bits: Bits) -> None:
        self._put("k", bits)

    @property
    def v(self) -> Bits:
        """The values. Raises UsageError where the layer has none."""
        return self.part("v")

    @v.setter
    def v(self, bits: Bits) -> None:
        self._put("v", bits)

    def _put(self, name: str, bits: Bits) -> None:
        """From now on the host's numbers count. At any time they are in one place at least."""
        self._held[name] = bits
        self._on_device.pop(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Layer, ({name: self.once(name) for name in self.layout.parts}, self.layout)

    def __iter__(self) -> Iterator[Bits]:
        return iter(self.parts.values())

    def part(self, name: str) -> Bits:
        """The bits of one part. Raises UsageError where the layer has none of that name."""
        found = self._held.get(name)
        if found is None:
            found = self._elsewhere(name)
            self._put(name, found)
        return found

    def once(self, name: str) -> Bits:
        """As :meth:`part`; what is read or copied for this is not kept."""
        found = self._held.get(name)
        return self._elsewhere(name) if found is None else found

    def block(self, name: str) -> Bits:
        """As :meth:`once`, in the shape of blocks: [batch, heads, tokens or rows, dim]."""
        return self.layout.part(name).as_block(self.once(name))

    def lines(self, name: str, row: int, start: int, stop: int) -> Bits:
        """[tokens, dim]: tokens (or rows) `start` to `stop` of a part, and of batch and heads the
        `row`-th pair. Where they lie together in a file, no more than they are read."""
        part = self.layout.part(name)
        device = self.on_device(name)
        if device is not None:
            return device[(*divmod(row, device.shape[1]), slice(start, stop))].read()
        if name not in self._held and self._read is not None and part.axes[-2:] in ("td", "rd"):
            _, _, lines, dim = part.block_shape
            # Batch and heads come before, and the batch first of all.
            at = (row * lines + start) * dim
            return self._read(name, slice(at, at + (stop - start) * dim)).reshape(-1, dim)
        block = self.block(name)
        return block[(*divmod(row, block.shape[1]), slice(start, stop))]

    def held(self) -> Mapping[str, Bits]:
        """The parts that are in memory."""
        return self._held

    def on_device(self, name: str) -> DeviceBits | None:
        """The bits of a part in a GPU's memory, in the shape of blocks; None where they are not
        there, or the part was looked at since, so that it may have been written to."""
        bits = self._on_device.get(name)
        return None if bits is None else self.layout.part(name).as_block(bits)

    def _elsewhere(self, name: str) -> Bits:
        """A part that is not in memory."""
        self.layout.part(name)
        device = self._on_device.get(name)
        if device is not None:
            return device.read()
        if self._read is not None:
            return self._read(name)
        found = self._held.get(name)  # another thread may have copied it by now
        if found is None:
            raise UsageError(f"a layer was made without its part {name!r}")
        return found


class Parts(Mapping[str, Bits]):
    """The parts of a layer, each read when it is asked for."""

    def __init__(self, layer: Layer):
        self._layer = layer

    def __getitem__(self, name: str) -> Bits:
        if name not in self._layer.layout.parts:
            raise KeyError(name)
        return self._layer.part(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.layout.parts)

    def __len__(self) -> int:
        return len(self._layer.layout.parts)


class Snapshot:
    """Keys, values and other parts of every layer, raw bits, with the ids of their tokens.

    ``layers[i].k`` and ``.v`` are numpy arrays of uint8, uint16, uint32 or uint64, shape [heads,
    tokens, dim] or [batch, heads, tokens, dim]; ``dtype`` names the format of their bits ("bf16",
    "fp8_e4m3fn", ...). Layers of other kinds have other parts, ``layers[i].parts`` by name, each
    with a format, a shape and axes of its own, ``layers[i].layout.parts``. ``token_ids``: uint32,
    [tokens] or [batch, tokens], or None. A batch of one may be given without its axis. Snapshots
    are equal when their bits, layouts and token ids are, wherever they come from. Threads may read
    one at once; who replaces something in it must be alone.

    Raises UsageError when shapes, bits or token ids do not fit each other.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        dtype: str,
        token_ids: NDArray[Any] | None = None,
        origin: Origin = Origin(),  # noqa: B008 - frozen
    ):
        held = list(_checked_layers(layers))
        layout = Layout(dtype, tuple([layer.layout for layer in held]))
        self._fill(held, layout, token_ids, origin)
        self.check()

    def _fill(
        self, layers: list[Layer], layout: Layout, token_ids: NDArray[Any] | None, origin: Origin
    ) -> None:
        self.layers, self.layout, self.origin = layers, layout, origin
        self.token_ids: NDArray[np.uint32] | None = token_ids

    @classmethod
    def checked(
        cls, layers: list[Layer], layout: Layout, token_ids: NDArray[Any] | None, origin: Origin
    ) -> Snapshot:
        """One of layers that hold what that layout says, as those that a reader has filled."""
        found = cls.__new__(cls)
        found._fill(layers, layout, token_ids, origin)
        if token_ids is not None:
            found.token_ids = _checked_ids(token_ids, layout)
        return found

    def check(self) -> None:
        """Raise UsageError unless the snapshot can be written and read: what it holds may have
        been replaced since it was made."""
        if not isinstance(self.layout, Layout):
            raise UsageError(f"the snapshot's layout is {self.layout!r}: it must be a Layout")
        self.layers = _checked_layers(self.layers)
        if self.layout.layers != tuple(layer.layout for layer in self.layers):
            raise UsageError("the snapshot's layers are not those of its layout")
        for i, layer in enumerate(self.layers):
            _check_held(i, layer)
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
            for part in a.layout.parts
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def dtype(self) -> str:
        """The format of keys and values; that of other parts is in the layout."""
        return self.layout.dtype

    @property
    def tokens(self) -> int:
        """True length of the sequence, tokens that sliding windows dropped included."""
        return self.layout.tokens

    @property
    def raw_bytes(self) -> int:
        """Bytes of all numbers, as they lie in memory."""
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
        """From one (K, V) pair a layer: numpy, torch, or anything with DLPack; no copy. Tensors in
        a GPU's memory stay there, where `encode(device=)` encodes them, and must not change; they
        are copied when they are looked at.

        `dtype` is needed when the arrays are integers that hold bits. All layers count as full.
        Raises UsageError for what is no array, UnsupportedError for another dtype.
        """
        built = []
        for k, v in pairs("layers", layers):
            kb, dtype = dtypes.held_bits(k, dtype)
            vb, dtype = dtypes.held_bits(v, dtype)
            layout = LayerLayout.of_kv(kb.shape, vb.shape, dtype, (0, 0, *kb.shape)[-2])
            built.append(Layer.of_kv(kb, vb, layout))
        if dtype is None:
            raise UsageError("a snapshot needs at least one layer")
        return cls(built, dtype, token_ids, origin)

    @classmethod
    def from_cache(
        cls, cache: Any, token_ids: Any = None, model: Any = None, encoder_ids: Any = None
    ) -> Snapshot:
        """From a transformers `Cache` that a forward pass has filled.

        `model` is the model (its id, RoPE parameters and layer kinds are noted, and the fingerprint
        that it has now: call this before the model is changed) or its id.
        A batch of one comes without the batch axis. Keys and values are looked at where they are,
        as :meth:`from_arrays` does; states are copied. `encoder_ids`: what the encoder got, if the
        model has one. A cache that keeps nothing but states needs `token_ids`. Layers of a kind
        that is not known (docs/models.md) raise UnsupportedError, and so do ids that stand for
        images or sound.
        """
        with extra_told("a model's cache needs more", "hf"):
            from kvzip.load.hf import snapshot_of_cache

        found: Snapshot = snapshot_of_cache(cache, token_ids, model, encoder_ids)
        return found

    # --- on disk ---------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all, one layer in memory at a time.

        Raises UsageError for what could not be read again, and OSError.
        """
        self.check()
        parts = [(f"layers.{i}.{name}", i, name, part) for i, name, part in self.layout.parts()]
        parts.sort(key=lambda found: -found[3].form.itemsize)
        described = Description(StoredLayout.of(self.layout), self.origin)
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
        for tensor, _, _, part in parts:
            place(tensor, part.form.safetensors, part.shape, part.form.itemsize)
        packed = msgspec.json.encode(header)
        packed += b" " * (-len(packed) % 8)
        check_header("the snapshot", packed)
        with replacing(path) as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            if self.token_ids is not None:
                file.write(self.token_ids.astype("<i8").data)
            for _, i, name, _ in parts:
                file.write(np.ascontiguousarray(self.layers[i].once(name)).data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> Snapshot:
        """Open a safetensors snapshot; each part of a layer is read when it is first used.

        A part that is read later, after the file was changed or cut short, is a CorruptError, and
        one that cannot be read any more a StoreError. With `mmap` nothing is copied: parts are
        looked at where they lie in the file, which takes no memory of its own. But a file that is
        cut short while it is mapped ends the process (SIGBUS), and one that is changed changes the
        numbers: map only what nobody writes to.

        Raises FormatError when it is not a snapshot, or one of another version, CorruptError when
        it is cut short, UsageError for what is no path, and the OSError of the path.
        """
        return cls.of_file(TensorFile(path, mapped=boolean("mmap", mmap)))

    @classmethod
    def of_file(cls, file: TensorFile) -> Snapshot:
        """The snapshot in a file that is open; the rest as :meth:`load`."""
        note = file.metadata.get("kvzip")
        if note is None:
            raise FormatError(
                f"{file.name} is a safetensors file, but not a snapshot of a KV cache"
            )
        nonsense = f"{file.name}: its description makes no sense"
        with _told(nonsense):
            version = from_json(note, _Version).version
        check_format(f"the snapshot {file.name}", version, VERSION, "capture it anew")
        with _told(nonsense):
            description = from_json(note, Description)
        layout = description.layout.layout()
        for i, name, part in layout.parts():
            form = part.form
            if not file.has(f"layers.{i}.{name}", form.safetensors, part.shape, form.itemsize):
                raise FormatError(
                    f"{file.name}: tensor layers.{i}.{name} is missing or not as described"
                )

        def layer(i: int) -> Layer:
            held = layout.layers[i]
            return Layer.unread(
                held,
                lambda name, *numbers: file.read(
                    f"layers.{i}.{name}", held.parts[name].form.uint, *numbers
                ),
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

    def tensors(self) -> list[tuple[Any, ...]]:
        """One (K, V) pair of torch tensors a layer, or one of each of its parts where it has
        others, in the snapshot's shapes (copies)."""
        return [
            tuple(
                dtypes.as_tensor(np.array(layer.once(name)), part.dtype)
                for name, part in layer.layout.parts.items()
            )
            for layer in self.layers
        ]

    def to_cache(self, config: Any) -> Any:
        """A transformers `DynamicCache` for a model of that config, holding every token; or, where
        layers keep states, as many tokens as these have seen.

        The prompt must go on beyond it: with a cache as long as the prompt `generate` would give
        wrong tokens, and the cache raises KVZipError (where the model rotates its keys).
        `kvzip.load.hf.load_cache` compares the prompt's ids, too. Raises KVZipError where
        transformers is not installed.
        """
        with extra_told("a cache for a model needs more", "hf"):
            from kvzip.load.hf import cache_of_snapshot

        return cache_of_snapshot(self, config)


def _checked_layers(given: Any) -> list[Layer]:
    """The layers as a list. Raises UsageError when they are none."""
    layers = given if type(given) is list else items("layers", given, "a sequence of Layers")
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            raise UsageError(f"layer {i} is a {type(layer).__name__}: it must be a Layer")
    return layers


def _check_held(i: int, layer: Layer) -> None:
    """Raise UsageError unless what layer i holds is as its layout says. What is not read yet is as
    the file's header says."""
    held, parts = layer._held, layer.layout.parts
    # Threads that look at parts move them from the device to what is held.
    on_device = dict(layer._on_device)
    there = dict.fromkeys([*on_device, *list(held)])
    if layer._read is None and there.keys() != parts.keys():
        has, wanted = ", ".join(there), ", ".join(parts)
        raise UsageError(f"layer {i} has the parts {has}, and its layout {wanted}")
    for name, bits in on_device.items():
        if bits.shape != parts[name].shape or bits.form is not parts[name].form:
            raise UsageError(f"layer {i}: {name} is not as its layout says")
    for name, found in list(held.items()):
        part = parts[name]
        if not isinstance(found, np.ndarray):
            raise UsageError(f"layer {i}: {name} is a {type(found).__name__}, no array")
        if type(found) is not np.ndarray:  # a subclass (np.ma) need not copy as arrays do
            found = layer._held[name] = np.asarray(found)
        if found.shape != part.shape:
            raise UsageError(f"layer {i}: {name} has shape {found.shape}, not {part.shape}")
        if found.dtype is not part.form.uint and found.dtype != part.form.uint:
            raise UsageError(f"layer {i}: {name} is {found.dtype}, no bits of {part.dtype}")


def _checked_ids(given: Any, layout: Layout) -> NDArray[Any]:
    """Token ids as uint32 in the layout's shape. Raises UsageError when it is not these."""
    shape = layout.ids_shape
    if (
        type(given) is np.ndarray
        and given.dtype is _IDS
        and given.shape == shape
        and given.flags.c_contiguous
    ):
        return given
    try:
        ids = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"token_ids is no array of integers: {error}") from None
    if ids.size and ids.dtype.kind not in "iu":
        raise UsageError(f"token_ids holds {ids.dtype}, and ids are integers")
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


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What is no JSON, or not of the form that is asked for, becomes a FormatError."""
    try:
        yield
    except (CorruptError, FormatError) as error:
        raise FormatError(f"{what}: {error}") from None


def sha256_raw(snapshot: Snapshot) -> str:
    """SHA-256 of all numbers' bytes: layer by layer, keys before values, in C order."""
    digest = hashlib.sha256()
    for layer in snapshot.layers:
        for part in layer.layout.parts:
            digest.update(np.ascontiguousarray(layer.once(part)).data)
    return digest.hexdigest()
