"""The ladder of models: its code lengths are those of real distributions, and fall rung by rung."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from command import run, run_json
from support import cache_like, make_snapshot, random_bits, tiny_model

import kvzip
from kvzip import Layer, LayerLayout, Profile, Snapshot, dtypes, entropy
from kvzip.capture import cast, prefill
from kvzip.entropy import ladder, linear, residual
from kvzip.entropy.ladder import BEFORE_ROPE, LEVELS, PREDICTED, PROFILE, orders, split
from kvzip.errors import KVZipError, ProfileError, UnsupportedError

HEADS, DIM = 2, 16
PREDICTED_DTYPES = [name for name in dtypes.NAMES if dtypes.get(name).bits <= 32]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("Llama", vocab_size=100, num_hidden_layers=4, head_dim=DIM)


def documents(loaded, count, tokens=160, seed=0, **how):
    rng = np.random.default_rng(seed)
    return [prefill(loaded, row, **how) for row in rng.integers(0, 100, (count, tokens), np.uint32)]


@pytest.fixture(scope="module")
def learned(llama):
    return documents(llama, 7)


@pytest.fixture(scope="module")
def fitted(learned):
    return entropy.fit(learned)


@pytest.fixture(scope="module")
def unseen(llama):
    return documents(llama, 2, seed=9)


# --- regressions ---------------------------------------------------------------------------------


def test_a_regression_finds_the_map():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 12)) * 3 + 200).astype(np.float32)
    w = rng.normal(size=(12, 5)).astype(np.float32)
    y = x @ w + rng.normal(size=(4000, 5)).astype(np.float32)
    moments = linear.Moments([(0, 0), (0, 1), (1, 1)])
    for i in range(0, 4000, 1000):
        moments.add({0: x[i : i + 1000], 1: y[i : i + 1000]})
    found = linear.regress(moments, [0], 1)
    assert np.abs(found.weights - w).max() < 0.05
    left = y - found({0: x})
    assert np.cov(left.T, bias=True) == pytest.approx(linear.left_of(moments, found, 1), abs=0.01)
    whole = linear.low_rank(moments, found, 1, 5)
    assert whole.weights == pytest.approx(found.weights, abs=1e-3)
    traces = [
        np.trace(linear.left_of(moments, linear.low_rank(moments, found, 1, r), 1))
        for r in range(1, 6)
    ]
    assert traces == sorted(traces, reverse=True)


def test_channels_before_leave_what_the_determinant_says(fitted, unseen):
    """Pairs that RoPE turns included: variance left adds up to the covariance's determinant."""
    view = residual.View(unseen[0].layers[1], orders(unseen[0])[1], "bf16")
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(view.y.shape[1],) * 2)
    covariance = mixing @ mixing.T
    within = residual.Within(covariance, view.order.pairs)
    a, b = within.variance[within.first], within.variance[within.second]
    alone = np.delete(within.variance, np.concatenate([within.first, within.second]))
    logs = np.log(a * b - within.both**2).sum() + np.log(alone).sum()
    assert logs == pytest.approx(np.linalg.slogdet(covariance)[1], rel=0.01)
    _, s = within.expect(view, view.y * 0)
    turned = np.log(s / residual.MEAN_DEVIATION).sum(axis=1) * 2
    assert turned == pytest.approx(np.full(len(s), logs), rel=0.01)


# --- fields ------------------------------------------------------------------------------------


