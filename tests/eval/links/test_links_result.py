"""What a result of links says: predictions, where the order turns, drawings, the page."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from kvzip.choice import cost
from kvzip.errors import KVZipError
from kvzip.eval.links import measure as links
from kvzip.eval.links.measure import PREFILL, Alone, Apart, Moving, Point, predict, turns
from kvzip.eval.report import charts
from kvzip.eval.report.readme import put_between
from kvzip.eval.results import stored
from kvzip.eval.results.provenance import Machine

RAW = 47_185_920
DELAYS = (0.0, 0.01)


def moving(seconds: float) -> list[Moving]:
    """The same at every rate."""
    return [Moving(mbps, delay, seconds) for delay in DELAYS for mbps in (50.0, 10000)]


APART = Apart(
    RAW,
    30,
    1.7,
    0.055,
    0.05,
    4,
    [
        Alone("raw", RAW, 1.0, 0.003, 0.02, 0.015, moving(0.03)),
        Alone("channel", round(RAW / 1.54), 1.54, 0.003, 0.03, 0.025, moving(0.02)),
        Alone("predictive", round(RAW / 2.2), 2.2, 0.003, 0.25, 0.24, moving(0.015)),
    ],
)
RATES = [50.0, 100, 200, 500, 1000, 2000, 5000, 10000]


def result(**changes: Any) -> links.Links:
    """One whose clock agrees with the formula but for 3 %."""
    points = []
    for delay in DELAYS:
        for mbps in RATES:
            for way in (PREFILL, "raw", "channel", "predictive"):
                exact = predict(APART, way, mbps, delay)
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
        "apart": APART,
        "points": points,
        "turns": turns(APART, RATES, 0.0, lambda way, m: 1.03 * predict(APART, way, m, 0.0)),
        "exact": True,
    }
    return links.Links(**fields | changes)  # type: ignore[arg-type]


# --- the prediction ------------------------------------------------------------------------------


def test_a_slow_link_takes_the_time_of_its_bytes() -> None:
    for codec in APART.codecs:
        alone = RAW / codec.ratio * 8 / cost.goodput(10e6)
        assert predict(APART, codec.codec, 10, 0.0) == pytest.approx(alone, rel=0.02)


def test_a_fast_link_takes_the_time_of_the_processor() -> None:
    """Everything that is done on it, once; what the last layers ask for, and opening, besides."""
    for codec in APART.codecs:
        work = codec.decoding_work + APART.step_work + codec.moving[0].seconds
        taken = max(work, codec.decoding, APART.step)
        found = predict(APART, codec.codec, 1e6, 0.0)
        assert found == pytest.approx(taken * (1 + 1 / 8) + codec.opening)


def test_what_moving_takes_lies_between_what_it_takes_at_the_rates_around() -> None:
    """On a line over the logarithm, each delay by itself, and the same beyond the ends."""
    measured = [Moving(100, 0.0, 4.0), Moving(100, 0.01, 9.0), Moving(1600, 0.0, 2.0)]
    codec = msgspec.structs.replace(APART.codecs[0], moving=measured)
    for mbps, seconds in ((10, 4.0), (100, 4.0), (200, 3.5), (400, 3.0), (1600, 2.0), (1e5, 2.0)):
        assert codec.moving_work(mbps, 0.0) == pytest.approx(seconds)
    assert codec.moving_work(400, 0.01) == 9.0


def test_a_delay_costs_its_round_trips() -> None:
    for way in ("raw", "channel", "predictive"):
        more = predict(APART, way, 100, 0.01) - predict(APART, way, 100, 0.0)
        assert 3 * 0.02 <= more <= 6 * 0.02
    assert predict(APART, PREFILL, 100, 0.01) == APART.prefill


# --- where the order turns -----------------------------------------------------------------------


def test_where_prefill_is_overtaken_is_the_break_even_bandwidth() -> None:
    found = {(t.below, t.above): t for t in result().turns}
    for codec in APART.codecs[:2]:
        work = codec.decoding_work + APART.step_work + codec.moving[0].seconds
        rate = RAW / max(work, codec.decoding, APART.step)
        same = cost.break_even_bandwidth(
            APART.prefill,
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
    apart = msgspec.structs.replace(APART, codecs=APART.codecs[:2], prefill=1e-9)
    found = turns(apart, [200.0, 800.0], 0.0, lambda w, m: taken.get((w, m), 1e-9))
    [turn] = [t for t in found if t.measured is not None]
    assert (turn.below, turn.above) == ("channel", "raw")
    assert turn.measured == pytest.approx(400)


def test_no_turn_where_the_order_holds() -> None:
    slow = msgspec.structs.replace(APART, prefill=100.0, codecs=APART.codecs[:1])
    assert turns(slow, RATES, 0.0, lambda way, m: predict(slow, way, m, 0.0)) == []


# --- what was loaded is checked ------------------------------------------------------------------


class Wrong:
    def ask(self, **question: Any) -> dict[str, Any]:
        return {"exact": False, "seconds": 1.0}


def test_a_load_that_is_not_exact_ends_the_run() -> None:
    with pytest.raises(KVZipError, match="raw: what was loaded is not the cache"):
        links._loaded(Wrong(), "raw", "somewhere")  # type: ignore[arg-type]


# --- words and drawings --------------------------------------------------------------------------


def test_the_summary_says_the_worst() -> None:
    found = result()
    assert found.worst_error == pytest.approx(1 - 1 / 1.03)
    assert found.worst_overlap == 1.05
    assert any("off by 3%" in line and "1.05 times" in line for line in links.summary(found))


def test_the_page_has_every_point(tmp_path: Any) -> None:
    page = tmp_path / "links.md"
    page.write_text("before\n<!-- links -->\nold\n<!-- /links -->\nafter\n")
    assert put_between(page, {"links": links.page(result())})
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for mbps in RATES:
        assert text.count(f"\n| {mbps:,g} Mb/s |") == 4  # times and overlap, at two delays
    assert not put_between(page, {"links": links.page(result())})


def test_the_chart_has_a_line_a_way_and_every_measurement() -> None:
    found = result()
    drawn = charts.links_file(found)
    assert drawn.count("data-line=") == 4 * 2
    assert drawn.count("data-point=") == len(found.points) * 3  # the median, and two times
    assert "nan" not in drawn.lower()


def test_a_stored_result_comes_back(tmp_path: Any) -> None:
    stored.save(result(), tmp_path / "links.json")
    assert links.load_links(tmp_path / "links.json") == result()
    stored.save(result(points=[]), tmp_path / "empty.json")
    with pytest.raises(KVZipError, match="no measured link"):
        links.load_links(tmp_path / "empty.json")
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(KVZipError, match="not a result of kvzip eval links"):
        links.load_links(tmp_path / "none.json")


def test_errors_are_relative_to_the_clock() -> None:
    point = Point("raw", 100, 0.0, 2.0, (2.0,), 1.0)
    assert point.error == -0.5 and math.isfinite(point.error)
