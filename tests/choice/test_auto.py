"""codec="auto" makes the choice of kvzip.choice.cost on the figures that come with the library."""

from __future__ import annotations

import json

import pytest
from support import assert_same, cache_like, make_snapshot, random_bits

import kvzip
from kvzip.choice import auto
from kvzip.choice.cost import Situation, best, options
from kvzip.errors import KVZipError


@pytest.fixture(scope="module")
def snapshot():
    return make_snapshot(cache_like, 1, "bf16", layers=3, heads=2, tokens=300, dim=64)


def test_it_is_a_codec_like_any_other(snapshot, dtype):
    for made in (snapshot, make_snapshot(random_bits, 2, dtype)):
        blob = kvzip.encode(made, "auto")
        assert_same(kvzip.decode(blob), made)
        used = kvzip.info(blob).header.codec["id"]
        assert used != "auto" and used in kvzip.codec_names()


@pytest.mark.parametrize("gbps", [0.001, 0.1, 1, 5, 25, 100, 1000, 1e5])
@pytest.mark.parametrize("profile", [None, "channel", "predictive"])
def test_the_choice_is_the_cost_models(snapshot, gbps, profile):
    layout, able = snapshot.layout, profile == "predictive"
    figures = [
        f
        for f in auto.measured_figures("bf16", auto._numbers(layout))
        if able or f.name != "predictive"
    ]
    assert len(figures) == 5 + able
    situation = Situation(raw_bytes=layout.raw_bytes, layers=3, bandwidth=gbps * 1e9)
    wanted = best(options(situation, figures), "seconds").name
    found = auto.resolve(f"auto:gbps={gbps:g}", layout, profile)
    assert found == kvzip.get_codec(wanted)


def test_slow_links_want_ratio_and_fast_ones_want_speed(snapshot):
    def chosen(spec, profile=None):
        return auto.resolve(spec, snapshot.layout, profile).codec_id

    assert chosen("auto") == chosen("auto:gbps=5") == "channel"
    assert chosen("auto:gbps=100000") == "raw"
    assert chosen("auto:gbps=0.01", "predictive") == "predictive"
    assert chosen("auto:gbps=0.01") == "channel"
    # More cores decode faster, so that a codec pays on a faster link.
    assert chosen("auto:gbps=100,threads=64") == "channel"


def test_what_is_no_auto_is_left_alone(snapshot):
    codec = kvzip.get_codec("zstd:level=9")
    for spec in (codec, "zstd:level=9", codec.get_config()):
        assert auto.resolve(spec, snapshot.layout) == codec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("auto:speed=3", "no setting 'speed'; it has: gbps, threads"),
        ("auto:gbps=fast", "write a number"),
        ("auto:gbps=-1", "above zero"),
        ("auto:gbps=nan", "above zero"),
    ],
)
def test_settings_that_cannot_be(snapshot, spec, says):
    with pytest.raises(kvzip.KVZipError, match=says):
        kvzip.encode(snapshot, spec)


def test_an_empty_cache_and_an_unknown_dtype_get_the_fallback(monkeypatch, snapshot):
    empty = kvzip.Snapshot([], "bf16")
    assert auto.resolve("auto", empty.layout).codec_id == auto.FALLBACK
    monkeypatch.setattr(auto, "measured_figures", lambda dtype, numbers: [])
    assert auto.resolve("auto", snapshot.layout).codec_id == auto.FALLBACK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "demo"}, "kind 'demo', version 1, and this kvzip reads kind 'inputs', version 1"),
        ({"version": 2}, "kind 'inputs', version 2, and this kvzip reads"),
        ({"rows": None}, "is not a result of kvzip eval inputs: "),
    ],
)
def test_figures_of_another_kind_or_version_are_refused(tmp_path, monkeypatch, change, message):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(json.loads(auto.MEASURED.read_bytes()) | change))
    monkeypatch.setattr(auto, "MEASURED", path)
    auto._kept.cache_clear()
    with pytest.raises(KVZipError, match=message):
        auto.measured_figures("bf16")
