"""A self-test that takes about a second: what the tests prove of many caches, seen on this machine.

Made-up caches go through every codec, on every set of instructions that the processor has: they
must come back bit for bit, as the same bytes from every set, and a changed bit must be noticed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvzip import api, dtypes
from kvzip.codec import codec_names, get_codec
from kvzip.codecs import _native
from kvzip.errors import CorruptError, KVZipError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot

INSTRUCTIONS = ("scalar", "avx2", "vnni", "avx512", "amx", "neon")
DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
_SHAPE = (2, 200, 16)  # heads, tokens, dim: more tokens than one vector of any codec
_LAYERS = 2


class Check(msgspec.Struct, frozen=True):
    """One thing that was tried."""

    name: str
    """A codec's."""
    error: str
    """What went wrong; empty where nothing did."""
    seconds: float


def instructions() -> list[str]:
    """The sets of instructions that this processor has and kvzip has kernels for."""
    with _instructions_kept():
        return [name for name in INSTRUCTIONS if _native.set_simd(name)]


def vectors() -> list[str]:
    """Those of `instructions` with vectors of their own; the others only multiply bytes faster, for
    `predictive`."""
    return [name for name in instructions() if name not in ("vnni", "amx")]


def self_test() -> list[Check]:
    """Try every installed codec; see the module. While it runs, other threads of the process may
    meet slower kernels, and no other bytes."""
    caches = [_cache(number, dtype) for number, dtype in enumerate(DTYPES)]
    kernels = instructions()
    profile = None
    found = []
    for name in codec_names():
        began, error = time.perf_counter(), ""
        try:
            codec = get_codec(name)
            if codec.needs_profile:
                profile = Profile.fit(caches[:1], codec=name)
            given = caches[:1] if codec.needs_profile else caches
            with _instructions_kept():
                for cache in given:
                    _try(name, cache, profile if codec.needs_profile else None, kernels)
        except Exception as failure:
            # Whatever it is, a codec of somebody else's included, the report goes on.
            error = f"{type(failure).__name__}: {failure}"
        found.append(Check(name, error, time.perf_counter() - began))
    return found


def _try(codec: str, cache: Snapshot, profile: Profile | None, kernels: Sequence[str]) -> None:
    """Raise KVZipError, or whatever else the codec raises, unless one cache comes back as it
    must, by every set of instructions in `kernels`."""
    blobs: dict[str, bytes] = {}
    for name in kernels:
        _native.set_simd(name)
        blob = api.encode(cache, codec, profile, threads=1)
        blobs[name] = blob
        if api.decode(blob, profile, threads=1) != cache:
            raise KVZipError(f"{cache.dtype} by {name} did not come back bit for bit")
        if blob != next(iter(blobs.values())):
            raise KVZipError(f"{cache.dtype}: {next(iter(blobs))} and {name} differ in bytes")
    # The last entry ends where the file does, but for padding; a bit of it is changed.
    with api.open(blob) as reader:
        index = reader.index
        end = max(a + b for a, b in zip(index.offset, index.length, strict=True))
    damaged = bytearray(blob)
    damaged[end - 1] ^= 1
    try:
        api.decode(bytes(damaged), profile, threads=1)
    except CorruptError:
        return
    raise KVZipError(f"{cache.dtype}: a changed bit was not noticed")


def _cache(seed: int, dtype: str) -> Snapshot:
    """A cache with the means and scales of channels that keys and values have, and some of the
    numbers that nobody expects: infinities, NaNs, zeros of both signs. The same on every machine:
    only bits and whole numbers decide it."""
    rng = np.random.default_rng(seed)
    form = dtypes.get(dtype)
    bits = 8 * form.uint.itemsize

    def part() -> NDArray[np.generic]:
        numbers = rng.integers(0, 2**bits, _SHAPE, np.uint64)
        # Nearly all of a channel share their sign and the exponent's upper bits.
        front = rng.integers(0, 2**bits, (_SHAPE[0], 1, _SHAPE[2]), np.uint64)
        shared = np.uint64(0xFC << (bits - 8))
        usual = (numbers & ~shared) | (front & shared)
        return np.where(rng.random(_SHAPE) < 0.99, usual, numbers).astype(form.uint)

    layers = [(part(), part()) for _ in range(_LAYERS)]
    return Snapshot.from_arrays(layers, dtype, rng.integers(0, 1000, _SHAPE[1]))


@contextmanager
def _instructions_kept() -> Iterator[None]:
    before = _native.simd()
    try:
        yield
    finally:
        _native.set_simd(before)
