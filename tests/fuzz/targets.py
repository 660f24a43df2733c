"""What is fuzzed: each target takes any bytes, and may raise nothing but a KVZipError.

Checksums are made true before a file is read (`kvzip.testing.reseal`), so that what was changed
meets the header's reader, the index and the codecs, and not the checksum that protects them.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TypeVar
from unittest.mock import patch

import kvzip
from kvzip.benchmarks.host_jobs import Idle
from kvzip.container.source import Source, open_source
from kvzip.load import chunks, llama_cpp, llama_slot, lmcache
from kvzip.store import Store
from kvzip.store.folder import SMALL, Folder, Meta
from kvzip.testing import cache_like, make_snapshot, reseal
from kvzip.workers import Workers, finished

T = TypeVar("T")

_SCRATCH = tempfile.TemporaryDirectory(prefix="kvzip-fuzz-")
FOLDER = Path(_SCRATCH.name)
GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
SAVED = make_snapshot(cache_like, 1, "bf16", layers=1, heads=1, tokens=40, dim=8)


def sealed(data: bytes) -> bytes:
    """The bytes as a file whose magic, version, length and checksums are right."""
    blob = bytearray(data.ljust(64, b"\0"))
    blob[:12] = START
    struct.pack_into("<Q", blob, 24, len(blob))
    return reseal(blob)


def opened(data: bytes) -> None:
    """The header, the index, and all that they say."""
    with kvzip.open(sealed(data)) as reader:
        str(reader.info), reader.layout, len(reader)


def decoded(data: bytes) -> None:
    """Every part, by whatever codec the header names."""
    kvzip.decode(sealed(data), threads=1)


def in_part(data: bytes) -> None:
    """A layer and a range of tokens, without the rest."""
    with kvzip.open(sealed(data), PREDICTED, threads=1) as reader:
        reader.layer(len(reader.layout.layers) - 1)
        reader.tokens(1, 3)


def named_in(data: bytes) -> kvzip.Profile:
    """The profile that a file names, of those that there are."""
    named = [profile for profile in TURNED.values() if profile.id.encode() in data]
    return [*named, PREDICTED][0]


def predicted(data: bytes) -> None:
    """A file that needs one of the profiles that there are."""
    kvzip.decode(sealed(data), named_in(data), threads=1)


def for_device(data: bytes) -> None:
    """What a processor makes of a file for a GPU. Here that does nothing."""
    with kvzip.open(sealed(data), named_in(data), threads=1) as reader:
        IDLE.expect(reader.index)
        reader.decode(device=IDLE)


def as_they_are(data: bytes) -> None:
    """A file with the checksums that it has."""
    kvzip.decode(data, threads=1)


def profile(data: bytes) -> None:
    path = FOLDER / "a.kvprofile"
    path.write_bytes(data)
    kvzip.Profile.load(path)


def snapshot(data: bytes) -> None:
    path = FOLDER / "doc.safetensors"
    path.write_bytes(data)
    for layer in kvzip.Snapshot.load(path).layers:
        for bits in layer.parts.values():
            bits.sum()


def page(data: bytes) -> None:
    """A page of a few tokens, whose profile is right. Its checksum is of the numbers, and compared
    after they were decoded."""
    kvzip.decode_page(data, PROFILE)


def session(data: bytes) -> None:
    """A saved session of llama.cpp's: whatever is understood of it, all of its bytes come back. A
    few places are tried for a section, not the thousands that numbers at random look like."""
    whole = data if llama_cpp.is_slot(data[:4]) else b"qsgg" + data
    with patch.object(llama_slot, "_MOST_CELLS", 16 * llama_slot._TRY):
        found = llama_cpp.load_slot(whole)
    for layer in found.layers:
        for bits in layer.parts.values():
            bits.sum()
    path = FOLDER / "session.bin"
    llama_cpp.save_slot(found, path)
    assert path.read_bytes() == whole


class Given:
    """What LMCache hands over of its memory: bytes, or a tensor to be filled."""

    def __init__(self, tensor: Any, data: bytes = b""):
        self.tensor, self.byte_array = tensor, bytearray(data)
        self.metadata = SimpleNamespace(shapes=None)


def chunk(data: bytes) -> None:
    """An engine's chunk, as LMCache and SGLang have it, into the tensor that waits for it."""
    import torch

    waits = Given(torch.empty(CHUNK, dtype=torch.bfloat16))
    lmcache.KvzipDeserializer(1).deserialize(Given(None, sealed(data) + bytes(9)), waits, None)


def spec(data: bytes) -> None:
    """The string that names a codec and its settings."""
    kvzip.get_codec(data.decode("utf-8", "replace"))