def test_the_fields_of_every_format(dtype):
    """Noise fills all of them; tables for each channel know what one for all does not."""
    fields = entropy.planes(make_snapshot(random_bits, 1, dtype, layers=1, tokens=2000))
    for field in fields:
        # What has few values is seen often enough to tell that they are alike.
        least = 0.99 * field.width if field.width <= 6 else 0.75 * min(field.width, 12)
        for bits in field.parts.values():
            assert least < bits <= field.width
    found = {field.plane: field.parts["k"] for field in fields}
    form = dtypes.get(dtype)
    if form.is_float:
        assert {"sign", "exponent", "mantissa"} <= {*found}
        real = entropy.planes(make_snapshot(cache_like, 1, dtype, layers=1, tokens=2000))
        real = {field.plane: field.parts["k"] for field in real}
        assert real["sign and exponent, each channel apart"] < real["sign and exponent"] - 0.5
    else:
        assert [*found] == [
            "upper four bits",
            "lower four bits",
            "byte",
            "byte, each channel apart",
        ]
        # Two numbers of four bits in a byte, of which one is always the same.
        packed = np.arange(64, dtype=np.uint8).reshape(1, 16, 4) % 8 << 4 | 5
        upper, lower, byte, _ = entropy.planes(Snapshot.from_arrays([(packed, packed)], dtype))
        assert [field.parts["k"] for field in (upper, lower, byte)] == [3, 0, 3]


def test_numbers_of_64_bits_are_counted_and_not_predicted():
    snapshots = [make_snapshot(cache_like, i, "fp64", tokens=200) for i in range(2)]
    levels = [rung.bits for rung in entropy.measure(snapshots).rungs]
    assert levels == sorted(levels, reverse=True) and levels[0] < 64
    with pytest.raises(UnsupportedError, match="fp64 are not predicted"):
        entropy.fit(snapshots)


# --- the ladder ----------------------------------------------------------------------------------


def test_the_rungs_fall(fitted, unseen):
    ladder = entropy.measure(unseen, fitted)
    bits = {rung.name: rung.bits for rung in ladder.rungs}
    assert list(bits) == [*LEVELS, BEFORE_ROPE, *PREDICTED]
    assert bits["and channels before"] < bits["from layers before"] - 0.3
    assert bits["from layers before"] < bits["density by channel"] - 0.3
    assert bits["density by channel"] < bits["all numbers alike"] + 0.1
    # Energy has nothing to tell in a random model's cache; it costs little.
    assert bits["and token energy"] < bits["and channels before"] + 0.05
    for rung in ladder.rungs:
        assert [part.part for part in rung.parts] == ["k", "v"]
        assert rung.bits == pytest.approx(sum(part.bits for part in rung.parts) / 2)
        for layer in rung.layers:
            assert list(layer) == ["k", "v"]
            for part in layer.values():
                assert np.shape(part.channels) == (HEADS, DIM)
                assert np.mean(part.channels) == pytest.approx(part.bits, abs=1e-3)
                assert np.mean(part.channels, axis=1) == pytest.approx(part.heads, abs=1e-3)
    assert ladder.numbers == sum(s.layout.numbers for s in unseen)
    for spectrum in ladder.spectra:
        assert spectrum.before == sorted(spectrum.before, reverse=True)
        assert sum(spectrum.before) == pytest.approx(2 * HEADS * DIM, rel=0.01)
    assert sum(ladder.spectra[2].residual) < 0.7 * sum(ladder.spectra[2].before)


def test_energy_pays_where_tokens_differ():
    """Tokens of two sizes, in equal shares."""
    rng = np.random.default_rng(0)

    def made():
        size = 2.0 ** rng.integers(0, 5, (1, 400, 1))
        parts = [rng.normal(size=(2, 400, 16)) * size for _ in range(2)]
        bits = [(p.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for p in parts]
        return kvzip.Snapshot.from_arrays([tuple(bits)], "bf16")

    ladder = entropy.measure([made()], entropy.fit([made() for _ in range(3)]))
    bits = {rung.name: rung.bits for rung in ladder.rungs}
    assert bits["and token energy"] < bits["and channels before"] - 0.2


@pytest.mark.parametrize("dtype", PREDICTED_DTYPES)
@pytest.mark.drawn(2)
def test_tables_never_cost_less_than_the_entropy(dtype):
    """Known frequencies cost the least; those of other documents cost more, on every level."""
    snapshots = [make_snapshot(cache_like, i, dtype, tokens=200) for i in range(3)]
    own = entropy.measure(snapshots[:1])
    levels = [rung.bits for rung in own.rungs]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] <= dtypes.get(dtype).bits
    others = entropy.measure(snapshots[:1], entropy.fit(snapshots[1:]))
    for known, learned in zip(own.rungs, others.rungs, strict=False):
        assert learned.name == known.name
        assert learned.bits > known.bits
    if dtype != "fp32":
        symbols = (dtypes.get(dtype).symbols - 1) if dtypes.get(dtype).bits > 8 else 255
        assert levels[0] <= np.log2(symbols + 1) + dtypes.get(dtype).mantissa_bits


