"""The evaluation on the command line: JSON for programs, words for people, nonsense named."""

from __future__ import annotations

import json

import pytest
from command import run, run_json

PAPER = {
    "prefill_over_reuse_255": 8.6,
    "prefill_over_reuse_3774": 49.7,
    "fleet_prefill_million_usd": 1.5,
    "fleet_reuse_million_usd": 0.03,
    "egress_over_prefill": 2.6,
    "ratio_needed": 2.65,
}


def test_the_paper(capsys):
    code, found = run_json(capsys, "eval", "paper")
    assert code == 0
    for name, wanted in PAPER.items():
        digits = len(str(wanted).partition(".")[2])
        assert round(found["figures"][name], digits) == wanted, name
    presets = {v["preset"] for v in found["verdicts"]}
    assert {"paper-m1pro", "h100-rented", "l4", "rtx4090", "api-qwen"} <= presets
    codecs = {v["codec"] for v in found["verdicts"]}
    assert {"raw", "zstd", "lz4", "planes", "channel", "predictive"} <= codecs
    assert len(found["verdicts"]) == len(
        {(v["preset"], v["codec"], v["dtype"]) for v in found["verdicts"]}
    )
    assert {a["dtype"] for a in found["answers"]} == {"fp16", "bf16"}
    words = run(capsys, "eval", "paper")[1]
    assert "estimate" in words and "agrees" in words
    assert "taken to hold for Qwen3-4B" in words and words.count("by construction") >= 2
    for row in found["rows"]:
        if row["note"]:
            assert f"{row['name']}: {row['note'][:40]}" in " ".join(words.split())


