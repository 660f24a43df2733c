"""Codecs of others that do not do what a codec must: never other numbers, and never none."""

from __future__ import annotations

import numpy as np
import pytest
from support import cache_like, make_snapshot

import kvzip
import kvzip.codec as codecs
from kvzip.codec import Codec


class Odd(Codec):
    """Stores numbers as they are."""

    codec_id = "odd"

    def encode(self, block, context):
        return np.ascontiguousarray(block).tobytes()

    def decode(self, data, out, context):
        out[...] = np.frombuffer(data, out.dtype).reshape(out.shape)

    def max_encoded_size(self, raw_bytes):
        return raw_bytes

    def max_decoded_size(self, encoded_bytes, dtype):
        return encoded_bytes


def leaves_all_out(self, blocks, threads=1):
    return []


def takes_and_leaves_out(self, blocks, threads=1):
    return [0 for _ in blocks][:0]


def leaves_the_last_out(self, blocks, threads=1):
    return Codec.decode_many(self, list(blocks)[:-1])


def stops_early(self, blocks, threads=1):
    for block in blocks:
        return Codec.decode_many(self, [block])
    return []


@pytest.mark.parametrize(
    "decode_many", [leaves_all_out, takes_and_leaves_out, leaves_the_last_out, stops_early]
)
def test_blocks_that_are_left_out_are_an_error(monkeypatch, decode_many):
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=2, tokens=40, dim=8)
    monkeypatch.setitem(codecs._registered, "odd", Odd)
    blob = kvzip.encode(snapshot, Odd(), block_tokens=10)
    assert kvzip.decode(blob).layers[0].k.shape == snapshot.layers[0].k.shape
    monkeypatch.setattr(Odd, "decode_many", decode_many)
    for threads in (1, 3):
        with pytest.raises(kvzip.KVZipError, match="'odd' does not decode all"):
            kvzip.decode(blob, threads=threads)


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a,b", "a=1", "a+b", 5, b"x"])
def test_names_that_no_spec_could_hold_are_refused(name):
    for what in (Odd, type("Named", (Odd,), {"codec_id": name})):
        with pytest.raises(kvzip.UnsupportedError, match="name is"):
            kvzip.register_codec(what, name if what is Odd else None)
    with pytest.raises(kvzip.UnsupportedError):
        kvzip.register_codec(Codec)