@pytest.mark.parametrize("dtype", PREDICTED_DTYPES)
def test_every_bit_pattern_has_a_price(dtype):
    """Noise: infinities, NaNs, subnormals. No model gains, and none is lost."""
    snapshots = [make_snapshot(random_bits, i, dtype, tokens=150, dim=8) for i in range(3)]
    ladder = entropy.measure(snapshots[:1], entropy.fit(snapshots[1:]))
    for rung in ladder.rungs:
        width = dtypes.get(dtype).bits
        assert width * 0.9 < rung.bits < width + 13


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_other_formats_are_predicted(llama, dtype):
    exact = replace(llama, model=copy.deepcopy(llama.model).float())
    made = documents(exact, 6, dtype=dtype)
    ladder = entropy.measure(made[:1], entropy.fit(made[1:]))
    bits = {rung.name: rung.bits for rung in ladder.rungs}
    assert bits["and channels before"] < bits["by channel"] - 0.5


def test_a_profile_is_a_rung(llama, learned, unseen):
    profile = kvzip.Profile.fit(learned)
    for dtype in ("bf16", "fp32"):
        ladder = entropy.measure([cast(s, dtype) for s in unseen], profile=profile)
        rung = ladder.rungs[-1]
        assert (rung.name, rung.learned, ladder.profile) == (PROFILE, "profile", profile.id)
    ladder = entropy.measure(unseen, profile=profile)
    files = [kvzip.encode(s, "predictive", profile) for s in unseen]
    spent = 8 * sum(map(len, files))
    overhead = 8 * sum(4000 + 300 * 2 * len(s.layers) for s in unseen)
    # A part that `channel` codes in less takes less.
    assert 0.9 * ladder.rungs[-1].bits * ladder.numbers < spent
    assert spent < ladder.rungs[-1].bits * ladder.numbers + overhead
    wrong = make_snapshot(cache_like, 1, "bf16", heads=3, dim=8)
    with pytest.raises(ProfileError, match="another model"):
        entropy.measure([wrong], profile=profile)