def test_advice_is_four_lines_or_json(capsys):
    arguments = ["advise", "--model", "qwen3-4b", "--tokens", "8192", "--link", "10Gb/s"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    lines = out.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["Time", "Dollars", "Room", "Rests on"]
    code, found = run_json(capsys, *arguments)
    assert code == 0
    for by in ("seconds", "dollars"):
        assert {"best", "value", "prefill", "raw", "sure", "turns"} <= set(found[by])
        assert 0 <= found[by]["sure"] <= 1


def test_pcie_has_no_egress_price(capsys):
    common = ["advise", "--model", "qwen3-4b", "--tokens", "8192", "--decode", "device"]
    inside = run_json(capsys, *common, "--link", "host-to-h100")[1]
    outside = run_json(capsys, *common, "--link", "432Gb/s")[1]
    assert inside["dollars"]["best"] != "prefill" == outside["dollars"]["best"]
    assert inside["seconds"] == outside["seconds"]


def test_prices_of_ones_own(capsys, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        '[egress.mine]\nvalue = 0.0001\nunit = "USD/GB"\ndate = "2026"\nsource = "us"\n'
        '[preset.paper-m1pro]\negress = "mine"\n'
    )
    code, book = run_json(capsys, "eval", "prices", "--price-file", mine, "--group", "egress")
    assert code == 0 and book["egress"]["mine"]["value"] == 0.0001
    common = ["advise", "--model", "qwen3-4b", "--tokens", "3774", "--link", "1Gb/s",
              "--prices", "paper-m1pro"]  # fmt: skip
    before = run_json(capsys, *common)[1]["dollars"]["best"]
    after = run_json(capsys, *common, "--price-file", mine)[1]["dollars"]["best"]
    assert before == "prefill" != after


def test_fleets(capsys, tmp_path):
    code, found = run_json(capsys, "eval", "fleet", "--preset", "team", "--codecs", "raw,channel")
    assert code == 0 and len(found["rows"]) == 1 + 3 * 2
    assert {row["bill"]["way"] for row in found["rows"]} == {
        "prefill", "egress", "provider", "nodes-only"
    }  # fmt: skip
    config = tmp_path / "fleet.toml"
    config.write_text("readers = 10\nzipf = 0.5")
    code, found = run_json(capsys, "eval", "fleet", "--preset", "team", "--config", config)
    assert found["fleet"]["readers"] == 10 and found["fleet"]["zipf"] == 0.5
    assert found["rows"][0]["counts"]["method"] == "simulation"
    words = run(capsys, "eval", "fleet", "--preset", "world")[1]
    assert "closed form" in words
    assert found["ratio_basis"] == "ratios measured on SmolLM2-135M, taken to hold for qwen3-4b"
    assert found["ratio_basis"] in " ".join(words.split())
    wide = run_json(capsys, "eval", "fleet", "--preset", "team", "--dtype", "fp32")[1]
    narrow = run_json(capsys, "eval", "fleet", "--preset", "team", "--dtype", "fp8_e4m3fn")[1]
    assert wide["fleet"]["raw_bytes"] == 4 * narrow["fleet"]["raw_bytes"]
    # Nodes that a profile has no room in keep nothing; links that are too slow are told.
    config.write_text("node_bytes = 1e8\nnode_bandwidth = 1e3")
    small = ["eval", "fleet", "--preset", "team", "--codecs", "predictive", "--config", config]
    assert run_json(capsys, *small)[1]["rows"][1]["counts"]["hits"] == 0
    words = " ".join(run(capsys, *small)[1].split())
    assert "The nodes' links cannot keep up: predictive" in words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["advise", "--tokens", "100", "--link", "fast"], "link 'fast': write a number"),
        (["advise", "--tokens", "-3", "--link", "1"], "tokens is -3"),
        (["advise", "--tokens", "100", "--link", "1", "--prices", "no"], "no price preset 'no'"),
        (["advise", "--tokens", "100", "--link", "1", "--model", "no"], "no model 'no'"),
        (["advise", "--tokens", "100", "--link", "1", "--device", "no"], "no device 'no'"),
        (["advise", "--tokens", "100", "--link", "1", "--store", "big"], "size 'big': write"),
        (
            ["advise", "--tokens", "100", "--link", "1", "--price-file", "bad.toml"],
            "egress.x is -1",
        ),
        (["advise", "--tokens", "100", "--link", "1", "--inputs", "bad.toml"], "bad.toml is not"),
        (["eval", "prices", "--group", "no"], "no group of prices 'no'"),
        (["eval", "fleet", "--preset", "no"], "no fleet 'no'; there are: paper-80m"),
        (["eval", "fleet", "--config", "fleet.toml"], "readers is -1"),
        (["eval", "fleet", "--codecs", "gzip"], "no measured codec 'gzip'"),
        (["eval", "inputs", "--lengths", "many"], "--lengths 'many'"),
        (["eval", "exactness", "none.safetensors"], "none.safetensors"),
        (["sweep", "bad.toml"], "unknown field `egress`"),
        (["report"], "name stored results"),
        (["report", "bad.toml"], "bad.toml is not JSON"),
        (["report", "none", "--sql", "select 1"], "no sweep at none"),
        (["report", "sweep"], "report sweep --sql 'SELECT * FROM sweep'"),
        (["eval", "figures", "sweep"], "report sweep --sql 'SELECT * FROM sweep'"),
        (["report", "sweep/rows/x.parquet"], "x.parquet --sql 'SELECT * FROM sweep'"),
        (["report", "a sweep"], "kvzip report 'a sweep' --sql 'SELECT"),
        (["report", "sweep/rows"], "sweep/rows is not the folder of a demo"),
    ],
)
def test_nonsense_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text(
        '[egress.x]\nvalue = -1\nunit = "USD/GB"\ndate = "2026"\nsource = "us"\n'
    )
    (tmp_path / "fleet.toml").write_text("readers = -1")
    for name in ("sweep", "a sweep"):
        (tmp_path / name / "rows").mkdir(parents=True)
    (tmp_path / "sweep" / "rows" / "x.parquet").write_bytes(b"PAR1")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    # On a machine that does much else an import takes seconds, and has lines of progress.
    [line] = [line for line in err.splitlines() if not line.startswith("[")]
    assert says in line
    code, found = run_json(capsys, *arguments)
    assert code == 2 and says in json.dumps(found, ensure_ascii=False)
