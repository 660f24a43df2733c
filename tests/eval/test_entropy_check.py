"""constriction codes what we code, under the same models: neither takes more than the other, but
for what is known to lie beside the numbers."""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
import pytest
from command import run, run_json
from container.test_parts import every_kind
from support import cache_like, make_snapshot, random_bits, rotated, tiny_model

import kvzip
from kvzip import Layer, LayerLayout, Profile, entropy
from kvzip.capture import cast, prefill
from kvzip.entropy.ladder import LEVELS
from kvzip.errors import KVZipError, UsageError
from kvzip.eval import entropy_check
from kvzip.eval.entropy_check import check
from kvzip.eval.results import stored
from kvzip.eval.results.entropy import EntropyResult

constriction = pytest.importorskip("constriction")

STREAM = 105 + 15
"""Bytes that a stream of `channel` takes besides its numbers, and what it is rounded up by."""


def saved(tmp_path, snapshot, name="doc"):
    path = tmp_path / f"{name}.safetensors"
    snapshot.save(path)
    return path


@pytest.fixture(scope="module")
def captured():
    """Caches of a model with random weights, which are foreseen from layer to layer."""
    model = tiny_model("Llama", vocab_size=100, num_hidden_layers=4, head_dim=16)
    rows = np.random.default_rng(0).integers(0, 100, (6, 160), np.uint32)
    return [prefill(model, row) for row in rows]


@pytest.fixture(scope="module")
def learned(captured):
    """By dtype and regions: a document, and a profile of others."""

    @cache
    def made(dtype="bf16", regions=1):
        documents = [cast(snapshot, dtype) for snapshot in captured]
        return documents[0], Profile.fit(documents[1:], regions=regions)

    return made


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("heads", [2, 3])
def test_channel_is_within_a_thousandth(tmp_path, dtype, heads):
    """Where a part has as many numbers as a stream."""
    snapshot = make_snapshot(cache_like, 5, dtype, layers=1, heads=heads, tokens=2048, dim=64)
    ladder, file = check([saved(tmp_path, snapshot)])
    for row in (ladder, file):
        assert row.numbers == snapshot.layout.numbers and not row.left_out
        assert row.ideal_bits <= row.coder_bits * (1 + 1e-6)
        # A word at most that is not full, for each part.
        assert row.coder_bits < row.ideal_bits * 1.0001 + 4 * 64
    assert (ladder.model, file.model) == ("by channel", "channel")
    assert -1e-4 < file.more < entropy_check.MOST
    assert abs(ladder.more) < 1e-4


def test_the_ladders_rung_is_a_code_length(tmp_path, dtype):
    snapshot = make_snapshot(cache_like, 3, dtype, layers=2, heads=2, tokens=300, dim=8)
    row = check([saved(tmp_path, snapshot)])[0]
    rung = entropy.measure([snapshot]).rungs[len(LEVELS) - 1]
    assert row.our_bits == pytest.approx(rung.bits * row.numbers)
    assert abs(row.coder_bits - row.our_bits) < 1e-4 * row.our_bits + 4 * 64


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.drawn(2)
def test_predictive_takes_what_its_states_and_counts_take(tmp_path, learned, dtype, regions):
    """A thousandth is allowed to files of ten thousand bytes a token; these have a hundred, and a
    state as large. So what lies beside the numbers is counted, and next to nothing may be left."""
    snapshot, profile = learned(dtype, regions)
    *_, row = check([saved(tmp_path, snapshot)], profile)
    assert (row.model, row.profile) == ("predictive", profile.id)
    with kvzip.open(kvzip.encode(snapshot, "predictive", profile), profile) as reader:
        blocks = reader._blocks
        rows = [r for span in reader.index.rows.values() for r in span[1:]]
        coded = [r for r in rows if blocks.stored(r)[0] in (3, 4)]
        size = 8 * sum(reader.index.length[r] for r in rows)
    assert row.left_out == sum(
        snapshot.layers[reader.index.key[r][0]].k.size for r in rows if r not in coded
    )
    assert len(coded) > len(rows) / 2
    lanes = profile.description["lanes"]
    # A state begins at 2^31, and is stored as 2 bits and as whole bytes, of whose bits about 5 say
    # nothing. A block has a header, which holds its few counts, and rounds sections up.
    known = 160 * lanes * (31 + 2 + 5) + len(coded) * 8 * (16 + 8)
    assert 0 <= row.our_bits - row.coder_bits < 0.0002 * size + known
    assert row.ideal_bits <= row.coder_bits


def test_the_model_is_the_native_one(tmp_path, learned):
    """Ideal bits are those that the native code says, of arithmetic that is not its own."""
    snapshot, profile = learned()
    row = check([saved(tmp_path, snapshot)], profile)[-1]
    rung = entropy.measure([snapshot], profile=profile).rungs[-1]
    blob = kvzip.encode(snapshot, "predictive", profile)
    with kvzip.open(blob, profile) as reader:
        rows = [r for span in reader.index.rows.values() for r in span[1:]]
        assert all(reader._blocks.stored(r)[0] in (3, 4) for r in rows)
        stored_bits = 8 * sum(reader.index.length[r] for r in rows)
    rest = 8 * len(blob) - stored_bits
    assert row.ideal_bits - rest == pytest.approx(rung.bits * row.numbers)