def test_sliding_windows_and_batches():
    loaded = tiny_model(
        "Gemma3Text",
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    found = entropy.measure(documents(loaded, 1, seed=5), entropy.fit(documents(loaded, 4)))
    assert found.tokens == 32
    rng = np.random.default_rng(0)
    batch = prefill(loaded, rng.integers(0, 100, (2, 40), np.uint32), full_history=True)
    alone = documents(loaded, 3, tokens=40, full_history=True)
    assert entropy.measure([batch], entropy.fit(alone)).tokens == 80


def test_wrong_documents_are_named(fitted, learned, unseen):
    with pytest.raises(KVZipError, match="among those to learn from"):
        entropy.measure([unseen[0], learned[3]], fitted)
    other = make_snapshot(cache_like, 1, "bf16", heads=3, dim=8)
    with pytest.raises(KVZipError, match=r"different models|differ in"):
        entropy.measure([other], fitted)
    with pytest.raises(KVZipError, match="differ in dtype"):
        entropy.fit([learned[0], cast(learned[1], "fp16")])
    for nothing in (lambda: entropy.fit([]), lambda: entropy.measure([])):
        with pytest.raises(KVZipError, match="no document"):
            nothing()


def test_few_tokens_to_learn_from_are_told(tmp_path, capsys, llama, unseen):
    learned = documents(llama, 10)
    many, few = (entropy.fit(found) for found in (learned, learned[:1]))
    assert many.most_inputs == few.most_inputs > 0
    enough = ladder.ENOUGH_TOKENS * few.most_inputs
    assert few.tokens < enough <= many.tokens
    assert few.few_tokens and not many.few_tokens
    paths = []
    for snapshot in [*unseen[:1], *learned]:
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        snapshot.save(paths[-1])
    for train, told in ((paths[1:2], True), (paths[1:], False)):
        out = run(capsys, "entropy", paths[0], "--train", *train)[1]
        assert (f"{few.tokens} tokens to learn from are few" in out) == told
        assert (f"fewer than {enough:,} tokens" in out) == told


def test_training_documents_are_shared_out():
    for count in range(1, 120):
        learning, calibrating = split(count)
        assert {*learning, *calibrating} == set(range(count))
        assert 1 <= len(calibrating) <= 16
        assert count == 1 or not {*learning} & {*calibrating}


# --- the command -------------------------------------------------------------------------------


def test_the_command_and_its_figures(tmp_path, capsys, learned, unseen):
    for i, snapshot in enumerate([*learned[:4], *unseen]):
        snapshot.save(tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(6)]
    options = ["--train", *paths[:4], "--out", tmp_path / "out"]
    code, found = run_json(capsys, "entropy", *paths[4:], *options)
    assert code == 0
    assert [f["file"] for f in found["files"]] == [str(p) for p in paths[4:]]
    assert [r["name"] for r in found["ladder"]["rungs"]] == [*LEVELS, BEFORE_ROPE, *PREDICTED]
    stored = json.loads((tmp_path / "out" / "entropy.json").read_text())
    assert stored["ladder"] == found["ladder"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "entropy.json",
        "ladder.svg",
        "heat.svg",
        "spectrum.svg",
    }
    for figure in found["figures"]:
        root = ElementTree.parse(figure).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    heat = ElementTree.parse(tmp_path / "out" / "heat.svg")
    cells = [e for e in heat.iter() if e.get("class") == "cell"]
    assert len(cells) >= 4 * 2 * HEADS
    bars = ElementTree.parse(tmp_path / "out" / "ladder.svg")
    wide = [float(e.get("width")) for e in bars.iter() if (e.get("class") or "").startswith("bar")]
    bits = [r["bits"] for r in found["ladder"]["rungs"]]
    assert np.array(wide) / wide[0] == pytest.approx(np.array(bits) / bits[0], abs=0.01)
    code, out, _ = run(capsys, "entropy", paths[4])
    assert "by channel" in out
    assert "ideal code length" in out
    code, _, err = run(capsys, "entropy", paths[4], "--train", paths[4])
    assert code == 2
    assert "among those to learn from" in err


@pytest.mark.parametrize("shape", [None, (0, 5, 4), (2, 5, 0), (2, 0, 4)])
@pytest.mark.parametrize("learn", [entropy.fit, Profile.fit, partial(Profile.fit, codec="channel")])
def test_nothing_to_learn_from_is_an_error(shape, learn):
    """A cache may have no layers, no heads, no channels or no tokens."""
    layers = []
    if shape is not None:
        bits = np.zeros(shape, np.uint16)
        layers = [Layer.of_kv(bits, bits, LayerLayout.of_kv(shape, shape, "bf16", shape[1]))]
    empty = Snapshot(layers, "bf16")
    with pytest.raises(ProfileError, match=r"numbers|tokens"):
        learn([empty])
    if shape is None or not shape[0] * shape[2]:
        with pytest.raises(ProfileError, match="numbers"):
            entropy.measure([empty])
