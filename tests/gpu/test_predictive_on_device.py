"""What `predictive` has predicted is decoded on a device bit by bit, whatever a profile holds; and
damage to it is told as by the CPU."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from predictive_profiles import (
    PAIRS,
    SHAPES,
    encode,
    kinds,
    random_profile,
    turned_snapshot,
)
from support import cache_like, random_bits, reseal
from test_on_device import assert_layers

import kvzip
from kvzip.codecs.common.rotation import ROUNDINGS
from kvzip.errors import CorruptError

ALIKE = [((2, 12), (2, 12))] * 3
UNLIKE = [((1, 7), (3, 5)), ((2, 16), (1, 9)), ((1, 7), (3, 5)), ((3, 11), (1, 1))]
"""Heads and dim of keys and of values, layer by layer."""

PROFILES = {
    "plain": {"pairs": 3},
    "many lanes": {"group": 16, "lanes": 8, "pairs": 4, "regions": 3},
    "tables": {"lanes": 2, "pairs": 2, "regions": 2, "tables": (2, 1)},
    "groups of no four": {"group": 6, "lanes": 3, "pairs": 1},
    "one pair": {"group": 2},
    "one group": {"group": 64, "lanes": 16, "pairs": 4, "wild": True},
    "many densities": {"group": 4, "lanes": 2, "pairs": 5, "regions": 5, "wild": True, "kinds": 20},
    "far inputs": {"lanes": 2, "pairs": 2, "regions": 2, "far": True},
    "side by side": {"lanes": 2, "pairs": 3, "side_by_side": True, "regions": 2},
    "wild tables": {"group": 10, "lanes": 5, "tables": (1,), "wild": True},
}
DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")


def document(seed, shapes, dtype="bf16", tokens=77, maker=cache_like, batch=None):
    rng = np.random.default_rng(seed)
    front = () if batch is None else (batch,)
    layers = [
        tuple(maker(rng, dtype, (*front, heads, tokens, dim)) for heads, dim in layer)
        for layer in shapes
    ]
    return kvzip.Snapshot.from_arrays(layers, dtype, rng.integers(0, 300, (*front, tokens)))


def kernels(device):
    return {name for name in getattr(device, "launched", ()) if name.startswith("predictive")}


@pytest.mark.parametrize(("name", "n"), [(name, n) for n, name in enumerate(PROFILES)])
@pytest.mark.parametrize("shapes", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.drawn(2)
def test_any_profile(device, shuffled, monkeypatch, name, n, shapes):
    profile = random_profile(n, shapes, **PROFILES[name])
    for where, dtype, block in ((device, DTYPES[n % 5], 64), (shuffled, DTYPES[(n + 2) % 5], 40)):
        snapshot = document(n, shapes, dtype)
        blob = encode(snapshot, profile, monkeypatch, block_tokens=block)
        assert_layers(kvzip.decode(blob, profile, device=where), snapshot.layers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits_and_blocks_of_every_kind(device, monkeypatch, dtype):
    """What `channel` codes, or what is stored as it is, others are predicted from, too."""
    profile = random_profile(3, ALIKE, group=4, lanes=2, pairs=4, regions=4, tables=(2,))
    for maker, plain in (
        (random_bits, {(0, "v"), (1, "k")}),
        (cache_like, {(0, "k"), (1, "k"), (2, "v")}),
    ):
        snapshot = document(5, ALIKE, dtype, 90, maker)
        blob = encode(snapshot, profile, monkeypatch, plain, block_tokens=50)
        assert_layers(kvzip.decode(blob, profile, device=device), snapshot.layers)


def test_a_batch(device, monkeypatch):
    profile = random_profile(4, ALIKE, group=8, lanes=4, pairs=6, regions=2, tables=(2, 1))
    snapshot = document(6, ALIKE, "bf16", 50, batch=3)
    blob = encode(snapshot, profile, monkeypatch, block_tokens=32)
    assert_layers(kvzip.decode(blob, profile, device=device), snapshot.layers)
    found = kvzip.decode(blob, profile, device=device, tokens=(20, 40))
    assert_layers(found, snapshot.layers, (20, 40))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["many lanes", "tables", "one group", "many densities"])
@pytest.mark.drawn(2)
def test_pairs_before_rope(device, shuffled, monkeypatch, name, rounding):
    """They are turned as they are decoded, and those that nothing turns to stay as they are."""
    settings = PROFILES[name] | {"pairs": PAIRS, "side_by_side": rounding > 3}
    profile = random_profile(9, SHAPES, **settings)
    for where, batch, plain in ((device, None, {(1, "k")}), (shuffled, 2, ())):
        snapshot = turned_snapshot(10, 150, rounding, batch=batch, strange=0.01)
        blob = encode(snapshot, profile, monkeypatch, plain, block_tokens=70)
        assert 4 in set().union(*kinds(blob, profile).values())
        assert_layers(kvzip.decode(blob, profile, device=where), snapshot.layers)
        found = kvzip.decode(blob, profile, device=where, tokens=(60, 100))
        assert_layers(found, snapshot.layers, (60, 100))


def test_pairs_before_rope_that_are_not_the_profiles(device, monkeypatch):
    """They are refused with the same words as on a CPU."""
    profile = random_profile(9, SHAPES, pairs=PAIRS)
    blob = encode(turned_snapshot(10, 60), profile, monkeypatch)
    with kvzip.open(blob, profile) as reader:
        at = reader.index.offset[reader.index.rows[0, "k"][1]] + 2
    assert blob[at] == 1
    bad = reseal(blob[:at] + bytes([4]) + blob[at + 1 :])
    assert outcome(bad, profile, device=device) == outcome(bad, profile)
    assert "not the profile's" in outcome(bad, profile)[1]


def test_pairs_before_rope_that_nothing_turns(device, monkeypatch):
    profile = random_profile(9, SHAPES, pairs=PAIRS)
    blob = encode(turned_snapshot(10, 60), profile, monkeypatch)
    for module in ("rotation", "gpu"):
        monkeypatch.setattr(f"kvzip.codecs.predictive.{module}.rotation_of", lambda *_: None)
    with pytest.raises(CorruptError, match="how they are turned"):
        kvzip.decode(blob, profile, device=device)


# --- requests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile():
    return random_profile(
        7, ALIKE + ALIKE[:2], group=8, lanes=2, pairs=5, regions=3, tables=(2, 1), kinds=4
    )


@pytest.fixture(scope="module")
def snapshot():
    return document(8, ALIKE + ALIKE[:2], "bf16", 140)


@pytest.fixture(scope="module")
def blob(profile, snapshot):
    patch = pytest.MonkeyPatch()
    return encode(snapshot, profile, patch, {(2, "k")}, block_tokens=32)


def test_layers_and_ranges(device, profile, snapshot, blob):
    """Layers before what is asked for are decoded beside, in their order."""
    for layers, tokens in (
        ([4, 0, 2], (0, 140)),
        ([3], (33, 90)),
        ([1, 1], (5, 6)),
        ([2], (0, 0)),
        ([], (0, 140)),
    ):
        with kvzip.open(blob, profile) as reader:
            found = reader.decode(layers=layers, tokens=tokens, device=device)
        assert_layers(found, [snapshot.layers[i] for i in layers], tokens)


def test_progress(device, profile, snapshot, blob):
    seen = []
    with kvzip.open(blob, profile) as reader:
        reader.decode(layers=[4, 1], device=device, progress=seen.append)
        reader.decode(layers=[0, 2, 3], device=device, progress=seen.append)
    assert sum(seen) == snapshot.raw_bytes


def test_layer_after_layer_goes_on_where_it_left_off(device, profile, snapshot, blob):
    """Each block is decoded once, unless what is asked for lies before."""
    with kvzip.open(blob, profile, 1) as reader:

        def launched(layers, tokens=(0, 140)):
            if not hasattr(device, "launched"):
                return None
            device.launched.clear()
            found = reader.decode(layers=layers, tokens=tokens, device=device)
            assert_layers(found, [snapshot.layers[i] for i in layers], tokens)
            return sum(name.startswith("predictive_chain") for name in device.launched)

        counts = [launched([0, 1]), launched([2]), launched([3, 4]), launched([1])]
        assert counts in ([4, 2, 4, 4], [None] * 4)
        assert launched([2]) in (2, None)
        assert launched([3], (40, 100)) in (8, None)  # other blocks
        assert launched([4], (40, 100)) in (2, None)


def test_many_pieces_and_groups(device, shuffled, monkeypatch, profile, snapshot, blob):
    from kvzip.container import on_device

    monkeypatch.setattr(on_device, "PIECE", 1)
    monkeypatch.setattr(on_device, "TOGETHER", 70)
    assert_layers(kvzip.decode(blob, profile, device=device), snapshot.layers)
    with kvzip.open(blob, profile) as reader:
        for i, layer in enumerate(snapshot.layers):
            assert_layers(reader.decode(layers=[i], device=shuffled), [layer])


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8_e5m2"])
def test_into_pages(device, room, monkeypatch, dtype):
    profile = random_profile(9, ALIKE[:2], group=16, lanes=4, pairs=6, regions=2)
    snapshot = document(10, ALIKE[:2], dtype, 100)
    blob = encode(snapshot, profile, monkeypatch, {(1, "k")}, block_tokens=32)
    size, count = 7, 20
    for begin, end in ((0, 100), (30, 90)):
        pages = np.random.default_rng(1).permutation(count)[: -(-end // size)]
        held = [
            room.tensor((2, count, size, 2, 12), layer.k.dtype.itemsize)
            for layer in snapshot.layers
        ]
        before = [flat.clone() for flat, _ in held]
        out = [(cache[0], cache[1]) for _, cache in held]
        kvzip.decode(
            blob, profile, device=device, out=out, pages=pages.tolist(), tokens=(begin, end)
        )
        for (flat, cache), old, layer in zip(held, before, snapshot.layers, strict=True):
            wanted = old.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            for part, target in zip(layer, wanted, strict=True):
                for t in range(begin, end):
                    row = part[:, t].view(flat.cpu().numpy().dtype)
                    target[int(pages[t // size]), t % size] = torch.from_numpy(row.copy()).to(flat)
            assert torch.equal(flat, old)


def test_layers_that_slide(device, monkeypatch):
    """Where a layer lacks a block's tokens, nothing after it is predicted."""
    rng = np.random.default_rng(4)
    profile = random_profile(11, ALIKE, group=8, pairs=4, regions=2)
    held = 90, 41, 90
    layouts = [
        kvzip.LayerLayout.of_kv(
            (2, n, 12), (2, n, 12), "bf16", 90, "full" if n == 90 else "sliding",
            None if n == 90 else n + 1,
        )
        for n in held
    ]  # fmt: skip
    layers = [
        kvzip.Layer.of_kv(cache_like(rng, "bf16", at.k), cache_like(rng, "bf16", at.v), at)
        for at in layouts
    ]
    blob = encode(kvzip.Snapshot(layers, "bf16"), profile, monkeypatch, block_tokens=16)
    assert_layers(kvzip.decode(blob, profile, device=device), layers)
    assert_layers(kvzip.decode(blob, profile, device=device, tokens=(50, 70)), layers, (50, 70))


