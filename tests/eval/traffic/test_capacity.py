"""Hit rates at all capacities in one pass are those of stores that are kept one by one."""

from __future__ import annotations

import json
from collections import OrderedDict

import numpy as np
import pytest
from command import run_json
from hypothesis import given
from hypothesis import strategies as st
from traces import a_trace

from kvzip.choice.auto import MEASURED
from kvzip.errors import UsageError
from kvzip.eval.traffic.capacity import NEVER, capacities, curve, needed_capacity, stack_distances
from kvzip.eval.traffic.trace import Trace, synthetic


def hits_of_a_store(prompts: list[list[int]], room: int) -> int:
    """The same, worked out with a store that keeps what was used last."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt in prompts:
        unbroken = True
        for block in prompt:
            unbroken = unbroken and block in held
            hits += unbroken
            held.pop(block, None)
            held[block] = None
            if len(held) > room:
                held.popitem(last=False)
    return hits


def rate(trace: Trace, size: float, ratio: float = 1.0) -> float:
    [found] = capacities([size], [ratio], needed_capacity(trace))
    return found.hit_rate


def test_a_trace_worked_out_by_hand():
    # Blocks 1 2 3 | 1 2 4 | 5 6 | 1 2 3: with room for 3, the second request finds 1 and 2 (3, 1, 2
    # are held), and the last one none: 2 4 5 6 came since. With 6 it finds 1, 2 and 3.
    trace = a_trace([1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3])
    assert stack_distances(trace.blocks).tolist() == [
        *(NEVER, NEVER, NEVER), *(3, 3, NEVER), *(NEVER, NEVER), *(5, 5, 6)
    ]  # fmt: skip
    assert [rate(trace, n) for n in (1, 2, 3, 4, 5, 6)] == pytest.approx(
        [0, 0, 2 / 11, 2 / 11, 4 / 11, 5 / 11]
    )
    # Twice as small is twice the room; half a block more is none.
    assert rate(trace, 3, 2.0) == pytest.approx(5 / 11)
    assert rate(trace, 3, 1.9) == rate(trace, 5)


def test_a_gap_ends_a_prefix():
    # 9 is held when it is asked for again, but what comes before it in the prompt is not.
    trace = a_trace([1, 9], [8, 9])
    assert rate(trace, 10) == 0


prompts = st.lists(st.lists(st.integers(0, 12), max_size=8, unique=True), min_size=1, max_size=30)


@given(prompts, st.integers(1, 15))
def test_every_capacity_is_a_store_of_that_size(prompts, room):
    trace = a_trace(*prompts)
    needed = needed_capacity(trace)
    assert (needed <= room).sum() == hits_of_a_store(prompts, room)


def test_more_room_never_hits_less():
    trace = synthetic(500, seed=1)
    needed = needed_capacity(trace)
    sizes = np.geomspace(1, 2 * trace.distinct, 60)
    rates = [c.hit_rate for c in capacities(sizes.tolist(), [1.0], needed)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] == pytest.approx(float((needed < NEVER).mean()))


def test_the_curve_is_the_capacities():
    needed = needed_capacity(synthetic(300, seed=2))
    points = curve(needed)
    sizes, rates = zip(*points, strict=True)
    assert list(sizes) == sorted(set(sizes)) and list(rates) == sorted(rates)
    assert [c.hit_rate for c in capacities(sizes, [1.0], needed)] == pytest.approx(list(rates))
    assert rates[-1] == pytest.approx(float((needed < NEVER).mean()))


@pytest.mark.parametrize(("blocks", "ratios"), [([0], [1]), ([1], [-1]), ([float("nan")], [1])])
def test_what_makes_no_sense(blocks, ratios):
    trace = a_trace([1])
    with pytest.raises(UsageError, match="above zero"):
        capacities(blocks, ratios, needed_capacity(trace))


def test_the_command(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    prompts = [1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3]
    path.write_text(
        "\n".join(
            json.dumps({"timestamp": i, "input_length": 1, "output_length": 1, "hash_ids": prompt})
            for i, prompt in enumerate(prompts)
        )
    )
    command = ["eval", "fleet", "--trace", str(path), "--capacity-blocks", "3,6", "--codecs=none"]
    found = run_json(capsys, *command, "--ratios", "1,2")[1]
    assert found["requests"] == 4 and found["distinct"] == 6
    assert found["most"] == pytest.approx(5 / 11)
    wanted = [(3, 1, 2), (3, 2, 5), (6, 1, 5), (6, 2, 5)]
    assert found["capacity"] == [
        {"blocks": size, "ratio": ratio, "hit_rate": pytest.approx(hits / 11)}
        for size, ratio, hits in wanted
    ]
    codecs = json.loads(MEASURED.read_text())["rows"]
    for dtype in ("bf16", "fp16"):
        found = run_json(capsys, *command, "--dtype", dtype)[1]
        last = {row["codec"]: row["ratio"] for row in codecs if row["dtype"] == dtype}
        wanted = [1, *(pytest.approx(last[c], abs=0.005) for c in ("channel", "predictive"))]
        assert [row["ratio"] for row in found["capacity"]] == 2 * wanted
    for wrong in ("--ratios=0", "--ratios=x", "--capacity-blocks=1,,2", "--ratios=nan"):
        assert run_json(capsys, *command, wrong)[0] == 2
