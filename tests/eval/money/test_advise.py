"""Advice: the best of all options, how sure it is, and three lines that say so."""

from __future__ import annotations

import dataclasses
import math
import statistics
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvzip.choice import cost
from kvzip.choice.auto import MEASURED
from kvzip.errors import KVZipError
from kvzip.eval.money import advise as a
from kvzip.eval.money.arguments import bandwidth
from kvzip.eval.money.breakeven import Use
from kvzip.eval.money.prices import default_prices
from kvzip.eval.money.ratios import same_model
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.stored import load

BOOK = default_prices()
INPUTS = load(MEASURED, Inputs)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a, "DRAWS", 150)


def advise(**changes: Any) -> a.Advice:
    given: dict[str, Any] = {
        "shape": BOOK.model["smollm2-135m"],
        "model": "smollm2-135m",
        "tokens": 2048,
        "dtype": "bf16",
        "bandwidth": 4e8,
        "base": BOOK.base("h100-rented"),
        "inputs": INPUTS,
    }
    return a.advise(**given | changes)


def option(advice: a.Advice, name: str) -> cost.Option:
    return next(o for o in advice.options if o.name == name)


def test_the_best_is_the_least_of_all() -> None:
    found = advise()
    assert found.seconds.value == min(o.seconds for o in found.options)  # type: ignore[type-var]
    assert found.dollars.value == min(o.dollars for o in found.options)  # type: ignore[type-var]
    assert found.raw_bytes == 47_185_920
    assert found.seconds.prefill == pytest.approx(INPUTS.prefill.model.seconds(2048))
    raw = option(found, "raw")
    assert (found.seconds.raw, found.dollars.raw) == (raw.seconds, raw.dollars)
    assert found.seconds.times_prefill == pytest.approx(found.seconds.prefill / found.seconds.value)


def rate_in(turns: str) -> float:
    """The bits per second at which the words say that the verdict turns."""
    return bandwidth(" ".join(turns.replace(",", "").split()[3:5]), BOOK)


@pytest.mark.parametrize("bandwidth", [1e6, 1e8, 1e10, 1e12])
@pytest.mark.parametrize("base", ["paper-m1pro", "h100-rented", "h100-same-region", "own-machine"])
def test_turns_are_where_the_verdict_turns(bandwidth: float, base: str) -> None:
    found = advise(bandwidth=bandwidth, base=BOOK.base(base))
    seconds = found.seconds
    if seconds.turns.startswith("it never turns"):
        assert seconds.best == "prefill"
        return
    limit = rate_in(seconds.turns)
    for factor, loads in ((0.99, False), (1.01, True)):
        there = advise(bandwidth=limit * factor, base=BOOK.base(base))
        assert (there.seconds.best != "prefill") is loads


def test_why_the_verdict_never_turns_is_said() -> None:
    """Where latency stops every codec, latency is named; where codecs are stopped by different
    things, each is named with its own."""
    prefill = advise().seconds.prefill
    late = advise(latency=prefill).seconds.turns
    assert late == ("it never turns: latency and pipeline fill alone take as long as the prefill")
    # What is left of the prefill suffices for the fill of all, and for the decoder of none.
    quick = min(47_185_920 / f.decode_rate for f in INPUTS.figures("bf16", 2048))
    figures = [
        cost.CodecFigures("slow", 1.5, 1e3),
        cost.CodecFigures("quick", 1.5, 47_185_920 / (0.9 * quick)),
    ]
    situation = cost.Situation(
        raw_bytes=47_185_920, layers=30, bandwidth=1e9, prefill_seconds=0.8 * quick
    )
    assert a._turns("seconds", "prefill", situation, figures) == (
        "it never turns: latency and pipeline fill alone take as long as the prefill (slow); "
        "decoding alone takes as long as the prefill (quick)"
    )
    dear = advise(use=Use(reads=1, hours=1e9), base=BOOK.base("paper-m1pro"))
    assert "decoding and storage alone cost as much as the prefill" in dear.dollars.turns


def test_near_the_turn_it_is_not_sure() -> None:
    limit = rate_in(advise().seconds.turns)
    assert advise(bandwidth=limit / 100).seconds.sure > 0.98
    assert 0.3 < advise(bandwidth=limit).seconds.sure < 0.7
    # Codecs that load alike share the draws in which loading wins.
    alike = advise(bandwidth=1e9, codecs=["channel", "predictive"])
    assert alike.seconds.best != "prefill"
    assert alike.seconds.sure < 0.95 < alike.seconds.side_sure
    never = advise(bandwidth=limit / 100).seconds
    assert never.best == "prefill" and never.sure == never.side_sure
    assert advise(bandwidth=limit * 4).seconds.best != "prefill"


