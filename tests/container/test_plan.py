"""What a request takes of a file, as properties of the plan alone: nothing is read or decoded."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from kvzip.container import plan
from kvzip.container.index import RECORD, Index, aligned, entries
from kvzip.errors import UnsupportedError, UsageError
from kvzip.layout import KV, LayerLayout, Layout, PartLayout

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
def attention(draw, batch, tokens):
    stored = draw(st.sampled_from([tokens, min(tokens, 9), tokens // 2]))
    heads, k, v = (draw(st.integers(1, 3)) for _ in range(3))
    kind = {} if stored == tokens else {"kind": "sliding", "window": max(stored, 1)}
    shapes = (*batch, heads, stored, k), (*batch, heads, stored, v)
    return LayerLayout.of_kv(*shapes, "bf16", tokens, **kind)


@st.composite
def others(draw, batch, tokens):
    """A latent, a state (alone or beside keys and values), or an encoder's tokens."""
    size, b = draw(st.integers(1, 5)), "b" if batch else ""
    latent = {
        "latent": PartLayout("bf16", (*batch, tokens, size), f"{b}td"),
        "scale": PartLayout("fp32", (size,), "d"),
    }
    state = {
        "conv": PartLayout("fp32", (*batch, size, 3), f"{b}dr"),
        "recurrent": PartLayout("bf16", (*batch, 2, size, 3), f"{b}hrd"),
    }
    keys = PartLayout("fp8_e4m3fn", (*batch, 2, tokens, size), f"{b}htd")
    return draw(
        st.sampled_from(
            [
                LayerLayout(latent, tokens, "latent"),
                LayerLayout(state, tokens, "state", state_length=tokens),
                LayerLayout({"k": keys} | state, tokens, state_length=max(tokens - 1, 0)),
                LayerLayout.of_kv((*batch, 2, 23, 4), (*batch, 2, 23, 4), "bf16", 23, "cross"),
            ]
        )
    )


@st.composite
def files(draw):
    """A layout with layers of every kind, the tokens of its blocks, and its index."""
    tokens = draw(st.integers(0, 70))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    layers = [draw(attention(batch, tokens))]
    for _ in range(draw(st.integers(0, 3))):
        layers.append(draw(attention(batch, tokens) | others(batch, tokens)))
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
    end = draw(st.sampled_from([layout.tokens, draw(st.integers(begin, layout.tokens))]))
    tokens = draw(st.sampled_from([None, (begin, end)]))
    try:
        return layout, block_tokens, index, plan.requested(layout, layers, tokens)
    except UnsupportedError:
        asked = layout.layers if layers is None else [layout.layers[i] for i in layers]
        assert any(s.state_length not in (None, end) for s in asked)
        reject()


def positions(index, row):
    return range(index.position[row], index.position[row] + index.tokens[row])


def wanted(request, key):
    return range(*request.cuts[key[0]].span(key[1]))


def parts_of(layout, layers):
    return [(i, part) for i in layers for part in layout.layers[i].parts]


def rows_of(layout, index, request):
    return [r for rows in plan.rows_by_part(layout, index, request).values() for r in rows]


def attention_rows(layout, index, request):
    """What is wanted of layers of attention: states need no others, and none needs them."""
    found = plan.rows_by_part(layout, index, request)
    plain = {i for i, layer in enumerate(layout.layers) if layer.kind in ("full", "sliding")}
    return {key: rows for key, rows in found.items() if key[0] in plain and key[1] in KV}


def among(layout, needs):
    """What is needed of layers of attention: the others have codecs of their own."""
    return lambda i, part: tuple(
        (j, name)
        for j, name in needs(i, part)
        if layout.layers[j].kind in ("full", "sliding") and name in layout.layers[j].parts
    )


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
    assert by_part.keys() == set(parts_of(layout, request.layers))
    for key, rows in by_part.items():
        assert all(index.key[row] == key and row != index.tables_row(row) for row in rows)
        held = [p for row in rows for p in positions(index, row)]
        assert len(held) == len(set(held))
        assert set(wanted(request, key)) <= set(held)


@given(case=requests())
def test_every_block_holds_something_wanted(case):
    layout, _, index, request = case
    for row in rows_of(layout, index, request):
        assert set(positions(index, row)) & set(wanted(request, index.key[row]))


@given(case=requests(), needs=st.sampled_from([none, earlier, skipping]))
def test_what_a_block_needs_stands_before_it_in_its_chain(case, needs):
    layout, _, index, request = case
    needs = among(layout, needs)
    chains = plan.chains(index, attention_rows(layout, index, request), needs)
    planned = [row for chain in chains for row in chain]
    assert len(planned) == len(set(planned))
    assert set(planned) >= {
        row for rows in attention_rows(layout, index, request).values() for row in rows
    }
    for chain in chains:
        ends = {positions(index, row).stop for row in chain}
        assert len(ends) == 1
        [end] = ends
        for at, row in enumerate(chain):
            before = {index.key[other] for other in chain[:at]}
            for key in needs(*index.key[row]):
                there = any(positions(index, r).stop == end for r in index.rows.get(key, ())[1:])
                assert not there or key in before


