"""The README says what the stored results say, and its picture is of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from kvzip.errors import KVZipError
from kvzip.eval.report import readme as f
from kvzip.eval.report.answers import answers
from kvzip.eval.report.sources import read
from kvzip.eval.report.traffic import found_at, markdown

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"
DEMO, BESIDE = read([RESULTS / "demo.json", *sorted(RESULTS.glob("traffic-*.json"))])
TRAFFIC = BESIDE.traffic or []


def test_the_readme_is_what_the_stored_results_give(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    assert f.put_figures(DEMO, copy, TRAFFIC) is False
    answers = f.answer(DEMO, TRAFFIC).replace("\n   ", " ").splitlines()[1:]
    assert [line.partition(":")[0][:8] for line in answers] == [
        "1. *In t", "2. *In d", "3. *In d", "4. *In r"
    ]  # fmt: skip
    assert all("`kvzip " in line for line in answers)


def test_the_tables_of_traces_are_what_the_stored_results_give(tmp_path: Path) -> None:
    copy = tmp_path / "fleet.md"
    copy.write_text((ROOT / "docs" / "fleet.md").read_text())
    assert f.put_between(copy, {"traffic": markdown(TRAFFIC)}) is False
    assert markdown(TRAFFIC).count("| no store |") == 2


def test_a_page_that_is_no_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_bytes(b"<!-- traffic -->\xe9<!-- /traffic -->")
    with pytest.raises(KVZipError, match=r"page\.md is not UTF-8 text"):
        f.put_between(tmp_path / "page.md", {"traffic": "x"})


def test_the_answer_in_room_is_what_the_trace_gives() -> None:
    """Six hit rates that were counted by other code, at 5,000 blocks and 1, 1.54 and 2.2 times as
    many; the curve between stored points is an estimate."""
    wanted = {"conversation": [11.0, 17.2, 22.1], "synthetic": [27.9, 36.5, 44.4]}
    for traffic in TRAFFIC:
        found = [100 * found_at(traffic, 5000, ratio) for ratio in (1, 1.54, 2.2)]
        name = traffic.trace.removeprefix("mooncake_").partition(".")[0]
        assert found == pytest.approx(wanted[name], abs=0.25)
    assert len(TRAFFIC) == 2
    text = f.answer(DEMO, TRAFFIC)
    plain = text.replace("\n   ", " ")
    assert (
        "11.0% of the blocks raw, 17.6% with `channel` (1.58x), 22.1% with `predictive` (2.21x)"
        in plain
    )
    assert "In room" not in f.answer(DEMO)


def test_the_answer_in_room_says_what_its_ratios_are_of_and_what_the_store_costs() -> None:
    plain = f.answer(DEMO, TRAFFIC).replace("\n   ", " ")
    assert "ratios measured on SmolLM2-135M, taken to hold for qwen3-4b" in plain
    by_pair = {(r.strategy, r.codec): r.usd for r in TRAFFIC[0].rows}
    best, without = by_pair["load", "channel"], by_pair["gpu", ""]
    assert by_pair["recompute", ""] > without  # what the GPUs keep by themselves costs nothing
    assert f"costs more than it saves on this trace (model): ${best:.2f} with `channel` " in plain
    assert f"against ${without:.2f} with the GPUs' own memory alone" in plain
    # The cheapest row is none that the hosts have no cores for.
    lacking = by_pair["load", "predictive"]
    assert lacking < best
    assert f"`predictive` would be ${lacking:.2f}, but takes 2.8 times the hosts' cores" in plain
    [cheap] = [r for r in TRAFFIC[0].rows if (r.strategy, r.codec) == ("load", "channel")]
    rows = [*TRAFFIC[0].rows]
    rows[rows.index(cheap)] = msgspec.structs.replace(cheap, usd=without / 2)
    other = f.answer(DEMO, [msgspec.structs.replace(TRAFFIC[0], rows=rows)])
    assert "costs less than it saves" in other.replace("\n   ", " ")


def test_readme_and_report_find_the_same() -> None:
    """The card of the report and the README's answer take one ratio."""
    card = next(a for a in answers(DEMO, TRAFFIC) if a.question.startswith("In room"))
    found = re.findall(r"[\d.]+%(?= with)", card.sentence)
    assert found and all(share in f.answer(DEMO, TRAFFIC) for share in found)


