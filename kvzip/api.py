"""What ``import kvzip`` is for: encode, decode, open, verify, info, write.

Here names become codecs, "auto" among them, and paths and URLs become open files. Below, in
:mod:`kvzip.container`, a writer is handed a codec, and a reader bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, overload

from kvzip.choice import auto
from kvzip.codec import Codec, get_codec
from kvzip.container.format import Info, whole_length
from kvzip.container.reader import Reader
from kvzip.container.sealed import (
    HEADER,
    AnyKey,
    Key,
    SealingSink,
    as_key,
    check_key,
    cipher_of,
    is_sealed,
    seal,
    sealed_size,
)
from kvzip.container.sink import Memory, Sink
from kvzip.container.source import is_url, open_source
from kvzip.container.writer import Writer, largest_size
from kvzip.errors import UsageError
from kvzip.files import replacing
from kvzip.options import boolean, callback
from kvzip.profile import Profile, check_profile
from kvzip.snapshot import Layout, Snapshot

CodecSpec = str | Codec | Mapping[str, Any]
"""A codec's name ("channel"), its name and settings ("zstd:level=9"), its config as
:meth:`kvzip.Codec.get_config` gives it, or the codec itself."""


# --- writing -------------------------------------------------------------------------------


def choose_codec(codec: CodecSpec, layout: Layout, profile: Profile | None = None) -> Codec:
    """The codec that `codec` names. "auto" names the one with which a cache of that layout is
    there soonest, over a link of 5 Gb/s or the one that is told: "auto:gbps=10,threads=4"
    (:mod:`kvzip.choice.auto`).

    Raises UnsupportedError when there is no such codec or setting, UsageError for what is no
    layout.
    """
    if not isinstance(layout, Layout):
        raise UsageError(f"the layout is {layout!r}: it must be a Layout")
    return auto.resolve(codec, layout, None if profile is None else profile.codec)


@overload
def encode(
    snapshot: Snapshot,
    codec: CodecSpec = "channel",
    profile: Profile | None = None,
    threads: int = 0,
    *,
    block_tokens: int | None = None,
    store_token_ids: bool = True,
    grids: bool = True,
    key: AnyKey | None = None,
    device: Any = None,
    out: None = None,
) -> bytes: ...


@overload
def encode(
    snapshot: Snapshot,
    codec: CodecSpec = "channel",
    profile: Profile | None = None,
    threads: int = 0,
    *,
    block_tokens: int | None = None,
    store_token_ids: bool = True,
    grids: bool = True,
    key: AnyKey | None = None,
    device: Any = None,
    out: Any,
) -> memoryview: ...


def encode(
    snapshot: Snapshot,
    codec: CodecSpec = "channel",
    profile: Profile | None = None,
    threads: int = 0,
    *,
    block_tokens: int | None = None,
    store_token_ids: bool = True,
    grids: bool = True,
    key: AnyKey | None = None,
    device: Any = None,
    out: Any = None,
) -> bytes | memoryview:
    """A snapshot as the bytes of a .kvz file.

    `codec`: a name, a name with settings ("zstd:level=9"), a config, a Codec, or "auto": what loads
    soonest over a link (:mod:`kvzip.choice.auto`; "auto:gbps=10"). `profile`: what
    the codec has learned of the model; the reader needs the same. One that is of another codec is
    left out. `threads`: 0 for all cores.
    `block_tokens`: tokens in a block, the smallest unit a reader decodes; by default what makes
    blocks of a size that suits the codec. `store_token_ids=False`
    stores a hash of the token ids instead of the ids. `grids=False`: parts whose numbers are on the
    grid of a narrower format (bf16 that holds fp8 times scales) are stored as they are, too
    (docs/format.md); a codec that predicts, and one with a profile, always does that. `key`: seal
    the file (AES-256-GCM), so that it is read only with this key: 32 bytes, or a `kvzip.Key`.
    `device`: the GPU ("cuda", "cuda:1") that encodes what lies in its memory, as far as the codec
    has kernels (docs/gpu.md); the CPU does the rest, and all by default. The bytes are the same.
    `out`: memory for the file, such as what a network card reads from: a writable buffer, array or
    CPU tensor of bytes side by side, apart from the snapshot's. The part of it that the file takes
    is returned, from its first byte on; :func:`max_encoded_size` says how many it may take. New
    memory, which there is without `out`, takes time, too.

    Raises UsageError for a snapshot or settings that no file can hold and for an `out` that is too
    small (bytes of it may be written then), ProfileError when the codec needs a profile and has
    none, UnsupportedError when there is no such codec, or no such GPU.
    """
    writer = writer_of(snapshot, codec, profile, block_tokens, store_token_ids, grids, device)
    known = None if key is None else as_key(key)
    if out is None:
        return writer.encode(threads) if known is None else seal(writer.encode(threads), known)
    numbers = [part for layer in snapshot.layers for part in list(layer.held().values())]
    of_sealed = "" if known is None else " (sealed=True)"
    memory = Memory(out, numbers, f"kvzip.max_encoded_size{of_sealed}")
    return memory.first(_written(writer, memory, threads, known))


def write(
    path: str | os.PathLike[str],
    snapshot: Snapshot,
    codec: CodecSpec = "channel",
    profile: Profile | None = None,
    threads: int = 0,
    *,
    block_tokens: int | None = None,
    store_token_ids: bool = True,
    grids: bool = True,
    progress: Callable[[int], None] | None = None,
    key: AnyKey | None = None,
    device: Any = None,
) -> int:
    """As :func:`encode`, into a file that appears whole or not at all; its length in bytes.

    Memory is bounded by a few layers. `progress` is called with raw bytes as they are done.
    """
    callback("progress", progress)
    writer = writer_of(snapshot, codec, profile, block_tokens, store_token_ids, grids, device)
    known = None if key is None else as_key(key)
    with replacing(path) as file:
        return _written(writer, file, threads, known, progress)


def _written(
    writer: Writer,
    sink: Sink,
    threads: int,
    key: Key | None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a file into a sink, sealed with a key if there is one; its length."""
    if key is None:
        return writer.write(sink, threads, progress)
    sealing = SealingSink(sink, key)
    writer.write(sealing, threads, progress)
    return sealing.close()


