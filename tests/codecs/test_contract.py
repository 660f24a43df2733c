"""What every codec must do, one suite for all."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    CODECS,
    NEED_PROFILE,
    assert_same,
    cache_like,
    examples,
    make_snapshot,
    random_bits,
)

import kvzip
from kvzip import PartLayout, dtypes
from kvzip.codec import Coded, Context


def test_round_trip_of_any_bits(codec, dtype):
    """Any bits, any shape, K and V unlike each other, batches, any block length."""

    @given(data=st.data())
    @settings(max_examples=examples(30, codec, dtype))
    def round_trip(data):
        draw = data.draw
        snapshot = make_snapshot(
            draw(st.sampled_from([random_bits, cache_like])),
            draw(st.integers(0, 2**32)),
            dtype,
            layers=draw(st.integers(1, 3)),
            heads=draw(st.integers(1, 4)),
            tokens=draw(st.integers(0, 300)),
            dim=draw(st.sampled_from([1, 2, 7, 16, 63, 64, 65, 80, 130])),
            batch=draw(st.sampled_from([None, 1, 3])),
        )
        block_tokens = draw(st.sampled_from([1, 7, 64, 129, 1024]))
        if snapshot.tokens > 40 * block_tokens:
            block_tokens = 64
        blob = kvzip.encode(snapshot, codec, block_tokens=block_tokens, threads=1)
        assert_same(snapshot, kvzip.decode(blob, threads=1))
        assert len(blob) <= kvzip.max_encoded_size(snapshot, codec, block_tokens=block_tokens)
        assert len(blob) <= kvzip.max_encoded_size(
            snapshot.layout, codec, block_tokens=block_tokens
        )

    round_trip()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)])
def test_many_blocks_at_once_are_each_alone(codec, dtype, axes, threads):
    """Blocks of several parts, in any layout; checksums are those of numbers in C order."""
    form, made = dtypes.get(dtype), kvzip.get_codec(codec)
    while not made.takes(PartLayout(dtype, (2, 9, 64), "htd"), "full", "k"):
        made = kvzip.get_codec(made.fallback)
    rng = np.random.default_rng(9)
    blocks, numbers = [], []
    for layer, shape in enumerate([(2, 3, 150, 16), (1, 1, 7, 80), (2, 3, 150, 16)]):
        context = Context(form, layer, "k", 0, kvzip.Origin())
        whole = cache_like(rng, dtype, shape)
        tables = made.make_tables(whole, context)
        loaded = made.load_tables(memoryview(tables), shape, context)
        context = msgspec.structs.replace(context, tables=loaded)
        for maker in (cache_like, random_bits):
            block = whole if maker is cache_like else random_bits(rng, dtype, shape)
            lying = [shape[a] for a in axes]
            out = np.zeros(lying, form.uint).transpose(np.argsort(axes))
            blocks.append(Coded(memoryview(made.encode(block, context)), out, context))
            numbers.append(block)
    found = made.decode_many(blocks, threads)
    assert found == [xxhash.xxh3_64_intdigest(block.tobytes()) for block in numbers]
    for block, expected in zip(blocks, numbers, strict=True):
        assert np.array_equal(block.out, expected)
    assert made.decode_many([], threads) == []
    blocks[3].data = blocks[3].data[:-1]
    with pytest.raises(kvzip.CorruptError):
        made.decode_many(blocks, threads)


def test_a_part_without_channels(codec, dtype):
    """Some engines keep one of the two alone."""
    rng = np.random.default_rng(1)
    parts = [random_bits(rng, dtype, (2, 9, dim)) for dim in (8, 0)]
    snapshot = kvzip.Snapshot.from_arrays([tuple(parts), tuple(parts[::-1])], dtype)
    assert_same(snapshot, kvzip.decode(kvzip.encode(snapshot, codec)))


def test_unequal_parts_and_layers(codec):
    rng = np.random.default_rng(5)
    shapes = [((2, 9, 8), (2, 9, 24)), ((1, 9, 64), (1, 9, 64)), ((3, 200, 16), (3, 200, 1))]
    layers = [tuple(random_bits(rng, "bf16", s) for s in pair) for pair in shapes]
    snapshot = kvzip.Snapshot.from_arrays(layers, "bf16")
    assert_same(snapshot, kvzip.decode(kvzip.encode(snapshot, codec, block_tokens=64)))


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_any_strides_in_and_out(codec, axes):
    """An engine's layout is a view: [tokens, heads, dim] and worse, both ways, without a cast."""
    shape = [2, 150, 16]
    rng = np.random.default_rng(6)
    stored = cache_like(rng, "bf16", tuple(shape))
    lying = np.ascontiguousarray(stored.transpose(axes)).transpose(np.argsort(axes))
    assert np.array_equal(lying, stored)
    snapshot = kvzip.Snapshot.from_arrays([(lying, lying)], "bf16")
    blob = kvzip.encode(snapshot, codec, block_tokens=64)
    assert blob == kvzip.encode(
        kvzip.Snapshot.from_arrays([(stored, stored)], "bf16"), codec, block_tokens=64
    )
    out = np.zeros([shape[a] for a in axes], np.uint16).transpose(np.argsort(axes))
    decoded = kvzip.decode(blob, out=[(out, np.zeros_like(out))])
    assert np.shares_memory(decoded.layers[0].k, out)
    assert np.array_equal(out, stored)


def test_the_same_bytes_whatever_the_threads(codec, dtype):
    snapshot = make_snapshot(cache_like, 7, dtype, layers=4, tokens=300)
    one = kvzip.encode(snapshot, codec, block_tokens=64, threads=1)
    assert one == kvzip.encode(snapshot, codec, block_tokens=64, threads=5)
    assert_same(kvzip.decode(one, threads=5), snapshot)


@pytest.mark.parametrize("pattern", [0, 1, -1])
def test_channels_that_never_change_cost_next_to_nothing(codec, dtype, pattern):
    uint = dtypes.get(dtype).uint
    number = np.array([pattern]).astype(uint)[0]
    same = np.full((2, 3000, 16), number, uint)
    snapshot = kvzip.Snapshot.from_arrays([(same, same)], dtype)
    blob = kvzip.encode(snapshot, codec)
    assert_same(snapshot, kvzip.decode(blob))
    if codec != "raw":
        assert len(blob) < snapshot.raw_bytes / 15


def test_random_bits_grow_by_next_to_nothing(codec, dtype):
    snapshot = make_snapshot(
        random_bits, 8, dtype, layers=1, heads=8, tokens=1024, dim=128, ids=False
    )
    encoded = len(kvzip.encode(snapshot, codec))
    # LZ4 alone cannot store: its own bound is 1 in 255.
    assert encoded < snapshot.raw_bytes * (1.005 if codec == "lz4" else 1.001) + 2000


def test_codecs_without_a_test_do_not_exist():
    """A codec that needs a profile has a suite of its own."""
    tested = {spec.partition(":")[0] for spec in CODECS}
    assert tested == set(kvzip.codec_names()) - NEED_PROFILE
    for name in NEED_PROFILE:
        assert [*Path(__file__).parent.glob(f"test_{name}*.py")]
