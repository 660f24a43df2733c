"""Policies hold what they have room for, and drop what their papers say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip.eval.traffic.eviction import POLICIES, Lru, S3Fifo

accesses = st.lists(st.integers(0, 20), max_size=200)


@pytest.mark.parametrize("policy", POLICIES)
@given(accesses, st.integers(1, 12))
def test_a_cache_holds_at_most_what_it_has_room_for(policy, blocks, room):
    cache = POLICIES[policy](room)
    used: list[int] = []
    for block in blocks:
        assert not (cache.touch(block) and block not in used)
        used.append(block)
    held = cache._held if isinstance(cache, Lru) else {**cache._small, **cache._main}
    assert len(held) == min(room, len(held))
    if len(set(blocks)) <= room:
        assert set(held) == set(blocks)


@pytest.mark.parametrize("policy", POLICIES)
@given(accesses)
def test_with_room_for_all_only_first_uses_miss(policy, blocks):
    cache = POLICIES[policy](21)
    assert [cache.touch(b) for b in blocks] == [b in blocks[:i] for i, b in enumerate(blocks)]


@given(accesses)
def test_what_was_used_last_is_there(blocks):
    cache = Lru(3)
    for i, block in enumerate(blocks):
        recent = list(dict.fromkeys(reversed(blocks[:i])))[:3]
        assert cache.touch(block) == (block in recent)


def test_s3_fifo_worked_out_by_hand():
    # Room for 10: one in the small queue, nine in the main one.
    cache = S3Fifo(10)
    for block in range(10):
        assert not cache.touch(block)
    assert cache.touch(0)  # in the small queue, which may be longer while there is room
    # 10 needs room: 0, first in the queue, was used again and goes to the main one; 1 is dropped.
    assert not cache.touch(10)
    assert cache.touch(0) and cache.touch(2)
    # 1 is remembered, so it goes to the main queue at once. For it 2, used again, moves there too,
    # and 3 is dropped.
    assert not cache.touch(1)
    assert not cache.touch(3)  # and for that, 4
    assert cache.touch(1) and cache.touch(2) and cache.touch(0)


def test_s3_fifo_keeps_what_is_used_again_through_a_scan():
    kept = range(50)
    for policy, survives in (("lru", False), ("s3-fifo", True)):
        cache = POLICIES[policy](100)
        for _ in range(2):
            for block in kept:
                cache.touch(block)
        for block in range(1000, 2000):
            cache.touch(block)
        assert all(cache.touch(block) == survives for block in kept), policy