def test_the_first_layers_computed_meanwhile() -> None:
    found = advise(bandwidth=1.2e8)
    assert 0 < found.split.layers_computed < 30
    assert found.split.seconds < found.seconds.value
    assert f"first {found.split.layers_computed} layers computed" in found.lines()[0]


def test_money_and_time_rest_on_their_own_prefill() -> None:
    """Time as measured here; dollars of the price base's device, by its peak."""
    found = advise()
    shape, h100 = BOOK.model["smollm2-135m"], BOOK.compute["h100"]
    model = cost.prefill_at_peak(shape.parameters, shape.layers, shape.width, h100.value * 5e11)
    assert found.dollars.prefill == pytest.approx(cost.device_cost(model.seconds(2048), 3.0))
    listed = advise(base=BOOK.base("api-qwen"))
    assert listed.dollars.prefill == pytest.approx(cost.token_cost(2048, 0.117))
    there = advise(compute=h100)
    assert there.seconds.prefill == pytest.approx(model.seconds(2048))


def test_storage_is_charged_by_the_read() -> None:
    one, many = (
        advise(use=Use(reads=reads, hours=730), base=BOOK.base("h100-same-region"))
        for reads in (1, 1000)
    )
    more = (option(one, "channel").dollars or 0) - (option(many, "channel").dollars or 0)
    encoded = (
        47_185_920
        / 1e9
        / next(f.ratio for f in INPUTS.figures("bf16", 2048) if f.name == "channel")
    )
    assert more == pytest.approx(encoded * 0.023 * (1 - 1 / 1000))


def test_another_model_is_advised_by_its_shape_and_less_surely() -> None:
    found = advise(shape=BOOK.model["qwen3-4b"], model="qwen3-4b", tokens=8192, bandwidth=5e10)
    assert found.raw_bytes == 147456 * 8192
    assert "ratios measured on SmolLM2-135M, taken to hold for qwen3-4b" in found.basis
    assert "ratios measured on SmolLM2-135M" in advise().basis
    assert any("prefill a model: 50% of 989" in words for words in found.basis)


def test_what_a_load_takes_beside_its_bytes_is_told() -> None:
    assert "no time before a load's first byte, nor for the model's step" in str(advise().basis)
    given = advise(latency=0.0021)
    assert "2.1 ms before a load's first byte and for the model's step" in str(given.basis)
    least = min(o.seconds for o in advise().options if o.name != "prefill")  # type: ignore[type-var]
    then = min(o.seconds for o in given.options if o.name != "prefill")  # type: ignore[type-var]
    assert then == pytest.approx(least + 0.0021)  # type: ignore[operator]


def test_four_lines_say_it() -> None:
    lines = advise(bandwidth=2e9).lines()
    assert len(lines) == 4
    assert lines[0].startswith("Time: load with channel") and "sure" in lines[0]
    assert lines[1].startswith("Dollars: prefill") and "A rented H100" in lines[1]
    assert lines[2].startswith("Room: 1 TB holds") and "raw" in lines[2]
    assert lines[3].startswith("Rests on: prefill fitted to")
    assert "prefill, " in advise(bandwidth=1e5).lines()[0]


def test_how_sure_says_of_what() -> None:
    load, prefill = advise(bandwidth=1e9), advise(bandwidth=1e5)
    assert min(load.seconds.side_sure, prefill.seconds.side_sure) > 0.99
    share = f"{load.seconds.sure:.0%}".replace("%", " %")
    assert (
        f"That loading beats prefill is more than 99 % sure, that {load.seconds.best} is the best "
        f"load {share};" in load.lines()[0]
    )
    assert "That prefill wins is more than 99 % sure;" in prefill.lines()[0]


@pytest.mark.parametrize("inside", ["machine", "data centre"])
def test_a_link_that_stays_inside_has_no_egress_price(inside: str) -> None:
    outside, found = advise(), advise(inside=inside)
    for o in found.options[1:]:
        figures = next(f for f in INPUTS.figures("bf16", 2048) if f.name == o.name)
        decode = cost.device_cost(47_185_920 / figures.decode_rate, 3.0)
        assert o.dollars == pytest.approx(decode)
        egress = 47_185_920 / figures.ratio / 1e9 * 0.09
        assert option(outside, o.name).dollars == pytest.approx(decode + egress)
    assert found.seconds == outside.seconds and found.dollars.prefill == outside.dollars.prefill
    assert f"no egress inside a {inside}" in found.basis[-1]
    assert "egress $0.09/GB" in outside.basis[-1]


