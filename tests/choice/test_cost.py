"""The formulas of kvzip.choice.cost: figures worked out by hand, and where two costs meet."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kvzip.choice import cost as e
from kvzip.errors import KVZipError

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
    model = e.fit_prefill([(255, 0.67), (3774, 14.71)]).model
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
    fit = e.fit_prefill([(n, truth.seconds(n)) for n in (100, 500, 2000, 9000)])
    assert fit.worst < 1e-6
    fitted = fit.model
    assert fitted.seconds(4000) == pytest.approx(truth.seconds(4000), rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 10**5), positive), min_size=1, max_size=8))
def test_prefill_time_is_never_below_zero(points: list[tuple[int, float]]) -> None:
    fit = e.fit_prefill(points)
    model = fit.model
    for (tokens, seconds), error in zip(fit.points, fit.errors, strict=True):
        assert model.seconds(tokens) == pytest.approx(seconds * (1 + error))
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


@given(positive, sizes, ratios, positive, positive)
def test_storage_moves_the_break_even_egress(
    prefill: float, raw: float, ratio: float, decode: float, storage: float
) -> None:
    found = e.break_even_egress(prefill, raw, ratio, decode, storage)
    if found.value is None:
        assert e.load_cost(raw / ratio, 0.0, decode, storage) >= prefill * (1 - 1e-9)
        return
    at = e.load_cost(raw / ratio, found.value, decode, storage)
    assert at == pytest.approx(prefill, rel=1e-6)
    assert value(e.break_even_ratio(prefill, raw, found.value, decode, storage)) == pytest.approx(
        ratio, rel=1e-6
    )


def test_storage_is_shared_by_the_reads() -> None:
    month = e.storage_share(0.023, 730, 1)
    assert month == pytest.approx(0.023)
    assert e.storage_share(0.023, 730, 1000) == pytest.approx(month / 1000)


@given(positive, positive, positive)
def test_break_even_reads_is_where_totals_meet(prefill: float, load: float, once: float) -> None:
    found = e.break_even_reads(prefill, load, once)
    if found.value is None:
        assert load >= prefill
        return
    n = found.value
    assert once + n * load == pytest.approx(n * prefill, rel=1e-6)
    more = math.ceil(n) + 1
    assume(prefill - load > 1e-9 * prefill)  # else one read more drowns in the sums' rounding
    assert once + more * load < more * prefill


def test_break_even_reads_of_the_paper() -> None:
    assert value(e.break_even_reads(0.67, 0.078, 0.67)) == pytest.approx(1.13, abs=0.005)
    assert value(e.break_even_reads(PREFILL, REUSE, PREFILL)) == pytest.approx(1.02, abs=0.005)


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-6), st.floats(1e-6, 1e-2), st.floats(0, 100))
@example(0.0078125, 5e-324, 0.0078125, 0.125)  # 4 b fixed is zero
def test_break_even_length_is_where_times_meet(a: float, b: float, k: float, fixed: float) -> None:
    model = e.PrefillModel(a, b)
    found = e.break_even_tokens(model, k, fixed)

    def gain(tokens: float) -> float:
        return a * tokens + b * tokens**2 - k * tokens - fixed

    if found.value is None:
        assert gain(1e12) <= 0
        return
    if found.value == 0:
        assert gain(1e-9) >= -1e-12
        return
    assume(1e-6 < found.value < 1e9)
    assume(abs(gain(found.value * 1.01)) > 1e-12)
    assert gain(found.value * 1.001) > 0 > gain(found.value / 1.001)
    low, high = found.value / 1e3, found.value * 1e3
    assume(gain(low) < 0)
    assert found.value == pytest.approx(search(gain, low, high), rel=1e-6)


@given(positive, positive, st.integers(1, 80), st.floats(0, 1))
def test_the_best_split_is_found(load: float, prefill: float, layers: int, share: float) -> None:
    fixed = share * load
    found = e.split_seconds(load, prefill, layers, fixed=fixed)

    def seconds(j: int) -> float:
        rest = fixed + (layers - j) / layers * (load - fixed) if j < layers else 0.0
        return max(j / layers * prefill, rest)

    assert found.seconds == pytest.approx(min(seconds(j) for j in range(layers + 1)))
    assert found.seconds == pytest.approx(seconds(found.layers_computed))
    assert found.seconds <= min(load, prefill) * (1 + 1e-12)
    assert found.seconds >= 1 / (1 / load + 1 / prefill) * (1 - 1e-12)


def test_many_layers_reach_the_ideal_split() -> None:
    found = e.split_seconds(3.0, 2.0, 100_000)
    assert found.seconds == pytest.approx(1 / (1 / 3 + 1 / 2), rel=1e-4)


@given(st.floats(1e6, 1e11), st.integers(1, 100), st.integers(64, 16384), st.integers(1, 10**5))
def test_a_modelled_prefill_is_its_operations(
    parameters: float, layers: int, width: int, tokens: int
) -> None:
    model = e.prefill_at_peak(parameters, layers, width, 5e14)
    wanted = e.prefill_flops(parameters, tokens, layers, width) / 5e14
    assert model.seconds(tokens) == pytest.approx(wanted, rel=1e-6)


# --- a choice ----------------------------------------------------------------------------------

FIGURES = (
    e.CodecFigures("raw", 1.0, 8e9),
    e.CodecFigures("channel", 1.54, 4e9),
    e.CodecFigures("predictive", 2.1, 2e7),
)


def situation(**changes: object) -> e.Situation:
    given = {
        "raw_bytes": 5e8,
        "layers": 36,
        "bandwidth": 1e9,
        "prefill_seconds": 14.7,
        "prefill_usd": 0.02,
        "egress": 0.09,
    } | changes
    return e.Situation(**given)  # type: ignore[arg-type]


def test_each_option_costs_what_the_formulas_say() -> None:
    s = situation(latency=0.2, storage=0.01, device_usd_per_hour=3.0)
    prefill, raw, channel, _ = e.options(s, FIGURES)
    assert (prefill.name, prefill.seconds, prefill.dollars) == ("prefill", 14.7, 0.02)
    assert raw.seconds == pytest.approx(0.2 + 5e8 / 36 / 8e9 + 5e8 * 8 / 1e9)
    assert channel.dollars == pytest.approx(5e8 / 1.54 / 1e9 * 0.1 + e.device_cost(5e8 / 4e9, 3.0))


@pytest.mark.parametrize(
    ("change", "by", "wanted"),
    [
        ({}, "seconds", "channel"),
        ({"bandwidth": 1e11}, "seconds", "raw"),
        ({"bandwidth": 5e7, "prefill_seconds": None}, "seconds", "predictive"),
        ({"bandwidth": 1e7}, "seconds", "prefill"),
        ({}, "dollars", "prefill"),
        ({"egress": 0.0}, "dollars", "raw"),
        ({"egress": 0.05}, "dollars", "predictive"),
    ],
)
def test_the_best_option(change: dict[str, object], by: e.By, wanted: str) -> None:
    assert e.best(e.options(situation(**change), FIGURES), by).name == wanted


@given(st.floats(1e5, 1e12))
def test_a_faster_link_never_makes_the_best_slower(bandwidth: float) -> None:
    slow, fast = (
        e.best(e.options(situation(bandwidth=b), FIGURES), "seconds")
        for b in (bandwidth, 2 * bandwidth)
    )
    assert fast.seconds is not None and slow.seconds is not None
    assert fast.seconds <= slow.seconds
    # Codecs of a higher ratio are for slower links.
    order = ["prefill", "predictive", "channel", "raw"]
    assert order.index(fast.name) >= order.index(slow.name)


def test_a_codec_that_cannot_be_is_named() -> None:
    for bad in (e.CodecFigures("odd", 0.0, 1e9), e.CodecFigures("odd", 2.0, -1.0)):
        with pytest.raises(KVZipError, match="odd: "):
            e.options(situation(), [bad])
    with pytest.raises(KVZipError, match="nothing to choose"):
        e.options(situation(prefill_seconds=None, prefill_usd=None), [])
    with pytest.raises(KVZipError, match="no option has dollars"):
        e.best([e.Option("prefill", 1.0, None)], "dollars")


def test_decoding_that_is_slower_than_prefill_has_a_reason() -> None:
    found = e.break_even_bandwidth(1.0, 1e9, 2.0, decode_rate=5e8)
    assert found.value is None and "decoding" in found.reason
    found = e.break_even_bandwidth(1.0, 1e9, 2.0, upload_rate=5e8)
    assert found.value is None and "uploading" in found.reason
    found = e.break_even_bandwidth(1.0, 1e9, 2.0, latency=1.0)
    assert found.value is None and "latency" in found.reason


# --- what a link and a shared processor add ----------------------------------------------------


def test_goodput_by_hand() -> None:
    """1,448 of 1,514 bytes of a full packet are content."""
    assert e.goodput(1e9) == pytest.approx(956.4e6, rel=1e-4)
    assert e.goodput(1e9, mtu=9000) > e.goodput(1e9)


def test_first_bytes_by_hand() -> None:
    """1 Gb/s and 20 ms hold 2.5 MB, 42.8 times what four connections send first: 5.45 doublings,
    one of which the link would have taken as well."""
    assert e.first_bytes_seconds(0.0, 1e9) == 0
    assert e.first_bytes_seconds(0.02, 1e9) == pytest.approx(0.02 * (3 + 4.453), rel=1e-3)
    assert e.first_bytes_seconds(0.02, 1e6) == pytest.approx(0.02 * 3)  # full from the first


@given(rates, st.floats(1e-4, 1), st.integers(1, 16))
def test_slow_start_is_what_doubling_takes(bandwidth: float, trip: float, connections: int) -> None:
    """Round by round: 10 segments a connection, then twice as many, until the link is full; the
    closed form lies within one round trip of it."""
    window, held, rounds, sent = connections * 14600.0, bandwidth * trip / 8, 0, 0.0
    while window < held:
        rounds, sent, window = rounds + 1, sent + window, 2 * window
    lost = rounds * trip - sent * 8 / bandwidth
    found = e.first_bytes_seconds(trip, bandwidth, round_trips=0, connections=connections)
    assert found == pytest.approx(lost, abs=1.0001 * trip)


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
        ("reads", lambda: e.storage_share(0.02, 730, bad)),
        ("load seconds", lambda: e.split_seconds(bad, 1, 30)),
        ("layers", lambda: e.pipeline_fill(1e9, bad, 1e9)),  # type: ignore[arg-type]
        ("bandwidth", lambda: e.first_bytes_seconds(0.01, bad)),
        ("bandwidth", lambda: e.goodput(bad)),
        ("seconds per token", lambda: e.break_even_tokens(e.PrefillModel(1, 1), bad)),
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
        ("storage price", lambda: e.storage_share(bad, 730, 1)),
        ("hours kept", lambda: e.storage_share(0.02, bad, 1)),
        ("storage per read", lambda: e.load_cost(1e9, 0.1, 0.0, bad)),
        ("load cost", lambda: e.break_even_reads(1, bad)),
        ("round trip", lambda: e.first_bytes_seconds(bad, 1e9)),
    ]
    for name, call in calls:
        with pytest.raises(KVZipError, match=name):
            call()


def test_no_points_no_model() -> None:
    with pytest.raises(KVZipError, match="at least one"):
        e.fit_prefill([])
