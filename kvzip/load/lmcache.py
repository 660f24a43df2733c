"""kvzip as a serde of LMCache: what an L2 adapter stores is compressed, bit for bit.

LMCache has no entry points for serdes, so the one that starts it registers this one before
anything is configured: ``python -m kvzip.load.lmcache server ...`` is ``lmcache server ...`` with
``"serde": {"type": "kvzip", "codec": "channel"}`` understood in an L2 adapter's configuration.

What is stored varies in length. LMCache's own adapter of type "fs" takes a file that is shorter
than the bound for one that is cut off, and never loads it; "kvzip_fs" is that adapter, told each
file's length. Its "s3" adapter takes what the object holds.

LMCache hands over chunks of a cache as tensors of a few layouts. One tensor becomes one .kvz file,
several of a chunk lie one after the other. The interface is that of LMCache 0.5.6,
``lmcache.v1.distributed.serde``; this module imports without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from kvzip import container, dtypes
from kvzip.codec import Codec, get_codec
from kvzip.errors import CorruptError, KVZipError, UnsupportedError
from kvzip.snapshot import Layout, Origin, Snapshot


def _pairs(array: Any) -> list[tuple[Any, Any]]:
    """A chunk's tensor as keys and values of layers, [1, tokens, channels] each: views.

    [2, layers, tokens, channels] (KV_2LTD), [2, tokens, channels] (KV_2TD) and [tokens, 2,
    channels] (KV_T2D) hold keys and values. Any other shape, like MLA's [1, layers, tokens,
    channels], has no such halves: of each layer one half of the channels goes as keys, the other as
    values. Which it is follows from the shape alone, which is all that a reader is told.
    """
    shape = tuple(array.shape)
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


def _snapshot(tensor: Any, model: str = "") -> Snapshot:
    """A view of a tensor as a snapshot. Numbers of other formats than ours go as raw bits of one
    that is as wide."""
    bits, name = _bits(tensor)
    return Snapshot.from_arrays(_pairs(bits), name, origin=Origin(model=model))


def _bits(tensor: Any) -> tuple[Any, str]:
    if not tensor.dtype.is_floating_point:
        wide = {1: "fp8_e4m3fn", 2: "fp16", 4: "fp32"}.get(tensor.element_size())
        if wide is None:
            raise UnsupportedError(f"a tensor of {tensor.dtype} holds no numbers of ours")
        return dtypes.as_bits(tensor, wide)
    return dtypes.as_bits(tensor)


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
        if codec.needs_profile:
            raise UnsupportedError(
                f"codec {codec.codec_id!r} needs whole layers and their positions, which LMCache's "
                "chunks do not tell: use channel"
            )
        self.codec, self.threads = codec, threads

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Encode the tensors of `src` into the bytes of `dst`; how many there are."""
        out, at = _bytes(dst), 0
        for tensor in _tensors(src):
            blob = container.encode(
                _snapshot(tensor, str(getattr(key, "model_name", ""))),
                self.codec,
                threads=self.threads,
            )
            if at + len(blob) > len(out):
                raise KVZipError(f"LMCache gave {len(out):,} bytes, too few for the chunk")
            out[at : at + len(blob)] = blob
            at += len(blob)
        return at

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """An upper bound of what :meth:`serialize` gives for tensors of those shapes."""
        return sum(
            container.max_encoded_size(layout, self.codec)
            for layout in map(_layout, layout_desc.shapes, layout_desc.dtypes)
        )


def _layout(shape: Sequence[int], dtype: Any) -> Layout:
    """Layout of the snapshot that :func:`_snapshot` makes of a tensor."""
    import torch

    return _snapshot(torch.empty(1, dtype=dtype).expand(tuple(shape))).layout


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
            bits, name = _bits(tensor)
            with container.open(data[at : at + length], threads=self.threads) as reader:
                stored, wanted = reader.layout, _snapshot(tensor).layout
                if stored != wanted:
                    raise UnsupportedError(
                        f"the chunk holds {stored.dtype} {stored.layers[0].k} in "
                        f"{len(stored.layers)} layers, the buffer {name} {wanted.layers[0].k} in "
                        f"{len(wanted.layers)}"
                    )
                reader.decode(out=_pairs(bits))
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
