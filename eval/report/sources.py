"""What a report is drawn from: a demo's result, and results of other kinds beside it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvzip.errors import KVZipError, UsageError
from kvzip.eval.report.traffic import trace_name
from kvzip.eval.results import stored
from kvzip.eval.results.base import Result
from kvzip.eval.results.bench import BenchResult
from kvzip.eval.results.demo import DemoResult
from kvzip.eval.results.entropy import EntropyResult
from kvzip.eval.results.exactness import ExactnessResult
from kvzip.eval.results.frontier import Frontier
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.links import Links
from kvzip.eval.results.traffic import TrafficResult


class Origin(msgspec.Struct, frozen=True):
    """Where figures are from: what was typed, when it was finished, and on which machine."""

    command: str
    date: str
    machine: str


def origin(result: Result) -> Origin:
    """Where a stored result is from, with the date as a day."""
    machine = result.machine
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    return Origin(result.command, result.date[:10], f"{machine.cpu}, {cores}")


class Extras(msgspec.Struct, frozen=True):
    """Results that a report shows beside a demo's: at most one of each kind, but of replayed traces
    one of each trace."""

    inputs: Inputs | None = None
    exactness: ExactnessResult | None = None
    peers: BenchResult | None = None
    frontier: Frontier | None = None
    ladder: EntropyResult | None = None
    links: Links | None = None
    traffic: list[TrafficResult] | None = None


_FIELDS: dict[type[Result], str] = {
    Inputs: "inputs",
    ExactnessResult: "exactness",
    BenchResult: "peers",
    Frontier: "frontier",
    EntropyResult: "ladder",
    Links: "links",
}
"""The field of `Extras` for each kind of result."""


def origins(demo: DemoResult, extras: Extras) -> dict[str, Origin]:
    """Where each part of a report is from, by what the part is called, the demo first."""
    found = {"the captured document": origin(demo)}
    named: list[tuple[str, Result | None]] = [
        ("the ladder of entropy models", extras.ladder),
        ("bits against compute", extras.frontier),
        ("real links", extras.links),
        ("other compressors", extras.peers),
        ("exactness at scale", extras.exactness),
        ("inputs by length", extras.inputs),
    ]
    named += [(f"the trace {trace_name(t)}", t) for t in extras.traffic or ()]
    return found | {name: origin(result) for name, result in named if result is not None}


def read(paths: Sequence[str | os.PathLike[str]]) -> tuple[DemoResult, Extras]:
    """The demo's result among the files, and the others; a folder stands for its result.json.

    Raises KVZipError that names the file when one is no result, two are of one kind or of one
    trace, a figure cannot be, or there is no demo's result.
    """
    demo: DemoResult | None = None
    found: dict[str, Any] = {}
    seen: set[object] = set()
    for given in map(Path, paths):
        path = _file_of(given)
        result = stored.load(path, Result)
        of = result.trace if isinstance(result, TrafficResult) else type(result)
        if of in seen:
            raise KVZipError(f"{path} is a second result of {result.writer}: give one of each")
        seen.add(of)
        if isinstance(result, DemoResult):
            demo = result
        elif isinstance(result, TrafficResult):
            found.setdefault("traffic", []).append(result)
        elif type(result) in _FIELDS:
            found[_FIELDS[type(result)]] = result
        else:
            forms: list[type[Result]] = [DemoResult, *_FIELDS, TrafficResult]
            known = ", ".join(form.writer for form in forms)
            raise KVZipError(
                f"{path} is a result of {result.writer}, which no report shows; it shows: {known}"
            )
    if demo is None:
        raise KVZipError(
            "a report needs a result of kvzip demo: its folder, or the result.json in it"
        )
    return demo, Extras(**found)


def _file_of(given: Path) -> Path:
    """The file of a result that a path names: its own, or that in the folder of a demo."""
    if (given / "rows").is_dir() or given.suffix == ".parquet":
        raise UsageError(
            f"{given} holds the rows of a sweep, of which no page is drawn: query them, as in "
            f"kvzip report {shlex.quote(str(given))} --sql 'SELECT * FROM sweep'"
        )
    if not given.is_dir():
        return given
    path = given / "result.json"
    if not path.is_file():
        raise UsageError(
            f"{given} is not the folder of a demo: there is no result.json in it. Name the files "
            "of stored results"
        )
    return path
