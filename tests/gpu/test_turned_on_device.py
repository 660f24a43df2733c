"""Keys that `channel` codes as they were before RoPE: turned on a device with the CPU's bits."""

from __future__ import annotations

import itertools
import random
import struct

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from predictive_profiles import encode, random_profile
from support import cache_like, random_bits
from test_damage_on_device import outcome
from test_on_device import assert_layers, bits_of

import kvzip
from kvzip.codecs import _native
from kvzip.codecs.channel import codec, gpu_rotation
from kvzip.codecs.channel.blocks import UNTURNED
from kvzip.codecs.channel.codec import ChannelCodec
from kvzip.codecs.common import device_angles
from kvzip.codecs.common.rotation import ROUNDINGS
from kvzip.codecs.native.cuda.work import Block, Slot, Target, Work
from kvzip.container import on_device

CODEC = "channel:keys=before_rope"
SHAPES = [(64, 32), (128, 64), (128, 16), (48, 24), (20, 5), (7, 3), (2, 1), (96, 44)]
"""Numbers of a head, and pairs that are turned: all, some, and where eight lie side by side."""


def before_rope(rng, shape):
    """Keys whose channels differ much, so that turning mixes them."""
    wide = rng.standard_normal(shape).astype(np.float32)
    wide *= np.exp2(rng.integers(-6, 6, (1, *shape[1:2], 1, shape[3]))).astype(np.float32)
    return (wide.view(np.uint32) >> 16).astype(np.uint16)


def turned(
    seed,
    dim,
    pairs,
    rounding=1,
    heads=2,
    tokens=150,
    batch=None,
    layers=2,
    first=0,
    exceptions=0.002,
):
    """A snapshot whose keys RoPE has turned; so many of all pairs are of any bits instead. `first`:
    the position of the first token."""
    rng = np.random.default_rng(seed)
    frequencies = (1e4 ** -(np.arange(pairs) / pairs)).astype(np.float32)
    rotation = _native.Rotation(frequencies, 1.25)
    found = []
    for _ in range(layers):
        k = before_rope(rng, (batch or 1, heads, tokens, dim))
        rotation.turn(k, first, rounding)
        rare = rng.random((*k.shape[:3], pairs)) < exceptions
        numbers = k[..., : 2 * pairs]
        apart = numbers[..., :pairs], numbers[..., pairs:]
        for half in apart if rounding <= 3 else (numbers[..., ::2], numbers[..., 1::2]):
            half[rare] = random_bits(rng, "bf16", k.shape)[..., :pairs][rare]
        v = cache_like(rng, "bf16", k.shape)
        if batch is None:
            k, v = k[0], v[0]
        kind = ("full", None) if not first else ("sliding", tokens + 1)
        layout = kvzip.LayerLayout.of_kv(
            k.shape, v.shape, "bf16", first + tokens, *kind, rope=len(found) % 2
        )
        found.append(kvzip.Layer.of_kv(k, v, layout))
    rope = {"inv_freq": frequencies.tolist(), "attention_scaling": 1.25}
    # Every other layer of a kind of its own, though they are alike.
    origin = kvzip.Origin(rope=(rope, rope | {"rope_type": "another"}))
    return kvzip.Snapshot(found, "bf16", origin=origin)


def kinds(blob):
    """What the stored blocks begin with, by their parts."""
    found: dict[str, list[int]] = {"k": [], "v": []}
    with kvzip.open(blob) as reader:
        for key, rows in reader.index.rows.items():
            found[key[1]] += [blob[reader.index.offset[row]] for row in rows[1:]]
    return found


def encoded(snapshot, block_tokens=64):
    blob = kvzip.encode(snapshot, CODEC, block_tokens=block_tokens, threads=1)
    found = kinds(blob)
    assert set(found["k"]) == {UNTURNED} and UNTURNED not in found["v"]
    assert_layers(kvzip.decode(blob), snapshot.layers)
    return blob


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("dim", "pairs"), SHAPES)
@pytest.mark.drawn(4)
def test_keys_come_back(device, shuffled, dim, pairs, rounding):
    """Whole, and in ranges that cut blocks."""
    heads = 8 if dim < 48 else 2
    snapshot = turned(dim, dim, pairs, rounding, heads, 150)
    blob = encoded(snapshot)
    for where in (device, shuffled):
        assert_layers(kvzip.decode(blob, device=where), snapshot.layers)
    for span in ((0, 64), (5, 149), (64, 65)):
        assert_layers(kvzip.decode(blob, device=device, tokens=span), snapshot.layers, span)
    with kvzip.open(blob) as reader:
        assert_layers(reader.decode(layers=[1], device=device), snapshot.layers[1:])