class InMemory(Folder):
    """A store's objects, which are files otherwise: writing those takes longer than reading them.

    They were all written a day ago, so that nothing stays because it is new.
    """

    folder = None

    def __init__(self, objects: dict[str, bytes]):
        self.url, self.objects = "memory", objects

    def get(self, path: str, most: int = SMALL) -> bytes | None:
        found = self.objects.get(path)
        return found if found is None or len(found) <= most else b""

    def head(self, path: str) -> Meta | None:
        found = self.objects.get(path)
        return None if found is None else Meta(path, len(found), None, A_DAY_AGO)

    def put(
        self, path: str, data: bytes | IO[bytes], create: bool = True, durable: bool = False
    ) -> bool:
        if create and path in self.objects:
            return False
        if not isinstance(data, bytes):
            data.seek(0)
            data = data.read()
        self.objects[path] = data
        return True

    def under(self, prefix: str) -> Iterator[Meta]:
        begin = f"{prefix}/"
        for path in sorted([path for path in self.objects if path.startswith(begin)]):
            yield Meta(path, len(self.objects[path]), None, A_DAY_AGO)

    def folders(self) -> list[str]:
        return sorted({path[: path.index("/")] for path in self.objects if "/" in path})

    def delete(self, path: str) -> None:
        self.objects.pop(path, None)

    def source(self, path: str) -> Source:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return open_source(self.objects[path])

    def sweep(self) -> None:
        """No writer died here."""


def at_once(_: Workers, do: Callable[..., T], *arguments: Any) -> Future[T]:
    """In place of what gives a job to another thread, which takes longer than the job."""
    return finished(partial(do, *arguments))


def in_order(_: Workers, do: Callable[..., T], *items: Iterable[Any]) -> Iterator[T]:
    """In place of what gives a job for each item to other threads."""
    return map(do, *items)


def looked_in(store: Store) -> None:
    """What there is, and a document that shares tokens with a prompt."""
    with store.find(SAVED.token_ids, **WANTED, threads=1) or nullcontext() as match:
        assert match is None or match.tokens <= SAVED.tokens
    store.abouts()


def cleared(store: Store) -> None:
    """A profile that a document needs stays, whatever does not tell of it any more."""
    store.prune(profiles=True)
    assert [(each.key, each.documents > 0) for each in store.profiles()] == NEEDED


def repaired(store: Store) -> None:
    """Who puts a document again finds all of it, whatever was lost of it."""
    assert not store.put(SAVED_FILE).new
    with store.find(SAVED.token_ids, **WANTED, threads=1) or nullcontext() as match:
        assert match is not None and match.tokens == SAVED.tokens


def emptied(store: Store) -> None:
    """One after the other, and then all."""
    store.remove(store.documents()[0].key)
    store.prune(0)
    assert not store.documents() and not store.profiles()


def store(data: bytes) -> None:
    """The small files of a store: its settings, what a namespace is of, chains, marks. One holds
    anything, or is not there."""
    first = data[0] if data else 0
    use, changed = USES[first % len(USES)], SMALL[first // len(USES) % len(SMALL)]
    objects = dict(STORED)
    if len(data) == 1:
        del objects[changed]
    else:
        objects[changed] = data[1:]
    with (
        patch.object(kvzip.store.store, "open_bucket", lambda *_, **__: InMemory(objects)),
        patch.object(Workers, "submit", at_once),
        patch.object(Workers, "map", in_order),
    ):
        use(Store("memory"))


PROFILE = kvzip.Profile.fit([SAVED], codec="channel")
PAGE = kvzip.encode_page([(layer.k[:, :16], layer.v[:, :16]) for layer in SAVED.layers], PROFILE)
PREDICTED = kvzip.Profile.load(GOLDEN / "predictive.kvprofile")
TURNED = {
    f"predictive-before-rope{name}-bf16.kvz": kvzip.Profile.load(
        GOLDEN / f"predictive-before-rope{of}.kvprofile"
    )
    for name, of in (("", ""), ("-6", "-4"))
}
"""Of keys that RoPE turned in bf16, and of pairs side by side, by a file of such keys."""
IDLE = Idle()
CHUNK = (2, 2, 40, 8)
"""Keys and values of two layers, of 40 tokens with 8 channels."""
START = kvzip.encode(SAVED, "raw")[:12]
"""Magic and version of a .kvz file, and what else does not change."""
WANTED = {"model": "test/model", "revision": "r1", "dtype": "bf16"}
A_DAY_AGO = datetime.now(UTC) - timedelta(days=1)


def stored() -> dict[str, bytes]:
    """The objects of a store of two documents that begin alike, one of which needs a profile."""
    with tempfile.TemporaryDirectory() as folder:
        made = Store(folder, block_tokens=16)
        made.put_profile(PROFILE)
        made.put(SAVED)
        with kvzip.open(SAVED_FILE) as reader:
            made.put(reader.tokens(0, 20), profile=PROFILE)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


SAVED_FILE = kvzip.encode(SAVED)
STORED = stored()
SMALL = sorted(path for path in STORED if not path.endswith((".kvz", ".kvprofile")))
USES: list[Callable[[Store], None]] = [looked_in, cleared, emptied, repaired]
NEEDED = [(f"profiles/{PROFILE.id}", True)]
TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "open": opened,
    "decode": decoded,
    "part": in_part,
    "predictive": predicted,
    "device": for_device,
    "file": as_they_are,
    "profile": profile,
    "snapshot": snapshot,
    "page": page,
    "session": session,
    "chunk": chunk,
    "spec": spec,
    "store": store,
}