def writer_of(
    snapshot: Any,
    codec: CodecSpec,
    profile: Any,
    block_tokens: int | None = None,
    store_token_ids: bool = True,
    grids: bool = True,
    device: Any = None,
) -> Writer:
    """What writes a snapshot into any open file; arguments and errors as of :func:`encode`."""
    if not isinstance(snapshot, Snapshot):
        kind = type(snapshot).__name__
        words = "Snapshot.load reads one from a file, from_arrays and from_cache make one"
        raise UsageError(f"a {kind} is no Snapshot: {words}")
    check_profile(profile)
    chosen = choose_codec(codec, snapshot.layout, profile)
    return Writer(snapshot, chosen, profile, block_tokens, store_token_ids, grids, device)


def max_encoded_size(
    layout: Layout | Snapshot,
    codec: CodecSpec = "channel",
    *,
    block_tokens: int | None = None,
    sealed: bool = False,
) -> int:
    """An upper bound of the file's length in bytes, for callers that allocate first.

    `layout`: a snapshot, or a Layout with the dtype and the shapes of all layers. From a bare
    Layout the bound holds for an origin of up to 4 KiB as JSON. "auto" is no codec here, since its
    choice depends on the profile. `sealed`: of a file with a key.
    """
    size = largest_size(layout, get_codec(codec), block_tokens)
    return sealed_size(size) if boolean("sealed", sealed) else size


# --- reading -------------------------------------------------------------------------------


def open(
    file: Any, profile: Profile | None = None, threads: int = 0, *, key: AnyKey | None = None
) -> Reader:
    """Open a .kvz file: a path, a URL (``https://``, signed ones too, ``s3://``, ``file://``),
    bytes or another buffer, any binary file object (a member of an archive, a compressed file), a
    tensor of uint8, or a `Source`. `key`: of a sealed file: 32 bytes, a `kvzip.Key`, or a mapping
    or function that has keys by their names.

    Reads the header and the index. Raises SealError for a sealed file without its key, and for one
    that is not sealed where a key is given; FormatError, CorruptError, or the OSError of the path;
    UsageError for what cannot be read; StoreError for a URL that does not answer.
    """
    if isinstance(file, str) and is_url(file):
        from kvzip.store.bucket import open_url

        return open_url(file, profile, threads, key=key)
    return Reader(open_source(file, partial(_length, check_key(key))), profile, threads, key)


def _length(key: AnyKey | None, first: bytearray) -> int | None:
    """The length that a .kvz file states in its first bytes, None if it takes more of them to tell.
    Sealed, it says none; one that is of another key is an error before all of it has come."""
    if not is_sealed(first):
        return whole_length(first)
    if len(first) < HEADER:
        return None
    cipher_of(bytes(first[:HEADER]), key)
    return 1 << 62


def decode(
    file: Any,
    profile: Profile | None = None,
    threads: int = 0,
    *,
    out: Sequence[Any] | None = None,
    layers: Sequence[int] | None = None,
    tokens: tuple[int, int] | None = None,
    device: Any = None,
    stream: Any = None,
    pages: Any = None,
    key: AnyKey | None = None,
) -> Any:
    """The snapshot in a .kvz file, bit-exact; `file` and `key` as for :func:`open`, the rest, and
    the result, as for :meth:`Reader.decode`."""
    with open(file, profile, threads, key=key) as reader:
        return reader.decode(out, layers, tokens, device=device, stream=stream, pages=pages)


def info(file: Any, *, key: AnyKey | None = None) -> Info:
    """What a .kvz file says of itself, without decoding a block; arguments as for :func:`open`."""
    with open(file, key=key) as reader:
        return reader.info


def verify(
    file: Any,
    profile: Profile | None = None,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
    *,
    key: AnyKey | None = None,
) -> Info:
    """Check every checksum and decode everything, one layer in memory at a time.

    Returns what :func:`info` does; raises CorruptError, FormatError or ProfileError.
    """
    callback("progress", progress)
    with open(file, profile, threads, key=key) as reader:
        reader.verify(progress)
        return reader.info