def test_batches_and_positions(device, shuffled, monkeypatch):
    """Of windows far into a sequence, too; angles that are brought in pieces, and for which there
    is hardly room."""
    monkeypatch.setattr(gpu_rotation, "_PAIRS", 100)
    monkeypatch.setattr(gpu_rotation, "_EXCEPTIONS", 3)
    monkeypatch.setattr(on_device, "PIECE", 5000)
    for n, (where, together) in enumerate(itertools.product((device, shuffled), (7, 60, 1000))):
        kept = (0, 20000)[n % 2]  # each with each of the other two
        monkeypatch.setattr(device_angles, "_TOGETHER", together * 16)
        monkeypatch.setattr(device_angles, "_KEPT_BYTES", kept)
        where.cache.pop("angles", None)  # of other pieces
        for batch, first, rounding in ((None, 5003, 1), (2, 0, 1), (2, 0, 6)):
            snapshot = turned(together, 32, 16, rounding, 3, 99, batch, 3, first, 0.001)
            blob = encoded(snapshot, 33)
            assert_layers(kvzip.decode(blob, device=where), snapshot.layers)
            span = first + 20, first + 90
            part = kvzip.decode(blob, device=where, tokens=span)
            assert_layers(part, snapshot.layers, span)
        angles = where.cache["angles"].values()
        assert len(angles) == 1 or sum(memory.size for memory in angles) <= kept
    where.cache.pop("angles")


def test_angles_of_many_positions():
    rotation = _native.Rotation(np.array([1, 0.3, 1e-3], np.float32), 0.5)
    found = rotation.angles_of(70_000, 50)
    assert found.shape == (50, 2, 3) and rotation.angles_of(0, 0).shape == (0, 2, 3)
    for n, angles in enumerate(found):
        assert np.array_equal(angles, rotation.angles_of(70_000 + n, 1)[0])


