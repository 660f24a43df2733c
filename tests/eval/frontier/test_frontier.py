"""The frontier: what it says of predictors holds, and an interrupted run goes on."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from command import run as command
from command import run_json
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_model

from kvzip.capture import prefill
from kvzip.errors import KVZipError
from kvzip.eval.frontier import copies, predictors
from kvzip.eval.frontier import run as frontier
from kvzip.eval.frontier.hull import hull, steps
from kvzip.eval.report import charts, pictures
from kvzip.eval.results import stored
from kvzip.eval.results.frontier import Frontier, Point
from kvzip.models import LoadedModel

DOCS = Path(__file__).parents[3] / "docs"
LAYERS = [1, 3]


def tiny(ref="tiny", dtype="bf16", device="cpu") -> LoadedModel:
    import torch

    loaded = tiny_model("Llama", vocab_size=100, head_dim=16)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return replace(loaded, model=loaded.model.to(kinds[dtype]))


@pytest.fixture(scope="module")
def small():
    """Few ranks and regions, and the tiny model for any reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "load_model", tiny)
        patch.setattr(frontier, "load_model", tiny)
        keep = ("channel", "density", "within", "rank-32", "one", "full", "regions-4")
        few = {key: predictors.CATALOGUE[key] for key in keep}
        patch.setattr(predictors, "CATALOGUE", few)
        patch.setattr(predictors, "MAIN", tuple(key for key in keep if key != "rank-32"))
        yield


