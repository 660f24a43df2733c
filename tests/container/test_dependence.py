"""Blocks that need others: a codec is handed the same ones by a reader as it was by the writer,
whatever is asked for, in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import random_bits

import kvzip
from kvzip import checksum, codec
from kvzip.snapshot import LayerLayout


class Masked(kvzip.Codec):
    """Numbers, masked by a checksum of all that the codec was given of other layers."""

    codec_id = "test-masked"

    def needs(self, layer, part):
        """The keys or values of some layers before, not of all."""
        return tuple((i, part) for i in (layer - 2, layer - 3) if i >= 0)

    def _mask(self, context):
        digest = checksum.of_bytes(b"")
        for key in sorted(context.earlier):
            digest ^= checksum.of_numbers(np.ascontiguousarray(context.earlier[key])) + len(key[1])
        return np.uint8(digest & 0xFF)

    def encode(self, block, context):
        flat = np.frombuffer(block.tobytes(), np.uint8)
        return (flat ^ self._mask(context)).tobytes()

    def decode(self, data, out, context):
        flat = np.frombuffer(data, np.uint8) ^ self._mask(context)
        out[...] = flat.view(out.dtype).reshape(out.shape)

    def max_encoded_size(self, raw_bytes):
        return raw_bytes

    def max_decoded_size(self, encoded_bytes, dtype):
        return encoded_bytes


@pytest.fixture(autouse=True, scope="module")
def registered():
    kvzip.register_codec(Masked)
    yield
    del codec._registered[Masked.codec_id]


@st.composite
def snapshots(draw):
    """Full layers, and some that slide, so that blocks of the same tokens begin elsewhere."""
    tokens, layers = draw(st.integers(1, 40)), []
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, 6))):
        stored = draw(st.sampled_from([tokens, tokens, min(tokens, 5), tokens // 2, 0]))
        kind = {} if stored == tokens else {"kind": "sliding", "window": max(stored, 1)}
        layout = LayerLayout.of_kv((1, stored, 3), (1, stored, 2), "bf16", tokens, **kind)
        k, v = (random_bits(rng, "bf16", part.shape) for part in layout.parts.values())
        layers.append(kvzip.Layer.of_kv(k, v, layout))
    return kvzip.Snapshot(layers, "bf16")


@given(data=st.data())
def test_any_requests_in_any_order(data):
    snapshot = data.draw(snapshots())
    count, total = len(snapshot.layers), snapshot.tokens
    blob = kvzip.encode(snapshot, "test-masked", block_tokens=data.draw(st.sampled_from([4, 16])))
    with kvzip.open(blob) as reader:
        for _ in range(data.draw(st.integers(1, 6))):
            layers = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
            begin = data.draw(st.integers(0, total))
            end = data.draw(st.integers(begin, total))
            found = reader.decode(layers=layers, tokens=(begin, end))
            for i, mine in zip(layers, found.layers, strict=True):
                whole = snapshot.layers[i]
                first = whole.layout.first
                wanted = slice(max(begin - first, 0), max(end - first, 0))
                assert np.array_equal(mine.k, whole.k[:, wanted])
                assert np.array_equal(mine.v, whole.v[:, wanted])


@given(snapshot=snapshots(), data=st.data())
def test_layers_in_turn(snapshot, data):
    """What is begun before another is done comes to the same."""
    blob = kvzip.encode(snapshot, "test-masked", block_tokens=8, threads=2)
    layers = data.draw(st.permutations(range(len(snapshot.layers))))
    with kvzip.open(blob, threads=2) as reader:
        found = reader.in_turn([([i], (0, snapshot.tokens)) for i in layers])
        for i, part in zip(layers, found, strict=True):
            assert np.array_equal(part.layers[0].k, snapshot.layers[i].k)
            assert np.array_equal(part.layers[0].v, snapshot.layers[i].v)
