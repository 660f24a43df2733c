"""Tiers find what caches that are kept one by one find; and by LRU what the stack distances say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import a_trace

from kvzip.eval.traffic.capacity import capacities, needed_capacity, stack_distances
from kvzip.eval.traffic.eviction import POLICIES
from kvzip.eval.traffic.finding import find, prompt_tokens
from kvzip.eval.traffic.trace import Request, of_requests, synthetic

prompts = st.lists(st.lists(st.integers(0, 12), max_size=8, unique=True), min_size=1, max_size=30)


@pytest.mark.parametrize("policy", POLICIES)
@given(prompts, st.integers(0, 8), st.integers(0, 15))
def test_each_tier_is_a_cache_of_its_own(policy, prompts, near, far):
    trace = a_trace([99], *prompts)
    found = find(trace, [near, far], policy)
    caches = [POLICIES[policy](room) if room else None for room in (near, far)]
    misses = [0, 0]
    for i, prompt in enumerate([[99], *prompts]):
        wanted, unbroken = [0, 0], True
        for block in prompt:
            there = [cache is not None and cache.touch(block) for cache in caches]
            misses = [m + (not hit) for m, hit in zip(misses, there, strict=True)]
            unbroken = unbroken and any(there)
            if unbroken:
                wanted[there.index(True)] += 1
        assert found.blocks[i].tolist() == wanted
        assert found.tokens[i].tolist() == [512 * n for n in wanted]
    assert found.misses == misses


@pytest.mark.parametrize("rooms", [(50, 400), (10, 90, 1000), (300,), (7, float("inf"))])
def test_tiers_hit_what_the_curve_says(rooms):
    trace = synthetic(400, seed=5)
    needed = needed_capacity(trace)
    found = find(trace, rooms, distances=stack_distances(trace.blocks))
    assert np.array_equal(find(trace, rooms).blocks, found.blocks)
    limits = [min(room, trace.distinct) for room in rooms]
    whole = [c.hit_rate for c in capacities(limits, [1.0], needed)]
    assert found.blocks.sum() / len(trace.blocks) == pytest.approx(whole[-1])
    # The first tier has what a store of its size has, where no gap is closed by another tier.
    assert found.blocks[:, 0].sum() / len(trace.blocks) >= whole[0]


def test_who_computed_what_is_found():
    trace = a_trace([1, 2], [1, 3], [2, 1], [1, 3, 4], [1, 3, 4])
    found = find(trace, [10])
    assert found.waits == [[], [0], [0], [0, 1], [0, 1, 3]]
    # With room for two, the third request drops 1 for 2, and computes it anew for the fourth.
    assert find(trace, [2]).waits == [[], [0], [], [2], []]


def test_tokens_of_a_prompt():
    lengths = [(700, [1, 2]), (1025, [1, 2]), (3, [1]), (3, []), (0, []), (1, [1, 2, 3])]
    trace = of_requests([Request(0, n, 1, ids) for n, ids in lengths], "a trace")
    # A prompt is no shorter than its blocks say, and has a token.
    assert prompt_tokens(trace).tolist() == [700, 1025, 3, 3, 1, 1025]
    assert find(trace, [9]).tokens[:, 0].tolist() == [0, 1024, 3, 0, 0, 1024]
