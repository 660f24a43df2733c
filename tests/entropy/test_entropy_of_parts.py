"""Entropy of layers of every kind: each part counts as it would alone, and all add up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command import run, run_json
from container.test_parts import every_kind, layer_of, snapshots
from hypothesis import given
from support import cache_like, make_snapshot

from kvzip import KVZipError, Layer, LayerLayout, PartLayout, Profile, Snapshot, entropy
from kvzip.entropy.ladder import LEVELS, PREDICTED
from kvzip.entropy.residual import held_layers
from kvzip.errors import ProfileError
from kvzip.eval.report import charts, parts, pictures
from kvzip.eval.results import stored
from kvzip.eval.results.entropy import EntropyResult


def alone(layer, name):
    """A part as the keys (and values) of a plain snapshot of its own."""
    block = layer.block(name)
    return Snapshot.from_arrays([(block, block)], layer.layout.parts[name].dtype)


def mixed_documents(count, seed=0, tokens=160):
    """Caches like a hybrid model's: attention, a state, attention beside a state, keys and values
    in fp8 with scales; of unequal numbers of heads."""

    def document(seed):
        plain = make_snapshot(cache_like, seed, "bf16", layers=4, tokens=tokens, dim=8)
        found, rng = [], np.random.default_rng(seed)
        state = {"recurrent": PartLayout("fp32", (3, 4, 5), "hrd")}
        for i, layer in enumerate(plain.layers):
            bits, layouts = dict(layer.parts), dict(layer.layout.parts)
            if i == 1:  # one head in place of two
                bits = {name: array[:1] for name, array in bits.items()}
                layouts = dict.fromkeys(bits, PartLayout("bf16", (1, tokens, 8), "htd"))
            if i == 2:
                bits |= layer_of(rng, state, tokens, "state", state_length=tokens).parts
                layouts |= state
            length = tokens if i == 2 else None
            found.append(Layer(bits, LayerLayout(layouts, tokens, state_length=length)))
            if i == 0:
                found.append(layer_of(rng, state, tokens, "state", state_length=tokens))
        scaled = dict.fromkeys("kv", PartLayout("fp8_e4m3fn", (2, tokens, 8), "htd"))
        scaled["k_scale"] = PartLayout("fp32", (), "")
        found.append(layer_of(rng, scaled, tokens))
        return Snapshot(found, "bf16", plain.token_ids, plain.origin)

    return [document(seed + i) for i in range(count)]


# --- fields ------------------------------------------------------------------------------------


@given(snapshot=snapshots())
def test_the_fields_of_a_part_are_those_of_the_same_numbers_as_keys(snapshot):
    for layer in snapshot.layers:
        found = entropy.planes(Snapshot([layer], snapshot.dtype))
        assert sorted({name for m in found for name in m.parts}) == sorted(layer.layout.parts)
        for name, part in layer.layout.parts.items():
            own = [(m.plane, m.width, m.parts[name]) for m in found if m.dtype == part.dtype]
            wanted = entropy.planes(alone(layer, name))
            assert own == [(m.plane, m.width, m.parts["k"]) for m in wanted]


def test_layers_with_the_same_part_count_together(dtype):
    """As one layer would with the heads of all, and those in another format apart."""
    snapshot = make_snapshot(cache_like, 1, dtype, layers=2)
    whole = [np.concatenate([layer.part(name) for layer in snapshot.layers]) for name in "kv"]
    wanted = entropy.planes(Snapshot.from_arrays([tuple(whole)], dtype))
    other = every_kind().layers[3]
    found = entropy.planes(Snapshot([*snapshot.layers, other], dtype))
    kv = [({p: m.parts[p] for p in "kv"}, m.plane) for m in found if "k" in m.parts]
    for (bits, plane), measure in zip(kv, wanted, strict=True):
        assert plane == measure.plane
        assert bits == pytest.approx(measure.parts)
    conv = [m.parts["conv"] for m in found if "conv" in m.parts]
    assert conv == [m.parts["k"] for m in entropy.planes(alone(other, "conv"))]


# --- the ladder ----------------------------------------------------------------------------------


@given(snapshot=snapshots())
def test_every_part_has_its_bits_and_all_add_up(snapshot):
    if not any(part.line_numbers for _, _, part in snapshot.layout.parts()):
        with pytest.raises(ProfileError, match="no numbers"):
            entropy.measure([snapshot])
        return
    ladder = entropy.measure([snapshot])
    held = held_layers(snapshot)
    assert ladder.numbers == sum(bits.size for layer in held for bits in layer.parts.values())
    for rung in ladder.rungs:
        assert [list(layer) for layer in rung.layers] == [list(layer.parts) for layer in held]
        spent = [
            rung.layers[i][name].bits * bits.size
            for i, layer in enumerate(held)
            for name, bits in layer.parts.items()
        ]
        assert rung.bits == pytest.approx(sum(spent) / max(ladder.numbers, 1))
        assert sum(part.numbers for part in rung.parts) == ladder.numbers
        total = sum(part.bits * part.numbers for part in rung.parts)
        assert rung.bits == pytest.approx(total / max(ladder.numbers, 1))
        assert rung.bits <= ladder.width + 1e-9 or not ladder.numbers


@pytest.mark.parametrize("batch", [None, 3])
def test_a_layer_alone_has_the_bits_of_plain_ones(batch):
    """Part by part, head by head, channel by channel, on every level."""
    for layer in every_kind(batch).layers:
        if not layer.layout.parts:
            continue
        found = entropy.measure([Snapshot([layer], "bf16")]).rungs
        for name in layer.layout.parts:
            wanted = entropy.measure([alone(layer, name)]).rungs
            for mine, other in zip(found, wanted, strict=True):
                assert mine.layers[0][name] == other.layers[0]["k"]
                _, heads, _, dim = layer.layout.parts[name].block_shape
                assert np.shape(mine.layers[0][name].channels) == (heads, dim)


def test_a_part_in_two_formats_is_measured_twice():
    rung = entropy.measure([every_kind()]).rungs[0]
    assert [p.dtype for p in rung.parts if p.part == "k"] == ["bf16", "fp8_e4m3fn"]
    labels = parts.format_labels(rung.parts)
    assert {"K bf16", "K fp8_e4m3fn", "recurrent fp32", "k_scale fp32"} <= set(labels)


# --- prediction ----------------------------------------------------------------------------------


def test_layers_of_keys_and_values_are_predicted_among_others():
    """With the figures that they have without the others, which count as by channel."""
    documents = mixed_documents(4)
    ladder = entropy.measure(documents[:1], entropy.fit(documents[1:]))
    assert [rung.name for rung in ladder.rungs] == [*LEVELS, *PREDICTED]
    predicted = [0, 2, 3, 4]

    def plain(snapshot):
        kv = [(snapshot.layers[i].k, snapshot.layers[i].v) for i in predicted]
        return Snapshot.from_arrays(kv, "bf16", snapshot.token_ids, snapshot.origin)

    alone = entropy.measure([plain(documents[0])], entropy.fit([plain(d) for d in documents[1:]]))
    tables = ladder.rungs[len(LEVELS) - 1].layers
    for mine, other in zip(ladder.rungs[len(LEVELS) :], alone.rungs[len(LEVELS) :], strict=True):
        for n, i in enumerate(predicted):
            assert {name: mine.layers[i][name] for name in "kv"} == other.layers[n]
        assert mine.layers[1] == tables[1]
        assert mine.layers[3]["recurrent"] == tables[3]["recurrent"]
        assert mine.layers[5] == tables[5]
    assert ladder.unpredicted == {
        "recurrent in place of keys and values": [1],
        "recurrent beside keys and values": [3],
        "keys and values in fp8_e4m3fn, not bf16": [5],
    }
    assert len(ladder.spectra) == 4
    line = parts.unpredicted_line(ladder.unpredicted | {"latent in place": [6, 7, 8, 11]})
    assert "layer 1: recurrent in place" in line
    assert "layers 6 to 8, 11: latent in place" in line


def test_a_cache_of_states_alone_has_tables_and_no_prediction():
    rng = np.random.default_rng(0)
    states = {"conv": PartLayout("bf16", (10, 3), "dr"), "scale": PartLayout("fp32", (), "")}

    def made():
        layers = [layer_of(rng, states, 40, "state", state_length=40) for _ in range(3)]
        return Snapshot(layers, "bf16")

    ladder = entropy.measure([made()], entropy.fit([made(), made()]))
    assert [rung.name for rung in ladder.rungs] == [*LEVELS]
    assert ladder.unpredicted == {"conv, scale in place of keys and values": [0, 1, 2]}
    assert (ladder.tokens, ladder.numbers, ladder.spectra) == (40, 3 * 31, [])
    assert ladder.width == pytest.approx((30 * 16 + 32) / 31)


def test_documents_with_other_parts_are_of_another_model():
    one, two = mixed_documents(2)
    bits = dict(two.layers[-1].parts)
    layouts = two.layers[-1].layout.parts | {"k_scale": PartLayout("int8", (), "")}
    bits["k_scale"] = np.zeros((), np.uint8)
    two.layers[-1] = Layer(bits, LayerLayout(layouts, 160))
    other = Snapshot(two.layers, "bf16", two.token_ids, two.origin)
    with pytest.raises(KVZipError, match="dtype of layer 5's k_scale: fp32 and int8"):
        entropy.measure([one, other])
    with pytest.raises(KVZipError, match="differ in layers: 6 and 5"):
        entropy.measure([one, Snapshot(two.layers[:-1], "bf16", two.token_ids, two.origin)])


def test_a_profile_is_of_caches_with_keys_and_values_in_every_layer():
    profile = Profile.fit([make_snapshot(cache_like, i, "bf16", tokens=200) for i in range(2)])
    with pytest.raises(ProfileError, match="layer 2 has latent, k_rope in place of keys"):
        entropy.measure([every_kind()], profile=profile)
    plain = make_snapshot(cache_like, 9, "bf16", tokens=200)
    scale = {"k_scale": PartLayout("fp32", (), "")}
    layers = [
        Layer(
            dict(layer.parts) | {"k_scale": np.ones((), np.uint32)},
            LayerLayout(layer.layout.parts | scale, 200),
        )
        for layer in plain.layers
    ]
    scaled = Snapshot(layers, "bf16", plain.token_ids, plain.origin)
    found, wanted = (entropy.measure([s], profile=profile).rungs[-1] for s in (scaled, plain))
    assert found.parts[:2] == wanted.parts
    assert found.parts[2].part == "k_scale"


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 2])
def test_every_kind_through_the_command(batch, tmp_path, capsys):
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for i, path in enumerate(paths):
        every_kind(batch, seed=i).save(path)
    out = tmp_path / "out"
    code, found = run_json(capsys, "entropy", paths[0], "--train", *paths[1:], "--out", out)
    assert code == 0
    names = {name for field in found["files"][0]["planes"] for name in field["parts"]}
    assert names == {name for _, name, _ in every_kind().layout.parts()}
    result = stored.load(out / "entropy.json", EntropyResult)
    assert result.ladder.unpredicted == found["ladder"]["unpredicted"]
    assert sorted(layer for n in result.ladder.unpredicted.values() for layer in n) == [
        2,
        3,
        4,
        5,
        7,
    ]
    assert {p.name for p in out.iterdir()} >= {"ladder.svg", "heat.svg", "spectrum.svg"}
    heat = (out / "heat.svg").read_text()
    for label in ("K 1", "recurrent 1", "latent 0"):
        assert f">{label}<" in heat
    code, said, _ = run(capsys, "entropy", paths[0], "--train", *paths[1:])
    assert code == 0
    for words in ("field of fp8_e4m3fn", "k_rope bf16", "recurrent fp32", "k_scale fp32"):
        assert words in said
    [line] = [line for line in said.splitlines() if line.startswith("not predicted")]
    assert "layer 7: an encoder's keys and values" in line


def test_a_cache_without_numbers_of_some_parts(tmp_path, capsys):
    """Parts without rows, heads or tokens, and one of numbers that are all alike."""
    held = {
        "k": PartLayout("bf16", (2, 0, 4), "htd"),
        "v": PartLayout("bf16", (0, 0, 4), "htd"),
        "conv": PartLayout("bf16", (0, 3), "dr"),
        "recurrent": PartLayout("fp64", (), ""),
    }
    bits = {name: np.zeros(part.shape, part.form.uint) for name, part in held.items()}
    Snapshot([Layer(bits, LayerLayout(held, 0))], "bf16").save(tmp_path / "a.safetensors")
    code, found = run_json(capsys, "entropy", tmp_path / "a.safetensors", "--out", tmp_path)
    assert code == 0
    assert found["ladder"]["numbers"] == 1
    assert stored.load(tmp_path / "entropy.json", EntropyResult).ladder.width == 64
    assert run(capsys, "entropy", tmp_path / "a.safetensors")[0] == 0


def test_an_older_result_says_what_to_do(tmp_path, capsys):
    make_snapshot(cache_like, 0, "bf16").save(tmp_path / "a.safetensors")
    run_json(capsys, "entropy", tmp_path / "a.safetensors", "--out", tmp_path)
    found = json.loads((tmp_path / "entropy.json").read_text())
    assert (found["kind"], found["version"]) == ("entropy", 2)
    (tmp_path / "entropy.json").write_text(json.dumps(found | {"version": 1}))
    with pytest.raises(KVZipError, match=r"older kvzip: measure again"):
        stored.load(tmp_path / "entropy.json", EntropyResult)


def test_a_picture_has_no_cell_where_a_layer_has_no_such_head():
    ladder = entropy.measure(mixed_documents(1))
    heads = [part.size("h") for _, _, part in mixed_documents(1)[0].layout.parts()]
    assert charts.heat_svg(ladder).count("<title>head ") == sum(heads)
    assert set(pictures.ladder_files(ladder)) == {"ladder.svg", "heat.svg"}
