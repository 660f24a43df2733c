"""Codecs of others that do not do what a codec must: never other numbers, and never none."""

from __future__ import annotations

import numpy as np
import pytest
from support import cache_like, make_snapshot

import kvzip
import kvzip.codec as codecs
from kvzip.cli.failures import BUG, failure_of
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
    blob = kvzip.encode(snapshot, Odd(), block_tokens=2)  # so that a job has several blocks
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


def test_whose_an_error_is(monkeypatch):
    """Of a codec of somebody else it is theirs, also where a library below it raises."""
    monkeypatch.setattr("kvzip.codec._registered", dict(codecs._registered))

    @kvzip.register_codec
    class Failing(Odd):
        codec_id = "failing"

        def __init__(self, way: str = "itself"):
            if way == "made":
                raise RuntimeError("no licence")
            self.way = way

        def encode(self, block, context):
            if self.way == "itself":
                raise RuntimeError("out of luck")
            return np.concatenate([])

    with pytest.raises(kvzip.UnsupportedError, match="codec 'failing': no licence"):
        kvzip.get_codec("failing:way=made")
    snapshot = make_snapshot(cache_like, 0, "bf16", layers=1, tokens=8, dim=8)
    for way in ("itself", "below"):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            kvzip.encode(snapshot, f"failing:way={way}", threads=1)
        found = failure_of(raised.value)
        assert (found.kind, found.exit) == ("bug", BUG)
        assert "bug in the codec 'failing', which is not kvzip's own" in found.message
    try:
        kvzip.codec._settings(7)
    except TypeError as error:
        assert "a bug in kvzip" in failure_of(error).message
