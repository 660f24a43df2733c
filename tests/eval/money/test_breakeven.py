"""Verdicts on a captured document, and the price book that feeds them."""

from __future__ import annotations

import math

import msgspec
import pytest

from kvzip.choice.cost import CodecFigures, load_seconds, storage_share
from kvzip.errors import KVZipError
from kvzip.eval.money import breakeven as e
from kvzip.eval.money.prices import HEADLINE, UNITS, PriceBook, default_prices, load_prices

# --- one document ------------------------------------------------------------------------------


def measured(**changes: object) -> e.Measured:
    """A small model on a CPU: 47 MB, 6.2 s of prefill, three codecs."""
    codecs = (
        CodecFigures("raw", 1.0, 9e9),
        CodecFigures("channel", 1.54, 1.3e9),
        CodecFigures("snail", 2.0, 5e6),
    )
    usual = e.Measured("small", "some CPU", 2048, 30, 47_185_920, 6.2, codecs, 6.96e11)
    return msgspec.structs.replace(usual, **changes)


def rows(document: e.Measured, base: str) -> dict[str, e.BreakEven]:
    found = e.breakeven(document, [default_prices().base(base)])
    return {row.codec: row for row in found}


def test_rows_cover_every_base_and_codec_and_go_to_json() -> None:
    found = e.breakeven(measured(), default_prices().bases(HEADLINE))
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


def test_a_verdict_that_turns_on_decoding_is_marked() -> None:
    bases = [default_prices().base(name) for name in ("h100-same-region", "h100-rented")]
    for row in e.breakeven(measured(prefill_flops=5.8e11), bases):
        free = row.dollars.break_even_free_decode_usd_per_gb
        assert free is not None
        turns = row.dollars.verdict == "prefill" and free > row.dollars.egress_usd_per_gb
        assert row.dollars.turns_on_decoding == turns == (row.base == "h100-same-region")


def test_reads_pay_back_the_encoding_too() -> None:
    quick = CodecFigures("channel", 1.54, 1.3e9)
    slow = msgspec.structs.replace(quick, encode_rate=1e7)
    base = default_prices().base("paper-m1pro")
    once, dear = (e.breakeven(measured(codecs=(c,)), [base])[0].dollars for c in (quick, slow))
    assert once.break_even_reads is not None and dear.break_even_reads is not None
    paid = (dear.break_even_reads - once.break_even_reads) * (dear.prefill_usd - dear.load_usd)
    assert paid == pytest.approx(47_185_920 / 1e7 / 3600 * base.device.value)


@pytest.mark.parametrize(("ratio", "rate"), [(1.54, 1.3e9), (1.007, 2.9e9), (2.2, 2e8)])
def test_a_codec_beats_raw_bytes_up_to_the_link_that_is_told(ratio: float, rate: float) -> None:
    given = measured(codecs=(CodecFigures("one", ratio, rate),))
    [row] = e.breakeven(given, [default_prices().base("l4")])
    limit, fill = row.time.beats_raw_below_mbps, row.time.fill_seconds
    assert limit is not None
    for factor, sooner in ((0.99, True), (1.01, False)):
        link = limit * 1e6 * factor
        loaded = load_seconds(given.raw_bytes, ratio, link, decode_rate=rate, fill=fill)
        assert (loaded < load_seconds(given.raw_bytes, 1.0, link)) == sooner


def test_a_device_is_not_another_whose_name_begins_alike() -> None:
    base = default_prices().base("l4")
    kinds = [
        e.prefill_price(measured(device=name, prefill_flops=None), base)[1]
        for name in ("NVIDIA L4", "NVIDIA L4 (24 GB)", "NVIDIA L40S", "NVIDIA L40")
    ]
    assert kinds == ["measured", "measured", "upper bound", "upper bound"]


def test_the_providers_own_cache_is_the_price_of_a_read_there() -> None:
    book = default_prices()
    for base in book.bases():
        assert (e.own_cache_usd(base, 0.01) is None) == (base.api_cached is None)
    assert e.own_cache_usd(book.base("paper-m1pro"), 0.01) == pytest.approx(0.001)
    assert e.own_cache_usd(book.base("api-deepseek"), 0.14) == pytest.approx(0.0028)


def test_time_follows_from_prefill_ratio_and_decoding() -> None:
    found = rows(measured(), "paper-m1pro")
    raw, channel, snail = (found[name].time for name in ("raw", "channel", "snail"))
    assert raw.break_even_mbps == pytest.approx(47_185_920 * 8 / 6.2 / 1e6, rel=1e-3)
    assert channel.break_even_mbps is not None and raw.break_even_mbps is not None
    assert channel.break_even_mbps < raw.break_even_mbps
    assert raw.beats_raw_below_mbps is None and channel.beats_raw_below_mbps is not None
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


def test_what_takes_long_is_told_in_words() -> None:
    large = measured(prefill_flops=1.8e15, prefill_seconds=4000.0)
    told = rows(large, "h100-rented")["raw"].dollars.basis
    assert "1,800 TFLOP at 50% of 989 TFLOP/s = 3.64 s at $3.00" in told
    told = rows(msgspec.structs.replace(large, prefill_flops=None), "h100-rented")
    assert "the 66.7 min of some CPU at" in told["raw"].dollars.basis


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
        ({"codecs": (CodecFigures("odd", 0.0, 1e9),)}, "odd: ratio"),
        ({"codecs": (CodecFigures("odd", 2.0, 0.0),)}, "odd: decode rate"),
    ],
)
def test_a_document_that_cannot_be_gets_no_verdict(change: dict[str, object], name: str) -> None:
    with pytest.raises(KVZipError, match=name):
        e.breakeven(measured(**change), default_prices().bases())