@pytest.fixture(scope="module")
def paths(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    loaded, rng = tiny(), np.random.default_rng(0)
    found = []
    for i in range(10):
        ids = rng.integers(0, 100, 120, np.uint32)
        text = f"/texts/a.txt, document {i} of 120 tokens"
        found.append(folder / f"{i}.safetensors")
        prefill(loaded, ids, text=text).save(found[-1])
    return found


def measured(paths, out, **how):
    options = {"model": "tiny", "out": out, "layers": LAYERS, "casts": ["fp8_e4m3fn"]} | how
    return frontier.run(paths[:5], paths[5:9], paths[9:], **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("frontier")


@pytest.fixture(scope="module")
def result(paths, kept):
    return measured(paths, kept)


def points(result, run=0):
    return {p.key: p for p in result.runs[run].points}


def test_more_knowledge_leaves_less(result):
    for i in range(2):
        found = {key: p.bits for key, p in points(result, i).items()}
        assert found["full"] < found["within"] < found["density"] < found["channel"] + 0.1
        assert found["rank-32"] < found["within"] if i == 0 else True
        assert found["int8"] < found["fp8"] < found["int4"]
        assert found["fp32"] < found["int8"]
    # The same sums in other pieces are nearly the same numbers; in one piece, the same.
    assert points(result)["pieces"].bits < 0.1
    assert 1 < points(result)["stream"].bits < 3
    assert points(result)["stream"].bits < points(result)["fp32"].bits


def test_shares_and_sizes_are_counted(result):
    found = points(result)
    # 4 layers: queries, keys, values and output of 32 x (64, 32, 32, 64), and 3 x 32 x 48.
    products = 4 * (32 * (64 + 32 + 32 + 64) + 3 * 32 * 48)
    assert result.prefill_products == products
    width = 2 * 2 * 16
    triangle = width * (width - 1) // 2
    for key, columns in (("one", width), ("full", 3 * width)):
        by_layer = [p.products for p in found[key].layers]
        assert by_layer[-1] == columns * width + triangle
        assert found[key].products == pytest.approx(4 * np.mean(by_layer))
    assert found["density"].share == found["channel"].share == 0
    for kind in ("int4", "fp8", "int8", "fp32", "pieces"):
        assert found[kind].share == 1
        assert found[f"{kind}-within"].share == pytest.approx(1 + 4 * triangle / products)
    assert found["int4"].profile_bytes < 0.7 * found["int8"].profile_bytes
    assert found["regions-4"].profile_bytes > 3.5 * found["full"].profile_bytes
    assert result.train_tokens == 600
    assert result.test == ["a.txt, document 9 of 120 tokens"]
    assert result.prefill_seconds > 0


def test_a_copy_that_uses_channels_before_says_so(result):
    found = points(result)
    variants = {key for key, p in found.items() if p.within}
    assert variants == {f"{kind}-within" for kind in copies.COPIES}
    assert not found["within"].within
    labels = [p.label for p in found.values()]
    assert all(labels) and len(set(labels)) == len(labels)


def test_what_was_found_is_kept(paths, kept, result, monkeypatch):
    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(predictors, "measure", never)
    monkeypatch.setattr(copies, "make", never)
    again = measured(paths, kept)
    assert again.runs == result.runs


def test_an_interrupted_run_goes_on(paths, tmp_path, monkeypatch, result):
    real, calls, stop = predictors.measure, [], [4]

    def counted(*given):
        calls.append(1)
        if len(calls) in stop:
            raise RuntimeError("stopped")
        return real(*given)

    monkeypatch.setattr(predictors, "measure", counted)
    options = {"kinds": ["int8"], "casts": []}
    with pytest.raises(RuntimeError, match="stopped"):
        measured(paths, tmp_path, **options)
    stop.clear()
    done = measured(paths, tmp_path, **options)
    # Two layers of six measured predictors and of two copies, one of them begun twice.
    assert len(calls) == 2 * (6 + 2) + 1
    assert points(done)["full"] == points(result)["full"]
    # Other documents: nothing of before stands.
    calls.clear()
    frontier.run(
        paths[1:5], paths[5:9], paths[9:], model="tiny", out=tmp_path, layers=[3], kinds=[]
    )
    assert len(calls) == 6


def test_the_result_goes_to_json_and_back(result, tmp_path):
    stored.save(result, tmp_path / "a.json")
    assert stored.load(tmp_path / "a.json", Frontier) == result
    (tmp_path / "b.json").write_text('{"kind": "frontier", "version": 2}')
    with pytest.raises(KVZipError, match="not a result of kvzip eval frontier"):
        stored.load(tmp_path / "b.json", Frontier)


def test_wrong_use_is_named(paths, tmp_path):
    with pytest.raises(KVZipError, match="given with --train and --test"):
        frontier.run(paths[:3], paths[3:5], paths[2:3], model="tiny", out=tmp_path)
    with pytest.raises(KVZipError, match="no copy is called 'int2'"):
        measured(paths, tmp_path, kinds=["int2"])
    with pytest.raises(KVZipError, match="layers 0 to 3"):
        measured(paths, tmp_path, layers=[4])
    with pytest.raises(KVZipError, match="documents are needed"):
        frontier.run([], paths[:1], paths[1:2], model="tiny", out=tmp_path)


# --- the hull ------------------------------------------------------------------------------------

POINTS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 100)), min_size=1, max_size=25, unique=True
)


def made(pairs):
    return [
        Point(
            key=str(i),
            title="",
            label="",
            family="linear",
            bits=bits / 10,
            k=0,
            v=0,
            products=0,
            share=share / 50,
            profile_bytes=0,
            layers=[],
        )
        for i, (share, bits) in enumerate(pairs)
    ]


@given(POINTS)
def test_no_point_lies_below_the_hull(pairs):
    every = made(pairs)
    chain = hull(every, room=0)
    shares, bits = [p.share for p in chain], [p.bits for p in chain]
    assert shares == sorted(set(shares))
    assert bits == sorted(set(bits), reverse=True)
    slopes = np.diff(bits) / np.diff(shares)
    assert (np.diff(slopes) > 0).all()
    assert min(p.bits for p in every) == bits[-1]
    for p in every:
        below = np.interp(p.share, shares, bits)
        assert p.share < shares[0] or p.bits > below - 1e-9


