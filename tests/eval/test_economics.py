"""The formulas of kvzip.eval.economics, and the price book that feeds them."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvzip.errors import KVZipError
from kvzip.eval import economics as e
from kvzip.eval.prices import PriceBook, default_prices, load_prices

# The paper's document (economics.md): 3,774 tokens of Qwen3-4B in fp16.
TOKENS, RAW, PREFILL, REUSE = 3774, 147456 * 3774, 14.71, 0.296

positive = st.floats(1e-3, 1e3)
sizes = st.floats(1e3, 1e12)
ratios = st.floats(0.5, 50)
rates = st.floats(1e6, 1e12)
nonsense = pytest.mark.parametrize("bad", [-1.0, math.nan])
nothing = pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])


def search(gain: Callable[[float], float], low: float, high: float) -> float:
    """Where `gain` changes from below zero to above, by bisection on a logarithmic scale."""
    assert gain(low) < 0 < gain(high)
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) < 0 else (low, middle)
    return low


def value(threshold: e.Threshold) -> float:
    assert threshold.value is not None
    return threshold.value


# --- figures worked out by hand ------------------------------------------------------------


def test_dollar_figures_of_the_paper() -> None:
    prefill = e.token_cost(TOKENS, 5.0)
    assert prefill == pytest.approx(0.01887)
    assert e.device_cost(3600, 3.0) == 3.0
    assert e.load_cost(RAW, 0.09) == pytest.approx(0.0501, abs=1e-4)
    assert value(e.break_even_ratio(prefill, RAW, 0.09)) == pytest.approx(2.65, abs=0.005)
    assert value(e.break_even_ratio(prefill, RAW, 0.05)) == pytest.approx(1.47, abs=0.005)
    assert value(e.break_even_egress(prefill, RAW, 1)) == pytest.approx(0.034, abs=5e-4)


@pytest.mark.parametrize(("ratio", "mbps"), [(1.0, 309), (1.5, 206), (2.2, 140)])
def test_bandwidths_of_the_paper(ratio: float, mbps: float) -> None:
    found = e.break_even_bandwidth(PREFILL, RAW, ratio, latency=REUSE)
    assert value(found) / 1e6 == pytest.approx(mbps, abs=0.5)


def test_prefill_model_goes_through_two_points() -> None:
    model = e.fit_prefill([(255, 0.67), (3774, 14.71)])
    assert model.seconds(255) == pytest.approx(0.67)
    assert model.seconds(3774) == pytest.approx(14.71)
    assert model.a > 0 and model.b > 0


def test_prefill_operations() -> None:
    assert e.prefill_flops(100, 10) == 2000
    assert e.prefill_flops(100, 10, layers=2, width=3) == 2000 + 2 * 2 * 3 * 100


# --- properties ------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e-1), st.floats(1e-10, 1e-4))
def test_prefill_model_recovers_its_coefficients(a: float, b: float) -> None:
    truth = e.PrefillModel(a, b)
    fitted = e.fit_prefill([(n, truth.seconds(n)) for n in (100, 500, 2000, 9000)])
    assert fitted.seconds(4000) == pytest.approx(truth.seconds(4000), rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 10**5), positive), min_size=1, max_size=8))
def test_prefill_time_is_never_below_zero(points: list[tuple[int, float]]) -> None:
    model = e.fit_prefill(points)
    assert model.a >= 0 and model.b >= 0
    assert model.seconds(10**6) > 0


@given(positive, sizes, ratios, positive)
def test_break_even_egress_is_where_costs_meet(
    prefill: float, raw: float, ratio: float, decode: float
) -> None:
    found = e.break_even_egress(prefill, raw, ratio, decode)
    if found.value is None:
        assert decode >= prefill and found.reason
        assert e.load_cost(raw / ratio, 0.0, decode) >= prefill
        return
    assume(prefill - decode > 1e-6 * prefill)
    found_by_search = search(
        lambda p: e.load_cost(raw / ratio, p, decode) - prefill,
        found.value / 1e3,
        found.value * 1e3,
    )
    assert found.value == pytest.approx(found_by_search, rel=1e-6)
    # The same meeting point, seen from the ratio.
    same = e.break_even_ratio(prefill, raw, found.value, decode)
    assert value(same) == pytest.approx(ratio)


@given(positive, sizes, ratios, rates, rates, st.floats(0, 10), st.floats(0, 10))
def test_break_even_bandwidth_is_where_times_meet(
    prefill: float,
    raw: float,
    ratio: float,
    decode_rate: float,
    upload_rate: float,
    latency: float,
    fill: float,
) -> None:
    def seconds(bandwidth: float) -> float:
        return e.load_seconds(
            raw,
            ratio,
            bandwidth,
            decode_rate=decode_rate,
            upload_rate=upload_rate,
            latency=latency,
            fill=fill,
        )

    found = e.break_even_bandwidth(
        prefill,
        raw,
        ratio,
        decode_rate=decode_rate,
        upload_rate=upload_rate,
        latency=latency,
        fill=fill,
    )
    if found.value is None:
        assert found.reason
        assert seconds(math.inf) >= prefill * (1 - 1e-9)
        return
    assume(prefill - latency - fill > 1e-6 * prefill)
    assume(seconds(found.value * 1e3) < prefill < seconds(found.value / 1e3))
    by_search = search(
        lambda bandwidth: prefill - seconds(bandwidth), found.value / 1e3, found.value * 1e3
    )
    assert found.value == pytest.approx(by_search, rel=1e-6)


@given(positive, sizes, ratios, ratios)
def test_a_better_ratio_never_hurts(prefill: float, raw: float, one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert value(e.break_even_egress(prefill, raw, low)) <= value(
        e.break_even_egress(prefill, raw, high)
    )
    assert value(e.break_even_bandwidth(prefill, raw, low)) >= value(
        e.break_even_bandwidth(prefill, raw, high)
    )


@given(positive, sizes, positive, positive)
def test_a_dearer_link_never_helps(prefill: float, raw: float, one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert e.load_cost(raw, low) <= e.load_cost(raw, high)
    assert value(e.break_even_ratio(prefill, raw, low)) <= value(
        e.break_even_ratio(prefill, raw, high)
    )


def test_decoding_that_is_slower_than_prefill_has_a_reason() -> None:
    found = e.break_even_bandwidth(1.0, 1e9, 2.0, decode_rate=5e8)
    assert found.value is None and "decoding" in found.reason
    found = e.break_even_bandwidth(1.0, 1e9, 2.0, upload_rate=5e8)
    assert found.value is None and "uploading" in found.reason
    found = e.break_even_bandwidth(1.0, 1e9, 2.0, latency=1.0)
    assert found.value is None and "latency" in found.reason


# --- nonsense is named -------------------------------------------------------------------------


@nothing
def test_nonsense_that_must_be_above_zero(bad: float) -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("ratio", lambda: e.break_even_egress(1, 1e9, bad)),
        ("ratio", lambda: e.break_even_bandwidth(1, 1e9, bad)),
        ("ratio", lambda: e.load_seconds(1e9, bad, 1e9)),
        ("raw bytes", lambda: e.break_even_egress(1, bad, 2)),
        ("raw bytes", lambda: e.break_even_ratio(1, bad, 0.1)),
        ("bandwidth", lambda: e.load_seconds(1e9, 2, bad)),
        ("decode rate", lambda: e.load_seconds(1e9, 2, 1e9, decode_rate=bad)),
        ("upload rate", lambda: e.load_seconds(1e9, 2, 1e9, upload_rate=bad)),
        ("prefill seconds", lambda: e.break_even_bandwidth(bad, 1e9, 2)),
        ("tokens", lambda: e.fit_prefill([(bad, 1.0)])),
        ("seconds", lambda: e.fit_prefill([(100, bad)])),
        ("parameters", lambda: e.prefill_flops(bad, 100)),
    ]
    for name, call in calls:
        with pytest.raises(KVZipError, match=name):
            call()


@nonsense
def test_nonsense_that_may_be_zero(bad: float) -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("egress price", lambda: e.load_cost(1e9, bad)),
        ("encoded bytes", lambda: e.load_cost(bad, 0.1)),
        ("decode cost", lambda: e.load_cost(1e9, 0.1, bad)),
        ("prefill cost", lambda: e.break_even_egress(bad, 1e9, 2)),
        ("egress price", lambda: e.break_even_ratio(1, 1e9, bad)),
        ("price of a million tokens", lambda: e.token_cost(100, bad)),
        ("price of an hour", lambda: e.device_cost(100, bad)),
        ("latency", lambda: e.load_seconds(1e9, 2, 1e9, latency=bad)),
        ("fill", lambda: e.load_seconds(1e9, 2, 1e9, fill=bad)),
    ]
    for name, call in calls:
        with pytest.raises(KVZipError, match=name):
            call()


def test_no_points_no_model() -> None:
    with pytest.raises(KVZipError, match="at least one"):
        e.fit_prefill([])


# --- one document ------------------------------------------------------------------------------


def measured(**changes: object) -> e.Measured:
    """A small model on a CPU: 47 MB, 6.2 s of prefill, three codecs."""
    codecs = (
        e.MeasuredCodec("raw", 1.0, 9e9),
        e.MeasuredCodec("channel", 1.54, 1.3e9),
        e.MeasuredCodec("snail", 2.0, 5e6),
    )
    usual = e.Measured("small", "some CPU", 2048, 30, 47_185_920, 6.2, codecs, 6.96e11)
    return msgspec.structs.replace(usual, **changes)


def rows(document: e.Measured, base: str) -> dict[str, e.BreakEven]:
    found = e.breakeven(document, [default_prices().base(base)])
    return {row.codec: row for row in found}


def test_rows_cover_every_base_and_codec_and_go_to_json() -> None:
    found = e.breakeven(measured(), default_prices().bases())
    assert [(row.base, row.codec) for row in found] == [
        (base, codec)
        for base in ("paper-m1pro", "h100-rented")
        for codec in ("raw", "channel", "snail")
    ]
    assert msgspec.json.decode(msgspec.json.encode(found), type=list[e.BreakEven]) == found
    # Time needs no price.
    assert [row.time for row in found[:3]] == [row.time for row in found[3:]]


def test_verdict_in_dollars_is_the_sign_of_the_difference() -> None:
    for row in e.breakeven(measured(), default_prices().bases()):
        d = row.dollars
        assert (d.verdict == "load") == (d.load_usd < d.prefill_usd)
        if d.break_even_usd_per_gb is not None:
            assert (d.verdict == "load") == (d.egress_usd_per_gb < d.break_even_usd_per_gb)
        if d.break_even_ratio is not None:
            assert (d.verdict == "load") == (row.ratio > d.break_even_ratio)


def test_time_follows_from_prefill_ratio_and_decoding() -> None:
    found = rows(measured(), "paper-m1pro")
    raw, channel, snail = (found[name].time for name in ("raw", "channel", "snail"))
    assert raw.break_even_mbps == pytest.approx(47_185_920 * 8 / 6.2 / 1e6, rel=1e-3)
    assert channel.break_even_mbps is not None and raw.break_even_mbps is not None
    assert channel.break_even_mbps < raw.break_even_mbps
    assert raw.beats_raw_below_mbps is None and channel.beats_raw_below_mbps == 1.3e9 * 8 / 1e6
    assert snail.decode_bound and snail.break_even_mbps is None
    assert "decoding" in snail.verdict


def test_each_basis_says_what_it_is() -> None:
    paper = rows(measured(), "paper-m1pro")["raw"].dollars
    assert paper.prefill_basis == "list price"
    assert paper.prefill_usd == pytest.approx(2048 * 5e-6)
    assert "derived" in paper.basis and "estimate" in paper.basis

    modelled = rows(measured(), "h100-rented")["raw"].dollars
    assert modelled.prefill_basis == "model" and "no NVIDIA H100 was measured" in modelled.basis
    assert modelled.prefill_usd == pytest.approx(6.96e11 / (0.5 * 989e12) / 3600 * 3.0)

    there = rows(measured(device="NVIDIA H100 80GB HBM3"), "h100-rented")["raw"].dollars
    assert there.prefill_basis == "measured"
    assert there.prefill_usd == pytest.approx(6.2 / 3600 * 3.0)


def test_an_upper_bound_never_says_load() -> None:
    found = rows(measured(prefill_flops=None), "h100-rented")
    assert {row.dollars.prefill_basis for row in found.values()} == {"upper bound"}
    assert found["channel"].dollars.load_usd < found["channel"].dollars.prefill_usd
    assert found["channel"].dollars.verdict == "unknown"
    cheap = rows(measured(prefill_flops=None, prefill_seconds=0.01), "h100-rented")
    assert {row.dollars.verdict for row in cheap.values()} == {"prefill"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"codecs": ()}, "codec"),
        ({"tokens": -1}, "tokens"),
        ({"raw_bytes": 0}, "raw bytes"),
        ({"layers": 0}, "layers"),
        ({"prefill_seconds": math.nan}, "prefill seconds"),
        ({"prefill_flops": -1.0}, "prefill operations"),
        ({"codecs": (e.MeasuredCodec("odd", 0.0, 1e9),)}, "odd: ratio"),
        ({"codecs": (e.MeasuredCodec("odd", 2.0, 0.0),)}, "odd: decode rate"),
    ],
)
def test_a_document_that_cannot_be_gets_no_verdict(change: dict[str, object], name: str) -> None:
    with pytest.raises(KVZipError, match=name):
        e.breakeven(measured(**change), default_prices().bases())


# --- the price book ------------------------------------------------------------------------------

BOOK = """
[egress.a]
value = 0.09
unit = "USD/GB"
date = "2026-06"
source = "somebody"
[device.a]
value = 3.0
unit = "USD/h"
date = "autumn 2026"
source = "somebody"
[preset.a]
title = "A"
egress = "a"
device = "a"
device_name = "a box"
"""


def load(tmp_path, text: str) -> PriceBook:  # type: ignore[no-untyped-def]
    path = tmp_path / "prices.toml"
    path.write_text(text)
    return load_prices(path)


def test_a_book_of_ones_own(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert load(tmp_path, BOOK).base("a").egress.value == 0.09


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"USD/GB"', '"EUR/GB"', r"egress\.a is in 'EUR/GB'"),
        ("0.09", "-0.09", r"egress\.a is -0\.09"),
        ("0.09", "nan", r"egress\.a is nan"),
        ("0.09", '"cheap"', "Expected `float`"),
        ("2026-06", "last week", r"egress\.a: date"),
        ('source = "somebody"\n[device', 'source = ""\n[device', r"egress\.a has no source"),
        ('source = "somebody"\n[device', "[device", "missing required field `source`"),
        ('egress = "a"', 'egress = "b"', r"names egress\.b"),
        ('title = "A"', 'title = "A"\ncolour = "red"', "unknown field `colour`"),
        ("[egress.a]", "[egress.a", "prices.toml"),
    ],
)
def test_what_is_wrong_with_a_book_is_said(  # type: ignore[no-untyped-def]
    tmp_path, old: str, new: str, message: str
) -> None:
    assert old in BOOK
    with pytest.raises(KVZipError, match=message):
        load(tmp_path, BOOK.replace(old, new))


def test_a_book_that_is_not_there(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KVZipError, match="No such file"):
        load_prices(tmp_path / "none.toml")


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(KVZipError, match="paper-m1pro, h100-rented"):
        default_prices().base("phone")