@pytest.mark.parametrize("hours", [0.0, 730.0])
def test_storage_is_charged_by_the_read(hours: float) -> None:
    [row] = e.breakeven(
        measured(codecs=(CodecFigures("channel", 1.54, 1.3e9),)),
        [default_prices().base("h100-rented")],
        e.Use(reads=10, hours=hours),
    )
    encoded = 47_185_920 / 1.54 / 1e9
    wanted = encoded * storage_share(0.023, hours, 10) if hours else 0.0
    assert row.dollars.storage_usd == pytest.approx(wanted)
    assert row.dollars.load_usd == pytest.approx(encoded * 0.09 + wanted + row.dollars.decode_usd)


def test_where_storage_alone_costs_the_prefill_no_egress_price_is_low_enough() -> None:
    rows = e.breakeven(
        measured(), [default_prices().base("h100-rented")], e.Use(reads=1, hours=1e9)
    )
    assert all(row.dollars.break_even_free_decode_usd_per_gb is None for row in rows)
    assert all(row.dollars.break_even_usd_per_gb is None for row in rows)


def test_reads_that_pay_back_the_storage() -> None:
    [row] = e.breakeven(
        measured(codecs=(CodecFigures("channel", 1.54, 1.3e9),)),
        [default_prices().base("paper-m1pro")],
        e.Use(reads=5, hours=730),
    )
    d = row.dollars
    assert d.break_even_reads is not None
    # As many reads, the storage of the month spread over them, cost what as many prefills do.
    n = d.break_even_reads
    kept = 5 * d.storage_usd
    assert d.prefill_usd + kept + n * (d.load_usd - d.storage_usd) == pytest.approx(
        n * d.prefill_usd
    )


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (e.Use(reads=0, hours=1), "reads"),
        (e.Use(reads=1, hours=-1), "hours kept"),
        (e.Use(reads=math.nan, hours=1), "reads"),
    ],
)
def test_a_use_that_cannot_be_is_named(use: e.Use, name: str) -> None:
    with pytest.raises(KVZipError, match=name):
        e.breakeven(measured(), default_prices().bases(), use)


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


def test_a_book_of_ones_own_goes_over_the_librarys(tmp_path) -> None:  # type: ignore[no-untyped-def]
    book = load(
        tmp_path, BOOK + '[egress.r2]\nvalue = 0.5\nunit = "USD/GB"\ndate = "2027"\nsource = "x"'
    )
    assert book.base("a").egress.value == 0.09
    assert book.egress["r2"].value == 0.5
    assert default_prices().egress["r2"].value == 0.0
    assert book.egress["aws"] == default_prices().egress["aws"]


def test_a_preset_changes_only_in_what_is_said_of_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    base = load(tmp_path, '[preset.l4]\negress = "r2"').base("l4")
    assert base.egress.value == 0.0
    assert base.device == default_prices().device["l4"]


def test_a_later_file_goes_over_an_earlier_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(BOOK)
    two.write_text('[preset.a]\negress = "oci"')
    assert load_prices(one, two).base("a").egress.value == 0.0085
    assert load_prices() == default_prices()


def test_a_new_value_needs_its_own_source(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KVZipError, match=r"prices.toml: egress\.aws: .*missing.*`unit`"):
        load(tmp_path, "[egress.aws]\nvalue = 0.02")


def test_every_group_of_the_librarys_book_has_entries_and_every_preset_works() -> None:
    book = default_prices()
    for group in (*UNITS, "prefill", "model", "preset"):
        assert getattr(book, group), group
    rows = e.breakeven(measured(), book.bases(), e.Use(reads=100, hours=24))
    assert {row.base for row in rows} == set(book.preset) >= {
        "paper-m1pro", "h100-rented", "l4", "rtx4090", "api-qwen",
    }  # fmt: skip


def test_what_has_no_source_is_called_a_model() -> None:
    book = default_prices()
    assert book.storage["nvme"].basis == "model" and book.device["own"].basis == "model"
    assert all(p.source for group in UNITS for p in getattr(book, group).values())


@pytest.mark.parametrize(
    ("model", "tokens", "raw_bytes"),
    [("qwen3-4b", 3774, 556_498_944), ("smollm2-135m", 2048, 47_185_920)],
)
def test_shapes_give_the_known_sizes(model: str, tokens: int, raw_bytes: int) -> None:
    assert default_prices().model[model].numbers_per_token * 2 * tokens == raw_bytes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"USD/GB"', '"EUR/GB"', r"egress\.a is in 'EUR/GB'"),
        ("0.09", "-0.09", r"egress\.a is -0\.09"),
        ("0.09", "nan", r"egress\.a is nan"),
        ("0.09", '"cheap"', r"egress\.a: Expected `float`"),
        ("[egress.a]", "[egres.a]", r"no group 'egres'; the groups are: egress, storage"),
        ("[egress.a]", "[egress]", r"write \[egress\.NAME\]"),
        ("2026-06", "last week", r"egress\.a: date"),
        ('source = "somebody"\n[device', 'source = ""\n[device', r"egress\.a has no source"),
        ('source = "somebody"\n[device', "[device", "missing required field `source`"),
        ('egress = "a"', 'egress = "b"', r"names egress\.b"),
        (
            'title = "A"',
            'title = "A"\ncolour = "red"',
            r"preset\.a: .*unknown field `colour`; its fields are: title, egress",
        ),
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