def test_a_profile_is_brought_once(device, profile, snapshot, blob):
    again = kvzip.Profile._of_bytes(profile._file)
    kvzip.decode(blob, again, device=device)
    (model,) = again.made["predictive on devices"].values()
    kvzip.decode(blob, again, device=device)
    assert list(again.made["predictive on devices"].values()) == [model]
    assert model.nbytes > again.unpacked_bytes / 2


# --- damage ------------------------------------------------------------------------------------


def outcome(blob, profile, **options):
    """The error's kind and words, or None."""
    try:
        kvzip.decode(blob, profile, threads=1, **options)
    except kvzip.KVZipError as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("resealed", [False, True], ids=["as it is", "resealed"])
def test_bytes_that_are_changed(device, shuffled, monkeypatch, resealed):
    """Anywhere in the blocks; headers, states and counts among them."""
    profile = random_profile(12, ALIKE[:2], group=8, lanes=2, pairs=3, regions=2, tables=(1,))
    snapshot = document(13, ALIKE[:2], "fp32", 40)
    blob = encode(snapshot, profile, monkeypatch, {(1, "k")}, block_tokens=24)
    draw = random.Random(2)
    with kvzip.open(blob, profile) as reader:
        index = reader.index
        starts = [index.offset[row] for row in range(len(index)) if index.tokens[row]]
    places = [at + draw.randrange(64) for at in starts for _ in range(2)]
    places += [draw.randrange(starts[0], len(blob)) for _ in range(30)]
    for n, at in enumerate(places):
        flipped = bytearray(blob)
        flipped[at] ^= 1 << draw.randrange(8)
        bad = reseal(bytes(flipped)) if resealed else bytes(flipped)
        where = shuffled if n % 4 == 3 else device
        assert outcome(bad, profile, device=where) == outcome(bad, profile), f"byte {at}"