def test_angles_stay_on_the_device(device):
    """What layers share is brought once, whichever document they are of."""
    device.cache.pop("angles", None)
    blob = encoded(turned(1, 64, 32, tokens=300, layers=4))
    kvzip.decode(blob, device=device)
    before = dict(device.cache["angles"])
    assert len(before) == 1
    kvzip.decode(encoded(turned(2, 64, 32, tokens=200)), device=device)
    assert device.cache["angles"] == before


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("halves", [False, True], ids=["apart", "a key, then its value"])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (20, 5)])
def test_into_pages(device, room, dim, pairs, halves, size):
    rng = np.random.default_rng(size)
    tokens, heads = 150, 2
    snapshot = turned(3, dim, pairs, layers=1, heads=heads, exceptions=0.004)
    blob = encoded(snapshot, 100)
    for span in ((0, tokens), (0, 100), (20, 141)):
        count = -(-tokens // size)
        table = rng.permutation(count + 5)[:count]
        if halves:
            flat, cache = room.tensor((count + 5, heads, size, 2 * dim), 2)
            views = cache.transpose(1, 2)[..., :dim], cache.transpose(1, 2)[..., dim:]
        else:
            flat, cache = room.tensor((2, count + 5, size, heads, dim), 2)
            views = cache[0], cache[1]
        expected = flat.clone()
        for part, view in zip(snapshot.layers[0], views, strict=True):
            target = expected.as_strided(view.shape, view.stride(), view.storage_offset())
            for t in range(*span):
                row = torch.from_numpy(part[:, t].view(np.int16)).to(target.device)
                target[int(table[t // size]), t % size] = row
        kvzip.decode(blob, device=device, out=[views], pages=table, tokens=span)
        assert torch.equal(flat, expected)


def test_a_batch_into_pages(device, room):
    snapshot = turned(4, 32, 16, layers=1, tokens=100, batch=2)
    blob = encoded(snapshot)
    _, cache = room.tensor((2, 20, 16, 2, 32), 2)
    table = np.random.default_rng(1).permutation(20)[:14].reshape(2, 7)
    kvzip.decode(blob, device=device, out=[(cache[0], cache[1])], pages=table)
    for part, found in zip(snapshot.layers[0], cache, strict=True):
        for b in range(2):
            rows = torch.cat([found[int(page)] for page in table[b]])[:100].transpose(0, 1)
            assert np.array_equal(rows.cpu().numpy().view(np.uint16), part[b])


def test_blocks_of_all_kinds(device):
    """Keys before RoPE beside blocks that are stored as they are, in one part, and layers without
    RoPE."""
    rng = np.random.default_rng(5)
    snapshot = turned(5, 64, 32, layers=2, tokens=900, exceptions=0)
    keys = snapshot.layers[0].k
    hard = before_rope(rng, (1, 2, 64, 64))
    # Exponents that are as good as random fit no tables.
    hard = (hard & 0x807F) | (rng.integers(97, 157, hard.shape) << 7).astype(np.uint16)
    rotation = _native.Rotation(np.array(snapshot.origin.rope[0]["inv_freq"], np.float32), 1.25)
    rotation.turn(hard, 64, 1)
    keys[:, 64:128] = hard[0]
    shape = (2, 900, 64)
    layout = kvzip.LayerLayout.of_kv(shape, shape, "bf16", 900)
    plain = kvzip.Layer.of_kv(*(cache_like(rng, "bf16", shape) for _ in range(2)), layout)
    held = kvzip.Snapshot([*snapshot.layers, plain], "bf16", origin=snapshot.origin)
    blob = kvzip.encode(held, CODEC, block_tokens=64, threads=1)
    assert set(kinds(blob)["k"]) == {0, 2, 3}
    assert_layers(kvzip.decode(blob, device=device), held.layers)
    for span in ((60, 70), (100, 300)):
        assert_layers(kvzip.decode(blob, device=device, tokens=span), held.layers, span)


def test_blocks_of_predictive_that_channel_coded(device, monkeypatch):
    """Their keys, too, may be those before RoPE; what follows is predicted from those behind it."""
    snapshot = turned(10, 32, 16, tokens=200, layers=3)
    profile = random_profile(1, [((2, 32), (2, 32))] * 3, pairs=3)
    monkeypatch.setattr(ChannelCodec.__init__, "__defaults__", ("before_rope",))
    plain = {(0, "k"), (0, "v"), (1, "k"), (1, "v"), (2, "k")}
    blob = encode(snapshot, profile, monkeypatch, plain, block_tokens=200)
    with kvzip.open(blob, profile) as reader:
        for row in (rows[1] for key, rows in reader.index.rows.items() if key in plain):
            data = memoryview(blob)[reader.index.offset[row] :]
            tables = int.from_bytes(data[16:20], "little")
            kind = UNTURNED if reader.index.key[row][1] == "k" else 2
            assert (data[0], data[32 + tables + -tables % 16]) == (2, kind)
    assert_layers(kvzip.decode(blob, profile), snapshot.layers)
    assert_layers(kvzip.decode(blob, profile, device=device), snapshot.layers)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_numbers_of_any_size(device, shuffled, room, rounding):
    """Every exponent that keys before RoPE may have, and both zeros, in every pair, at positions
    where cosines and sines are near to nothing, too."""
    rng = np.random.default_rng(9)
    for dim, pairs in ((64, 32), (26, 13)):
        shape = (2, 3, 300, dim)
        keys = random_bits(rng, "bf16", shape)
        exponents = rng.integers(127 - 39, 127 + 60, shape).astype(np.uint16)
        near = rng.random(shape) < 0.5  # sums that cancel
        exponents[near] = 127 + rng.integers(0, 3, shape)[near]
        keys = (keys & 0x807F) | exponents << 7
        keys[rng.random(shape) < 0.1] &= 0x8000
        frequencies = (1e6 ** -(np.arange(pairs) / pairs)).astype(np.float32)
        frequencies[0] = np.float32(np.pi / 2)
        rotation = _native.Rotation(frequencies)
        expected = keys.copy()
        rotation.turn(expected, 1000, rounding)
        for where in (device, shuffled):
            _, there = room.tensor(shape, 2)
            there.copy_(torch.from_numpy(keys.view(np.int16)))
            torch.cuda.synchronize() if room.where == "cuda" else None
            strides = 3 * 300 * dim, 300 * dim, dim
            turn(where, rotation, Target(there.data_ptr(), strides, shape, 0), 1000, rounding)
            found = there.cpu().numpy().view(np.uint16)
            assert np.array_equal(found[..., : 2 * pairs], expected[..., : 2 * pairs])
            assert np.array_equal(found[..., 2 * pairs :], keys[..., 2 * pairs :])


def turn(device, rotation, target, start, rounding):
    """Turns keys where they lie on a device."""
    block = Block(0, 0, 0, 0, 0, target.shape[2], 0)
    with device.current():
        slot, stream = Slot(device), device.stream()
        slot.grow(1 << 16)
        work = Work(slot, 0, 0)
        work.part(target)
        turning = gpu_rotation.Turning(work)
        turning.add(rotation, start, block, rounding, 0)
        turning.run()
        work.finish()
        work.start(stream, stream)
        device.synchronize(device.record(stream))


# --- damage ------------------------------------------------------------------------------------


def with_blocks(monkeypatch, snapshot, change, block_tokens=64):
    """A file whose blocks of keys before RoPE are what `change` makes of them."""
    good, changed = ChannelCodec.encode, []

    def encode(self, block, context):
        data = good(self, block, context)
        if data[0] != UNTURNED:
            return data
        changed.append(data)
        return bytes(change(bytearray(data)))

    with monkeypatch.context() as patched:
        patched.setattr(ChannelCodec, "encode", encode)
        blob = kvzip.encode(snapshot, CODEC, block_tokens=block_tokens, threads=1)
    assert changed
    return blob


def exceptions_of(data):
    """How many there are, and the pairs of them."""
    count = struct.unpack_from("<I", data, 4)[0]
    return count, [struct.unpack_from("<I", data, 16 + 8 * i)[0] for i in range(count)]


def put(at, value, size=4):
    """A change of a few bytes; `at` and `value` may depend on what there is."""

    def change(data):
        pairs = exceptions_of(data)[1]
        place, number = (x(pairs) if callable(x) else x for x in (at, value))
        data[place : place + size] = int(number).to_bytes(size, "little")
        return data

    return change


def counted(difference):
    def change(data):
        data[4:8] = (exceptions_of(data)[0] + difference).to_bytes(4, "little")
        return data

    return change


ALL = 2 * 64 * 32  # pairs of a block below
DAMAGE = {
    "a pair behind the last": put(lambda e: 16 + 8 * (len(e) - 1), ALL),
    "a pair far behind": put(lambda e: 16 + 8 * (len(e) - 1), 2**32 - 1),
    "the first pair out of range": put(16, ALL + 5),
    "a pair twice": put(24, lambda e: e[0]),
    "pairs that fall": put(16, lambda e: e[1] + 1),
    "another pair": put(16, lambda e: e[0] + 1 if e[0] + 1 < e[1] else e[1] - 1),
    "other numbers": put(20, 0x7F807FC0),
    "no such rounding": put(1, 7, 1),
    "no rounding": put(1, 0, 1),
    "the other rounding": put(1, 2, 1),
    "cosines of float32": put(1, 3, 1),
    "pairs side by side": put(1, 4, 1),
    "a head that is not zeros": put(2, 1, 1),
    "its end not zeros": put(15, 1, 1),
    "too few exceptions": counted(-1),
    "one more": counted(1),
    "none": lambda d: d[:4] + bytes(4) + d[8:],
    "more than there are bytes": put(4, 2**29),
    "as many as can be": put(4, 2**32 - 1),
    "cut behind the head": lambda d: d[:16],
    "cut in the exceptions": lambda d: d[:28],
    "cut behind them": lambda d: d[: 16 + -(-8 * exceptions_of(d)[0] // 16) * 16],
    "cut at its end": lambda d: d[:-16],
    "in itself": lambda d: d[:16] + d,
    "numbers as they are within": lambda d: d[:4] + bytes(28) + bytes(2 * 64 * 64 * 2),
    "of a time before": lambda d: d[:4] + bytes(12) + b"\1" + d[17:],
}


@pytest.fixture(scope="module")
def odd():
    """Of which each block has an odd number of exceptions, and three at least."""
    snapshot = turned(6, 64, 32, layers=1, tokens=128, exceptions=0)
    for block in (0, 64):
        for n in range(5):
            snapshot.layers[0].k[n % 2, block + 11 * n + 3, 2 * n : 64 : 32] = 0x7FC0 + n
    counts = []
    blob = encoded(snapshot)
    with kvzip.open(blob) as reader:
        for row in reader.index.rows[0, "k"][1:]:
            at = reader.index.offset[row]
            counts.append(exceptions_of(blob[at : at + reader.index.length[row]])[0])
    assert counts == [5, 5]
    return snapshot


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told(device, shuffled, room, odd, monkeypatch, what):
    """As the CPU tells it; behind true checksums of what is stored. Nothing else is written."""
    bad = with_blocks(monkeypatch, odd, DAMAGE[what])
    told = outcome(bad)
    newer = what in ("no such rounding", "no rounding")
    expected = kvzip.UnsupportedError if newer else kvzip.CorruptError
    assert told is not None and told[0] is expected
    assert outcome(bad, device=device) == told
    assert outcome(bad, device=shuffled) == told
    flat, cache = room.tensor((2, 12, 16, 2, 64), 2)
    before, table = flat.clone(), [4, 1, 6, 0, 3, 9, 11, 8]
    assert outcome(bad, device=device, out=[(cache[0], cache[1])], pages=table) == told
    same = torch.ones_like(flat, dtype=torch.bool)
    mine = same.as_strided(cache.shape, cache.stride(), cache.storage_offset())
    mine[:, table] = False
    assert torch.equal(flat[same], before[same])


@pytest.mark.parametrize("size", [1, 2, 12, 16, 20])
def test_blocks_of_little_more_than_a_head(device, monkeypatch, size):
    """Which only blocks of few numbers may be."""
    few = turned(9, 64, 32, heads=1, layers=1, tokens=200, exceptions=0)
    bad = with_blocks(monkeypatch, few, lambda data: data[:size], 8)
    told = outcome(bad)
    assert told is not None and told[0] is kvzip.CorruptError
    assert outcome(bad, device=device) == told


def test_damage_anywhere(device, shuffled, odd, monkeypatch):
    """A bit, or some bytes, of what stands before the coded block and in it."""
    draw = random.Random(7)

    def change(data):
        end = draw.choice([16, 64, len(data)])
        for _ in range(draw.choice([1, 1, 5])):
            data[draw.randrange(1, end)] ^= 1 << draw.randrange(8)
        return data

    for n in range(60):
        bad = with_blocks(monkeypatch, odd, change)
        assert outcome(bad, device=(device, shuffled)[n % 2]) == outcome(bad)


def test_any_exceptions_are_put_in(device, odd, monkeypatch):
    """All pairs of a block can be exceptions: of whatever bits, the last one too."""
    rng = np.random.default_rng(8)
    keys = random_bits(rng, "bf16", (2, 128, 64))
    blocks = iter((keys[:, :64], keys[:, 64:]))

    def change(data):
        block = next(blocks)
        found = np.zeros(ALL, [("pair", "<u4"), ("numbers", "<u2", 2)])
        found["pair"] = np.arange(ALL)
        found["numbers"][:, 0] = block[..., :32].reshape(-1)
        found["numbers"][:, 1] = block[..., 32:].reshape(-1)
        count = exceptions_of(data)[0]
        coded = data[16 + -(-8 * count // 16) * 16 :]
        return data[:4] + ALL.to_bytes(4, "little") + bytes(8) + found.tobytes() + coded

    bad = with_blocks(monkeypatch, odd, change)  # its checksums are of the keys of before
    out = [torch.zeros(2, 128, 64, dtype=torch.int16) for _ in range(2)]
    where = "cuda" if device.kind == "cuda" else "cpu"
    out = [tensor.to(where) for tensor in out]
    told = outcome(bad, device=device, out=[tuple(out)])
    assert told == outcome(bad) and told[0] is kvzip.CorruptError
    assert np.array_equal(bits_of(out[0]).view(np.uint16), keys)


@pytest.mark.parametrize(
    "rope",
    [
        (),
        ({},),
        ({"rope_theta": "much"},),
        ({"inv_freq": [2.0**200] * 32},),
        ({"inv_freq": [0.5] * 7},),
        ({"rope_theta": 1e4},),
    ],
    ids=["nothing", "no parameters", "no number", "not finite", "fewer pairs", "others"],
)
def test_a_header_that_does_not_say_how_keys_are_turned(device, odd, monkeypatch, rope):
    """Keys before RoPE in a file whose parameters are none, or others."""
    true, found = odd.origin, codec.unturned
    other = kvzip.Snapshot(odd.layers, "bf16", origin=kvzip.Origin(rope=rope))
    with monkeypatch.context() as patched:
        patched.setattr(
            codec, "unturned", lambda part, context: found(part, replace(context, origin=true))
        )
        bad = kvzip.encode(other, CODEC, block_tokens=64, threads=1)
    assert UNTURNED in kinds(bad)["k"]
    told = outcome(bad)
    assert told is not None and told[0] is kvzip.CorruptError
    assert outcome(bad, device=device) == told
