"""What a request takes of a file, as properties of the plan alone: nothing is read or decoded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip import dtypes
from kvzip.container import plan
from kvzip.container.index import RECORD, Index, aligned, entries
from kvzip.errors import UsageError
from kvzip.layout import PARTS, LayerLayout, Layout

FORM = dtypes.get("bf16")
START = 4096


def index_of(layout, block_tokens):
    """The index of a file of that layout, as a writer makes it, and the file's layout."""
    records, offset = [], START
    for n, entry in enumerate(entries(layout, block_tokens)):
        length = 0 if entry.tables else 1 + 37 * n % 500
        records.append(entry.record(offset, length, n, n))
        offset += aligned(length)
    return Index(np.array(records, RECORD).tobytes(), START, offset, layout, block_tokens)


@st.composite
def files(draw):
    """A layout with full and sliding layers, the tokens of its blocks, and its index."""
    tokens = draw(st.integers(0, 70))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        stored = draw(st.sampled_from([tokens, min(tokens, 9), tokens // 2]))
        heads, k, v = (draw(st.integers(1, 3)) for _ in range(3))
        kind = {} if stored == tokens else {"kind": "sliding", "window": max(stored, 1)}
        shapes = (*batch, heads, stored, k), (*batch, heads, stored, v)
        layers.append(LayerLayout(*shapes, tokens, **kind))
    layout = Layout("bf16", tuple(layers))
    block_tokens = draw(st.sampled_from([1, 4, 16, 100]))
    return layout, block_tokens, index_of(layout, block_tokens)


@st.composite
def requests(draw):
    """A file as `files` gives it, and a request for some of it."""
    layout, block_tokens, index = draw(files())
    count = len(layout.layers)
    layers = draw(st.none() | st.lists(st.integers(-count, count - 1), max_size=5))
    begin = draw(st.integers(0, layout.tokens))
    tokens = draw(st.none() | st.just((begin, draw(st.integers(begin, layout.tokens)))))
    return layout, block_tokens, index, plan.requested(layout, layers, tokens)


def positions(index, row):
    return range(index.position[row], index.position[row] + index.tokens[row])


def wanted(request, key):
    cut = request.cuts[key[0]]
    return range(cut.first, cut.cumulative_length)


def none(layer, part):
    return ()


def earlier(layer, part):
    """As the codec `predictive`: values need their keys, and those the values before."""
    return ((layer, "k"),) if part == "v" else ((layer - 1, "v"),) if layer else ()


def skipping(layer, part):
    return tuple((i, part) for i in (layer - 1, layer - 3) if i >= 0)


@given(case=requests())
def test_every_wanted_position_is_in_exactly_one_block(case):
    layout, _, index, request = case
    by_part = plan.rows_by_part(layout, index, request)
    assert by_part.keys() == {(i, part) for i in request.layers for part in PARTS}
    for key, rows in by_part.items():
        assert all(index.key[row] == key and row != index.tables_row(row) for row in rows)
        held = [p for row in rows for p in positions(index, row)]
        assert len(held) == len(set(held))
        assert set(wanted(request, key)) <= set(held)


@given(case=requests())
def test_every_block_holds_something_wanted(case):
    layout, _, index, request = case
    for row in plan.rows(layout, index, request):
        assert set(positions(index, row)) & set(wanted(request, index.key[row]))


@given(case=requests(), needs=st.sampled_from([none, earlier, skipping]))
def test_what_a_block_needs_stands_before_it_in_its_chain(case, needs):
    layout, _, index, request = case
    chains = plan.chains(layout, index, request, needs)
    planned = [row for chain in chains for row in chain]
    assert len(planned) == len(set(planned))
    assert set(planned) >= set(plan.rows(layout, index, request))
    for chain in chains:
        ends = {positions(index, row).stop for row in chain}
        assert len(ends) == 1
        [end] = ends
        for at, row in enumerate(chain):
            before = {index.key[other] for other in chain[:at]}
            for key in needs(*index.key[row]):
                there = any(positions(index, r).stop == end for r in index.rows[key][1:])
                assert not there or key in before


@given(case=requests(), needs=st.sampled_from([earlier, skipping]))
def test_chains_hold_no_layer_that_nothing_needs(case, needs):
    layout, _, index, request = case
    allowed, left = set(), [(i, part) for i in request.layers for part in PARTS]
    while left:
        key = left.pop()
        if key not in allowed:
            allowed.add(key)
            left += needs(*key)
    rows = [row for chain in plan.chains(layout, index, request, needs) for row in chain]
    assert {index.key[row] for row in rows} <= allowed


@given(case=files(), needs=st.sampled_from([none, earlier, skipping]))
def test_after_its_last_use_nothing_needs_a_part(case, needs):
    _, _, index = case
    last = plan.last_uses(index, needs)
    for row, key in enumerate(index.key):
        for other in needs(*key):
            assert last[other] >= row
    assert all(key in needs(*index.key[row]) for key, row in last.items())


@given(case=requests())
def test_memory_holds_what_is_wanted_and_not_much_more(case):
    layout, block_tokens, index, request = case
    extents = plan.extents(layout, block_tokens, request)
    assert [e.key for e in extents] == [(i, part) for i in request.layers for part in PARTS]
    for key, shape, first in extents:
        layer, cut = layout.layers[key[0]], request.cuts[key[0]]
        held, mine = range(first, first + shape[2]), wanted(request, key)
        assert set(mine) <= set(held)
        assert set(held) <= set(range(layer.first, layer.cumulative_length))
        assert len(held) <= 2 * len(mine)
        assert math.prod(shape) == len(held) * layer.token_numbers(key[1])
        if len(held) > cut.stored:  # whole blocks
            edges = {layer.first} | {positions(index, r).stop for r in index.rows[key][1:]}
            assert {held.start, held.stop} <= edges


@given(case=requests())
def test_raw_bytes_are_those_of_the_request(case):
    layout, _, index, request = case
    raw = sum(
        math.prod(cut.shape(part)) * FORM.itemsize
        for cut in request.cuts.values()
        for part in PARTS
    )
    assert request.raw_bytes(index, plan.rows(layout, index, request), FORM) == raw
    assert request.raw_bytes(index, range(len(index)), FORM) == raw


@given(case=requests(), needs=st.sampled_from([None, earlier]))
def test_tables_are_read_with_their_blocks(case, needs):
    layout, _, index, request = case
    read = plan.entries_read(layout, index, request, needs)
    assert {index.tables_row(row) for row in read} <= read
    assert set(plan.rows(layout, index, request)) <= read


@given(
    rows=st.lists(st.integers(0, 1000), max_size=300),
    workers=st.integers(1, 64),
    threaded=st.booleans(),
)
def test_batches_are_the_rows_in_order(rows, workers, threaded):
    found = plan.batches(rows, workers, threaded)
    assert [row for batch in found for row in batch] == rows
    assert all(1 <= len(batch) <= (64 if threaded else 16) for batch in found)
    # There is work for every worker, where there is so much.
    assert threaded or len(found) >= min(len(rows), workers)


def test_requests_for_what_is_not_there():
    layer = LayerLayout((2, 10, 4), (2, 10, 4), 10)
    layout = Layout("bf16", (layer, layer))
    assert plan.requested(layout, [-1, 0]).layers == [1, 0]
    assert plan.requested(layout, None, (0, 10)).cuts == {0: layer, 1: layer}
    for layers in ([2], [-3], [0.5], ["k"], [True]):
        with pytest.raises(UsageError, match=r"there is no layer|must be an integer"):
            plan.requested(layout, layers)
    for tokens in ((-1, 5), (5, 4), (0, 11)):
        with pytest.raises(UsageError, match="not within"):
            plan.requested(layout, None, tokens)
    for tokens in (5, (1,), (1, 2, 3), "no", (0, 1.5)):
        with pytest.raises(UsageError, match=r"must be \(first, last \+ 1\)|must be an integer"):
            plan.requested(layout, None, tokens)
