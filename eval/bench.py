"""Ratio and speed of a codec on a snapshot: whole files, in memory, checksums included."""

from __future__ import annotations

import time

import msgspec

from kvzip import container
from kvzip.codec import Codec
from kvzip.snapshot import Snapshot


class CodecResult(msgspec.Struct, frozen=True):
    """One codec on one snapshot. Speeds are raw gigabytes (10^9) a second."""

    name: str
    spec: str
    encoded_bytes: int
    ratio: float
    bits_per_value: float
    encode_seconds: float
    decode_seconds: float
    encode_gbps: float
    decode_gbps: float
    exact: bool


def measure(
    snapshot: Snapshot, codec: Codec, *, threads: int = 1, repeat: int = 3
) -> tuple[CodecResult, bytes]:
    """Encode and decode `repeat` times, the fastest counts; also the encoded file's bytes."""
    encode_seconds = decode_seconds = float("inf")
    # A mapped file would charge the first codec for reading the disk.
    for layer in snapshot.layers:
        layer.k.max(initial=0), layer.v.max(initial=0)
    for _ in range(repeat):
        began = time.perf_counter()
        blob = container.encode(snapshot, codec, threads=threads)
        encode_seconds = min(encode_seconds, time.perf_counter() - began)
        began = time.perf_counter()
        decoded = container.decode(blob, threads=threads)
        decode_seconds = min(decode_seconds, time.perf_counter() - began)
    exact = decoded.layout == snapshot.layout and all(
        (a == b).all()
        for old, new in zip(snapshot.layers, decoded.layers, strict=True)
        for a, b in zip(old, new, strict=True)
    )
    raw = snapshot.raw_bytes
    return CodecResult(
        name=codec.codec_id,
        spec=spec_of(codec),
        encoded_bytes=len(blob),
        ratio=raw / len(blob),
        bits_per_value=8 * len(blob) / max(snapshot.layout.numbers, 1),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
        encode_gbps=raw / encode_seconds / 1e9,
        decode_gbps=raw / decode_seconds / 1e9,
        exact=bool(exact),
    ), blob


def spec_of(codec: Codec) -> str:
    """A codec's name with the settings that are not its defaults, as `get_codec` reads it."""
    default = type(codec)().get_config()
    differing = (f"{k}={v}" for k, v in codec.get_config().items() if v != default.get(k))
    return ":".join(filter(None, [codec.codec_id, ",".join(differing)]))
