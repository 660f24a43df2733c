"""Ratio and speed of a codec on a snapshot: whole files, in memory, checksums included."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import api
from kvzip.codec import Codec
from kvzip.dtypes import Bits
from kvzip.eval.results.provenance import cache_bytes
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Layer, Snapshot


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


Buffers = list[tuple[Bits, ...]]
"""Arrays for the parts of each layer."""


class WholeFile:
    """A snapshot through a codec into a file, and back, each in memory that is there.

    `memory`: bytes for the file, which lies there until another is made in it.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        codec: Codec,
        threads: int = 1,
        out: Buffers | None = None,
        profile: Profile | None = None,
        memory: Bits | None = None,
    ) -> None:
        self.snapshot, self.codec, self.threads, self.profile = snapshot, codec, threads, profile
        self.blob = memoryview(b"")
        self._out = buffers(snapshot) if out is None else out
        self._memory = memory_for(snapshot, [codec]) if memory is None else memory

    @property
    def encoded_bytes(self) -> int:
        return len(self.blob)

    def encode(self) -> None:
        """Make the file anew."""
        self.blob = api.encode(
            self.snapshot, self.codec, self.profile, self.threads, out=self._memory
        )

    def decode(self) -> None:
        """Decode all of the file, every checksum verified."""
        api.decode(self.blob, self.profile, self.threads, out=self._out)

    def exact(self) -> bool:
        """Whether all comes back, bit for bit, into buffers that were wiped before."""
        for a in itertools.chain(*self._out):
            a.fill(0)
        self.decode()
        return all(
            np.array_equal(a, b)
            for layer, out in zip(self.snapshot.layers, self._out, strict=True)
            for a, b in zip(layer, out, strict=True)
        )

    def forget(self) -> None:
        """Drop the file."""
        self.blob = memoryview(b"")


def room(like: Bits) -> Bits:
    """Zeros of that shape, aligned to 64 bytes, as an engine's tensors are."""
    memory = np.zeros(like.nbytes + 64, np.uint8)
    at = -memory.ctypes.data % 64
    return memory[at : at + like.nbytes].view(like.dtype).reshape(like.shape)


def memory_for(snapshot: Snapshot, codecs: Sequence[Codec]) -> Bits:
    """Bytes for the file that any of the codecs makes of a snapshot."""
    most = max((api.max_encoded_size(snapshot, codec) for codec in codecs), default=0)
    return np.zeros(most, np.uint8)


def buffers(snapshot: Snapshot) -> Buffers:
    """Room for what a snapshot holds, written once: pages that the system only hands out while a
    codec decodes into them would be charged to it."""
    return [tuple(map(room, layer)) for layer in snapshot.layers]


def measure(
    snapshot: Snapshot,
    codec: Codec,
    profile: Profile | None = None,
    *,
    threads: int = 1,
    repeat: int = 3,
) -> tuple[CodecResult, bytes]:
    """Encode and decode `repeat` times, the fastest counts; also the encoded file's bytes."""
    repeat = integer("repeat", repeat, 1, 10_000)
    file = WholeFile(in_memory(snapshot), codec, threads, profile=profile)
    times = [(seconds(file.encode), seconds(file.decode)) for _ in range(repeat)]
    encode_seconds, decode_seconds = (min(column) for column in zip(*times, strict=True))
    raw = snapshot.raw_bytes
    return CodecResult(
        name=codec.codec_id,
        spec=codec.spec,
        encoded_bytes=len(file.blob),
        ratio=raw / len(file.blob),
        bits_per_value=8 * len(file.blob) / max(snapshot.layout.numbers, 1),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
        encode_gbps=raw / encode_seconds / 1e9,
        decode_gbps=raw / decode_seconds / 1e9,
        exact=file.exact(),
    ), bytes(file.blob)


def in_memory(snapshot: Snapshot) -> Snapshot:
    """A copy that no mapped file stands behind: reading the disk is not encoding."""
    layers = [
        Layer({n: np.array(bits) for n, bits in a.parts.items()}, a.layout) for a in snapshot.layers
    ]
    return Snapshot(layers, snapshot.dtype, snapshot.token_ids, snapshot.origin)


def seconds(step: Callable[[], object]) -> float:
    """Wall-clock seconds of `step`, begun with nothing of its data in the processor's caches."""
    _sweep().max()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


@cache
def _sweep() -> NDArray[np.uint8]:
    """What takes the place of everything else in the caches when it is read.

    It is never written: its write-backs would fall into what is measured.
    """
    return np.ones(4 * cache_bytes(), np.uint8)
