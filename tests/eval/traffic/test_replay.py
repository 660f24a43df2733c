"""A replay's rows add up, agree with the capacities, and say where each number comes from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import msgspec
import pytest
from command import run, run_json
from test_simulate import HALF, RAW, a_fleet
from traces import a_trace

from kvzip.errors import KVZipError
from kvzip.eval.money.arguments import shape_of
from kvzip.eval.money.prices import default_prices
from kvzip.eval.money.profiles import profile_bytes
from kvzip.eval.report.traffic import core_seconds, cores_use, too_few_cores
from kvzip.eval.results import stored
from kvzip.eval.results.traffic import BASIS, FleetRow, TierRow, TrafficResult
from kvzip.eval.traffic.capacity import capacities, needed_capacity
from kvzip.eval.traffic.fleet import Tier, gpus_needed, rooms, tiers
from kvzip.eval.traffic.replay import NO_CODEC, row
from kvzip.eval.traffic.trace import BLOCK_TOKENS, synthetic

pytest.importorskip("simpy", reason="a replay needs the extra `eval`")

BOOK = default_prices()
RESULTS = Path(__file__).parents[3] / "docs/results"


@pytest.mark.parametrize("blocks", [20, 100, 600])
@pytest.mark.parametrize("codec", [RAW, HALF])
def test_a_store_of_one_tier_finds_what_the_capacities_say(blocks, codec):
    trace = synthetic(300, seed=6)
    fleet = a_fleet(tiers=(Tier(name="host", bytes=blocks * 512.0),))
    [wanted] = capacities([blocks], [codec.ratio], needed_capacity(trace))
    for strategy in ("load", "choose", "overlap"):
        assert row(trace, fleet, codec, strategy).hit_rate == pytest.approx(wanted.hit_rate)
    assert row(trace, fleet, codec, "recompute").hit_rate == 0


def test_gpu_memory_alone_is_a_store_of_one_tier_without_a_price():
    trace = synthetic(300, seed=6)
    gpu = Tier(name="gpu", bytes=60 * 512.0, encoded=False)
    host = Tier(name="host", bytes=100 * 512.0, usd_per_gb_month=1e9)
    both = a_fleet(tiers=(gpu, host))
    alone = row(trace, both, NO_CODEC, "gpu")
    assert alone == msgspec.structs.replace(
        row(trace, a_fleet(tiers=(gpu,)), NO_CODEC, "load"), strategy="gpu"
    )
    assert 0 < alone.hit_rate < row(trace, both, RAW, "load").hit_rate
    assert (alone.store_usd, [tier.tier for tier in alone.tiers]) == (0, ["gpu"])
    bare = row(trace, a_fleet(tiers=(host,)), NO_CODEC, "gpu")
    assert (bare.hit_rate, bare.tiers) == (0, [])


def test_cores_that_are_not_there_are_told():
    made = stored.load(RESULTS / "traffic-conversation.json", TrafficResult)
    rows = {(r.strategy, r.codec): r for r in made.rows}
    there = 16 * made.gpus * made.seconds
    for found in rows.values():
        needed = found.decode_core_seconds + found.encode_core_seconds
        assert cores_use(made, found) == pytest.approx(needed / there)
    assert core_seconds(made, rows["load", "predictive"]).endswith(" (2.8x)")
    assert "x" not in core_seconds(made, rows["load", "channel"])
    assert too_few_cores(made, made.rows) and not too_few_cores(made, [rows["load", "channel"]])


def test_dollars_worked_out_by_hand():
    # 3600 $/h is a dollar a second. A GB of the host's memory is 730 * 3600 $ a month: a dollar a
    # second. Blocks have 1 GB.
    host = Tier(name="host", bytes=8e9, usd_per_gb_month=730 * 3600.0, usd_per_gb_read=0.5)
    fleet = a_fleet(tiers=(host,), bytes_per_token=1e9 / 512, pcie=16e9)
    trace = a_trace([1, 2], [1, 2], seconds=[0, 10])
    codec = msgspec.structs.replace(HALF, decode_rate=4e9, encode_rate=1e9)
    found = row(trace, fleet, codec, "load")
    # Two blocks decode in 0.5 s, all in one layer; on PCIe they take 1 s.
    seconds = 10 + 1 + 0.5 + 1 / 512
    assert found.gpu_usd == pytest.approx(2 + 1 / 512)
    assert found.tiers[0].usd == pytest.approx(1.0 * seconds + 0.5 * 1.0)
    assert found.usd == pytest.approx(found.gpu_usd + found.store_usd)
    assert found.store_usd == found.tiers[0].usd
    assert (found.tiers[0].read_bytes, found.tiers[0].written_bytes) == (1e9, 1e9)
    assert found.pcie_bytes == 2e9
    assert (found.decode_core_seconds, found.encode_core_seconds) == (0.5, 2.0)
    assert found.loaded_share == 0.5
    bare = row(trace, fleet, codec, "recompute")
    assert (bare.usd, bare.tiers, bare.encode_core_seconds) == (pytest.approx(4), [], 0)


def test_a_place_of_several_gpus_costs_them_all():
    trace = synthetic(100, seed=2)
    one = row(trace, a_fleet(gpus=2), HALF, "load")
    four = row(trace, a_fleet(gpus=2, gpus_each=4), HALF, "load")
    assert four.gpu_seconds == 4 * one.gpu_seconds and four.gpu_usd == 4 * one.gpu_usd
    assert (four.gpu_use, four.ttft_mean) == (one.gpu_use, one.ttft_mean)


def test_a_profile_takes_room_where_it_is_used():
    fleet = a_fleet(
        gpus=2,
        tiers=(
            Tier(name="gpu", bytes=10 * 512, encoded=False),
            Tier(name="host", bytes=10 * 512),
            Tier(name="nvme", bytes=math.inf),
        ),
    )
    use = msgspec.structs.replace(HALF, profile_bytes=2 * 512.0)
    assert rooms(fleet, HALF, BLOCK_TOKENS) == [10, 20, math.inf]
    assert rooms(fleet, use, BLOCK_TOKENS) == [10, 16, math.inf]
    on_device = msgspec.structs.replace(use, decoder="device")
    assert rooms(fleet, on_device, BLOCK_TOKENS) == [6, 20, math.inf]
    big = msgspec.structs.replace(use, profile_bytes=1e9)
    assert rooms(fleet, big, BLOCK_TOKENS)[1] == 0
    shape = shape_of("qwen3-4b", BOOK)
    assert profile_bytes("predictive", shape) == 36 * 4 * 2048**2
    assert profile_bytes("channel", shape) == 0


def test_a_profile_pays_rent_for_the_room_it_takes():
    month = 730 * 3600.0  # a dollar a GB and second
    host = Tier(name="host", bytes=8e9, usd_per_gb_month=month)
    fleet = a_fleet(tiers=(host,), bytes_per_token=1e9 / 512, pcie=1e15)
    trace = a_trace([1, 2], [1, 2], seconds=[0, 10])
    quick = msgspec.structs.replace(HALF, decode_rate=1e12)
    without, use = (
        row(trace, fleet, quick, "load"),
        msgspec.structs.replace(quick, profile_bytes=2e9),
    )
    found = row(trace, fleet, use, "load")
    assert found.ttft_mean == without.ttft_mean
    assert found.store_usd == pytest.approx(3 * without.store_usd)  # 1 GB of blocks, 2 of profile
    full = msgspec.structs.replace(fleet, tiers=(msgspec.structs.replace(host, bytes=2.5e9),))
    # One block has room, so nothing is found, and two blocks are computed from 10 s on.
    assert row(trace, full, use, "load").store_usd == pytest.approx(2.5 * 12)


def test_tiers_as_they_are_typed():
    found = tiers("object,host:400GB,gpu", 3, BOOK)
    assert [tier.name for tier in found] == ["gpu", "host", "object"]
    assert [tier.bytes for tier in found] == [60e9, 400e9, math.inf]
    assert [tier.encoded for tier in found] == [False, True, True]
    for wrong in ("", "disk", "host,host", "host:5", "host:-5GB", "gpu:1.2.3GB"):
        with pytest.raises(KVZipError):
            tiers(wrong, 1, BOOK)


def test_as_many_gpus_as_are_needed():
    trace = a_trace(*([i] for i in range(101)), seconds=[float(i) for i in range(101)])
    fleet = a_fleet()
    assert gpus_needed(trace, fleet.prefill) == 2  # 101 s of work in 100 s, at most 75 % busy


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    made = synthetic(60, seed=1)
    with path.open("w") as file:
        for i in range(made.requests):
            ids = made.blocks[made.starts[i] : made.starts[i + 1]].tolist()
            line = {"timestamp": 1e3 * made.seconds[i], "input_length": int(made.inputs[i])}
            file.write(json.dumps({**line, "output_length": 5, "hash_ids": ids}) + "\n")
    return path


def test_the_command(trace_file, tmp_path, capsys):
    result = tmp_path / "traffic.json"
    command = ["eval", "fleet", "--trace", trace_file, "--tiers", "gpu,host,nvme,object"]
    code, found = run_json(capsys, *command, "-o", result)
    assert code == 0 and (found["kind"], found["version"]) == ("traffic", 1)
    codecs = {"raw", "zstd", "lz4", "planes", "channel", "predictive"}
    pairs = {(r["strategy"], r["codec"]) for r in found["rows"]}
    assert pairs == {("recompute", ""), ("gpu", "")} | {
        (s, c) for s in ("load", "choose", "overlap") for c in codecs
    }
    for r in found["rows"]:
        assert r["hit_rate"] == pytest.approx(sum(t["hit_rate"] for t in r["tiers"]))
        assert r["usd"] == pytest.approx(r["gpu_usd"] + r["store_usd"])
    assert all(i["basis"] and i["source"] for i in found["inputs"])
    assert stored.load(result, TrafficResult).rows == msgspec.convert(found, TrafficResult).rows
    words = run(capsys, *command)[1]
    assert "cores do not have in the trace's time" not in words
    slow = ["--threads", "1", "--codecs", "predictive", "--strategies", "load", "--gpus", "1"]
    words = run(capsys, *command, *slow)[1]
    assert "cores do not have in the trace's time" in " ".join(words.split())
    assert re.search(r"\(\d+\.\dx\)", words)
    words = run(capsys, *command)[1]
    for word in ("counted", "measured", "modelled", "list prices", "overlap"):
        assert word in words
    basis = "ratios measured on SmolLM2-135M, taken to hold for qwen3-4b;"
    assert basis in " ".join(words.split())
    # Why the two tables differ, and what the modelled seconds leave out.
    said = " ".join(words.split())
    sizes = {i["name"]: i["value"] for i in found["inputs"] if i["name"].endswith(", size")}
    blocks = sizes["host, size"] / found["block_bytes"]
    assert f"host {sizes['host, size'] / 1e9:g} GB, {blocks:,.0f} raw blocks" in said
    assert "object without limit" in said and "The tables are of different stores" in said
    assert "reading the weights from its memory" in said and "is not counted" in said
    own = run(capsys, *command, "--model", "smollm2-135m", "--codecs", "raw")[1]
    assert "ratios measured on SmolLM2-135M;" in " ".join(own.split())


def test_models_of_other_families(trace_file, capsys):
    command = ["eval", "fleet", "--trace", trace_file, "--codecs", "channel", "--prices", "h200"]
    found = run_json(capsys, *command, "--model", "qwen3-5-397b")[1]
    assert found["block_bytes"] == 512 * 30720 and found["gpus"] % 8 == 0
    basis = {i["name"]: i["basis"] for i in found["inputs"]}
    assert basis["states and windows"] == "assumed"
    code, found = run_json(capsys, *command, "--model", "minimax-m2-5", "--gpus", "12")
    assert code == 2 and "takes 8 for each copy" in json.dumps(found)
    assert run_json(capsys, *command, "--model", "minimax-m2-5", "--gpus", "16")[1]["gpus"] == 16


def test_codecs_on_a_gpu_say_whether_they_were_measured(trace_file, capsys):
    command = ["eval", "fleet", "--trace", trace_file, "--decode", "device", "--strategies", "load"]
    found = run_json(capsys, *command, "--codecs", "channel,predictive,zstd")[1]
    assert [r["decoder"] for r in found["rows"]] == ["device", "device", "host"]
    basis = {i["name"]: i["basis"] for i in found["inputs"]}
    assert basis["channel, decode"] == "measured"
    assert basis["predictive, decode"] == "target"
    assert basis["predictive, profile"] == "modelled"
    words = run(capsys, *command, "--codecs", "channel,predictive,zstd")[1]
    assert "predictive 2.21x (GPU, a target)" in words and "channel 1.58x (GPU) " in words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tiers", "disk"], "tiers 'disk'"),
        (["--strategies", "guess"], "no strategy 'guess'"),
        (["--codecs", "gzip"], "no measured codec 'gzip'"),
        (["--gpus", "0"], "gpus is 0"),
        (["--gpus", "9999999999"], "more than a replay takes"),
        (["--threads", "0"], "cores is 0"),
        (["--dtype", "int8"], "int8"),
        (["--model", "no"], "no model 'no'"),
        (["--prices", "own-machine"], "the prefill's time is not known"),
    ],
)
def test_nonsense_is_named(trace_file, capsys, arguments, says):
    code, found = run_json(capsys, "eval", "fleet", "--trace", trace_file, *arguments)
    assert code == 2 and says in json.dumps(found)


def test_a_prompt_of_impossible_length_is_told(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    lines = [(0, 5), (1000, 2**40 - 1)]
    path.write_text(
        "\n".join(
            json.dumps({"timestamp": t, "input_length": n, "output_length": 1, "hash_ids": [1]})
            for t, n in lines
        )
    )
    code, found = run_json(capsys, "eval", "fleet", "--trace", path)
    assert code == 2 and "look at the lengths in the trace" in json.dumps(found)


def test_every_figure_has_a_basis():
    known = {name.partition(".")[0] if "." not in name else name for name in BASIS}
    texts = {"strategy", "codec", "decoder", "tiers", "tier"}
    for form, front in ((FleetRow, ""), (TierRow, "tiers.")):
        for field in form.__struct_fields__:
            assert field in texts or front + field in known, field
