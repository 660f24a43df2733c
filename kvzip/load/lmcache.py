"""kvzip as a serde of LMCache: what an L2 adapter stores is compressed, bit for bit.

LMCache has no entry points for serdes, so the one that starts it registers this one before
anything is configured: ``python -m kvzip.load.lmcache server ...`` is ``lmcache server ...`` with
``"serde": {"type": "kvzip", "codec": "channel"}`` understood in an L2 adapter's configuration.

What is stored varies in length. LMCache's own adapter of type "fs" takes a file that is shorter
than the bound for one that is cut off, and never loads it; "kvzip_fs" is that adapter, told each
file's length. Its "s3" adapter takes what the object holds.

One tensor of a chunk becomes one .kvz file, several lie one after the other. The interface is that
of LMCache 0.5.6, ``lmcache.v1.distributed.serde``; this module imports without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kvzip import container
from kvzip.codec import Codec, get_codec
from kvzip.errors import CorruptError, KVZipError
from kvzip.load import chunks


def _tensors(memory: Any) -> list[Any]:
    """All tensors of a MemoryObj."""
    groups = memory.metadata.shapes
    found = [memory.get_tensor(i) for i in range(len(groups))] if groups else [memory.tensor]
    if any(tensor is None for tensor in found):
        raise KVZipError("LMCache gave a memory object without a tensor")
    return found


def _bytes(memory: Any) -> memoryview:
    """The bytes of a MemoryObj, writable."""
    return memoryview(memory.byte_array).cast("B")


class KvzipSerializer:
    """LMCache's `Serializer`: tensors of a chunk to bytes of variable length."""

    def __init__(self, codec: Codec, threads: int):
        self.codec, self.threads = chunks.check_codec(codec), threads

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Encode the tensors of `src` into the bytes of `dst`; how many there are."""
        out, at = _bytes(dst), 0
        for tensor in _tensors(src):
            model = str(getattr(key, "model_name", ""))
            blob = chunks.encode(tensor, self.codec, self.threads, model)
            if at + len(blob) > len(out):
                raise KVZipError(f"LMCache gave {len(out):,} bytes, too few for the chunk")
            out[at : at + len(blob)] = blob
            at += len(blob)
        return at

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """An upper bound of what :meth:`serialize` gives for tensors of those shapes."""
        import torch

        like = (
            torch.empty(1, dtype=dtype).expand(tuple(shape))
            for shape, dtype in zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        )
        return sum(container.max_encoded_size(chunks.layout(t), self.codec) for t in like)


class KvzipDeserializer:
    """LMCache's `Deserializer`: those bytes back into tensors, decoded in place."""

    def __init__(self, threads: int):
        self.threads = threads

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Decode `src` into the tensors of `dst`. Raises CorruptError, FormatError, or
        UnsupportedError when they are of another shape; LMCache then counts the chunk as a miss."""
        data, at = _bytes(src), 0
        for tensor in _tensors(dst):
            # The buffer may be longer than what was stored.
            length = container.stated_length(data[at:])
            if at + length > len(data):
                raise CorruptError(f"the chunk is cut short: {len(data):,} bytes")
            chunks.decode(data[at : at + length], tensor, self.threads)
            at += length


def create(kwargs: Mapping[str, Any]) -> Any:
    """LMCache's factory: a SerdeProcessor from the serde's configuration without its "type".

    ``codec``: a codec that needs no profile, with settings (default "channel"). ``threads``: for
    one chunk (default 1). ``max_workers``: chunks at once (default 1).
    """
    from lmcache.v1.distributed.serde.async_processor import AsyncSerdeProcessor

    unknown = sorted(set(kwargs) - {"codec", "threads", "max_workers"})
    if unknown:
        raise KVZipError(f"serde kvzip: no setting {unknown[0]!r}")
    threads = int(kwargs.get("threads", 1))
    return AsyncSerdeProcessor(
        KvzipSerializer(get_codec(kwargs.get("codec", "channel")), threads),
        KvzipDeserializer(threads),
        max_workers=int(kwargs.get("max_workers", 1)),
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
    """LMCache's adapter on files, which loads files as long as they are."""
    from lmcache.v1.distributed.l2_adapters.config import register_l2_adapter_type
    from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
    from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig

    class Config(FSL2AdapterConfig):
        pass

    class Adapter(FSL2Adapter):
        def submit_load_task(self, keys: list[Any], objects: list[Any]) -> Any:
            for key, memory in zip(keys, objects, strict=True):
                with suppress(FileNotFoundError):
                    size = self._key_to_path(key).stat().st_size
                    memory.set_used_size(min(size, memory.get_size()))
            return super().submit_load_task(keys, objects)

    register_l2_adapter_type(name, Config)
    register_l2_adapter_factory(name, lambda config, memory=None: Adapter(config))


def main() -> None:
    """``lmcache``, with the serde registered."""
    from lmcache.cli.main import main as lmcache

    register()
    lmcache()


if __name__ == "__main__":
    main()