def test_what_only_a_later_version_knows(device, monkeypatch):
    """A kind of block, and a rounding of keys before RoPE, is told as on a CPU."""
    profile = random_profile(12, ALIKE[:2], group=8, pairs=3)
    blob = encode(document(13, ALIKE[:2], "bf16", 40), profile, monkeypatch, block_tokens=24)
    with kvzip.open(blob, profile) as reader:
        at = reader.index.offset[reader.index.rows[0, "k"][1]]
    for change, words in (
        ({0: 9}, "kind 9"),
        ({0: 4, 2: 7}, "rounding 7"),
        ({0: 4, 2: 0}, "rounding 0"),
    ):
        bad = bytearray(blob)
        for place, value in change.items():
            bad[at + place] = value
        told = outcome(reseal(bytes(bad)), profile)
        assert told[0] is kvzip.UnsupportedError and words in told[1]
        assert outcome(reseal(bytes(bad)), profile, device=device) == told


def test_damage_in_a_layer_that_was_not_asked_for(device, profile, blob):
    with kvzip.open(blob, profile) as reader:
        row = reader.index.rows[1, "v"][2]
        bad = bytearray(blob)
        bad[reader.index.offset[row] + reader.index.length[row] // 2] ^= 0x81
    told = []
    for where in (None, device):
        with kvzip.open(bytes(bad), profile, 1) as reader:
            reader.decode(layers=[0], device=where)
            with pytest.raises(kvzip.CorruptError) as error:
                reader.decode(layers=[4], device=where)
            told.append(str(error.value))
    assert told[0] == told[1] and "tokens 32:64" in told[0]


def test_nothing_is_written_elsewhere(device, room, profile, blob):
    """Whatever streams hold: what lies around the pages stays as it was."""
    draw = random.Random(3)
    table = [4, 1, 6, 0, 3, 9, 2, 8, 10]
    for resealed in (False, True) * 2:
        bad = bytearray(blob)
        for _ in range(draw.randrange(1, 9)):
            bad[draw.randrange(len(blob) // 6, len(blob))] = draw.randrange(256)
        bad = reseal(bytes(bad)) if resealed else bytes(bad)
        held = [room.tensor((2, 12, 16, 2, 12), 2) for _ in range(5)]
        before = [flat.clone() for flat, _ in held]
        told = outcome(
            bad, profile, device=device, out=[(c[0], c[1]) for _, c in held], pages=table
        )
        assert told == outcome(bad, profile)
        for (flat, cache), old in zip(held, before, strict=True):
            same = torch.ones_like(flat, dtype=torch.bool)
            mine = same.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            for page in table:
                mine[:, page, : 12 if page == table[-1] else 16] = False
            assert torch.equal(flat[same], old[same])


def test_a_profile_of_another_model(device, monkeypatch, snapshot):
    """A file that names a profile whose layers are others is damaged, and no more."""
    profile = random_profile(14, [((2, 12), (2, 12))], group=8)
    blob = encode(
        kvzip.Snapshot(snapshot.layers[:1], "bf16"), profile, monkeypatch, block_tokens=64
    )
    other = random_profile(14, [((1, 6), (2, 12))], group=8)
    bad = reseal(blob.replace(profile.id.encode(), other.id.encode()))
    assert outcome(bad, other, device=device) == outcome(bad, other)
    assert outcome(bad, other)[0] is kvzip.CorruptError
    assert outcome(bad, None, device=device) == outcome(bad, None)