def test_what_needs_too_much_room_is_not_on_the_hull():
    small, large = made([(0, 100), (10, 10)])
    large = msgspec.structs.replace(large, profile_bytes=2.0)
    assert hull([small, large], room=2) == [small, large]
    assert hull([small, large], room=1) == [small]
    assert hull([small, msgspec.structs.replace(large, family="copy")], room=1)[1:]


@given(POINTS)
def test_a_step_is_worth_it_where_both_take_as_long(pairs):
    for step in steps(made(pairs), room=0, numbers=1000, prefill_seconds_per_token=1e-3):
        sending = 1000 * step.bits_saved / (step.worth_below_mbps * 1e6)
        assert sending == pytest.approx(step.share_more * 1e-3)


# --- copies --------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), columns=st.sampled_from([32, 48, 64]))
def test_rounding_is_to_the_nearest_step(seed, columns):
    import torch

    weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, columns))).float()
    top = weight.abs().amax(1, keepdim=True)
    error = {
        kind: (copies.rounded(weight, kind) - weight).abs() for kind in ("int4", "fp8", "int8")
    }
    assert (error["int8"] <= top / 127 / 2 * 1.001).all()
    assert (error["int4"] <= top / 7 / 2 * 1.01).all()
    # e4m3fn has 3 bits of mantissa; below its smallest normal number steps are even.
    step = torch.maximum(weight.abs() / 16, top / 448 * 2.0**-10)
    assert (error["fp8"] <= step * 1.001).all()


# --- figures -----------------------------------------------------------------------------------


def circles(svg):
    root = ElementTree.fromstring(svg)
    return {e.get("data-point"): float(e.get("r")) for e in root.iter() if e.get("data-point")}


@pytest.mark.parametrize("width", [760, 344])
def test_every_predictor_is_a_point(result, width):
    run = result.runs[0]
    found = circles(charts.frontier_svg(result, run, "f", (width, 400)))
    on_hull = {p.key for p in hull(run.points, result.prefill_products)}
    drawn = [p for p in run.points if p.family != "floor" and (not p.within or p.key in on_hull)]
    assert on_hull <= set(found)  # every point that the line goes through
    assert set(found) == {p.key for p in drawn}
    sizes = [found[p.key] for p in sorted(drawn, key=lambda p: p.profile_bytes)]
    assert sizes == sorted(sizes)


def test_the_file_stands_alone(result):
    root = ElementTree.fromstring(pictures.frontier_file(result))
    names = [e.get("data-chart") for e in root.iter() if e.get("data-chart")]
    assert names == ["frontier-bf16", "frontier-fp8_e4m3fn"]
    assert root.find("{http://www.w3.org/2000/svg}style") is not None
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))


def test_the_stored_result():
    """What the docs show is drawn from what the docs hold."""
    found = stored.load(DOCS / "frontier.json", Frontier)
    assert not set(found.train) & set(found.test)
    assert not set(found.calibrate) & set(found.test)
    assert found.command.startswith("kvzip eval frontier")
    assert (DOCS / "frontier.svg").read_text() == pictures.frontier_file(found)
    second = found.prefill_seconds / found.document_tokens
    for run in found.runs:
        assert run.steps == steps(
            run.points, found.prefill_products, found.numbers_per_token, second
        )


def test_the_command(paths, kept, result, tmp_path, capsys):
    options = ["--train", *paths[:5], "--calibrate", *paths[5:9], "--test", *paths[9:]]
    options += ["--model", "tiny", "--layers", "1,3", "--cast", "fp8_e4m3fn", "--out", kept]
    code, found = run_json(capsys, "eval", "frontier", *options)
    assert code == 0
    assert found["runs"] == json.loads(msgspec.json.encode(result.runs))
    code, out, _ = command(
        capsys, "eval", "frontier", "--draw", kept / "frontier.json", "--out", tmp_path
    )
    assert code == 0
    assert "worth it below" in out
    assert (tmp_path / "frontier.svg").read_text() == (kept / "frontier.svg").read_text()
    assert command(capsys, "eval", "frontier", "--test", paths[0])[0] == 2
