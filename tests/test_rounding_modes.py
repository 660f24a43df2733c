"""How a thread computes with floating point is for an application to say. It changes no byte of a
file and no number that is read."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys

import msgspec
import numpy as np
import pytest
import torch
from container.test_grids_in_files import small
from predictive_profiles import SHAPES, encode, kinds, random_profile, with_rope
from support import (
    CODECS,
    UNLIKE_DTYPES,
    assert_same,
    cache_like,
    make_snapshot,
    random_bits,
    rotated,
)

import kvzip
from kvzip.codecs import _native
from kvzip.grids import find
from kvzip.parsing import from_json, from_toml
from kvzip.selftest import instructions

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="numbers of rounding modes are glibc's"
)


def modes():
    """Down, up and to zero: of x86, then of Arm."""
    if sys.platform != "linux":
        return []
    libm = ctypes.CDLL("libm.so.6")
    found = [
        m for m in (0x400, 0x800, 0xC00, 0x400000, 0x800000, 0xC00000) if not libm.fesetround(m)
    ]
    libm.fesetround(0)
    return found


@contextlib.contextmanager
def rounding(mode):
    libm = ctypes.CDLL("libm.so.6")
    libm.fesetround(mode)
    try:
        yield
        assert libm.fegetround() == mode
    finally:
        libm.fesetround(0)


@contextlib.contextmanager
def flushed():
    """Subnormal numbers count as 0, and none comes about."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        yield
        assert not float(np.float64(5e-324) * np.float64(1.0))
    finally:
        torch.set_flush_denormal(False)


WAYS = {hex(mode): lambda mode=mode: rounding(mode) for mode in modes()} | {"flushed": flushed}


@pytest.fixture(params=WAYS)
def other(request):
    """A context of another way to compute."""
    return WAYS[request.param]


@pytest.fixture(params=instructions())
def simd(request):
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


def check(other, snapshot, codec, profile=None, make=kvzip.encode, **options):
    """The same file, and the same numbers of it, however either side computes."""
    expected = make(snapshot, codec, profile, **options)
    first = snapshot.layers[0].layout.first
    tokens = first + 3, first + 80
    with other():
        found = make(snapshot, codec, profile, **options)
        again = kvzip.decode(found, profile, threads=2)
        with kvzip.open(expected, profile) as reader:
            part, layer = reader.tokens(*tokens), reader.layer(1)
    assert found == expected
    assert_same(again, snapshot)
    assert_same(kvzip.decode(expected, profile), snapshot)
    with kvzip.open(expected, profile) as reader:
        assert_same(part, reader.tokens(*tokens))
    assert np.array_equal(layer.k, snapshot.layers[1].k)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.drawn(2)
def test_codecs(codec, other):
    for dtype in UNLIKE_DTYPES:
        for maker in (cache_like, random_bits):
            check(other, make_snapshot(maker, 1, dtype, tokens=90), codec, threads=1)


def test_tables_and_keys_before_rope(other, simd):
    check(other, rotated(1, first=100), "channel", threads=2)
    learned = [rotated(2), rotated(3)]
    profile = kvzip.Profile.fit(learned, codec="channel")
    with other():
        again = kvzip.Profile.fit(learned, codec="channel")
    assert again.id == profile.id
    check(other, rotated(1), "channel", profile)


def turned(rounds, first=100_000, tokens=150):
    """Far from the first token, where an angle tells most of a frequency's last bit."""
    radians = (10_000.0 ** (-np.arange(32) / 32)).astype(np.float32)[[3, 5, 7]]
    rng, rotation, layers = np.random.default_rng(1), _native.Rotation(radians), []
    for (heads, dim), values in SHAPES:
        k = cache_like(rng, "bf16", (1, heads, tokens, dim))
        rotation.turn(k, first, rounds)
        layers.append((k, cache_like(rng, "bf16", (1, values[0], tokens, values[1]))))
    origin = kvzip.Origin(rope=({"inv_freq": [float(f) for f in radians]},))
    return with_rope(layers, rng.integers(0, 300, (1, first + tokens)), origin, first=first)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.drawn(2)
def test_predictive(other, simd, rounds, monkeypatch):
    """With a model that is made under either way to compute, too."""
    snapshot = turned(rounds)

    def profile():
        return random_profile(1, SHAPES, lanes=2, pairs=3, regions=2, tables=(2, 1, 2))

    def make(snapshot, codec, given, **options):
        return encode(snapshot, profile(), monkeypatch, **options)

    assert kinds(make(snapshot, None, None), profile())[0, "k"] == {4}
    check(other, snapshot, "predictive", profile(), make, block_tokens=60)
    with other():
        assert_same(kvzip.decode(make(snapshot, None, None), profile()), snapshot)
        assert_same(
            kvzip.decode(kvzip.encode(snapshot, "predictive", profile()), profile()), snapshot
        )


def test_grids(other):
    snapshot = small()
    check(other, snapshot, "channel")
    for layer in snapshot.layers:
        expected = find(layer.k, "bf16")
        with other():
            found = find(layer.k, "bf16")
        assert found.grid == expected.grid
        for a, b in ((found.codes, expected.codes), (found.scales, expected.scales)):
            assert np.array_equal(a, b)


def test_numbers_in_headers(other):
    """The nearest to what is written, as Python reads them by default."""
    draw = random.Random(1)
    numbers = [float(np.float32(10_000.0 ** (-i / 64))) for i in range(64)]
    numbers += [draw.random() * 10.0 ** draw.randint(-300, 300) for _ in range(1000)]
    text, blob = msgspec.json.encode(numbers), kvzip.encode(rotated(1), "raw")
    with other():
        found, of_toml = from_json(text), from_toml(b"numbers = " + text)
        typed = from_json(text, list[float])
        origin = kvzip.info(blob).header.origin
    assert found == typed == of_toml["numbers"] == numbers
    assert origin == rotated(1).origin
