"""The table of claims: every row says all that it must, ours are what stored results hold, and the
page is drawn from it."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest
from command import run, run_json

from kvzip.errors import KVZipError
from kvzip.eval.claims import claims as table
from kvzip.eval.claims.page import blocks
from kvzip.eval.report.readme import put_between

ROOT = Path(__file__).parents[3]
TEXT = (files("kvzip.eval.claims") / "claims.toml").read_text()
CLAIMS = table.load()


def test_our_claims_are_what_stored_results_hold() -> None:
    assert len(CLAIMS.own) >= 8
    counted = table.check_stored(CLAIMS.own, ROOT)
    assert counted == sum(len(own.figures) for own in CLAIMS.own) > len(CLAIMS.own)


def test_the_command_says_whether_they_were_compared(capsys) -> None:  # type: ignore[no-untyped-def]
    words = " ".join(run(capsys, "eval", "claims", "--results", ROOT)[1].split())
    count = sum(len(own.figures) for own in CLAIMS.own)
    assert words.endswith(
        f"All {count} figures of kvzip's {len(CLAIMS.own)} claims agree with their stored results."
    )
    alone = " ".join(run(capsys, "eval", "claims")[1].split())
    assert alone.endswith("were not compared with stored results: --results")


@pytest.mark.parametrize("own", CLAIMS.own, ids=lambda own: own.name)
def test_a_claim_that_says_more_than_its_result_is_refused(own: table.Own) -> None:
    for n, figure in enumerate(own.figures):
        whole, dot, fraction = figure.says.partition(".")
        more = f"{int(whole + fraction) + 1:0{len(whole + fraction)}d}"
        says = more[: len(more) - len(fraction)] + dot + more[len(more) - len(fraction) :]
        figures = [*own.figures]
        figures[n] = msgspec.structs.replace(figure, says=says)
        with pytest.raises(KVZipError, match=rf"says {says}, and .* is {figure.says[:1]}"):
            table.check_stored([msgspec.structs.replace(own, figures=figures)], ROOT)


def test_the_page_is_current(tmp_path: Path) -> None:
    copy = tmp_path / "claims.md"
    shutil.copy(ROOT / "docs" / "claims.md", copy)
    assert put_between(copy, blocks(CLAIMS)) is False
    text = copy.read_text()
    for claim in (*CLAIMS.published, *CLAIMS.own):
        assert text.count(f". {claim.name} | {claim.claim} |") == 1
        assert text.count(f". **{claim.name}.**") == 1
    put_between(copy, blocks(msgspec.structs.replace(CLAIMS, published=CLAIMS.published[1:])))
    assert copy.read_text() != text


@pytest.mark.parametrize("group", ["published", "own"])
def test_every_field_must_be_there(group: str) -> None:
    rows = getattr(CLAIMS, group)
    plain = msgspec.to_builtins(CLAIMS)
    for field in msgspec.structs.fields(type(rows[0])):
        if field.required:
            one = {key: value for key, value in plain[group][0].items() if key != field.name}
            with pytest.raises(msgspec.ValidationError, match=field.name):
                msgspec.convert(plain | {group: [one]}, table.Claims)
            if one | {field.name: ""} and isinstance(getattr(rows[0], field.name), str):
                emptied = msgspec.structs.replace(rows[0], **{field.name: ""})
                with pytest.raises(KVZipError, match=rf"{field.name} is empty|no stored figure"):
                    msgspec.structs.replace(CLAIMS, **{group: [emptied]}).check()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('exact = "theory"', 'exact = "lossless"', "exact"),
        ('checked = "reported"', 'checked = "source"', "names where"),
        ('checked = "nowhere"', 'checked = "source"', "no address"),
        ("most = 2.70", "most = 1.70", "2.37 to 1.7 is no range"),
        ('date = "2026-05-08"', 'date = "spring"', "the date is 'spring'"),
        ('name = "SplitZip"', 'name = "ds4 #186"', "two claims are called ds4 #186"),
        ('claim = "1.56x"', 'claim = "1.75x"', "no stored figure is given for 1.75"),
        ("[[own]]", "[[ours]]", "ours"),
        ("[[own]]", "[own", "the table of claims"),
    ],
)
def test_a_table_that_breaks_its_rules_is_refused(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(KVZipError, match=says):
        table.parse(TEXT.replace(old, new))


def test_a_place_in_a_result() -> None:
    result = {"rows": [{"codec": "a", "n": 1, "r": 2.5}, {"codec": "a", "n": 2, "r": 3.5}]}
    assert table.look_up(result, "rows[codec=a,n=2].r") == 3.5
    dotted = {"rows": [{"file": "build/doc.json", "r": 1.0}]}
    assert table.look_up(dotted, "rows[file=build/doc.json].r") == 1.0
    for at in ("rows[codec=a].r", "rows[codec=b].r", "rows.r", "lines", "rows[codec=a,n=2].s"):
        with pytest.raises(KVZipError, match="nothing, or not one thing"):
            table.look_up(result, at)


def test_the_command(capsys, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, found = run_json(capsys, "eval", "claims", "--results", ROOT)
    assert code == 0 and msgspec.convert(found, table.Claims) == CLAIMS
    code, out, _ = run(capsys, "eval", "claims")
    assert code == 0 and "SplitZip" in out and "rounded numbers" in out
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert run(capsys, "eval", "claims", "--page", page)[0] == 2
    assert run(capsys, "eval", "claims", "--results", tmp_path)[0] == 2