def test_which_links_of_the_book_stay_inside() -> None:
    assert {name: link.inside for name, link in BOOK.link.items()} == {
        "s3-connection": "",
        **dict.fromkeys(("ethernet-10", "ethernet-100", "ethernet-400"), "data centre"),
        **dict.fromkeys(("nvme-gen4", "nvme-gen5", "host-to-h100"), "machine"),
    }


def test_it_goes_to_json_and_back() -> None:
    found = advise()
    assert msgspec.json.decode(msgspec.json.encode(found), type=a.Advice) == found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("10", 1e10),
        ("10Gb/s", 1e10),
        ("400 Mb/s", 4e8),
        ("7GB/s", 5.6e10),
        ("nvme-gen4", 5.6e10),
        ("1e3 kb/s", 1e6),
    ],
)
def test_links_as_people_write_them(text: str, wanted: float) -> None:
    assert bandwidth(text, BOOK) == wanted


@pytest.mark.parametrize("text", ["fast", "10 Gbit", "-3 Gb/s", "0", "nan", "1e", ""])
def test_links_that_are_none(text: str) -> None:
    with pytest.raises(KVZipError, match="link"):
        bandwidth(text, BOOK)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 0}, "tokens"),
        ({"tokens": -5}, "tokens"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"bandwidth": math.nan}, "bandwidth"),
        ({"latency": -1.0}, "latency"),
        ({"dtype": "int4"}, "int4"),
        ({"codecs": ["gzip"]}, "none of these codecs was measured.*raw"),
        ({"threads": 0}, "threads"),
        ({"use": Use(reads=0, hours=1)}, "reads"),
        (
            {"base": BOOK.base("api-qwen"), "shape": BOOK.model["qwen3-8b"]},
            "prefill's time is not known",
        ),
    ],
)
def test_what_cannot_be_gets_no_advice(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(KVZipError, match=says):
        advise(**changes)


def test_inputs_that_cannot_be_are_named(tmp_path: Any) -> None:
    def written(**changes: Any) -> Any:
        plain = msgspec.to_builtins(INPUTS) | changes
        (tmp_path / "inputs.json").write_bytes(msgspec.json.encode(plain))
        return tmp_path / "inputs.json"

    assert load(written(), Inputs) == INPUTS
    row = msgspec.to_builtins(INPUTS.rows[0])
    for changes, says in (
        ({"rows": []}, "no codec"),
        ({"rows": [row | {"ratio": -1.0}]}, "ratio is -1"),
        ({"rows": [row | {"exact": False}]}, "was not exact"),
        ({"kind": "links"}, "not a result of kvzip eval inputs, but of kvzip eval links"),
        ({"machine": None}, "machine"),
    ):
        with pytest.raises(KVZipError, match=says):
            load(written(**changes), Inputs)
    with pytest.raises(KVZipError, match="No such file"):
        load(tmp_path / "none.json", Inputs)


def test_figures_are_of_the_nearest_length_in_ratio() -> None:
    lengths = sorted({row.tokens for row in INPUTS.rows if row.dtype == "bf16"})
    for length in lengths:
        for tokens in (length * 0.95, length * 1.05):
            wanted = [r.figures for r in INPUTS.rows if (r.dtype, r.tokens) == ("bf16", length)]
            assert INPUTS.figures("bf16", tokens) == wanted
    with pytest.raises(KVZipError, match="no codec was measured on int4"):
        INPUTS.figures("int4", 100)


def test_a_measured_run_of_a_tiny_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `measure` on a random model: rows for each dtype, length and codec, a codec that fails
    named."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from support import tiny_model

    from kvzip.eval.speed import inputs as measuring

    class Words:
        """A tokenizer of one token a byte."""

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": [b % 200 for b in text.encode()]})

    def load(ref: str, dtype: str) -> Any:
        return dataclasses.replace(tiny_model("Llama"), tokenizer=Words())

    torch.set_num_threads(1)
    monkeypatch.setattr(measuring, "load_model", load)
    text = tmp_path / "text.txt"
    text.write_text("a few words " * 100)
    found = measuring.measure(
        "tiny",
        text=[str(text)],
        lengths=(32, 64),
        cache_dtypes=("bf16", "fp8_e4m3fn"),
        codecs=("raw", "channel"),
        repeat=1,
    )
    assert [(r.dtype, r.tokens, r.codec) for r in found.rows] == [
        (dtype, tokens, codec)
        for dtype in ("bf16", "fp8_e4m3fn")
        for tokens in (32, 64)
        for codec in ("raw", "channel")
    ]
    assert isinstance(found, Inputs) and found.layers == 4
    assert found.numbers_per_token == 2 * 4 * 2 * 8
    assert found.width == 4 * 8
    assert [n for n, _ in found.prefill.points] == [32, 64]
    assert all(r.raw_bytes == r.tokens * 128 * (2 if r.dtype == "bf16" else 1) for r in found.rows)
    with pytest.raises(KVZipError, match="at least one length"):
        measuring.measure("tiny", lengths=())


def with_predictive(**changes: Any) -> Inputs:
    """The measured inputs with one row of predictive, as channel's, with these changes."""
    others = [row for row in INPUTS.rows if row.codec != "predictive"]
    row = next(row for row in others if (row.codec, row.dtype) == ("channel", "bf16"))
    row = msgspec.structs.replace(row, codec="predictive", **changes)
    return msgspec.structs.replace(INPUTS, rows=[*others, row])


def test_a_profile_is_counted_and_said() -> None:
    """Its bytes are those that it was measured with, for a model of another shape scaled; without a
    measurement one region's."""
    assert advise(codecs=["raw", "channel"]).profiles == []
    region = 30 * 4 * 384**2
    tokens = next(row.tokens for row in with_predictive().rows if row.codec == "predictive")
    found = advise(inputs=with_predictive(), bandwidth=8e9, tokens=tokens)
    [needed] = found.profiles
    assert (needed.codec, needed.bytes, needed.copies) == ("predictive", region, 1)
    assert needed.seconds == pytest.approx(region / 1e9)
    kept = next(k for k in found.room.kept if k.codec == "predictive")
    assert kept.documents == pytest.approx((1e12 - region) * kept.ratio / found.raw_bytes)
    said = advise(inputs=with_predictive(ratio=9.0), tokens=tokens).lines()
    assert len(said) == 4
    assert "The profile of predictive takes 17.7 MB of it and of the host's memory" in said[2]
    inputs = with_predictive(profile_bytes=5 * region)
    assert advise(inputs=inputs, tokens=tokens).profiles[0].bytes == pytest.approx(5 * region)
    other = advise(inputs=inputs, tokens=tokens, shape=BOOK.model["qwen3-4b"], model="qwen3-4b")
    assert other.profiles[0].bytes == pytest.approx(5 * 36 * 4 * 2048**2)


def test_how_far_ratios_may_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a codec gains is least sure where it was learned from another model."""
    drawn: list[dict[str, float]] = []
    options = a.options

    def seen(situation: Any, figures: Any) -> Any:
        drawn.append({f.name: f.ratio - 1 for f in figures})
        return options(situation, figures)

    monkeypatch.setattr(a, "options", seen)
    tokens = next(row.tokens for row in with_predictive().rows if row.codec == "predictive")
    for model, channel, predictive in (("smollm2-135m", 0.01, 0.01), ("qwen3-4b", 0.1, 0.2)):
        drawn.clear()
        codecs = ["channel", "predictive"]
        given = {"tokens": tokens, "inputs": with_predictive(), "codecs": codecs}
        advise(model=model, shape=BOOK.model[model], **given)
        for codec, spread in (("channel", channel), ("predictive", predictive)):
            logarithms = [math.log(gains[codec]) for gains in drawn[-a.DRAWS :]]
            assert statistics.pstdev(logarithms) == pytest.approx(spread, rel=0.3), (model, codec)


def test_a_profile_on_a_gpu_takes_the_gpus_memory() -> None:
    rate = next(iter(BOOK.decoder.values()))
    book = msgspec.structs.replace(BOOK, decoder={**BOOK.decoder, "predictive": rate})
    inputs = with_predictive(ratio=9.0)
    tokens = inputs.rows[-1].tokens
    found = advise(inputs=inputs, tokens=tokens, book=book, on_device=True)
    assert found.profiles[0].on_device
    assert "MB of it and of a GPU's memory" in found.lines()[2]


def test_storage_without_a_price_is_not_free() -> None:
    base = msgspec.structs.replace(BOOK.base("h100-r2"), storage=None)
    assert advise(base=base).dollars.value > 0
    with pytest.raises(KVZipError, match=r"h100-r2 names no storage price"):
        advise(base=base, use=Use(reads=2, hours=1))


def test_a_cache_of_the_same_shape_is_not_of_the_same_model() -> None:
    """Qwen3-4B and Qwen3-8B: caches of one shape, prefills of two speeds."""
    four, eight = (BOOK.model[name] for name in ("qwen3-4b", "qwen3-8b"))
    made = msgspec.structs.replace(
        INPUTS, layers=36, numbers_per_token=73728.0, parameters=3_633_511_936
    )
    assert four.numbers_per_token == eight.numbers_per_token
    assert same_model(four, made) and not same_model(eight, made)
    basis = [advise(shape=shape, model="one", inputs=made).basis for shape in (four, eight)]
    assert "measured" in basis[0][0] and "a model" in basis[1][0]
    assert "taken to hold" not in basis[0][1] and "taken to hold" in basis[1][1]


def test_prefill_times_of_one_model_are_worked_out_for_another() -> None:
    base, four = BOOK.base("paper-m1pro"), BOOK.model["qwen3-4b"]
    own, words, spread = a.prefill_model(four, None, None, base, book=BOOK)
    assert own.seconds(3774) == pytest.approx(14.71) and "a model" not in words
    for name in ("qwen3-8b", "minimax-m2-5", "smollm2-135m", "deepseek-v4-pro"):
        shape = BOOK.model[name]
        found, words, wider = a.prefill_model(shape, None, None, base, book=BOOK)
        one, other = (
            cost.prefill_at_peak(s.parameters, s.square_layers, s.width, 1e14)
            for s in (four, shape)
        )
        assert found.a / own.a == pytest.approx(other.a / one.a)
        assert found.b / own.b == pytest.approx(other.b / one.b)
        assert "by operations: a model" in words and wider > spread


def test_what_the_providers_own_cache_asks_is_told() -> None:
    [line] = [w for w in advise(base=BOOK.base("paper-m1pro")).lines() if w.startswith("Dollars")]
    assert "from the provider's own cache: $0.00102, which is less than any of these." in line
    assert "own cache" not in " ".join(advise().lines())


def test_a_plain_copy_is_told_where_it_turns_the_verdict() -> None:
    """Over PCIe one thread that checks raw bytes takes longer than an H100's prefill; bytes that
    nobody checks do not."""
    four = {"shape": BOOK.model["qwen3-4b"], "model": "qwen3-4b", "tokens": 8192}
    found = advise(**four, bandwidth=432e9, base=BOOK.base("h100-same-region"))
    raw = 8192 * 147_456
    assert found.seconds.best == found.dollars.best == "prefill"
    assert found.seconds.unchecked == pytest.approx(raw * 8 / 432e9)
    assert found.seconds.unchecked < found.seconds.prefill and found.dollars.unchecked == 0
    time, money, *_ = found.lines()
    assert ", 22.4 ms by a copy of raw bytes that nobody checks, at best" in time
    assert ", $0 by a copy of raw bytes that nobody checks, at best" in money
    slow = advise(**four, bandwidth=1e9)
    assert slow.seconds.unchecked > slow.seconds.value
    assert "nobody checks" not in " ".join(slow.lines()[:2])


def test_a_prefill_counts_as_a_codec_does_by_its_fastest_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were it the median, loading would look better by what a machine wavers."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from kvzip.eval.speed import inputs as measuring

    class Model:
        device = torch.device("cpu")
        config = None

        def __call__(self, ids: Any, **options: Any) -> Any:
            return SimpleNamespace(logits=torch.zeros(1, 1, 4))

    took = iter([9.0, 1.0, 3.0, 2.0, 8.0, 5.0, 6.0])  # one to warm up, three of each length
    clock = iter([t for seconds in took for t in (0.0, seconds)])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    loaded = SimpleNamespace(model=Model())
    assert measuring.prefill_seconds(loaded, list(range(8)), (4, 8)) == [(4, 1.0), (8, 5.0)]


def test_a_target_is_told_and_less_sure_than_a_measured_rate() -> None:
    """A GPU's rates are the price book's, whatever the inputs are of."""

    def asked(bandwidth: float, **changed: Any) -> a.Advice:
        rate = msgspec.structs.replace(BOOK.decoder["predictive"], **changed)
        return advise(
            shape=BOOK.model["qwen3-4b"],
            model="qwen3-4b",
            tokens=8192,
            bandwidth=bandwidth,
            codecs=["predictive"],
            on_device=True,
            book=msgspec.structs.replace(BOOK, decoder=BOOK.decoder | {"predictive": rate}),
        )

    found = asked(4e10)
    assert (found.seconds.best, found.targets) == ("predictive", ["predictive"])
    assert "load with predictive (its decoder's rate is a target)" in found.lines()[0]
    # Half of a prefill's time, limited by the decoder.
    target, measured = (asked(2e11, value=16.0, basis=basis) for basis in ("target", "measured"))
    assert target.seconds.value == measured.seconds.value
    assert measured.targets == [] and "target" not in measured.lines()[0]
    assert 0.5 < target.seconds.side_sure < measured.seconds.side_sure