def test_other_results_give_another_answer(tmp_path: Path) -> None:
    other = msgspec.structs.replace(DEMO, tokens=4096)
    copy = tmp_path / "README.md"
    marks = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("answer", "codecs")]
    copy.write_text("before\n" + "between\n".join(marks) + "after\n")
    assert f.put_figures(other, copy) is True
    text = copy.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "4,096 tokens" in text and "between" in text and "| `channel` | 1.58 |" in text
    assert max(map(len, text.splitlines())) <= 120
    copy.write_text("no marks")
    with pytest.raises(KVZipError, match="has no <!-- answer -->"):
        f.put_figures(DEMO, copy)


def test_every_figure_of_the_answer_is_listed() -> None:
    found = {figure.name: figure for figure in f.figures(DEMO)}
    by_codec = {codec.name: codec for codec in DEMO.codecs}
    assert found["prefill"].value == DEMO.prefill_seconds
    assert found["ratio, channel"].value == by_codec["channel"].ratio
    links = [name for name in found if name.startswith("break-even link")]
    assert "break-even link, raw" in links
    assert found["ratio that opens the trap"].value == pytest.approx(2.65, abs=0.005)
    text = f.answer(DEMO)
    assert f"{found['prefill'].value:.1f} s" in text
    assert f"{found['break-even link, channel'].value:.0f} Mb/s" in text


@pytest.mark.parametrize(
    ("verdict", "says"),
    [("load", "yes for this cache"), ("prefill", "no codec makes"), ("unknown", "not known")],
)
def test_words_follow_the_verdicts(verdict: str, says: str) -> None:
    rows = [
        msgspec.structs.replace(row, dollars=msgspec.structs.replace(row.dollars, verdict=verdict))
        for row in DEMO.breakeven
    ]
    text = f.answer(msgspec.structs.replace(DEMO, breakeven=rows))
    assert text.replace("\n   ", " ").count(says) == 2


def test_whether_a_codec_reaches_the_papers_ratio_and_raw_bytes_pay() -> None:
    text = f.answer(DEMO).replace("\n   ", " ")
    assert "which no codec here reaches" in text and "even as raw bytes" in text
    better = [msgspec.structs.replace(codec, ratio=3.0) for codec in DEMO.codecs]
    rows = [row for row in DEMO.breakeven if row.codec != "raw"]
    text = f.answer(msgspec.structs.replace(DEMO, codecs=better, breakeven=rows))
    assert "no codec here" not in text and "raw bytes" not in text


def test_a_codec_that_is_slower_than_the_prefill_is_said() -> None:
    quick = [
        msgspec.structs.replace(
            row, time=msgspec.structs.replace(row.time, break_even_mbps=None, decode_bound=True)
        )
        for row in DEMO.breakeven
    ]
    text = f.answer(msgspec.structs.replace(DEMO, breakeven=quick))
    assert "*In time*: no." in text


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed")
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("chromium is not installed (apt-get install chromium)")
    f.put_picture(DEMO, tmp_path / "answer.png")
    picture = (tmp_path / "answer.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width = int.from_bytes(picture[16:20])
    stored = (ROOT / "docs" / "answer.png").read_bytes()
    assert width == int.from_bytes(stored[16:20]) > 1000


def test_a_picture_without_chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where there is none, nor where what is called so does not start."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "none"))
    for _ in range(2):
        with pytest.raises(KVZipError, match="needs Chromium"):
            f.put_picture(DEMO, tmp_path / "answer.png")
        assert not (tmp_path / "answer.png").exists()
        broken = tmp_path / "chromium"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o700)


def test_results_are_json_that_a_person_can_read() -> None:
    text = (ROOT / "docs" / "results" / "demo.json").read_text()
    assert json.loads(text)["tokens"] == DEMO.tokens and text.count("\n") > 100
