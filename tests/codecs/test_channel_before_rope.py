"""Keys that `channel` codes as they were before RoPE: against the spec, on every set of
instructions, in every layout, and damaged."""

from __future__ import annotations

import ctypes
import struct
import sys

import channel_reference
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import assert_same, cache_like, examples, random_bits, reseal

import kvzip
from kvzip import dtypes
from kvzip.codecs import _native
from kvzip.selftest import instructions
from kvzip.snapshot import Layer

ROUNDINGS = (1, 2, 3, 4, 5, 6)
CODEC = kvzip.get_codec("channel:keys=before_rope")
FORM = dtypes.get("bf16")


def radians(pairs, theta=10_000.0):
    return (theta ** (-np.arange(pairs) / pairs)).astype(np.float32)


def before(rng, shape):
    return cache_like(rng, "bf16", shape)


def snapshot_of(keys, first=0, frequencies=None, rounding=1, values=None, **parameters):
    """A snapshot of one layer of keys before RoPE, [batch, heads, tokens, dim], as a model caches
    them behind `first` tokens that are gone."""
    frequencies = radians(keys.shape[3] // 2) if frequencies is None else frequencies
    scale = parameters.get("attention_scaling", 1.0)
    turned = keys.copy()
    _native.Rotation(np.asarray(frequencies, np.float32), scale).turn(turned, first, rounding)
    return cached(turned, first, frequencies, values, **parameters)


def cached(keys, first, frequencies, values=None, **parameters):
    values = keys if values is None else values
    tokens = keys.shape[2]
    kind = ("sliding", tokens) if first else ("full", None)
    form = kvzip.LayerLayout.of_kv(keys.shape, values.shape, "bf16", first + tokens, *kind, 0)
    rope = {"inv_freq": [float(f) for f in frequencies], **parameters}
    ids = np.zeros((keys.shape[0], first + tokens), int)
    return kvzip.Snapshot(
        [Layer.of_kv(keys, values, form)], "bf16", ids, kvzip.Origin(model="m", rope=(rope,))
    )


def modes(blob):
    """The first bytes of the blocks of keys."""
    with kvzip.open(blob) as reader:
        index = reader.index
        return [blob[index.offset[row]] for row in index.rows[0, "k"][1:]]


# --- the arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_turning_is_what_the_spec_says(rounding):
    rng = np.random.default_rng(rounding)
    frequencies = radians(20)
    for level in instructions():
        _native.set_simd(level)
        for scale in (1.0, 1.25):
            keys = before(rng, (1, 2, 3, 44))
            expected = channel_reference.turn(keys, 5000, frequencies, rounding, scale)
            _native.Rotation(frequencies, scale).turn(keys, 5000, rounding)
            assert np.array_equal(keys, expected)


@pytest.mark.parametrize("theta", [1e2, 1e4, 5e8])
def test_angles_are_those_of_cosine_and_sine(theta):
    frequencies = radians(64, theta)
    rotation = _native.Rotation(frequencies)
    for position in (0, 1, 2, 1000, 32_767, 1_000_003, 16_777_215):
        expected = [channel_reference.angles(position, f) for f in frequencies]
        bits = np.array(expected, np.float32).view(np.uint32).T >> 16
        assert np.array_equal(rotation.angles_of(position, 1)[0], bits)
        if position < 2**20:  # beyond, float32 shows what Pi's parts lack
            wide = [channel_reference.angles(position, f, wide=True) for f in frequencies]
            assert np.array_equal(rotation.wide_angles_of(position, 1)[0], np.array(wide).T)


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of rounding modes are glibc's")
def test_a_threads_rounding_mode_changes_nothing():
    libm = ctypes.CDLL("libm.so.6")
    keys, frequencies = before(np.random.default_rng(3), (1, 2, 300, 64)), radians(32)

    def found(mode):
        rotation = _native.Rotation(frequencies)
        turned, back = keys.copy(), keys.copy()
        libm.fesetround(mode)
        try:
            rotation.turn(turned, 1000, 1)
            rotation.unturn(keys, 1000, 1, back, keys.size)
            angles = rotation.angles_of(1000, 1)[0]
            left = libm.fegetround()
        finally:
            libm.fesetround(0)
        assert left == mode
        return turned, back, angles

    # Down, up and to zero: of x86, then of Arm.
    others = [m for m in (0x400, 0x800, 0xC00, 0x400000, 0x800000) if not libm.fesetround(m)]
    libm.fesetround(0)
    for mode in others:
        for result, expected in zip(found(mode), found(0), strict=True):
            assert np.array_equal(result, expected)


@examples(100)
@given(st.data())
def test_what_was_turned_is_found(data):
    """Nearly always: where no number is found, another pair was cached; what is found turns to the
    keys, on every set of instructions to the same."""
    heads, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    pairs, rest = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 3))
    first = data.draw(st.sampled_from([0, 1, 250, 100_000]))
    rounding = data.draw(st.sampled_from(ROUNDINGS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    keys = before(rng, (1, heads, tokens, 2 * pairs + rest))
    rotation = _native.Rotation(radians(pairs))
    rotation.turn(keys, first, rounding)
    found = []
    for level in instructions():
        _native.set_simd(level)
        out = keys.copy()
        missing = rotation.unturn(keys, first, rounding, out, keys.size)
        again = out.copy()
        rotation.turn(again, first, rounding)
        wrong = (by_pairs(again, pairs, rounding) != by_pairs(keys, pairs, rounding)).any(1)
        assert set(np.flatnonzero(wrong)) <= set(missing.tolist())
        assert np.array_equal(out[..., 2 * pairs :], keys[..., 2 * pairs :])
        assert len(missing) <= 2 + heads * tokens * pairs // 500
        found.append((out.tobytes(), missing.tobytes()))
    assert len(set(found)) == 1


def test_there_are_no_more_pairs_than_a_search_can_number():
    """They have a number of 16 bits; the last of as many as there may be is found at its place."""
    with pytest.raises(ValueError, match="more than 65,535 pairs"):
        _native.Rotation(radians(65536))
    pairs = 65535
    keys = before(np.random.default_rng(6), (1, 1, 2, 2 * pairs))
    rotation = _native.Rotation(radians(pairs))
    for rounding in ROUNDINGS:
        turned, out = keys.copy(), np.empty_like(keys)
        rotation.turn(turned, 0, rounding)
        missing = rotation.unturn(turned, 0, rounding, out, keys.size)
        assert len(missing) <= 2 * pairs // 500
        rotation.turn(out, 0, rounding)
        wrong = (by_pairs(out, pairs, rounding) != by_pairs(turned, pairs, rounding)).any(1)
        assert set(np.flatnonzero(wrong)) <= set(missing.tolist())


def by_pairs(keys, pairs, rounding):
    """The numbers that are turned, [all pairs, 2]."""
    turned = keys[..., : 2 * pairs]
    if rounding > 3:
        return turned.reshape(-1, 2)
    return turned.reshape(*keys.shape[:-1], 2, pairs).swapaxes(-1, -2).reshape(-1, 2)


@examples(50)
@given(st.integers(0, 2**32), st.sampled_from(ROUNDINGS), st.sampled_from([9, 70]))
def test_whatever_the_bits_are(seed, rounding, tokens):
    """NaN, infinities and the smallest numbers are none that anything turns to: what processors
    could differ in is left out. Of 70 tokens more pairs than wait together are tried again."""
    rng = np.random.default_rng(seed)
    keys = random_bits(rng, "bf16", (1, 2, tokens, 40))
    keys[..., ::3] = rng.choice(np.array([0, 0x8000, 1, 0x7F80, 0xFFC0, 0x7F, 0x80], np.uint16))
    rotation, outs = _native.Rotation(radians(20)), []
    for level in instructions():
        _native.set_simd(level)
        out = keys.copy()
        missing = rotation.unturn(keys, 3, rounding, out, keys.size)
        turned = out.copy()
        rotation.turn(turned, 3, rounding)
        same = (by_pairs(turned, 20, rounding) == by_pairs(keys, 20, rounding)).all(1)
        found = np.setdiff1d(np.arange(len(same)), missing.astype(int))
        assert same[found].all()
        exponents = by_pairs(out, 20, rounding)[found] >> 7 & 0xFF
        assert ((exponents == 0) | ((exponents >= 127 - 40) & (exponents < 127 + 60))).all()
        outs.append(missing.tobytes())
    assert len(set(outs)) == 1


@pytest.mark.parametrize("rounding", [1, 2, 3])
@pytest.mark.parametrize(("pairs", "rest"), [(1, 0), (7, 3), (16, 0), (33, 1), (64, 0)])
def test_pairs_side_by_side_are_the_same_pairs_elsewhere(pairs, rest, rounding):
    """Once numbers have changed places they are turned to the same, and the same are found."""
    rng = np.random.default_rng(pairs)
    apart = before(rng, (1, 2, 30, 2 * pairs + rest))
    order = np.arange(2 * pairs + rest)
    order[: 2 * pairs] = order[: 2 * pairs].reshape(2, pairs).T.reshape(-1)
    side = np.ascontiguousarray(apart[..., order])
    rotation = _native.Rotation(radians(pairs))
    for level in instructions():
        _native.set_simd(level)
        keys = [apart.copy(), side.copy()]
        for turned, how in zip(keys, (rounding, rounding + 3), strict=True):
            rotation.turn(turned, 9, how)
        assert np.array_equal(keys[0][..., order], keys[1])
        keys[0][0, 0, ::5, 0] = 0x7F80  # nothing turns to infinity
        keys[1][...] = keys[0][..., order]
        outs = [turned.copy() for turned in keys]
        found = [
            rotation.unturn(turned, 9, how, out, turned.size)
            for turned, how, out in zip(keys, (rounding, rounding + 3), outs, strict=True)
        ]
        assert len(found[0]) >= 6 and np.array_equal(*found)
        assert np.array_equal(outs[0][..., order], outs[1])


def test_it_gives_up_where_too_many_are_missing():
    rng = np.random.default_rng(3)
    keys = random_bits(rng, "bf16", (1, 2, 40, 64))
    rotation, out = _native.Rotation(radians(32)), np.empty_like(keys)
    for rounding in ROUNDINGS:
        assert rotation.unturn(keys, 0, rounding, out, 20) is None


@pytest.mark.parametrize(
    ("frequencies", "call"),
    [
        (4, lambda r, k: r.turn(k[..., :7], 0, 1)),
        (4, lambda r, k: r.turn(k, 0, 7)),
        (4, lambda r, k: r.unturn(k, 0, 0, k.copy(), 1)),
        (4, lambda r, k: r.unturn(k, 0, 1, k[:, :1].copy(), 1)),
        (5, lambda r, k: r.turn(k, 0, 1)),
    ],
)
def test_arguments_that_do_not_fit(frequencies, call):
    keys = np.zeros((1, 2, 3, 8), np.uint16)
    with pytest.raises((ValueError, TypeError)):
        call(_native.Rotation(radians(frequencies)), keys)


# --- files -------------------------------------------------------------------------------------

SHAPES = [
    ((1, 2, 300, 64), 0),  # several blocks
    ((1, 3, 130, 128), 0),  # pairs of different strips
    ((2, 2, 90, 48), 0),  # a batch, pairs that fill no vector
    ((1, 2, 200, 64), 777),  # behind a window
    ((1, 1, 129, 96), 131_000),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("shape", "first"), SHAPES)
@pytest.mark.drawn(2)
def test_a_decoder_written_from_the_spec_reads_real_blocks(shape, first, rounding):
    rng = np.random.default_rng(5)
    frequencies = radians(shape[3] // 2)
    snapshot = snapshot_of(before(rng, shape), first, frequencies, rounding)
    snapshot.layers[0].k[0, 0, ::50, 1] ^= 0x1040
    blob = kvzip.encode(snapshot, CODEC, block_tokens=128)
    assert_same(kvzip.decode(blob), snapshot)
    assert 3 in modes(blob)  # a second block of few tokens takes less as it is
    with kvzip.open(blob) as reader:
        index = reader.index
        rows = index.rows[0, "k"]
        stored = [blob[index.offset[row] : index.offset[row] + index.length[row]] for row in rows]
        channels = channel_reference.tables(stored[0], shape[1], shape[3], FORM)
        for row, data in list(zip(rows, stored, strict=True))[1:3]:
            begin, tokens = index.position[row], index.tokens[row]
            of = (shape[0], shape[1], tokens, shape[3])
            keys = channel_reference.decode_keys(data, channels, of, FORM, begin, frequencies)
            expected = snapshot.layers[0].block("k")[:, :, begin - first : begin - first + tokens]
            assert np.array_equal(keys, expected)


@pytest.mark.parametrize("rounding", [1, 4])
@pytest.mark.parametrize(("shape", "first"), SHAPES)
def test_parts_of_it_in_any_order(shape, first, rounding):
    rng = np.random.default_rng(6)
    snapshot = snapshot_of(before(rng, shape), first, rounding=rounding)
    snapshot.layers[0].k[0, 0, ::40, 2] ^= 0x2222
    blob = kvzip.encode(snapshot, CODEC, block_tokens=64)
    whole = snapshot.layers[0].block("k")
    with kvzip.open(blob) as reader:
        for begin, stop in [(0, 5), (60, 70), (shape[2] - 3, shape[2]), (10, 90)]:
            part = reader.decode(tokens=(first + begin, first + stop)).layers[0].block("k")
            assert np.array_equal(part, whole[:, :, begin:stop])


@pytest.mark.parametrize("rounding", [1, 5])
def test_into_any_strides(rounding):
    rng = np.random.default_rng(7)
    snapshot = snapshot_of(before(rng, (1, 3, 400, 64)), rounding=rounding)
    blob = kvzip.encode(snapshot, CODEC, block_tokens=64)
    k = np.zeros((1, 400, 3, 64), np.uint16).transpose(0, 2, 1, 3)
    odd = np.zeros((1, 3, 400, 128), np.uint16)[..., ::2]
    for to in (k, odd):
        to[...] = 0
        kvzip.decode(blob, out=[(to, np.empty((1, 3, 400, 64), np.uint16))])
        assert np.array_equal(to, snapshot.layers[0].k)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_it_takes_less(rounding):
    """Of keys with a mean that is theirs, as real ones have them."""
    rng = np.random.default_rng(8)
    snapshot = snapshot_of(before(rng, (1, 4, 1000, 64)), rounding=rounding)
    cached = len(kvzip.encode(snapshot, "channel:keys=cached"))
    assert len(kvzip.encode(snapshot, CODEC)) < 0.99 * cached


@pytest.mark.parametrize("tokens", [1, 2, 16, 40, 128])
@pytest.mark.parametrize("rounding", [1, 6])
def test_few_tokens(tokens, rounding):
    rng = np.random.default_rng(tokens)
    snapshot = snapshot_of(before(rng, (1, 4, tokens, 64)), rounding=rounding)
    blob = kvzip.encode(snapshot, CODEC)
    assert_same(kvzip.decode(blob), snapshot)
    assert len(blob) <= len(kvzip.encode(snapshot, "channel:keys=cached")) + 64


def otherwise(kind):
    """Keys that the origin's RoPE did not turn, or not there."""
    rng = np.random.default_rng(9)
    shape = (1, 2, 200, 64)
    keys = before(rng, shape)
    if kind == "never turned":
        return cached(keys, 0, radians(32))
    if kind == "another theta":
        turned = snapshot_of(keys, 0, radians(32, 500_000.0)).layers[0].k
        return cached(turned, 0, radians(32))
    if kind == "padded on the left":
        turned = snapshot_of(keys, 0).layers[0].k
        return cached(np.roll(turned, 5, 2), 0, radians(32))
    turned = snapshot_of(keys, 0, attention_scaling=1.5).layers[0].k
    return cached(turned, 0, radians(32))


@pytest.mark.parametrize(
    "kind", ["never turned", "another theta", "padded on the left", "another scale"]
)
def test_keys_that_were_turned_otherwise_are_coded_as_they_are(kind):
    snapshot = otherwise(kind)
    blob = kvzip.encode(snapshot, CODEC)
    assert set(modes(blob)) == {2}
    assert_same(kvzip.decode(blob), snapshot)


def test_a_model_that_scales_its_angles():
    rng = np.random.default_rng(10)
    snapshot = snapshot_of(before(rng, (1, 2, 150, 64)), attention_scaling=1.1386)
    blob = kvzip.encode(snapshot, CODEC)
    assert set(modes(blob)) == {3}
    assert_same(kvzip.decode(blob), snapshot)


@pytest.mark.parametrize("rounding", [1, 5])
@pytest.mark.parametrize("pairs", [32, 20])
def test_any_bits_come_back(pairs, rounding):
    rng = np.random.default_rng(11)
    for share in (0.001, 0.02, 1.0):
        keys = before(rng, (1, 2, 150, 64))
        snapshot = snapshot_of(keys, 0, radians(pairs), rounding)
        keys = snapshot.layers[0].k
        some = rng.random(keys.shape) < share
        keys[some] = random_bits(rng, "bf16", (1, 1, 1, int(some.sum())))[0, 0, 0]
        blob = kvzip.encode(snapshot, CODEC, block_tokens=64)
        assert_same(kvzip.decode(blob), snapshot)


# --- damage ------------------------------------------------------------------------------------


def small(rounding=1):
    rng = np.random.default_rng(12)
    snapshot = snapshot_of(before(rng, (1, 1, 140, 16)), rounding=rounding)
    snapshot.layers[0].k[0, 0, [3, 90], 1] ^= 0x4002
    blob = kvzip.encode(snapshot, CODEC)
    assert modes(blob) == [3]
    return snapshot, blob


@pytest.mark.parametrize("rounding", [1, 4])
def test_every_flipped_byte_is_an_error(rounding):
    _, blob = small(rounding)
    for at in range(len(blob)):
        other = bytearray(blob)
        other[at] ^= 1 << at % 8
        with pytest.raises(kvzip.KVZipError):
            kvzip.decode(bytes(other))


def block_of(blob):
    with kvzip.open(blob) as reader:
        row = reader.index.rows[0, "k"][1]
        return reader.index.offset[row], reader.index.length[row]


@pytest.mark.parametrize("rounding", [1, 4])
def test_heads_and_exceptions_that_make_no_sense(rounding):
    """Checksums are made true again, so that the decoder meets it."""
    _, blob = small(rounding)
    at, _ = block_of(blob)
    assert blob[at : at + 2] == bytes([3, rounding])
    count = struct.unpack_from("<I", blob, at + 4)[0]
    assert count == 2
    first, second = struct.unpack_from("<I4xI", blob, at + 16)
    pairs = 140 * 8
    changes = {
        "pairs that lie otherwise": (at + 1, bytes([(rounding + 3) % 6])),
        "zeros": (at + 2, b"\1"),
        "more zeros": (at + 15, b"\1"),
        "one more exception": (at + 4, struct.pack("<I", 3)),
        "one less": (at + 4, struct.pack("<I", 1)),
        "none": (at + 4, struct.pack("<I", 0)),
        "very many": (at + 4, struct.pack("<I", 0xFFFFFFFF)),
        "twice the same": (at + 24, struct.pack("<I", first)),
        "backwards": (at + 16, struct.pack("<I", second + 1)),
        "of no pair": (at + 24, struct.pack("<I", pairs)),
        "far out": (at + 24, struct.pack("<I", 0xFFFFFFFF)),
        "other numbers": (at + 20, b"\1\2\3\4"),
        "a raw block within": (at + 32, b"\0"),
        "keys before RoPE within": (at + 32, b"\3"),
    }
    for name, (where, what) in changes.items():
        other = bytearray(blob)
        other[where : where + len(what)] = what
        with pytest.raises(kvzip.CorruptError):
            kvzip.decode(reseal(other))
            pytest.fail(name)


@pytest.mark.parametrize(
    "rope",
    [
        (),
        ({},),
        ({"inv_freq": "long"},),
        ({"inv_freq": [{}]},),
        ({"inv_freq": [1e300] * 8},),
        ({"inv_freq": [1.0] * 8, "attention_scaling": "x"},),
        ({"inv_freq": [1.0] * 8, "attention_scaling": 1e300},),
        ({"inv_freq": [1e38] * 8},),
        ({"rope_theta": []},),
    ],
)
def test_an_origin_that_says_something_else(rope):
    """In a header that was made true again, or of a writer: an error, and nothing else."""
    snapshot, blob = small()
    origin = msgspec.structs.replace(snapshot.origin, rope=rope)
    with kvzip.open(blob) as reader:
        header = reader.header
    other = msgspec.structs.replace(header, origin=origin)
    with pytest.raises(kvzip.KVZipError):
        kvzip.decode(with_header(blob, other))
    written = kvzip.Snapshot(snapshot.layers, "bf16", snapshot.token_ids, origin)
    assert_same(kvzip.decode(kvzip.encode(written, CODEC)), snapshot)


def with_header(blob, header):
    """The file with another header, everything else where it belongs."""
    from kvzip.container.format import Preamble, packed_start

    preamble = Preamble.read(memoryview(blob))
    begin = 40 + preamble.header_length + preamble.ids_length
    index = np.frombuffer(blob[begin : begin + 48 * preamble.entries], kvzip.container.index.RECORD)
    index = index.copy()
    data = msgspec.json.encode(header)
    ids = blob[begin - preamble.ids_length : begin]
    moved = Preamble(len(data), len(index), len(ids), 0).blocks_at - preamble.blocks_at
    index["offset"] = (index["offset"].astype(np.int64) + moved).astype(np.uint64)
    body = blob[preamble.blocks_at :]
    return packed_start(data, ids, index, len(blob) + moved) + body
