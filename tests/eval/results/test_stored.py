"""Stored results: known by kind and version, and never taken for what they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvzip.choice.auto import MEASURED
from kvzip.errors import KVZipError
from kvzip.eval.results import stored
from kvzip.eval.results.base import Result
from kvzip.eval.results.bench import BenchResult
from kvzip.eval.results.demo import DemoResult
from kvzip.eval.results.exactness import ExactnessResult
from kvzip.eval.results.frontier import Frontier
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.links import Links
from kvzip.eval.results.provenance import Machine, machine

DOCS = Path(__file__).parents[3] / "docs"
FILES: dict[Path, type[Result]] = {
    MEASURED: Inputs,
    DOCS / "results" / "demo.json": DemoResult,
    DOCS / "results" / "exactness.json": ExactnessResult,
    DOCS / "results" / "links.json": Links,
    DOCS / "benchmarks.json": BenchResult,
    DOCS / "benchmarks-avx2.json": BenchResult,
    DOCS / "frontier.json": Frontier,
}


@pytest.mark.parametrize(("path", "form"), FILES.items(), ids=lambda p: getattr(p, "name", ""))
def test_what_is_in_the_repository_is_read_by_its_kind(
    path: Path, form: type[Result], tmp_path: Path
) -> None:
    found = stored.load(path, Result)
    assert type(found) is form and stored.KINDS[found.kind] is form
    plain = json.loads(path.read_text())
    assert list(plain)[:2] == ["kind", "version"]
    assert (plain["kind"], plain["version"]) == (found.kind, found.version)
    stored.save(found, tmp_path / "again.json")
    assert stored.load(tmp_path / "again.json", form) == found
    assert json.loads((tmp_path / "again.json").read_text()) == plain


def written(folder: Path, **changes: Any) -> Path:
    plain = json.loads(MEASURED.read_text()) | changes
    path = folder / "some.json"
    path.write_text(json.dumps({k: v for k, v in plain.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": None}, "no kind and version.*made by an older kvzip: measure again"),
        ({"version": None}, "no kind and version.*made by an older kvzip: measure again"),
        ({"kind": ["inputs"]}, "no kind and version"),
        ({"version": "1"}, "no kind and version"),
        ({"kind": "dreams"}, "kind 'dreams', which this kvzip does not know: .* known are: demo"),
        ({"kind": "demo"}, "not a result of kvzip eval inputs, but of kvzip demo"),
        ({"version": 2}, "reads version 1: it was made by a later kvzip, install that"),
        ({"version": 0}, "reads version 1: it was made by an older kvzip: measure again"),
        ({"width": None}, "not a result of kvzip eval inputs: .*width"),
        ({"rows": []}, "some.json: there is no codec in it"),
    ],
)
def test_what_is_something_else_is_said(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(KVZipError, match=says) as error:
        stored.load(written(tmp_path, **changes), Inputs)
    assert str(tmp_path / "some.json") in str(error.value)


@pytest.mark.parametrize(
    ("file", "at", "wrong"),
    [
        ("results/links.json", ("points", 0, "way"), "x"),
        ("results/links.json", ("points", 0, "mbps"), -0.0),
        ("results/links.json", ("points", 0, "predicted"), 0),
        ("results/links.json", ("points", 0, "times"), [1.0, 0.0]),
        ("results/links.json", ("inputs", "step"), -1),
        ("results/links.json", ("inputs", "together"), 0),
        ("results/links.json", ("inputs", "codecs"), []),
        ("results/links.json", ("inputs", "codecs", 1, "transfers"), []),
        ("results/links.json", ("inputs", "codecs", 1, "transfers", 0, "mbps"), 0),
        ("results/links.json", ("inputs", "codecs", 1, "ratio"), 0),
        ("frontier.json", ("runs", 0, "points", 0, "profile_bytes"), -1),
        ("frontier.json", ("runs", 0, "points", 0, "family"), "x"),
        ("results/frontier/whole.json", ("runs", 0, "points", 0, "profile_bytes"), -1),
        ("results/traffic-synthetic.json", ("rows", 0, "strategy"), "x"),
    ],
)
def test_what_no_chart_could_show_is_said(
    tmp_path: Path, file: str, at: tuple[Any, ...], wrong: Any
) -> None:
    plain = json.loads((DOCS / file).read_text())
    holder = plain
    for key in at[:-1]:
        holder = holder[key]
    assert at[-1] in holder or at[-1] < len(holder)
    holder[at[-1]] = wrong
    (tmp_path / "some.json").write_text(json.dumps(plain))
    with pytest.raises(KVZipError, match=r"some\.json"):
        stored.load(tmp_path / "some.json", Result)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "not JSON"), (b"[1]", "holds something else"), (b'{"kind": "\xff"}', "not JSON")],
)
def test_what_is_no_object_is_said(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(KVZipError, match=says):
        stored.load(tmp_path / "some.json", Result)
    with pytest.raises(KVZipError, match="No such file"):
        stored.load(tmp_path / "none.json", Result)


def test_kinds_are_fixed_by_their_class() -> None:
    for kind, form in stored.KINDS.items():
        assert kind == form.__struct_config__.tag and form.writer
        assert "kind" not in form.__struct_fields__
    assert len(set(stored.KINDS.values())) == len(stored.KINDS) == 12


def test_a_machine_says_what_was_noted_of_it() -> None:
    here = machine()
    assert here.cores >= 1 and here.cache_mib and here.cache_mib > 0
    assert msgspec.convert(msgspec.to_builtins(here), Machine) == here
    assert msgspec.to_builtins(Machine("some CPU", 2, 16.0)) == {
        "cpu": "some CPU",
        "cores": 2,
        "memory_gib": 16.0,
    }
