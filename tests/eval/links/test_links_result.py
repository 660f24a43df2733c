"""What a result of links says: predictions, where the order turns, drawings, the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvzip.choice import cost
from kvzip.errors import KVZipError
from kvzip.eval.links import timing
from kvzip.eval.links.prediction import crossovers, predict
from kvzip.eval.report import links as words
from kvzip.eval.report import pictures
from kvzip.eval.report.readme import put_between
from kvzip.eval.results import stored
from kvzip.eval.results.links import (
    PREFILL,
    CodecCosts,
    Crossover,
    Links,
    Point,
    PredictionInputs,
    TransferCost,
)
from kvzip.eval.results.provenance import Machine

DOCS = Path(__file__).parents[3] / "docs"
RAW = 47_185_920
DELAYS = (0.0, 0.01)


def transfers(seconds: float) -> list[TransferCost]:
    """The same at every rate."""
    return [TransferCost(mbps, delay, seconds) for delay in DELAYS for mbps in (50.0, 10000)]


INPUTS = PredictionInputs(
    RAW,
    30,
    1.7,
    0.055,
    0.05,
    4,
    [
        CodecCosts("raw", RAW, 1.0, 0.003, 0.02, 0.015, transfers(0.03)),
        CodecCosts("channel", round(RAW / 1.54), 1.54, 0.003, 0.03, 0.025, transfers(0.02)),
        CodecCosts("predictive", round(RAW / 2.2), 2.2, 0.003, 0.25, 0.24, transfers(0.015)),
    ],
)
RATES = [50.0, 100, 200, 500, 1000, 2000, 5000, 10000]


def result(**changes: Any) -> Links:
    """One whose clock agrees with the formula but for 3 %."""
    points = []
    for delay in DELAYS:
        for mbps in RATES:
            for way in (PREFILL, "raw", "channel", "predictive"):
                exact = predict(INPUTS, way, mbps, delay)
                more = () if way == PREFILL else (0.9 * exact, exact, 1.05)
                taken = (1.03 * exact,) * 2
                points.append(Point(way, mbps, delay, 1.03 * exact, taken, exact, *more))
    fields = {
        "command": "kvzip eval links",
        "date": "2026-01-01T00:00:00+00:00",
        "machine": Machine("a CPU", 2, 8.0),
        "versions": {},
        "model": "pkg:model",
        "revision": "r",
        "dtype": "bf16",
        "text": "text",
        "tokens": 2048,
        "profile": "",
        "server": "a server",
        "congestion_control": "cubic",
        "repeat": 2,
        "load_average": (0.1, 1.0),
        "inputs": INPUTS,
        "points": points,
        "crossovers": crossovers(
            INPUTS, RATES, 0.0, lambda way, m: 1.03 * predict(INPUTS, way, m, 0.0)
        ),
        "exact": True,
    }
    return Links(**fields | changes)  # type: ignore[arg-type]


# --- the prediction ------------------------------------------------------------------------------


def test_a_slow_link_takes_the_time_of_its_bytes() -> None:
    for codec in INPUTS.codecs:
        alone = RAW / codec.ratio * 8 / cost.goodput(10e6)
        assert predict(INPUTS, codec.codec, 10, 0.0) == pytest.approx(alone, rel=0.02)


def test_a_fast_link_takes_the_time_of_the_processor() -> None:
    """Everything that is done on it, once; what the last layers ask for, and opening, besides."""
    for codec in INPUTS.codecs:
        work = codec.decoding_work + INPUTS.step_work + codec.transfers[0].seconds
        taken = max(work, codec.decoding, INPUTS.step)
        found = predict(INPUTS, codec.codec, 1e6, 0.0)
        assert found == pytest.approx(taken * (1 + 1 / 8) + codec.opening)


def test_what_a_transfer_takes_lies_between_what_it_takes_at_the_rates_around() -> None:
    """On a line over the logarithm, each delay by itself, and the same beyond the ends."""
    measured = [
        TransferCost(100, 0.0, 4.0),
        TransferCost(100, 0.01, 9.0),
        TransferCost(1600, 0.0, 2.0),
    ]
    codec = msgspec.structs.replace(INPUTS.codecs[0], transfers=measured)
    for mbps, seconds in ((10, 4.0), (100, 4.0), (200, 3.5), (400, 3.0), (1600, 2.0), (1e5, 2.0)):
        assert codec.transfer_work(mbps, 0.0) == pytest.approx(seconds)
    assert codec.transfer_work(400, 0.01) == 9.0


def test_a_delay_costs_its_round_trips() -> None:
    for way in ("raw", "channel", "predictive"):
        more = predict(INPUTS, way, 100, 0.01) - predict(INPUTS, way, 100, 0.0)
        assert 3 * 0.02 <= more <= 6 * 0.02
    assert predict(INPUTS, PREFILL, 100, 0.01) == INPUTS.prefill


# --- where the order turns -----------------------------------------------------------------------


def test_where_prefill_is_overtaken_is_the_break_even_bandwidth() -> None:
    found = {(t.below, t.above): t for t in result().crossovers}
    for codec in INPUTS.codecs[:2]:
        work = codec.decoding_work + INPUTS.step_work + codec.transfers[0].seconds
        rate = RAW / max(work, codec.decoding, INPUTS.step)
        same = cost.break_even_bandwidth(
            INPUTS.prefill,
            RAW,
            codec.ratio,
            decode_rate=rate,
            latency=codec.opening,
            fill=cost.pipeline_fill(RAW, 8, rate),
        ).value
        assert same is not None
        turn = found[PREFILL, codec.codec]
        assert turn.predicted is not None
        assert cost.goodput(turn.predicted * 1e6) == pytest.approx(same, rel=1e-3)
        # By the clock: lines between few bandwidths, the same 3 % on both sides.
        assert turn.measured == pytest.approx(turn.predicted, rel=0.05)


def test_a_turn_by_the_clock_alone() -> None:
    """Between 200 and 800 Mb/s the gain goes from 1/2 to 2: in the middle, at 400."""
    taken = {("raw", 200.0): 2.0, ("raw", 800.0): 1.0, ("channel", 200.0): 1.0}
    taken["channel", 800.0] = 2.0
    inputs = msgspec.structs.replace(INPUTS, codecs=INPUTS.codecs[:2], prefill=1e-9)
    found = crossovers(inputs, [200.0, 800.0], 0.0, lambda w, m: taken.get((w, m), 1e-9))
    [turn] = [t for t in found if t.measured is not None]
    assert (turn.below, turn.above) == ("channel", "raw")
    assert turn.measured == pytest.approx(400)


def test_no_turn_where_the_order_holds() -> None:
    slow = msgspec.structs.replace(INPUTS, prefill=100.0, codecs=INPUTS.codecs[:1])
    assert crossovers(slow, RATES, 0.0, lambda way, m: predict(slow, way, m, 0.0)) == []


# --- what was loaded is checked ------------------------------------------------------------------


class Wrong:
    def ask(self, **question: Any) -> dict[str, Any]:
        return {"exact": False, "seconds": 1.0}


def test_a_load_that_is_not_exact_ends_the_run() -> None:
    with pytest.raises(KVZipError, match="raw: what was loaded is not the cache"):
        timing.load_exactly(Wrong(), "raw", "somewhere")  # type: ignore[arg-type]


# --- words and drawings --------------------------------------------------------------------------


def test_the_summary_says_the_worst() -> None:
    found = result()
    assert found.worst_error == pytest.approx(1 - 1 / 1.03)
    assert found.worst_overlap == 1.05
    assert any("off by 3%" in line and "1.05 times" in line for line in words.summary(found))


def test_the_page_has_every_point(tmp_path: Any) -> None:
    page = tmp_path / "links.md"
    page.write_text("before\n<!-- links -->\nold\n<!-- /links -->\nafter\n")
    assert put_between(page, {"links": words.page(result())})
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for mbps in RATES:
        assert text.count(f"\n| {mbps:,g} Mb/s |") == 4  # times and overlap, at two delays
    assert not put_between(page, {"links": words.page(result())})


def test_the_chart_has_a_line_a_way_and_every_measurement() -> None:
    found = result()
    drawn = pictures.links_file(found)
    assert drawn.count("data-line=") == 4 * 2
    assert drawn.count("data-point=") == len(found.points) * 3  # the median, and two times
    assert "nan" not in drawn.lower()


def test_a_stored_result_comes_back(tmp_path: Any) -> None:
    stored.save(result(), tmp_path / "links.json")
    assert stored.load(tmp_path / "links.json", Links) == result()
    stored.save(result(points=[]), tmp_path / "empty.json")
    with pytest.raises(KVZipError, match="no measured link"):
        stored.load(tmp_path / "empty.json", Links)
    (tmp_path / "none.json").write_text('{"kind": "links", "version": 2}')
    with pytest.raises(KVZipError, match="not a result of kvzip eval links"):
        stored.load(tmp_path / "none.json", Links)
    (tmp_path / "old.json").write_text('{"kind": "links", "version": 1, "apart": {}, "turns": []}')
    with pytest.raises(KVZipError, match="made by an older kvzip"):
        stored.load(tmp_path / "old.json", Links)


def test_a_file_has_the_names_of_the_fields() -> None:
    """So that who reads the file finds what each key means in the class."""
    for form in (Links, PredictionInputs, CodecCosts, TransferCost, Point, Crossover):
        assert all(f.name == f.encode_name for f in msgspec.structs.fields(form)), form


def test_errors_are_relative_to_the_clock() -> None:
    point = Point("raw", 100, 0.0, 2.0, (2.0,), 1.0)
    assert point.error == -0.5 and math.isfinite(point.error)


def test_how_often_times_were_taken_and_how_far_apart_they_are_is_told() -> None:
    given = result()
    once, thrice = (
        [msgspec.structs.replace(p, times=times) for p in given.points if p.overlap][:1]
        for times in ([1.0], [1.0, 1.1, 1.5])
    )
    told = [
        words.summary(msgspec.structs.replace(given, points=points))[-1]
        for points in (once, once + thrice)
    ]
    assert told[0] == "each time is the median of 1"
    assert told[1].startswith("each time is the median of 1 to 3; of one link and way the slowest")
    assert "took 1.50 times the fastest at most, 1.50 times in the middle" in told[1]


def test_what_the_page_says_of_the_other_machine_is_stored() -> None:
    folder = DOCS / "results" / "machines"
    found = stored.load(folder / "links-intel-xeon.json", Links)
    page = " ".join((DOCS / "links.md").read_text().split())
    prefills = [p for p in found.points if p.way == PREFILL]
    times = [t for p in prefills for t in p.times]
    assert f"{len(times)} prefills took {min(times):.2f} to {max(times):.2f} s" in page
    medians = [p.seconds for p in prefills]
    assert f"{min(medians):.2f} to {max(medians):.2f} s" in page
    from_prefill: dict[float, list[tuple[float, float]]] = {0.0: [], 0.01: []}
    for c in found.crossovers:
        if c.below == PREFILL:
            from_prefill[c.delay].append((c.measured or 0, c.predicted or 0))
    (a, b, c), (x, y, z) = from_prefill.values()
    assert f"from {a[0]:.0f} Mb/s on with `predictive`, {b[0]:.0f} with `channel`" in page
    assert f"{c[0]:.0f} with raw bytes" in page
    assert f"turns at {x[0]:.0f}, {y[0]:.0f} and {z[0]:.0f} Mb/s" in page
    assert f"the formulas have {x[1]:.0f}, {y[1]:.0f} and {z[1]:.0f}" in page
