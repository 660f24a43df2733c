"""What is fuzzed: each target takes any bytes, and may raise nothing but a KVZipError.

Checksums are made true before a file is read (`kvzip.testing.reseal`), so that what was changed
meets the header's reader, the index and the codecs, and not the checksum that protects them.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import kvzip
from kvzip.benchmarks.host_jobs import Idle
from kvzip.store import Store
from kvzip.testing import cache_like, make_snapshot, reseal

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


def spec(data: bytes) -> None:
    """The string that names a codec and its settings."""
    kvzip.get_codec(data.decode("utf-8", "replace"))


def store(data: bytes) -> None:
    """The small files of a store: its settings, what a namespace is of, a chain, a mark."""
    folder = FOLDER / "store"
    if not folder.exists():
        Store(folder, block_tokens=16).put(SAVED)
        KEPT.update({path: path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    small = sorted(path for path in KEPT if path.suffix != ".kvz")
    changed = small[(data[0] if data else 0) % len(small)]
    changed.write_bytes(data[1:])
    try:
        again = Store(folder)
        match = again.find(SAVED.token_ids, model="test/model", revision="r1", dtype="bf16")
        assert match is None or match.snapshot().tokens <= SAVED.tokens
        again.documents()
    finally:
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_bytes(KEPT[changed])


KEPT: dict[Path, bytes] = {}
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
START = kvzip.encode(SAVED, "raw")[:12]
"""Magic and version of a .kvz file, and what else does not change."""
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
    if target == "spec":
        return [name.encode() for name in ("zstd:level=3", "planes:mode=bit,coder=lz4", "channel")]
    if target == "store":
        return [b"\0" + b'{"block_tokens":16}', b"\1" + b"0" * 64 + b"\nend", b"\2{}"]
    return []


def tried(target: str, data: bytes) -> None:
    """Run a target: nothing but a KVZipError may come out of it."""
    with suppress(kvzip.KVZipError):
        TARGETS[target](data)
