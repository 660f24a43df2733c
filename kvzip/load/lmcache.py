"""kvzip as a serde of LMCache: what an L2 adapter stores is compressed, bit for bit.

LMCache has no entry points for serdes, so the one that starts it registers this one before
anything is configured: ``python -m kvzip.load.lmcache server ...`` is ``lmcache server ...`` with
``"serde": {"type": "kvzip", "codec": "channel"}`` understood in an L2 adapter's configuration.

What is stored varies in length. LMCache's own adapter of type "fs" takes a file that is shorter
than the bound for one that is cut off, and never loads it; "kvzip_fs" is that adapter, told each
file's length. Its "s3" adapter takes what the object holds.

One tensor of a chunk becomes one .kvz file, several lie one after the other. Where a key is named,
they are a sealed file together (:mod:`kvzip.container.sealed`), which is good under its chunk's own
name, and before it its length in eight bytes, little-endian.

The interface is that of LMCache 0.5.6, ``lmcache.v1.distributed.serde``; this module imports
without it.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvzip import container, metrics
from kvzip.codec import Codec, get_codec
from kvzip.container.sealed import MAGIC, Key, Sealed, is_sealed, seal, sealed_size
from kvzip.container.secret_keys import key_from
from kvzip.container.source import Memory
from kvzip.errors import CorruptError, KVZipError, SealError
from kvzip.identity.checkpoint import changed, checkpoint_fingerprint
from kvzip.load import chunks
from kvzip.load.place import Place
from kvzip.options import integer
from kvzip.snapshot import Origin
from kvzip.workers import thread_count

if TYPE_CHECKING:
    import torch
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.distributed.l2_adapters.base import L2TaskId
    from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor
    from lmcache.v1.memory_management import MemoryObj

_log = logging.getLogger("kvzip.lmcache")


def _tensors(memory: MemoryObj) -> list[torch.Tensor]:
    """All tensors of a MemoryObj."""
    groups = memory.metadata.shapes
    found = [memory.get_tensor(i) for i in range(len(groups))] if groups else [memory.tensor]
    if any(tensor is None for tensor in found):
        raise KVZipError("LMCache gave a memory object without a tensor")
    return found


def _bytes(memory: MemoryObj) -> memoryview:
    """The bytes of a MemoryObj, writable."""
    return memoryview(memory.byte_array).cast("B")


class Weights:
    """Which weights an engine's chunks come from. LMCache says no more than the model's name.

    `model`: where the weights lie, if the name does not say it. `revision`: what pins them, in
    place of the checkpoint's fingerprint. `told`: what the engine was told to change about them.
    """

    def __init__(
        self,
        model: str | None = None,
        revision: str | None = None,
        told: Mapping[str, object] | None = None,
    ):
        self._model, self._revision, self._told = model, revision, dict(told or {})
        self._unknown: set[str] = set()

    def origin(self, key: ObjectKey) -> Origin:
        """Where a chunk comes from, by LMCache's key."""
        name = str(getattr(key, "model_name", ""))
        return Origin(model=name, revision=self._pinned(self._model or name))

    def _pinned(self, model: str) -> str:
        revision = self._revision
        if revision is None:
            try:
                # Asked anew for each chunk: an engine may have started again with other weights.
                revision = checkpoint_fingerprint(model)
            except KVZipError as error:
                if model not in self._unknown:
                    self._unknown.add(model)
                    _log.warning(
                        'chunks are told apart by the name %r alone (%s): set "model" to where its '
                        'weights lie, or "revision", in the serde, and change that with them',
                        model,
                        error,
                    )
                revision = ""
        return changed(revision, self._told)


_LENGTH = struct.Struct("<Q")


def _sealed(blob: bytes, key: Key, name: tuple[str, ...]) -> bytes:
    """A chunk's bytes, sealed, and their length before them: what holds them may be longer."""
    sealed = seal(blob, key, "/".join(name))
    return _LENGTH.pack(len(sealed)) + sealed


def _unsealed(data: memoryview, key: Key | None, name: tuple[str, ...]) -> memoryview:
    """The bytes of a chunk that may be sealed. Raises SealError for a sealed one without its key,
    and for one that is not sealed where a key is named; CorruptError."""
    rest = data[_LENGTH.size :]
    if not is_sealed(rest[: len(MAGIC)]):
        if key is not None:
            raise SealError("the chunk is not sealed, and a key is named")
        return data
    [length] = _LENGTH.unpack_from(data)
    if length > len(rest):
        raise CorruptError(f"the chunk is cut short: {len(data):,} bytes")
    source = Sealed(Memory(rest[:length]), key, "/".join(name))
    return source.read(0, source.size)


_failed: set[tuple[str, ...]] = set()
"""Names of chunks that could not be loaded: the adapter's next store replaces them."""


def _name_of(key: ObjectKey | None) -> tuple[str, ...]:
    """What tells one chunk from another in LMCache's keys."""
    fields = ("model_name", "kv_rank", "object_group_id", "chunk_hash", "cache_salt")
    return tuple(str(getattr(key, name, "")) for name in fields)


