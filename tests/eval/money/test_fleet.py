"""Fleets: the closed form and the simulation agree where they meet; bills add up."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvzip.choice.cost import MONTH_HOURS, CodecFigures, load_cost
from kvzip.errors import KVZipError
from kvzip.eval.money import fleet as f
from kvzip.eval.money.fleet_presets import presets
from kvzip.eval.money.prices import default_prices

RAW = CodecFigures("raw", 1.0, math.inf)
HALF = CodecFigures("half", 2.0, 1e9)


def fleet(**changes: object) -> f.Fleet:
    usual = f.Fleet(
        readers=20_000.0,
        documents=500,
        zipf=0.8,
        regions=2,
        nodes_per_region=2,
        raw_bytes=1e9,
        node_bytes=60e9,
        prefill_seconds=2.0,
        reuse_seconds=0.1,
        device_usd_per_hour=3.6,
        egress=0.09,
        storage=0.02,
        node_bandwidth=8e9,
    )
    return msgspec.structs.replace(usual, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zipf": 0.0},
        {"zipf": 1.3, "node_bytes": 10e9},
        {"node_bytes": math.inf},
        {"node_bytes": math.inf, "reads_per_write": 20.0},
        {"reads_per_write": 30.0},
        {"regions": 1, "nodes_per_region": 1, "node_bytes": 5e9},
        {"documents": 20_000, "node_bytes": 500e9},
        {"documents": 1, "reads_per_write": 3.0},
    ],
)
@pytest.mark.drawn(3)
def test_the_simulation_and_the_closed_form_agree(changes: dict[str, object]) -> None:
    given_fleet = fleet(**changes)
    by_form = f.closed_form(given_fleet)
    runs = [f.simulate(given_fleet, seed=seed) for seed in range(3)]
    assert np.mean([r.reads for r in runs]) == pytest.approx(by_form.reads, rel=0.02)
    assert np.mean([r.writes for r in runs]) == pytest.approx(by_form.writes, rel=0.03)
    assert np.mean([r.hit_rate for r in runs]) == pytest.approx(by_form.hit_rate, abs=0.012)
    assert np.mean([r.link_use for r in runs]) == pytest.approx(by_form.link_use, rel=0.02)
    for way in f.WAYS:
        one = f.bill(given_fleet, by_form, way, RAW)
        many = [f.bill(given_fleet, r, way, RAW) for r in runs]
        for field in ("dollars", "device_seconds", "store_bytes", "node_bytes"):
            mean = np.mean([getattr(b, field) for b in many])
            assert mean == pytest.approx(getattr(one, field), rel=0.06), (way, field)


def test_reads_wait_for_a_busy_link_as_queues_do() -> None:
    busy = fleet(
        documents=1, regions=1, nodes_per_region=1, node_bandwidth=8e9, hours=20_000 / 3600 / 0.8
    )
    by_form = f.closed_form(busy)
    assert by_form.link_use == pytest.approx(0.8)
    assert by_form.wait_seconds == pytest.approx(0.8 * 1.0 / (2 * 0.2))
    waits = [f.simulate(busy, seed=s).wait_seconds for s in range(4)]
    assert np.mean(waits) == pytest.approx(by_form.wait_seconds, rel=0.12)
    # A codec that halves the bytes takes a link that cannot keep up to one that can.
    full = fleet(regions=1, nodes_per_region=1, node_bandwidth=8e9, hours=20_000 / 3600 / 1.2)
    assert f.closed_form(full, 1.0).wait_seconds is None
    assert f.closed_form(full, 2.0).wait_seconds == pytest.approx(0.6 * 0.5 / (2 * 0.4))


@given(st.integers(1, 10**9), st.floats(0, 2))
def test_popularity_adds_up(documents: int, zipf: float) -> None:
    share, alike = f.popularity(documents, zipf)
    assert alike.sum() == pytest.approx(documents)
    assert (share * alike).sum() == pytest.approx(1)
    assert (np.diff(share) <= 1e-15).all()


@pytest.mark.parametrize("zipf", [0.0, 0.7, 1.0, 1.4])
def test_bins_stand_for_their_documents(zipf: float, monkeypatch: pytest.MonkeyPatch) -> None:
    many = fleet(documents=20_000, node_bytes=300e9, zipf=zipf)
    binned = f.closed_form(many)
    monkeypatch.setattr(f, "EXACT_RANKS", 20_000)
    assert f.closed_form(many).hits == pytest.approx(binned.hits, rel=1e-3)


@given(
    st.floats(1, 1e9),
    st.integers(1, 10**6),
    st.floats(0, 2),
    st.floats(1, 1e4),
    st.floats(1e8, 1e13),
)
@example(1.0, 4097, 1.0000000000000002, 1.0, 1e8)  # nearly harmonic
def test_hits_are_what_they_can_be(
    readers: float, documents: int, zipf: float, per_write: float, room: float
) -> None:
    made = fleet(
        readers=readers, documents=documents, zipf=zipf, reads_per_write=per_write, node_bytes=room
    )
    one, two = f.closed_form(made, 1.0), f.closed_form(made, 2.0)
    assert 0 <= one.hits <= one.reads * (1 + 1e-9)
    assert two.hits >= one.hits * (1 - 1e-6) - 1e-6  # smaller caches, more of them
    rarely = f.closed_form(msgspec.structs.replace(made, reads_per_write=math.inf))
    assert rarely.hits >= one.hits * (1 - 1e-6) - 1e-6


def test_the_papers_fleet() -> None:
    the_paper = presets()["paper-80m"]
    counts = f.count(the_paper)
    assert counts.method == "closed form" and counts.reads == 80e6
    everyone = f.bill(the_paper, counts, "prefill")
    assert everyone.dollars == pytest.approx(1.5e6, rel=0.01)
    assert everyone.device_seconds == pytest.approx(80e6 * 14.71)
    hosted = f.bill(the_paper, counts, "provider", RAW)
    assert hosted.dollars == pytest.approx(0.03e6, rel=0.05)
    assert hosted.readers_pay_usd == pytest.approx(0.15e6, rel=0.01)
    # The paper has no nodes at the readers: every load is egress.
    shipped = f.bill(the_paper, counts, "egress", RAW)
    assert shipped.network_usd / everyone.dollars == pytest.approx(2.65, abs=0.01)
    assert shipped.store_bytes == pytest.approx(80e6 * 556_498_944)


def test_caches_of_wider_numbers_are_larger() -> None:
    narrow, usual, wide = (presets(itemsize=size) for size in (1, 2, 4))
    assert usual == presets()
    for name, fleet_of_bytes in narrow.items():
        assert usual[name].raw_bytes == 2 * fleet_of_bytes.raw_bytes
        assert wide[name].raw_bytes == 4 * fleet_of_bytes.raw_bytes


def test_bytes_between_zones_are_paid_for_at_both_ends() -> None:
    each_way = default_prices().egress["aws-zones"]
    assert "each way" in each_way.source
    assert {p.internal for n, p in presets().items() if n != "paper-80m"} == {2 * each_way.value}


def test_nodes_and_encoding_are_paid_for() -> None:
    given = fleet(readers=5000.0, documents=100, node_storage=0.73, hours=10.0)
    counts = f.count(given, 2.0)
    free = msgspec.structs.replace(given, node_storage=0.0)
    for way in ("egress", "provider", "nodes-only"):
        kept = [f.bill(g, counts, way, HALF).storage_usd for g in (given, free)]
        # Two regions hold 100 caches of half a GB, $0.01 a GB in ten hours; their room is 240 GB.
        assert kept[0] - kept[1] == pytest.approx(2 * 100 * 0.5 * 0.01)
        slow = msgspec.structs.replace(HALF, encode_rate=1e8)
        dear, quick = (f.bill(given, counts, way, codec) for codec in (slow, HALF))
        encoded = counts.misses if way == "nodes-only" else counts.writes
        assert dear.encode_seconds == pytest.approx(10 * encoded) and quick.encode_seconds == 0
        assert dear.dollars - quick.dollars == pytest.approx(10 * encoded * 3.6 / 3600)
    small = msgspec.structs.replace(given, node_bytes=10e9)
    bill = f.bill(small, counts, "nodes-only", HALF)
    assert bill.storage_usd == pytest.approx(4 * 10 * 0.01)


@pytest.mark.parametrize("method", ["simulation", "closed form"])
def test_nodes_without_room_find_nothing(method: str) -> None:
    assert f.count(fleet(node_bytes=0.0), 2.0, method).hits == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("zipf", [20.0, 400.0, 1e6])
def test_a_law_so_steep_that_one_document_has_all_reads(zipf: float) -> None:
    steep, one = (f.closed_form(fleet(documents=n, zipf=zipf)) for n in (10**6, 1))
    assert steep.hits == pytest.approx(one.hits, rel=1e-4)


def test_bills_add_up_and_come_cheapest_first() -> None:
    found = f.bills(fleet(readers=5000.0), [RAW, HALF])
    assert len(found) == 1 + 3 * 2
    dollars = [b.dollars for _, b in found]
    assert dollars == sorted(dollars)
    for counts, b in found:
        parts = b.compute_usd + b.network_usd + b.storage_usd
        assert b.dollars == pytest.approx(parts)
        if b.way != "prefill":
            ratio = {"raw": 1, "half": 2}[b.codec]
            assert b.node_bytes == pytest.approx(counts.reads * 1e9 / ratio)
            assert b.decode_seconds == pytest.approx(counts.reads if b.codec == "half" else 0)
        if b.way in ("egress", "provider"):
            assert b.store_bytes == pytest.approx(counts.misses * 1e9 / ratio)


def test_every_preset_can_be_counted_and_billed() -> None:
    for name, preset in presets().items():
        found = f.bills(preset, [RAW, HALF])
        assert all(math.isfinite(b.dollars) and b.dollars > 0 for _, b in found), name
    assert f.count(presets()["one-reader"]).hits == 0
    assert f.count(presets()["world"]).reads == 1e10


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"readers": -1.0}, "readers"),
        ({"readers": math.nan}, "readers"),
        ({"documents": 0}, "documents"),
        ({"egress": -0.1}, "egress"),
        ({"zipf": -1.0}, "zipf"),
        ({"reads_per_write": 0.0}, "reads_per_write"),
        ({"node_bytes": math.nan}, "node_bytes"),
        ({"prefill_usd": -1.0}, "prefill_usd"),
        ({"hours": math.inf}, "hours"),
    ],
)
def test_a_fleet_that_cannot_be_is_named(changes: dict[str, object], name: str) -> None:
    with pytest.raises(KVZipError, match=name):
        f.count(fleet(**changes))


def test_what_cannot_be_asked() -> None:
    many = fleet(documents=10**9)  # which would be gigabytes, however few read
    assert f.count(many).method == "closed form"
    with pytest.raises(KVZipError, match="1,000,000,000 documents are too many to simulate"):
        f.simulate(many)
    with pytest.raises(KVZipError, match="too many to simulate"):
        f.simulate(fleet(readers=1e9))
    with pytest.raises(KVZipError, match="at least one codec"):
        f.bills(fleet(), [])
    with pytest.raises(KVZipError, match="needs a codec"):
        f.bill(fleet(), f.count(fleet()), "egress")
    with pytest.raises(KVZipError, match="odd: ratio"):
        f.bill(fleet(), f.count(fleet()), "egress", CodecFigures("odd", 0.0, 1.0))


def test_a_profile_is_stored_once_and_takes_room_in_every_node() -> None:
    given = fleet(documents=200, node_bytes=20 * fleet().raw_bytes, regions=2, storage=0.02)
    size = 4 * given.raw_bytes
    needs = msgspec.structs.replace(HALF, profile_bytes=size)
    bills = {(b.way, b.codec): (c, b) for c, b in f.bills(given, [HALF])}
    for c, b in f.bills(given, [needs]):
        counts, without = bills[b.way, b.codec]
        if b.way == "prefill":
            assert b == without
            continue
        smaller = msgspec.structs.replace(given, node_bytes=given.node_bytes - size)
        assert c == f.count(smaller, 2.0)
        assert c.hit_rate < counts.hit_rate
        if b.way != "nodes-only":
            each = given.raw_bytes / 2
            nodes = given.regions * given.nodes_per_region
            assert b.store_bytes == pytest.approx(c.misses * each + nodes * size)
            assert b.storage_usd - without.storage_usd == pytest.approx(
                load_cost(size, given.storage * given.hours / MONTH_HOURS)
            )