def test_numbers_that_nothing_foresees(tmp_path, learned):
    """Escapes of both codecs, constant channels, and blocks that are stored as they are."""
    snapshot, profile = learned()
    rng = np.random.default_rng(0)
    arrays = [(layer.k.copy(), layer.v.copy()) for layer in snapshot.layers]
    k, v = arrays[1][0], arrays[2][1]
    k[:, ::40] = random_bits(rng, "bf16", k[:, ::40].shape)
    k[0, :, 3] = 0x3F80
    v[...] = random_bits(rng, "bf16", v.shape)
    strange = kvzip.Snapshot.from_arrays(arrays, "bf16", snapshot.token_ids, snapshot.origin)
    rows = check([saved(tmp_path, strange)], profile)
    for row in rows:
        assert row.coder_bits >= row.ideal_bits * (1 - 1e-6)
        assert row.our_bits > row.coder_bits * 0.999
    assert 0 < rows[-1].left_out < rows[-1].numbers


def test_a_batch_and_unequal_layers(tmp_path, learned):
    snapshot, profile = learned()
    pairs = [tuple(np.stack([a, a[:, ::-1]]) for a in (x.k, x.v)) for x in snapshot.layers]
    ids = np.stack([snapshot.token_ids, snapshot.token_ids[::-1]])
    row = check([saved(tmp_path, kvzip.Snapshot.from_arrays(pairs, "bf16", ids))], profile)[-1]
    assert row.left_out < row.numbers
    assert row.coder_bits == pytest.approx(row.ideal_bits, rel=1e-3)
    layers = list(snapshot.layers)
    k, v = (a[:, 60:] for a in (layers[1].k, layers[1].v))
    layout = LayerLayout.of_kv(k.shape, v.shape, "bf16", 160, "sliding", 100)
    layers[1] = Layer.of_kv(k, v, layout)
    sliding = kvzip.Snapshot(layers, "bf16", snapshot.token_ids, snapshot.origin)
    with pytest.raises(UsageError, match="hold the same tokens"):
        check([saved(tmp_path, sliding)], profile)


@pytest.mark.parametrize("batch", [None, 2])
def test_caches_of_every_kind(tmp_path, batch):
    """What channel does not take counts the same on both sides."""
    snapshot = every_kind(batch)
    ladder, file = check([saved(tmp_path, snapshot)])
    assert ladder.numbers == entropy.measure([snapshot]).numbers
    assert 0 < file.left_out <= file.numbers == snapshot.layout.numbers


def test_a_channel_profile(tmp_path):
    documents = [make_snapshot(cache_like, i, "bf16", tokens=600, dim=8) for i in range(4)]
    profile = Profile.fit(documents[1:], codec="channel")
    row = check([saved(tmp_path, documents[0])], profile)[-1]
    assert row.model == "channel with the profile's tables"
    assert row.coder_bits < row.our_bits < row.coder_bits + 8 * 12 * STREAM * 2


@pytest.mark.parametrize("rounding", [1, 2, 5])
def test_keys_before_rope(tmp_path, rounding):
    """Under the tables of the numbers that are coded; head and exceptions stand beside either."""
    snapshot = rotated(1, 2048, rounding=rounding, layers=1, heads=2, dim=64)
    for i in range(0, 2048, 300):  # pairs that nothing turns to
        snapshot.layers[0].k[0, i, 3] = 0x7F01
    _, cached, before = check([saved(tmp_path, snapshot)])
    assert (cached.model, before.model) == ("channel", "channel, keys before RoPE")
    assert before.our_bits < cached.our_bits
    assert before.ideal_bits < cached.ideal_bits
    assert -1e-4 < before.more < entropy_check.MOST
    assert before.ideal_bits <= before.coder_bits * (1 + 1e-6)
    blob = kvzip.encode(snapshot, entropy_check.BEFORE_ROPE)
    assert before.our_bits == 8 * len(blob)
    profile = Profile.fit(
        [rotated(seed, layers=1, heads=2, dim=64) for seed in (2, 3)], codec="channel"
    )
    rows = check([saved(tmp_path, snapshot)], profile)
    names = ["channel with the profile's tables" + more for more in ("", ", keys before RoPE")]
    assert [row.model for row in rows[3:]] == names
    assert rows[4].ideal_bits < rows[3].ideal_bits and -1e-4 < rows[4].more < 0.0015


def test_another_coder_that_loses_numbers_is_found_out(tmp_path, monkeypatch):
    path = saved(tmp_path, make_snapshot(cache_like, 1, "bf16", layers=1))
    coder = constriction.stream.stack.AnsCoder

    class Forgetful:
        def __init__(self):
            self.real = coder()

        def __getattr__(self, name):
            return getattr(self.real, name)

        def decode(self, *given):
            return self.real.decode(*given) * 0 - 1

    monkeypatch.setattr(constriction.stream.stack, "AnsCoder", Forgetful)
    with pytest.raises(KVZipError, match="did not give back"):
        check([path])


# --- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys, monkeypatch):
    snapshot = make_snapshot(cache_like, 5, "bf16", layers=1, heads=2, tokens=2048, dim=64)
    path, out = saved(tmp_path, snapshot), tmp_path / "out"
    code, found = run_json(capsys, "entropy", path, "--check", "--out", out)
    assert code == 0
    result = stored.load(out / "entropy.json", EntropyResult)
    assert [row.model for row in result.checks] == ["by channel", "channel"]
    assert found["checks"][1]["our_bits"] == result.checks[1].our_bits
    code, said, _ = run(capsys, "entropy", path, "--check")
    assert code == 0
    assert "difference" in said and "+0.0" in said
    monkeypatch.setattr(entropy_check, "MOST", 1e-5)
    code, found = run_json(capsys, "entropy", path, "--check")
    assert code == 1 and len(found["checks"]) == 2  # a check that fails shows all the same
    assert run_json(capsys, "entropy", path)[1]["checks"] == []


def test_without_constriction_the_extra_is_named(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path, make_snapshot(cache_like, 1, "bf16", layers=1))
    monkeypatch.setitem(sys.modules, "constriction", None)
    code, _, err = run(capsys, "entropy", path, "--check")
    assert code == 2 and "pip install 'kvzip[bench]'" in err
