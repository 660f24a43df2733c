"""Traces are read as they are, packed or not; what is none is an error that names the line."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import zstandard

from kvzip.errors import FormatError, KVZipError
from kvzip.eval.traffic.trace import BLOCK_TOKENS, read_trace, synthetic

LINES = [
    {"timestamp": 2500, "input_length": 1025, "output_length": 7, "hash_ids": [46, 47, 90]},
    {"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [46, 47], "more": 1},
    {"timestamp": 2500, "input_length": 3, "output_length": 0, "hash_ids": []},
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_trace_in_the_order_of_arrival(tmp_path, pack):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(pack("\n".join(map(json.dumps, LINES)).encode() + b"\n\n"))
    trace = read_trace(path)
    assert trace.name == "trace.jsonl"
    assert trace.seconds.tolist() == [0.0, 2.5, 2.5]
    assert trace.inputs.tolist() == [600, 1025, 3]
    assert trace.outputs.tolist() == [9, 7, 0]
    assert trace.blocks.tolist() == [0, 1, 0, 1, 2]
    assert trace.starts.tolist() == [0, 2, 5, 5]
    assert (trace.requests, trace.distinct) == (3, 3)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"timestamp": 1}',
        '{"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 1, "input_length": 1e9, "output_length": 1, "hash_ids": [1.5]}',
        '{"timestamp": 1, "input_length": -3, "output_length": 1, "hash_ids": [1]}',
        "\udcff\udcfe",
    ],
)
def test_a_line_that_is_no_request(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    text = json.dumps(LINES[0]) + "\n" + line + "\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match="line 2"):
        read_trace(path)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_damaged_file(tmp_path, pack):
    data = pack(("\n".join(json.dumps(LINES[0]) for _ in range(50))).encode())
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"damaged|cut short"):
        read_trace(tmp_path / "cut")


def test_what_is_no_trace(tmp_path):
    (tmp_path / "empty").write_text("")
    for path in (tmp_path / "empty", tmp_path / "none", tmp_path):
        with pytest.raises(KVZipError):
            read_trace(path)


def test_a_made_up_trace_is_the_same_every_time():
    trace, again = synthetic(300, seed=3), synthetic(300, seed=3)
    assert np.array_equal(trace.blocks, again.blocks)
    assert np.array_equal(trace.seconds, again.seconds)
    assert (np.diff(trace.seconds) >= 0).all()
    lengths = np.diff(trace.starts)
    assert (-(-trace.inputs // BLOCK_TOKENS) == lengths).all()
    assert len(trace.blocks) > 1.5 * trace.distinct  # prompts share what they begin with
