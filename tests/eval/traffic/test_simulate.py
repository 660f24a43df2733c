"""A replay in time does what was worked out by hand, and what formulas say where they hold."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from traces import a_trace

from kvzip.choice.cost import PrefillModel, load_seconds, pipeline_fill
from kvzip.eval.traffic.finding import find
from kvzip.eval.traffic.fleet import STRATEGIES, CodecUse, Fleet, Tier, rooms
from kvzip.eval.traffic.simulate import simulate, work
from kvzip.eval.traffic.trace import BLOCK_TOKENS, spread, synthetic

pytest.importorskip("simpy", reason="a replay needs the extra `eval`")

TOKEN = 1 / BLOCK_TOKENS
RAW = CodecUse(name="raw", ratio=1.0)
HALF = CodecUse(name="half", ratio=2.0, decode_rate=1000.0, encode_rate=500.0)


def a_fleet(**changes):
    """A block takes a GPU 1 s, has 512 bytes, and crosses PCIe in 0.5 s."""
    usual = Fleet(
        model="none",
        layers=1,
        bytes_per_token=1.0,
        prefill=PrefillModel(TOKEN, 0.0),
        gpus=1,
        gpu_usd_per_hour=3600.0,
        pcie=2 * 512 * 8.0,
        cores=1,
        tiers=(Tier(name="host", bytes=math.inf),),
    )
    return msgspec.structs.replace(usual, **changes)


def run(trace, fleet, codec, strategy):
    found = find(trace, rooms(fleet, codec, BLOCK_TOKENS), fleet.policy)
    return simulate(trace, found, fleet, codec, strategy)


def test_a_trace_worked_out_by_hand():
    trace = a_trace([1, 2], [1, 2, 3], [4], [1, 2, 3], seconds=[0, 1, 10, 20])
    # Computing: the second waits for the first until 2, and is done at 5.
    found = run(trace, a_fleet(), RAW, "recompute")
    assert found.ttft == pytest.approx([2, 4, 1, 3])
    assert (found.gpu_seconds, found.seconds) == pytest.approx((2 + 3 + 1 + 3, 23))
    # Loading: the second waits until its blocks are computed at 2, loads two of them in 1 s and
    # computes one; the last loads three and computes one token anew.
    found = run(trace, a_fleet(), RAW, "load")
    assert found.ttft == pytest.approx([2, 3, 1, 1.5 + TOKEN])
    assert found.gpu_seconds == pytest.approx(2 + 1 + 1 + TOKEN)
    assert found.busy["pcie"] == pytest.approx(2.5)
    assert run(trace, a_fleet(), RAW, "choose").ttft == pytest.approx(found.ttft)
    # Both: a block computed while two are loaded, for which the GPU is held that long.
    found = run(trace, a_fleet(), RAW, "overlap")
    assert found.ttft == pytest.approx([2, 1 + 2 / 3 + 1, 1, 1 + TOKEN], abs=1e-3)
    assert found.loaded.tolist() == pytest.approx([0, 2 / 3, 0, 2 / 3], abs=1e-3)
    assert found.gpu_seconds == pytest.approx(2 + 2 / 3 + 1 + 1 + 1 + TOKEN, abs=2e-3)


def test_a_link_that_is_slower_than_computing():
    slow = a_fleet(pcie=512 * 8 / 4.0)
    trace = a_trace([1, 2], [1, 2], seconds=[0, 10])
    assert run(trace, slow, RAW, "load").ttft == pytest.approx([2, 8 + TOKEN])
    assert run(trace, slow, RAW, "choose").ttft == pytest.approx([2, 2])
    # The GPU meets the link after 8/5 of 2 blocks.
    assert run(trace, slow, RAW, "overlap").ttft == pytest.approx([2, 1.6 + TOKEN], abs=2e-3)


def test_a_codec_is_less_on_the_links_and_more_for_decoders():
    drive = Tier(name="nvme", bytes=math.inf, bandwidth=512 * 8.0, latency=0.25)
    fleet = a_fleet(tiers=(drive,), pcie=math.inf)
    trace = a_trace([1, 2], [1, 2], seconds=[0, 10])
    assert run(trace, fleet, RAW, "load").ttft[1] == pytest.approx(2.25 + TOKEN)
    # Half the bytes: 1 s on the drive; 1.024 s in the decoder, which cannot begin before the layer
    # (there is one) is there.
    assert run(trace, fleet, HALF, "load").ttft[1] == pytest.approx(0.25 + 2 * 1.024 + TOKEN)
    # On a device decoding takes the GPU.
    device = msgspec.structs.replace(HALF, decoder="device")
    found = run(trace, fleet, device, "load")
    assert found.ttft[1] == pytest.approx(0.25 + 1 + 1.024 + TOKEN)
    assert found.gpu_seconds == pytest.approx(2 + 1.024 + TOKEN)
    # And PCIe carries what is encoded.
    narrow = msgspec.structs.replace(fleet, pcie=512 * 8.0)
    assert run(trace, narrow, device, "load").busy["pcie"] == pytest.approx(1)
    assert run(trace, narrow, HALF, "load").busy["pcie"] == pytest.approx(2)


def test_loads_queue_at_a_drive():
    drive = Tier(name="nvme", bytes=math.inf, bandwidth=512 * 8.0)
    trace = a_trace([1, 2], [1, 2], [1, 2], seconds=[0, 10, 10])
    one = a_fleet(tiers=(drive,), pcie=math.inf, gpus=4)
    assert run(trace, one, RAW, "load").ttft == pytest.approx([2, 2 + TOKEN, 4 + TOKEN])
    two = msgspec.structs.replace(one, tiers=(msgspec.structs.replace(drive, links=2),))
    assert run(trace, two, RAW, "load").ttft == pytest.approx([2, 2 + TOKEN, 2 + TOKEN])


FLEETS = {
    "host": a_fleet(layers=7, cores=3),
    "tiers": a_fleet(
        layers=5,
        gpus=3,
        prefill=PrefillModel(TOKEN, 1e-6),
        tiers=(
            Tier(name="gpu", bytes=30 * 512, encoded=False),
            Tier(name="host", bytes=200 * 512),
            Tier(name="nvme", bytes=900 * 512, bandwidth=1e4, links=2, latency=0.1),
            Tier(name="object", bytes=math.inf, bandwidth=3e3, latency=0.5),
        ),
    ),
    "s3-fifo": a_fleet(tiers=(Tier(name="host", bytes=300 * 512),), policy="s3-fifo"),
}


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=list(FLEETS))
@pytest.mark.parametrize("codec", [RAW, HALF, msgspec.structs.replace(HALF, decoder="device")])
def test_without_contention_a_replay_is_the_formula(fleet, codec):
    trace = synthetic(300, seed=4)
    trace = msgspec.structs.replace(trace, seconds=np.arange(300) * 1e6)
    found = find(trace, rooms(fleet, codec, BLOCK_TOKENS), fleet.policy)
    assert found.blocks.sum() > 100
    todo = work(trace, found, fleet, codec)
    ttft = {s: simulate(trace, found, fleet, codec, s).ttft for s in STRATEGIES}
    whole = fleet.prefill.each(todo.tokens)
    rest = whole - fleet.prefill.each(np.minimum(todo.found, todo.tokens - 1))
    load = np.where(todo.found > 0, todo.load_seconds() + todo.decode, 0.0) + rest
    assert ttft["recompute"] == pytest.approx(whole, rel=1e-6)
    assert ttft["load"] == pytest.approx(load, rel=1e-6)
    least = np.minimum(ttft["recompute"], ttft["load"])
    assert ttft["choose"] == pytest.approx(least, rel=1e-6)
    if codec.decoder == "host":
        assert (ttft["overlap"] <= ttft["load"] * (1 + 1e-6)).all()
        assert (ttft["overlap"] < 0.99 * least).any()


def test_a_load_takes_what_the_library_says():
    drive = Tier(name="nvme", bytes=math.inf, bandwidth=1e4, latency=0.25)
    fleet = a_fleet(tiers=(drive,), layers=9, cores=2)
    trace = a_trace([1, 2, 3], [1, 2, 3], seconds=[0, 1e6])
    for codec in (RAW, HALF):
        todo = work(trace, find(trace, [math.inf]), fleet, codec)
        raw = 3 * 512.0
        rate = 2 * codec.decode_rate
        assert todo.load_seconds()[1] == pytest.approx(
            load_seconds(
                raw,
                codec.ratio,
                drive.bandwidth,
                decode_rate=rate,
                upload_rate=fleet.pcie / 8,
                latency=0.25,
                fill=pipeline_fill(raw, 9, rate),
            )
        )


@pytest.mark.parametrize("use", [0.3, 0.8])
def test_requests_wait_for_a_gpu_as_queues_do(use):
    rng = np.random.default_rng(1)
    n = 20_000
    trace = a_trace(*([i] for i in range(n)), seconds=np.cumsum(rng.exponential(1 / use, n)))
    found = run(trace, a_fleet(), RAW, "recompute")
    wait = found.ttft.mean() - 1  # a block takes 1 s
    assert wait == pytest.approx(use / (2 * (1 - use)), rel=0.08)


def test_every_request_is_served_whatever_the_strategy():
    trace = spread(synthetic(500, seed=8, rate=200.0))
    fleet = FLEETS["tiers"]
    for strategy in STRATEGIES:
        found = run(trace, fleet, HALF, strategy)
        assert (found.ttft > 0).all()
        assert found.gpu_seconds <= fleet.gpus * found.seconds * (1 + 1e-9)
        assert ((found.loaded >= 0) & (found.loaded <= 1)).all()


def test_requests_of_one_time_spread_evenly():
    trace = a_trace(*([i] for i in range(7)), seconds=[0, 0, 0, 3, 3, 4, 4])
    assert spread(trace).seconds.tolist() == [0, 1, 2, 3, 3.5, 4, 4.5]
    apart = a_trace([1], [2], seconds=[0, 2])
    assert spread(apart).seconds.tolist() == [0, 2]
    assert spread(a_trace([1], [2], seconds=[5, 5])).seconds.tolist() == [0, 0]
