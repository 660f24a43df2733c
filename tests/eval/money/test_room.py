"""The third answer: what a store has room for, and what it finds of real requests."""

from __future__ import annotations

import math

import pytest

from kvzip.choice.cost import CodecFigures
from kvzip.errors import KVZipError
from kvzip.eval.money.arguments import store_size
from kvzip.eval.money.room import room
from kvzip.eval.traffic.capacity import capacities, needed_capacity
from kvzip.eval.traffic.trace import synthetic

RAW = CodecFigures("raw", 0.999, math.inf)
NONE = CodecFigures("lz4", 0.98, math.inf)
HALF = CodecFigures("half", 2.0, 1e9)


def test_a_store_keeps_its_codecs_ratio_times_as_many() -> None:
    found = room(1e12, 1e9, 1e6, [HALF, NONE, RAW])
    assert [(k.codec, k.documents) for k in found.kept] == [
        ("raw", pytest.approx(999)), ("lz4", pytest.approx(980)), ("half", pytest.approx(2000))
    ]  # fmt: skip
    assert found.line() == (
        "Room: 1 TB holds 999 such caches raw and 2,000 with half (2.00x); what your traffic finds "
        "of them: --trace."
    )
    assert room(5e11, 1e9, 1e6, [HALF]).line().startswith("Room: 500 GB holds 1,000 such caches wi")


def test_with_a_trace_it_says_what_is_found() -> None:
    trace = synthetic(300, seed=1)
    found = room(100 * 512e6, 1e9, 1e6, [RAW, HALF], trace)
    wanted = capacities([100], [0.999, 2.0], needed_capacity(trace))
    assert [k.hit_rate for k in found.kept] == [c.hit_rate for c in wanted]
    assert f"finds {wanted[0].hit_rate:.1%} and {wanted[1].hit_rate:.1%}." in found.line()


def test_sizes_as_they_are_typed() -> None:
    assert store_size("400GB") == 4e11 and store_size(" 1.5 TB ") == 1.5e12
    for wrong in ("", "5", "GB", "-1GB", "1.2.3TB", "0GB", "5kB"):
        with pytest.raises(KVZipError):
            store_size(wrong)


def test_a_profile_lies_in_the_store_too() -> None:
    needs = CodecFigures("half", 2.0, 1e9, profile_bytes=4e11)
    found = room(1e12, 1e9, 1e6, [RAW, needs])
    assert [k.documents for k in found.kept] == [pytest.approx(999), pytest.approx(1200)]
    trace = synthetic(300, seed=1)
    [_, with_it] = room(100 * 512e6, 1e9, 1e6, [RAW, needs], trace).kept
    left = (100 * 512e6 - 4e11) / 512e6
    assert left < 0 and (with_it.documents, with_it.hit_rate) == (0, 0)
    small = CodecFigures("half", 2.0, 1e9, profile_bytes=40 * 512e6)
    [_, with_it] = room(100 * 512e6, 1e9, 1e6, [RAW, small], trace).kept
    [wanted] = capacities([60], [2.0], needed_capacity(trace))
    assert with_it.hit_rate == wanted.hit_rate