def small(name: str, tokens: int, heads: int = 2) -> kvzip.Snapshot:
    """A piece of a golden file, which as a whole is longer than what a fuzzer makes."""
    with kvzip.open(GOLDEN / name, TURNED.get(name, PREDICTED)) as reader:
        read = reader.tokens(0, tokens)
    if name in TURNED:
        return read
    layers = [(layer.k[:heads], layer.v[:heads]) for layer in read.layers]
    return kvzip.Snapshot.from_arrays(layers, read.dtype, read.token_ids, read.origin)


def on_a_grid() -> kvzip.Snapshot:
    """Numbers that are fp8 times scales."""
    k = small("channel-on-a-grid-bf16.kvz", 40).layers[0].k[..., :32]
    return kvzip.Snapshot.from_arrays([(k, k)], "bf16")


def seeds(target: str) -> list[bytes]:
    """Good input, from which a fuzzer goes on."""
    if target == "device":
        return seeds("predictive") + seeds("decode")
    if target in ("predictive", "part"):
        names = [f"predictive-{dtype}.kvz" for dtype in ("bf16", "fp32", "fp8_e5m2")]
        files = [kvzip.encode(small(name, 12), "predictive", PREDICTED) for name in names]
        if target == "predictive":
            for name, profile in TURNED.items():
                files.append(kvzip.encode(small(name, 12), "predictive", profile))
        return files + (seeds("decode") if target == "part" else [])
    if target in ("open", "decode", "file"):
        kinds = [("raw", "bf16"), ("zstd", "fp16"), ("planes", "fp32"), ("channel", "bf16")]
        kinds += [("lz4", "int8"), ("planes:mode=bit", "fp8_e4m3fn"), ("channel", "fp8_e5m2")]
        size = {"layers": 1, "heads": 1, "tokens": 40, "dim": 8}
        files = [
            kvzip.encode(make_snapshot(cache_like, 1, dtype, **size), codec)
            for codec, dtype in kinds
        ]
        files += [kvzip.encode(on_a_grid(), codec) for codec in ("raw", "channel")]
        for name in ("channel-before-rope-bf16.kvz", "channel-before-rope-6-bf16.kvz"):
            with kvzip.open(GOLDEN / name) as reader:
                files.append(kvzip.encode(reader.decode(layers=[0]), "channel"))
        return files
    if target == "profile":
        path = FOLDER / "seed.kvprofile"
        kvzip.Profile.fit([SAVED], codec="channel").save(path)
        return [path.read_bytes()]
    if target == "snapshot":
        SAVED.save(FOLDER / "seed.safetensors")
        return [(FOLDER / "seed.safetensors").read_bytes()]
    if target == "page":
        return [PAGE]
    if target == "session":
        from load.test_llama_cpp import attention, recurrent
        from load.test_llama_cpp import session as of_context
        from load.test_llama_cpp import slot as of_sequence

        kinds = [{}, {"transposed": True}, {"extra": bytes(8)}, {"values": False}, {"kind": 8}]
        caches = [attention(range(5), layers=1, width=32, **kind) for kind in kinds]
        windows = attention(range(2, 5), layers=2, width=32)
        sessions = [
            of_context(caches[0], outputs=False, version=11),
            of_sequence(caches[0], windows, recurrent(5)),
        ]
        return [of_sequence(kind) for kind in caches] + sessions
    if target == "chunk":
        import torch

        numbers = torch.arange(2 * 2 * 40 * 8, dtype=torch.float32).reshape(CHUNK).bfloat16()
        codecs = ("channel", "planes", "zstd", "raw")
        return [chunks.encode(numbers, kvzip.get_codec(codec)) for codec in codecs]
    if target == "spec":
        return [name.encode() for name in ("zstd:level=3", "planes:mode=bit,coder=lz4", "channel")]
    if target == "store":
        count = len(USES) * len(SMALL)
        return [bytes([n]) + STORED[SMALL[n // len(USES)]] for n in range(count)]
    return []


def tried(target: str, data: bytes) -> None:
    """Run a target: nothing but a KVZipError may come out of it."""
    with suppress(kvzip.KVZipError):
        TARGETS[target](data)