class KvzipSerializer:
    """LMCache's `Serializer`: tensors of a chunk to bytes of variable length."""

    def __init__(
        self, codec: Codec, threads: int, weights: Weights | None = None, key: Key | None = None
    ):
        self.codec, self.threads = chunks.codec_for_chunks(codec, _log), threads
        self.weights, self._key = weights or Weights(), key

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Encode the tensors of `src` into the bytes of `dst`; how many there are."""
        out, origin = _bytes(dst), self.weights.origin(key)
        data = b"".join(
            chunks.encode(tensor, self.codec, self.threads, origin) for tensor in _tensors(src)
        )
        if self._key is not None:
            data = _sealed(data, self._key, _name_of(key))
        if len(data) > len(out):
            raise KVZipError(f"LMCache gave {len(out):,} bytes, too few for the chunk")
        out[: len(data)] = data
        return len(data)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """An upper bound of what :meth:`serialize` gives for tensors of those shapes: LMCache takes
        as much of its memory for each chunk while it stores or loads it."""
        import torch

        like = (
            torch.empty(1, dtype=dtype).expand(tuple(shape))
            for shape, dtype in zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        )
        bound = sum(map(chunks.bound, like))
        return bound if self._key is None else _LENGTH.size + sealed_size(bound)


class KvzipDeserializer:
    """LMCache's `Deserializer`: those bytes back into tensors, decoded in place."""

    def __init__(self, threads: int, weights: Weights | None = None, key: Key | None = None):
        self.threads, self.weights, self._key = threads, weights or Weights(), key

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey | None) -> None:
        """Decode `src` into the tensors of `dst`. Raises CorruptError, FormatError, SealError, or
        UnsupportedError when they are of another shape or of other weights; LMCache then counts the
        chunk as a miss."""
        try:
            data = _unsealed(_bytes(src), self._key, _name_of(key))
            self._deserialize(data, dst, None if key is None else self.weights.origin(key))
            metrics.count("lookups", where="lmcache", result="hit")
        except Exception as error:
            metrics.recomputed("lmcache", error)
            if key is not None:
                _failed.add(_name_of(key))
            raise

    def _deserialize(self, data: memoryview, dst: MemoryObj, origin: Origin | None) -> None:
        at = 0
        for tensor in _tensors(dst):
            # The buffer may be longer than what was stored.
            length = container.stated_length(data[at:])
            if at + length > len(data):
                raise CorruptError(f"the chunk is cut short: {len(data):,} bytes")
            chunks.decode(data[at : at + length], tensor, self.threads, origin)
            at += length


def create(kwargs: Mapping[str, Any]) -> AsyncSerdeProcessor:
    """LMCache's factory: a SerdeProcessor from the serde's configuration without its "type".

    ``codec``: a codec with its settings (default "channel", which is also used in place of one that
    needs a profile). ``threads``: for one chunk (default 1). ``max_workers``: chunks at once
    (default 1). ``model``, ``revision``, ``quantization``, ``adapter``: which weights the chunks
    come from, where the model's name does not say it, see :class:`Weights`. ``key_from``: where the
    key is that chunks are sealed with, see :func:`kvzip.container.secret_keys.key_from`.
    """
    from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor

    of_weights = {"model", "revision", "quantization", "adapter"}
    unknown = sorted(set(kwargs) - {"codec", "threads", "max_workers", "key_from"} - of_weights)
    if unknown:
        raise KVZipError(f"serde kvzip: no setting {unknown[0]!r}")
    threads = thread_count(kwargs.get("threads", 1))
    told = {name: kwargs.get(name) for name in ("quantization", "adapter")}
    weights = Weights(kwargs.get("model"), kwargs.get("revision"), told)
    key = key_from(kwargs.get("key_from"))
    return AsyncSerdeProcessor(
        KvzipSerializer(get_codec(kwargs.get("codec", "channel")), threads, weights, key),
        KvzipDeserializer(threads, weights, key),
        max_workers=integer("max_workers", kwargs.get("max_workers", 1), 1, 1024),
    )


def register(name: str = "kvzip") -> None:
    """Make the serde `name` and the adapter `name`_fs known to LMCache in this process; before
    its storage manager is built."""
    from lmcache.v1.distributed.serde.factory import (
        get_registered_serde_types,
        register_serde_factory,
    )

    if name not in get_registered_serde_types():
        register_serde_factory(name, create)
        _register_adapter(f"{name}_fs")


def _register_adapter(name: str) -> None:
    """LMCache's adapter on files, which loads files as long as they are. It refuses a folder of
    another key than its serde's: a sealed ``store.json`` in it tells."""
    from lmcache.v1.distributed.l2_adapters.config import register_l2_adapter_type
    from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
    from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig

    class Config(FSL2AdapterConfig):
        pass

    class Adapter(FSL2Adapter):
        def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
            for key, memory in zip(keys, objects, strict=True):
                with suppress(FileNotFoundError):
                    size = self._key_to_path(key).stat().st_size
                    memory.set_used_size(min(size, memory.get_size()))
            return super().submit_load_task(keys, objects)

        def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
            for key in keys:  # LMCache's adapter leaves alone what is there
                path = self._key_to_path(key)
                name = _name_of(key)
                if name in _failed or not _whole(path):
                    path.unlink(missing_ok=True)
                    _failed.discard(name)
            return super().submit_store_task(keys, objects)

    def make(config: FSL2AdapterConfig, memory: object = None) -> Adapter:
        serde = getattr(config, "serde_config", None)
        if serde is not None and serde.type == name.removesuffix("_fs"):
            Place(config.base_path, serde.kwargs.get("key_from")).objects()  # is it the key?
        return Adapter(config)

    register_l2_adapter_type(name, Config)
    register_l2_adapter_factory(name, make)


def _whole(path: Path) -> bool:
    """Whether a chunk's file is as long as its parts say; True if there is none."""
    at = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_LENGTH.size + len(MAGIC))
            if is_sealed(first[_LENGTH.size :]):
                return size == _LENGTH.size + _LENGTH.unpack_from(first)[0]
            while at < size:
                file.seek(at)
                at += container.stated_length(file.read(64))
    except FileNotFoundError:
        return True
    except KVZipError:  # after the last part there may be anything
        return 0 < at <= size
    return 0 < at <= size


def main() -> None:
    """``lmcache``, with the serde registered."""
    from lmcache.cli.main import main as lmcache

    register()
    lmcache()


if __name__ == "__main__":
    main()
