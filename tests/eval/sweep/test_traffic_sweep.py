"""A sweep of replays: capacities, ratios and strategies, a row each; gone on with, and queried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clusters import ray_cluster

from kvzip.errors import KVZipError
from kvzip.eval.results.sweep import TrafficRow
from kvzip.eval.sweep.grid import read_config
from kvzip.eval.sweep.points import Point
from kvzip.eval.sweep.query import query
from kvzip.eval.sweep.rows import RowFolder
from kvzip.eval.sweep.run import run
from kvzip.eval.traffic.capacity import capacities, needed_capacity
from kvzip.eval.traffic.trace import read_trace

pytest.importorskip("pyarrow", reason="sweeps need the extra `eval`")
pytest.importorskip("simpy", reason="a replay needs the extra `eval`")

SIZES, RATIOS = [5, 20, 60], [1.0, 1.54, 2.2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A grid of 3 capacities, 3 ratios and 2 strategies, and two points beside it."""
    requests = [[1, 2], [3, 4, 5], [1, 2, 6], [*range(10, 30)], [1, 2, 6, 7], [3, 4], [1, 2]]
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 900 * i, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate(requests * 5)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "sweep.toml"
    path.write_text(
        f"""
        kind = "traffic"
        [grid]
        trace = ["{trace}"]
        capacity_blocks = {SIZES}
        ratio = {RATIOS}
        strategy = ["load", "overlap"]
        [[points]]
        trace = "{trace}"
        strategy = "recompute"
        [[points]]
        trace = "{trace}"
        codec = "channel"
        policy = "s3-fifo"
        tiers = "gpu:1GB,host:2GB,nvme"
        """
    )
    return path


def test_a_sweep_over_capacities_and_ratios(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="queries need the extra `eval`")
    points, out = read_config(config), tmp_path / "out"
    first = run(points[:7], out)
    assert (first.measured, first.failed) == (7, [])
    rest = run(points, out)
    assert (rest.points, rest.measured, rest.kept, rest.failed) == (20, 13, 7, [])
    rows = [TrafficRow(**row) for row in RowFolder(out).read()]
    needed = needed_capacity(read_trace(tmp_path / "trace.jsonl"))
    for row in rows:
        if row.capacity_blocks is not None and row.ratio is not None:
            [wanted] = capacities([row.capacity_blocks], [row.ratio], needed)
            assert row.hit_rate == pytest.approx(wanted.hit_rate)
    found = query(out, "select strategy, count(*) n from sweep group by all order by 1")
    assert [(r["strategy"], r["n"]) for r in found] == [
        ("load", 10), ("overlap", 9), ("recompute", 1)
    ]  # fmt: skip
    [bare] = [row for row in rows if row.strategy == "recompute"]
    assert bare.hit_rate == 0 and all(row.gpu_seconds <= bare.gpu_seconds for row in rows)  # type: ignore[operator]


def test_kinds_do_not_mix(config: Path, tmp_path: Path) -> None:
    run(read_config(config)[:1], tmp_path / "out")
    with pytest.raises(KVZipError, match="rows of kind 'traffic-sweep', and not of a sweep"):
        run([Point(codec="raw", model="synthetic:layers=1,heads=1,dim=8")], tmp_path / "out")


def test_what_fails_says_why(config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("trace.jsonl", "none.jsonl")
    config.write_text(text)
    done = run(read_config(config)[:1], tmp_path / "out")
    assert "none.jsonl" in done.failed[0]["reason"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("strategy = ['guess']", "'guess'"),
        ("ratio = [0.0]", "ratio is 0"),
        ("capacity_blocks = [-5.0]", "capacity_blocks is -5"),
        ("tokens = [5]", "unknown field `tokens`"),
        ("dtype = ['int4']", "int4"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(f"kind = 'traffic'\n[grid]\ntrace = ['t']\n{line}")
    with pytest.raises(KVZipError, match=says):
        read_config(path)
    path.write_text("kind = 'traffic'\nrepeats = 2\n[grid]\ntrace = ['t']")
    with pytest.raises(KVZipError, match="the same every time"):
        read_config(path)


@pytest.mark.long  # as test_sweep.py has it, whose rows go the same way
def test_a_ray_cluster_gives_the_same_rows(config: Path, tmp_path: Path) -> None:
    points = read_config(config)[:6]
    run(points, tmp_path / "here")
    with ray_cluster(cores=2) as address:
        done = run(points, tmp_path / "there", ray=address)
    assert (done.measured, done.failed) == (6, [])
    figures = ("id", "hit_rate", "ttft_mean", "gpu_seconds", "usd")
    here, there = (
        sorted(tuple(row[name] for name in figures) for row in RowFolder(tmp_path / f).read())
        for f in ("here", "there")
    )
    assert here == there