@given(case=requests(), needs=st.sampled_from([earlier, skipping]))
def test_chains_hold_no_layer_that_nothing_needs(case, needs):
    layout, _, index, request = case
    needs, by_part = among(layout, needs), attention_rows(layout, index, request)
    allowed, left = set(), list(by_part)
    while left:
        key = left.pop()
        if key not in allowed:
            allowed.add(key)
            left += needs(*key)
    rows = [row for chain in plan.chains(index, by_part, needs) for row in chain]
    assert {index.key[row] for row in rows} <= allowed


@given(case=files(), needs=st.sampled_from([none, earlier, skipping]))
def test_after_its_last_use_nothing_needs_a_part(case, needs):
    layout, _, index = case
    needs = among(layout, needs)
    last = plan.last_uses(index, needs)
    for row, key in enumerate(index.key):
        for other in needs(*key):
            assert last[other] >= row
    assert all(key in needs(*index.key[row]) for key, row in last.items())


@given(case=requests())
def test_memory_holds_what_is_wanted_and_not_much_more(case):
    layout, block_tokens, index, request = case
    extents = plan.extents(layout, block_tokens, request)
    assert [e.key for e in extents] == parts_of(layout, request.layers)
    for key, shape, first in extents:
        layer = layout.layers[key[0]]
        held, mine = range(first, first + shape[2]), wanted(request, key)
        assert set(mine) <= set(held)
        assert set(held) <= set(range(*layer.span(key[1])))
        assert len(held) <= 2 * len(mine)
        assert math.prod(shape) == len(held) * layer.parts[key[1]].line_numbers
        if len(held) > len(mine):  # whole blocks
            edges = {layer.first} | {positions(index, r).stop for r in index.rows[key][1:]}
            assert {held.start, held.stop} <= edges


@given(case=requests())
def test_raw_bytes_are_those_of_the_request(case):
    layout, _, index, request = case
    raw = sum(part.nbytes for cut in request.cuts.values() for part in cut.parts.values())
    assert request.raw_bytes(index, rows_of(layout, index, request)) == raw
    assert request.raw_bytes(index, range(len(index))) == raw


@given(case=files(), most=st.sampled_from([0, 64, 700, 1 << 40]), data=st.data())
def test_runs_are_neighbours_that_are_read_together(case, most, data):
    index = case[2]
    rows = sorted(data.draw(st.sets(st.integers(0, max(len(index) - 1, 0)))) if len(index) else [])
    runs = index.runs(rows, most)
    assert [row for _, _, run in runs for row in run] == rows
    ends = []
    for begin, length, run in runs:
        spans = [index.span(row) for row in run]
        assert begin == spans[0][0] and length == sum(size for _, size in spans)
        assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(spans))
        assert length <= most or len(run) == 1
        ends.append((begin + length, length, index.span(run[0])[1]))
    for (end, length, _), (begin, _, _), (_, _, first) in zip(
        ends, runs[1:], ends[1:], strict=False
    ):
        assert end != begin or length + first > most


@given(case=files(), data=st.data())
def test_stored_bytes_are_cut_out_of_what_was_read(case, data):
    index = case[2]
    begin, size = START, sum(index.span(row)[1] for row in range(len(index)))
    read = memoryview(bytearray(size))
    rows = [row for row in range(len(index)) if index.length[row]]
    for row in rows:  # its own number, and zeros behind
        at, length = index.offset[row] - begin, index.length[row]
        read[at : at + length] = bytes([row % 255 + 1]) * length
    found = index.stored(read, begin, rows, 0)
    assert list(found) == rows
    for row, stored in found.items():
        assert bytes(stored) == bytes([row % 255 + 1]) * index.length[row]
    if not rows:
        return
    row = data.draw(st.sampled_from(rows))
    with pytest.raises(ValueError, match="checksum"):
        index.stored(read, begin, [row], 1 << 40)
    for less, at in ((read[:-1], begin), (read, begin - 1), (read, begin + 1)):
        with pytest.raises(ValueError, match=r"cut short|zeros"):
            index.stored(less, at, rows, 0)
    with pytest.raises(ValueError, match="no such entry"):
        index.stored(read, begin, [len(index)], 0)
    end, taken = index.offset[row] + index.length[row], index.span(row)[1]
    if index.length[row] < taken:
        read[end - begin] = 1
        with pytest.raises(ValueError, match="zeros"):
            index.stored(read, begin, [row], 0)


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
    layer = LayerLayout.of_kv((2, 10, 4), (2, 10, 4), "bf16", 10)
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
