"""How ratios grow: points follow from files, an ended run goes on, and an extrapolation says how
little it knows."""

from __future__ import annotations

import csv
import io
import math
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command import run, run_json
from hypothesis import given
from hypothesis import strategies as st
from support import save_tiny_model

import kvzip
from kvzip.cli import main
from kvzip.errors import KVZipError
from kvzip.eval.report.scaling import scaling_file
from kvzip.eval.results import stored
from kvzip.eval.results.ratios import RatiosResult
from kvzip.eval.results.scaling import ScaledModel, ScalingPoint, ScalingResult, Shape
from kvzip.eval.scaling import run as scaling
from kvzip.eval.scaling.extrapolate import (
    QWEN3_4B,
    extrapolations,
    gains,
    of_one_size,
)
from kvzip.eval.scaling.table import as_csv

DOCS = Path(__file__).parents[3] / "docs"
RATIOS = DOCS / "results" / "ratios" / "smollm2-135m-bf16.json"


@pytest.fixture(scope="module")
def given_options(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Options of a run on a random model, with texts of random words."""
    folder = tmp_path_factory.mktemp("scaling")
    save_tiny_model(folder / "tiny")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        words = " ".join(f"w{i}" for i in rng.integers(1, 60, 700))
        (folder / f"{split}.txt").write_text(words)
    text = f"words={folder / 'train.txt'}:{folder / 'test.txt'}"
    return ["eval", "scaling", "--models", folder / "tiny", "--work", folder / "work", "--kinds",
            "none", "--text", text, "--tokens", "64", "--train", "1,10", "--test", "2",
            "--sizes", "1,100"]  # fmt: skip


@pytest.fixture(scope="module")
def result(given_options: list[Any], tmp_path_factory: pytest.TempPathFactory) -> ScalingResult:
    out = tmp_path_factory.mktemp("out") / "scaling.json"
    with pytest.raises(SystemExit) as ended:
        main([*map(str, given_options), "-o", str(out), "--json"])
    assert ended.value.code == 0
    found = stored.load(out, ScalingResult)
    assert out.with_suffix(".csv").read_text() == as_csv(found)
    return found


def test_points_follow_from_files(given_options: list[Any], result: ScalingResult) -> None:
    work = Path(given_options[5])
    [model] = result.models
    assert model.shape.numbers_per_token == 4 * 2 * 2 * 8 and model.shape.cache_width == 1
    [folder] = work.iterdir()
    paths = sorted((folder / "captured" / "words.test").glob("*.safetensors"))
    documents = [kvzip.Snapshot.load(path) for path in paths]
    names = [(p.codec, p.train_documents) for p in model.points]
    assert names[:4] == [("planes", 0), ("channel", 0), ("channel", 1), ("predictive", 1)]
    assert ("predictive", 10) in names
    for point in model.points:
        profile = None
        if point.profile_id:
            found = [kvzip.Profile.load(p) for p in (folder / "profiles").iterdir()]
            [profile] = [p for p in found if p.id == point.profile_id]
            assert point.profile_bytes == profile.nbytes
        sizes = [len(kvzip.encode(d, point.codec, profile)) for d in documents]
        assert point.encoded_bytes == sum(sizes) and point.exact
        assert point.raw_bytes == sum(d.raw_bytes for d in documents)
        if point.codec == "predictive":
            assert len(point.regions) == len(point.products) == 4
            assert point.train_tokens == 64 * point.train_documents
        else:
            assert not point.regions and not point.products


def test_a_larger_training_set_begins_with_the_smaller(result: ScalingResult) -> None:
    [model] = result.models
    trained = [d for d in model.documents if d.split == "train"]
    assert [d.number for d in trained] == list(range(10))
    assert len([d for d in model.documents if d.split == "test"]) == 2


def test_an_ended_run_goes_on(
    given_options: list[Any], result: ScalingResult, capsys: Any, monkeypatch: Any
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(kvzip.Profile, "fit", never)
    monkeypatch.setattr(scaling, "measure", never)
    code, again = run_json(capsys, *given_options)
    assert code == 0 and again["models"] == msgspec.to_builtins(result.models)
    monkeypatch.setattr(scaling, "POINT_VERSION", 0)
    with pytest.raises(SystemExit) as ended:
        main([str(option) for option in given_options])
    assert ended.value.code and "measured again" in capsys.readouterr().err


def test_the_csv_has_every_point_by_kind_and_for_all(result: ScalingResult) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    [model] = result.models
    assert [r["text"] for r in rows] == ["words", "all"] * len(model.points)
    for row, point in zip(rows[1::2], model.points, strict=True):
        assert float(row["bits_per_value"]) == pytest.approx(point.bits_per_value, abs=1e-4)
        share = point.profile_bytes / model.shape.matrix_bytes
        assert float(row["profile_share"]) == pytest.approx(share, abs=1e-5)


# --- results of kvzip eval ratios, and what models say together ---------------------------------


def test_results_of_ratios_join_in(capsys: Any, tmp_path: Path) -> None:
    ratios = stored.load(RATIOS, RatiosResult)
    code, found = run_json(capsys, "eval", "scaling", "--ratios", RATIOS, "-o", tmp_path / "a.json")
    assert code == 0
    [model] = stored.load(tmp_path / "a.json", ScalingResult).models
    assert model.source == RATIOS.name and model.shape.name == ratios.model
    for point in model.points:
        rows = [row for row in ratios.rows if row.codec == point.codec]
        assert point.encoded_bytes == sum(row.encoded_bytes for row in rows)
        assert point.numbers == sum(row.numbers for row in rows)
    [learned] = ratios.profiles
    [predictive] = [p for p in model.points if p.codec == "predictive"]
    assert (predictive.profile_bytes, predictive.train_tokens) == (learned.bytes, learned.tokens)
    assert not found["extrapolations"]
    code, out, _ = run(capsys, "eval", "scaling", "--draw", tmp_path / "a.json")
    assert code == 0 and "Qwen" not in out  # nothing is said of it from one model
    assert run(capsys, "eval", "scaling")[0] == 2


def made(name: str, points: list[tuple[int, int, float]], **shape: Any) -> ScaledModel:
    """A model with points of `predictive`: training tokens, profile's bytes, bits."""

    def point(codec: str, tokens: int, size: int, bits: float) -> ScalingPoint:
        return ScalingPoint(
            codec=codec,
            train_documents=tokens // 2048,
            train_tokens=tokens,
            profile_bytes=size,
            kinds=[],
            layer_bytes=[],
            bits_per_value=bits,
            ratio=16 / bits,
            exact=True,
        )

    sizes = {"layers": 10, "hidden_size": 100, "numbers_per_token": 500, "parameters": 1e8} | shape
    return ScaledModel(
        shape=Shape(name=name, **sizes),
        revision="",
        architecture="",
        dtype="bf16",
        document_tokens=2048,
        texts=[],
        documents=[],
        points=[point("channel", 0, 0, 10.5), *(point("predictive", *p) for p in points)],
    )


BITS = st.floats(5, 9)


@given(BITS, BITS)
def test_two_models_say_little(a: float, b: float) -> None:
    other = {"layers": 20, "numbers_per_token": 1000}
    models = [made("a", [(2048, 9, a)]), made("b", [(2048, 9, b), (4096, 9, 1.0)], **other)]
    [found] = extrapolations(models, QWEN3_4B)
    assert found.train_tokens == 2048 and found.bits == [a, b]
    assert found.mean == pytest.approx((a + b) / 2)
    # Student's t of one degree of freedom is Cauchy's: half of it lies within one deviation.
    half = math.sqrt(0.75) * abs(a - b)
    assert found.half[0] == pytest.approx(found.mean - half)
    assert found.half[1] == pytest.approx(min(found.mean + half, 10.5))
    assert 0 <= found.most[0] <= found.half[0] and found.half[1] <= found.most[1] <= 10.5
    if abs(a - b) > 1:
        assert found.most == (0, 10.5)  # that is, nothing is known
    [layers] = found.lines  # all else is the same of both
    assert (layers.axis, layers.values, layers.target) == ("layers", [10, 20], 36)
    assert layers.bits == pytest.approx(b + 1.6 * (b - a))
    assert layers.beyond == pytest.approx(1.6)


def test_profiles_of_one_size_are_compared() -> None:
    """Of the size that most training sets have, the larger of two such; not of one that only the
    largest has."""
    sizes = {3: {14: 8.0, 15: 7.9}, 10: {14: 7.5, 15: 7.4}, 30: {15: 7.2}}
    model = made("a", [])
    for asked, bits in sizes.items():
        of = made("a", [(2**n, asked, bits[n]) for n in bits])
        model.points.extend(msgspec.structs.replace(p, asked=asked / 100) for p in of.points[1:])
    assert [p.bits_per_value for p in of_one_size(model)] == [7.5, 7.4]
    [gain] = gains([model])
    assert gain.tokens == pytest.approx(0.1) and gain.profile_range == (3, 30)
    assert of_one_size(made("a", [])) == []


def test_the_smallest_profile_counts_and_the_target_ends_it() -> None:
    models = [made("a", [(10, 9, 7.0), (10, 5, 8.0)]), made("b", [(10, 5, 7.5)])]
    [found] = extrapolations(models, QWEN3_4B)
    assert found.bits == [8.0, 7.5]
    assert extrapolations([*models, made("somebody/Qwen3-4B", [(10, 5, 6.0)])], QWEN3_4B) == []
    assert extrapolations(models[:1], QWEN3_4B) == []


@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_gains_are_found_again(tokens: float, profile: float) -> None:
    points = [
        (2**n, size, 20 - tokens * n - profile * math.log2(size))
        for n in (14, 15, 17)
        for size in (10**7, 3 * 10**7)
    ]
    [gain] = gains([made("a", points)])
    assert gain.tokens == pytest.approx(tokens) and gain.tokens_range == (2**14, 2**17)
    assert gain.profile == pytest.approx(profile) and gain.profile_range == (10**7, 3 * 10**7)
    [gain] = gains([made("a", points[:2])])
    assert gain.tokens is None and gain.profile == pytest.approx(profile)
    assert gains([made("a", points[:1])]) == []  # nothing to compare with


def test_what_was_not_measured_is_drawn_as_such() -> None:
    models = [made("a", [(10, 9, 7.0)]), made("b", [(10, 5, 7.5)])]
    extrapolated = scaling_file(scaling.conclude(models, "a test"))
    assert "Qwen3-4B? not measured" in extrapolated
    measured = scaling_file(
        scaling.conclude([*models, made("Qwen/Qwen3-4B", [(10, 5, 6.0)])], "a test")
    )
    assert "not measured" not in measured
    lines = [e.get("data-line") for e in ElementTree.fromstring(measured).iter()]
    assert lines.count("Qwen3-4B") == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ratio": 2.5}, "ratio is 2.5, and its bytes say"),
        ({"bits_per_value": 1.0}, "bits_per_value is 1.0, and its bytes say"),
        ({"exact": False}, "was not exact"),
        ({"kinds": []}, "numbers is 0"),
        ({"layer_bytes": [1]}, "has not 4 layers"),
        ({"layer_bytes": [10**9] * 4}, "greater than its files"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    result: ScalingResult, change: dict[str, Any], says: str
) -> None:
    [model] = result.models
    points = [msgspec.structs.replace(model.points[0], **change), *model.points[1:]]
    wrong = msgspec.structs.replace(model, points=points)
    with pytest.raises(KVZipError, match=says):
        msgspec.structs.replace(result, models=[wrong]).check()


def test_a_document_in_both_splits_is_refused(result: ScalingResult) -> None:
    [model] = result.models
    leak = msgspec.structs.replace(model.documents[0], split="test")
    wrong = msgspec.structs.replace(model, documents=[*model.documents, leak])
    with pytest.raises(KVZipError, match="in both splits"):
        msgspec.structs.replace(result, models=[wrong]).check()
    with pytest.raises(KVZipError, match="no figure"):
        msgspec.structs.replace(result, models=[]).check()


def test_wrong_sizes_are_named(given_options: list[Any], capsys: Any) -> None:
    code, _, error = run(capsys, *given_options[:-1], "300")
    assert code == 2 and "--sizes are percentages" in error


# --- what is stored and told --------------------------------------------------------------------


def test_the_stored_result_is_what_the_docs_tell() -> None:
    path = DOCS / "results" / "scaling" / "small-models.json"
    found = stored.load(path, ScalingResult)
    assert path.with_suffix(".csv").read_text() == as_csv(found)
    assert (DOCS / "scaling.svg").read_text() == scaling_file(found)
    again = scaling.conclude(found.models, found.command)
    assert (again.gains, again.extrapolations) == (found.gains, found.extrapolations)
    page = (DOCS / "qwen3-4b.md").read_text()
    for model in found.models:
        [line] = [line for line in page.splitlines() if line.startswith(f"| {model.shape.name} |")]
        points = of_one_size(model)
        bits = [f"{point.bits_per_value:.2f}" for point in points]
        channel = next(p.bits_per_value for p in model.points if p.codec == "channel")
        said = [cell.strip() for cell in line.split("|")[1:-1]]
        shape = model.shape
        about = [str(shape.layers), f"{shape.cache_width:.2f}", f"{shape.parameters / 1e6:.0f} M"]
        assert said[1:] == [*about, f"{channel:.2f}", *bits]
    sizes = (DOCS / "research.md").read_text()
    for model in found.models:
        for point in model.points:
            if point.codec == "predictive":
                share = point.profile_bytes / 2 / model.shape.parameters
                assert (
                    f"| {point.profile_bytes / 1e6:.1f} MB | {100 * share:.1f} % "
                    f"| {point.train_tokens:,} tokens | {statistics.fmean(point.regions):.1f} "
                    f"| {point.bits_per_value:.2f} |"
                ) in sizes
    # What four times the tokens save, by text and profile, over both models.
    few, many = {}, {}
    for model in found.models:
        for point in model.points:
            if point.codec == "predictive" and point.asked in (0.03, 0.1):
                for kind in point.kinds:
                    at = few if point.train_tokens == 24_576 else many
                    key = (model.shape.name, point.asked, kind.kind)
                    at[key] = 8 * kind.encoded_bytes / kind.numbers
    for asked, kinds, said in (
        (0.03, ("python-source", "package-metadata"), "0.10 to 0.13"),
        (0.1, ("python-source", "package-metadata"), "0.19 to 0.22"),
        (0.03, ("licences",), "lose 0.05 to 0.06"),
    ):
        saved = [abs(few[k] - many[k]) for k in few if k[1] == asked and k[2] in kinds]
        assert f"{min(saved):.2f} to {max(saved):.2f}" in said and said in page
    if found.extrapolations:
        last = found.extrapolations[-1]
        assert f"{last.mean:.1f} bits" in page
        assert f"between {last.half[0]:.1f} and {last.half[1]:.1f} in half of all cases" in page
        assert f"between {last.most[0]:.1f} and {last.most[1]:.1f} in 95 of 100" in page
        for line in last.lines:
            assert line.axis in page and f"{line.bits:.1f}" in page
    else:
        assert "was not measured" not in page
