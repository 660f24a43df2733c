"""A device tells what is wrong with a file as the CPU does, and writes nothing elsewhere."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support import CHANNEL_DTYPES, cache_like, make_snapshot, reseal

import kvzip
from kvzip.testing.damage import first_stored, sealed_index


def outcome(blob, **options):
    """The error's kind and words, or None."""
    try:
        kvzip.decode(blob, threads=1, **options)
    except kvzip.KVZipError as error:
        return type(error), str(error)
    return None


def small(codec, dtype="bf16", block_tokens=24, **shape):
    shape = {"layers": 1, "heads": 1, "tokens": 40, "dim": 16, "ids": False} | shape
    snapshot = make_snapshot(cache_like, 2, dtype, **shape)
    return kvzip.encode(snapshot, codec, block_tokens=block_tokens, threads=1)


def _changed(device, codec, resealed, most):
    blob = small(codec)
    draw = random.Random(1)
    with kvzip.open(blob) as reader:
        places = range(reader.index.offset[0], len(blob))
    for at in draw.sample(places, min(most, len(places))):
        flipped = bytearray(blob)
        flipped[at] ^= 1 << draw.randrange(8)
        bad = reseal(bytes(flipped)) if resealed else bytes(flipped)
        assert outcome(bad, device=device) == outcome(bad), f"byte {at}"


@pytest.mark.parametrize("resealed", [False, True], ids=["as it is", "resealed"])
@pytest.mark.drawn(2)
def test_bytes_that_are_changed(device, codec, resealed):
    """Some of a small file's, one bit of each; also where stored bytes' checksums are made true
    again, so that what is decoded must tell."""
    _changed(device, codec, resealed, 100)


@pytest.mark.long
@pytest.mark.parametrize("resealed", [False, True], ids=["as it is", "resealed"])
def test_any_byte_that_is_changed(device, codec, resealed):
    """Every byte of a small file."""
    _changed(device, codec, resealed, 1 << 20)


@pytest.mark.parametrize("dtype", CHANNEL_DTYPES)
@pytest.mark.drawn(2)
def test_damage_in_longer_streams(device, shuffled, dtype):
    """Of whole groups and strips, where the kernels take their fastest way."""
    blob = small("channel", dtype, 300, heads=2, tokens=300, dim=128)
    draw = random.Random(2)
    start = len(blob) // 8
    for n in range(20):
        flipped = bytearray(blob)
        flipped[draw.randrange(start, len(blob))] ^= 1 << draw.randrange(8)
        bad = bytes(flipped) if n % 2 else reseal(bytes(flipped))
        assert outcome(bad, device=(device, shuffled)[n % 4 // 2]) == outcome(bad)


@pytest.mark.parametrize("resealed", [False, True])
def test_nothing_is_written_elsewhere(device, room, codec, resealed):
    """A damaged block may leave anything in its own place, and nothing in any other."""
    blob = small(codec, heads=2, tokens=70, dim=64)
    draw = random.Random(3)
    table = [4, 1, 6, 0, 3]
    for _ in range(12):
        flipped = bytearray(blob)
        for _ in range(draw.randrange(1, 9)):
            flipped[draw.randrange(len(blob) // 4, len(blob))] = draw.randrange(256)
        bad = reseal(bytes(flipped)) if resealed else bytes(flipped)
        flat, cache = room.tensor((2, 7, 16, 2, 64), 2)
        before = flat.clone()
        told = outcome(bad, device=device, out=[(cache[0], cache[1])], pages=table)
        assert told == outcome(bad)
        same = torch.ones_like(flat, dtype=torch.bool)
        mine = same.as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for page in table:
            mine[:, page, : 6 if page == table[-1] else 16] = False
        assert torch.equal(flat[same], before[same])


def test_a_good_block_is_not_blamed(device, codec):
    """One damaged block is named, whichever it is."""
    blob = small(codec, tokens=90, layers=2)
    with kvzip.open(blob) as reader:
        rows = [row for row in range(len(reader.index)) if reader.index.tokens[row]]
        for row in rows:
            bad = bytearray(blob)
            bad[reader.index.offset[row] + reader.index.length[row] // 2] ^= 0x80
            told = outcome(bytes(bad), device=device)
            assert told is not None and told == outcome(bytes(bad))
            layer, part = reader.index.key[row]
            assert f"layer {layer} {part}, tokens {reader.index.position[row]}:" in told[1]


def test_after_damage_the_device_goes_on(device):
    blob = small("channel")
    bad = bytearray(blob)
    bad[-1] ^= 1
    assert outcome(bytes(bad), device=device) is not None
    found = kvzip.decode(blob, device=device).layers[0].k
    expected = kvzip.decode(blob).layers[0].k
    bits = (
        np.asarray(found) if not isinstance(found, torch.Tensor) else found.cpu().view(torch.int16)
    )
    assert np.array_equal(np.asarray(bits).view(np.uint16), expected)


@pytest.mark.parametrize("codec", ["raw", "channel", "planes"])
def test_checksums_of_stored_bytes(device, codec):
    """They tell of small entries, whose changed bytes may mean the same numbers, and of none
    without bytes: as on the CPU."""
    good = reseal(small(codec))
    with kvzip.open(good) as reader:
        lengths = list(reader.index.length)
    start = first_stored(good) - 48 * len(lengths)
    for row, length in enumerate(lengths):
        blob = bytearray(good)
        blob[start + 48 * row + 32] ^= 1
        bad = sealed_index(blob)
        told = outcome(bad)
        assert (told is not None) == (length > 0)
        assert outcome(bad, device=device) == told
