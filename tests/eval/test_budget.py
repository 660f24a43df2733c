"""A demo that ends in the time it is given, and says how far it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip.choice.cost import PrefillModel
from kvzip.eval.budget import SIZES, Counts, Progress, Speed, choose, plan
from kvzip.eval.speed.inputs import halves


def sizes_for(speed, codecs=7, new_tokens=24):
    return lambda tokens, train: plan(speed, tokens, train, halves(tokens), codecs, new_tokens)


def speed(scale=1.0):
    """Of the small model on two cores of a Zen 3, or so many times as slow."""
    return Speed(PrefillModel(2.2e-3 * scale, 5e-7 * scale), 0.13 * scale)


def size(found):
    return found.tokens, found.train


def test_faster_machines_do_more():
    picked = [size(choose(240, sizes_for(speed(s)), None, None)) for s in (0.1, 1, 3, 1000)]
    places = [SIZES.index(one) for one in picked]
    assert places == sorted(places)
    assert size(choose(600, sizes_for(speed(0.1)), None, None)) == SIZES[0]
    assert picked[-1] == SIZES[-1]
    assert picked[1] not in (SIZES[0], SIZES[-1])


@given(
    scale=st.floats(0.01, 100),
    budget=st.floats(0, 10_000),
    codecs=st.integers(1, 10),
    new_tokens=st.integers(1, 100),
)
def test_what_is_picked_fits_or_is_the_smallest(scale, budget, codecs, new_tokens):
    of_size = sizes_for(speed(scale), codecs, new_tokens)
    found = choose(budget, of_size, None, None)
    assert found.seconds <= budget or size(found) == SIZES[-1]
    # Nothing larger would have fitted with the same margin.
    for tokens, train in SIZES[: SIZES.index(size(found))]:
        assert of_size(tokens, train).seconds * 1.2 > budget


def test_what_is_named_is_done():
    of_size = sizes_for(speed(50))
    assert size(choose(1, of_size, 2048, 16)) == (2048, 16)
    assert choose(1, of_size, 777, None).tokens == 777
    assert choose(1e9, of_size, None, 3).train == 3
    assert choose(1, of_size, None, 0).train == 0


@pytest.fixture
def all_told(monkeypatch):
    monkeypatch.setattr("kvzip.eval.budget.EVERY", 0.0)


def test_parts_of_a_step_are_told_now_and_then(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr("kvzip.eval.budget.time.monotonic", lambda: now[0])
    progress = Progress(lambda what, share=None: told.append(what))
    progress("a")
    for done in range(1, 101):
        now[0] += 0.25
        progress.within("b", done, 100)
    assert told == [
        "a",
        "b: 20 of 100",
        "b: 40 of 100",
        "b: 60 of 100",
        "b: 80 of 100",
        "b: 100 of 100",
    ]


def test_counts_are_told_every_few_seconds(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr("kvzip.eval.budget.time.monotonic", lambda: now[0])
    counts = Counts(told.append, "learning")
    for done in range(1, 4501):
        now[0] += 0.0025
        counts("regressions", done, 4500)
    assert told == [
        "learning, regressions: 2,000 of 4,500",
        "learning, regressions: 4,000 of 4,500",
    ]


def test_shares_grow_to_the_whole(all_told):
    told = []
    progress = Progress(lambda what, share=None: told.append((what, share)))
    progress("loading")
    progress.expect(10.0, 90.0)
    progress("a", 30)
    progress("b", 60)
    for done in (1, 2):
        progress.within("c", done, 2)
    progress("end")
    assert told == [
        ("loading", None),
        ("a", 0.1),
        ("b", 0.4),
        ("c: 1 of 2", 0.7),
        ("c: 2 of 2", 1.0),
        ("end", 1.0),
    ]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5)), max_size=20))
def test_shares_never_fall_or_pass_one(all_told, steps):
    shares = []
    progress = Progress(lambda what, share=None: shares.append(share))
    progress.expect(1.0, 50.0)
    for seconds, parts in steps:
        progress("x", seconds)
        for done in range(parts):
            progress.within("y", done, parts)
    assert shares == sorted(shares)
    assert all(0 < share <= 1 for share in shares)


def test_a_demo_says_what_it_picked_and_how_far_it_is(tmp_path, monkeypatch):
    """With a tiny model, the whole way: two runs of different sizes share a folder."""
    pytest.importorskip("jinja2")
    from support import tiny_model

    from kvzip.eval import demo
    from kvzip.models import LoadedModel

    class Words:
        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = [1 + len(word) % 190 for word in text.split()]
            return type("", (), {"input_ids": [] if add_special_tokens else ids})

    loaded = tiny_model("Llama", max_position_embeddings=4096)
    loaded = LoadedModel(loaded.model, Words(), loaded.id, loaded.revision)
    monkeypatch.setattr(demo, "load_model", lambda ref: loaded)
    for want, codecs, more in (
        (SIZES[-1], ("planes", "predictive"), {}),
        ((128, 0), ("planes",), {"tokens": 128}),
    ):
        told = []
        result = demo.run(
            tmp_path,
            codecs=codecs,
            new_tokens=2,
            budget=1e-9,
            step=lambda what, share=None, told=told: told.append((what, share)),
            **more,
        )
        assert result.exact
        assert result.tokens == want[0]
        assert any(f"{want[0]} tokens and {want[1]} to learn from" in what for what, _ in told)
        shares = [share for _, share in told if share is not None]
        assert shares == sorted(shares)
        assert len(shares) > 5
