"""Rungs of what `channel` does: tables of keys before RoPE, and those of a profile."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest
from command import run, run_json
from container.test_parts import every_kind
from support import cache_like, make_snapshot, random_bits, rotated

import kvzip
from kvzip import Context, Profile, Snapshot, dtypes, entropy
from kvzip.codecs.channel.rotation import unturned
from kvzip.entropy.ladder import BEFORE_ROPE, LEVELS, TABLES
from kvzip.errors import ProfileError
from kvzip.testing.caches import nearest_bits


def rung(ladder, name):
    return next((found for found in ladder.rungs if found.name == name), None)


def before(snapshot):
    """A cache whose keys are those before RoPE, as nothing had turned them."""
    form, layers = dtypes.get("bf16"), []
    for i, layer in enumerate(snapshot.layers):
        known = Context(form, i, "k", layer.layout.first, snapshot.origin, rope=layer.layout.rope)
        layers.append((unturned(layer.block("k"), known).array[0], layer.v))
    return Snapshot.from_arrays(layers, "bf16")


@pytest.mark.parametrize("first", [0, 1000])
def test_keys_before_rope_have_tables_of_their_own(first):
    documents = [rotated(i, first=first) for i in range(2)]
    ladder = entropy.measure(documents)
    assert [found.name for found in ladder.rungs] == [*LEVELS, BEFORE_ROPE]
    found, cached = rung(ladder, BEFORE_ROPE), rung(ladder, LEVELS[-1])
    wanted = rung(entropy.measure([before(s) for s in documents]), LEVELS[-1])
    assert found.layers == wanted.layers
    assert (found.bits, found.parts) == (wanted.bits, wanted.parts)
    assert found.bits < cached.bits - 0.3
    assert found.parts[1] == cached.parts[1]


def test_tables_of_other_documents():
    measured, learned = [rotated(1)], [rotated(2), rotated(3)]
    found = rung(entropy.measure(measured, entropy.fit(learned)), BEFORE_ROPE)
    pairs = [[before(s) for s in documents] for documents in (measured, learned)]
    wanted = rung(entropy.measure(pairs[0], entropy.fit(pairs[1])), LEVELS[-1])
    assert (found.learned, found.layers) == ("other documents", wanted.layers)
    assert found.bits > rung(entropy.measure(measured), BEFORE_ROPE).bits


def other_keys(snapshot, layer):
    """With keys of a layer that nothing turned."""
    layers = list(snapshot.layers)
    held = layers[layer]
    k = random_bits(np.random.default_rng(0), "bf16", held.k.shape)
    layers[layer] = kvzip.Layer.of_kv(k, held.v, held.layout)
    return Snapshot(layers, "bf16", origin=snapshot.origin)


def test_layers_whose_keys_are_stored_as_cached():
    """In any document, of those to measure as of those to learn from."""
    documents = [rotated(1), other_keys(rotated(2), 0)]
    for ladder in (
        entropy.measure(documents),
        entropy.measure(documents[:1], entropy.fit([rotated(3), *documents[1:]])),
    ):
        found, cached = (rung(ladder, name).layers for name in (BEFORE_ROPE, LEVELS[-1]))
        assert found[0] == cached[0]
        assert found[1]["k"].bits < cached[1]["k"].bits - 0.3
    for plain in (
        make_snapshot(cache_like, 1, "bf16"),
        make_snapshot(cache_like, 1, "fp16"),
        other_keys(other_keys(rotated(1), 0), 1),
        every_kind(),
    ):
        assert rung(entropy.measure([plain]), BEFORE_ROPE) is None


def alike(seed, dtype, shape=(3, 1500, 64)):
    """Documents of one model: channels have their sizes in all of them."""
    sizes = 2.0 ** np.random.default_rng(0).integers(-3, 3, (2, shape[0], 1, shape[2]))
    numbers = sizes * np.random.default_rng(seed).normal(size=(2, *shape))
    return Snapshot.from_arrays([tuple(nearest_bits(part, dtype) for part in numbers)], dtype)


@pytest.mark.parametrize(
    "dtype", ["keys before RoPE", "bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2"]
)
def test_a_profile_of_tables_is_a_rung(dtype):
    """What a file takes with these tables, but for what its streams have besides and exceptions."""
    if dtype == "keys before RoPE":
        measured, *others = (rotated(i, 1500, layers=1, dim=64) for i in range(3))
    else:
        measured, *others = (alike(i, dtype) for i in range(3))
    profile = Profile.fit(others, codec="channel")
    ladder = entropy.measure([measured], profile=profile)
    found = rung(ladder, TABLES)
    assert (found, found.learned) == (ladder.rungs[-1], "profile")
    blob = kvzip.encode(measured, "channel", profile)
    with kvzip.open(blob, profile) as reader:
        assert reader.info.parts[0].before_rope == (dtype == "keys before RoPE")
        size = 8 * sum(reader.index.length)
    spent = found.bits * ladder.numbers
    assert spent < size < spent * 1.005
    for layer in found.layers:
        for part in layer.values():
            assert np.mean(part.channels) == pytest.approx(part.bits, abs=1e-3)


def test_numbers_that_no_table_has():
    """Escapes cost what they take."""
    documents = [make_snapshot(cache_like, i, "bf16", tokens=300) for i in range(2)]
    profile = Profile.fit(documents, codec="channel")
    strange = make_snapshot(random_bits, 1, "bf16", tokens=300)
    assert entropy.measure([strange], profile=profile).rungs[-1].bits > 20


def test_profiles_of_tables_and_other_parts():
    """What they have no tables for counts with one for each channel."""
    snapshot = every_kind()
    profile = Profile.fit([snapshot], codec="channel")
    ladder = entropy.measure([snapshot], profile=profile)
    found, plain = rung(ladder, TABLES), rung(ladder, LEVELS[-1])
    tables = profile.description["channel"]["layers"]
    for i, layer in enumerate(found.layers):
        for name, part in layer.items():
            if name not in tables[i]:
                assert part == plain.layers[i][name]
    with pytest.raises(ProfileError, match="another model"):
        entropy.measure([make_snapshot(cache_like, 1, "bf16", heads=3)], profile=profile)
    with pytest.raises(ProfileError, match="not fp16"):
        entropy.measure([make_snapshot(cache_like, 1, "fp16")], profile=profile)


def test_the_command_shows_them(tmp_path, capsys):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        rotated(i).save(path)
    profile = Profile.fit(paths[1:], codec="channel")
    profile.save(tmp_path / "p.kvprofile")
    options = ["--profile", tmp_path / "p.kvprofile", "--out", tmp_path / "out"]
    code, found = run_json(capsys, "entropy", paths[0], *options)
    assert code == 0
    names = [*LEVELS, BEFORE_ROPE, TABLES]
    assert [r["name"] for r in found["ladder"]["rungs"]] == names
    assert found["ladder"]["profile"] == profile.id
    assert json.loads((tmp_path / "out" / "entropy.json").read_text())["ladder"] == found["ladder"]
    drawn = html.unescape((tmp_path / "out" / "ladder.svg").read_text())
    assert all(name in drawn for name in names)
    code, out, _ = run(capsys, "entropy", paths[0], *options[:2])
    assert code == 0 and "RoPE" in out and "profile's" in out
