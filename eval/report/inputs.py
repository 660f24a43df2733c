"""Results that a report shows beside a demo's, each from its own file: measured inputs, exactness
at scale, peers, the frontier, the ladder of entropy models, links. Recognised by what is in them.

The benchmark's file belongs to kvzip.benchmarks, which stands above; here is only what a report
needs of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvzip.entropy import Ladder
from kvzip.errors import KVZipError
from kvzip.eval.exactness.corpus import Trials, load_trials
from kvzip.eval.results.demo import DemoResult, as_result
from kvzip.eval.results.frontier import Frontier
from kvzip.eval.results.links import Links, load_links
from kvzip.eval.speed.inputs import Inputs, load_inputs


class PeerRow(msgspec.Struct, frozen=True):
    """One compressor on one snapshot, of `kvzip bench`."""

    file: str
    kind: str
    """memcpy, kvzip or peer."""
    name: str
    ratio: float
    bits_per_value: float
    encode_gbps: float
    decode_gbps: float
    exact: bool

    @property
    def title(self) -> str:
        return f"kvzip {self.name}" if self.kind == "kvzip" else self.name


class PeerSnapshot(msgspec.Struct, frozen=True):
    file: str
    model: str
    dtype: str
    tokens: int


class PeerMachine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int


class Peers(msgspec.Struct, frozen=True):
    """A result of `kvzip bench`."""

    command: str
    date: str
    machine: PeerMachine
    threads: int
    snapshots: list[PeerSnapshot]
    rows: list[PeerRow]


class Extras(msgspec.Struct, frozen=True):
    inputs: Inputs | None = None
    exactness: Trials | None = None
    peers: Peers | None = None
    frontier: Frontier | None = None
    ladder: Ladder | None = None
    links: Links | None = None


def read(paths: Sequence[str | os.PathLike[str]]) -> tuple[DemoResult, Extras]:
    """The demo's result among the files, and the others; a folder stands for its result.json.

    Raises KVZipError that names the file when one is no result, two are of one kind, a figure
    cannot be, or there is no demo's result.
    """
    found: dict[str, Any] = {}
    for given in map(Path, paths):
        path = given / "result.json" if given.is_dir() else given
        kind, result = _recognise(path)
        if kind in found:
            raise KVZipError(f"{path} is a second result of {_WRITTEN_BY[kind]}: give one of each")
        found[kind] = result
    demo = found.pop("demo", None)
    if demo is None:
        raise KVZipError(
            "a report needs a result of kvzip demo: its folder, or the result.json in it"
        )
    return demo, Extras(**found)


_WRITTEN_BY = {
    "demo": "kvzip demo",
    "inputs": "kvzip eval inputs",
    "exactness": "kvzip eval exactness",
    "peers": "kvzip bench",
    "frontier": "kvzip eval frontier",
    "ladder": "kvzip entropy",
    "links": "kvzip eval links",
}


def _recognise(path: Path) -> tuple[str, Any]:
    try:
        plain = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise KVZipError(f"{path}: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KVZipError(f"{path} is not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise KVZipError(f"{path} holds no result: it is no JSON object")
    if isinstance(plain.get("ladder"), dict):
        plain = plain["ladder"]
    if plain.get("kind") == "inputs":
        return "inputs", load_inputs(path)
    if plain.get("kind") == "exactness":
        return "exactness", load_trials(path)
    if plain.get("kind") == "links":
        return "links", load_links(path)
    if "breakeven" in plain:
        return "demo", as_result(plain)
    for kind, key, form in (
        ("frontier", "runs", Frontier),
        ("ladder", "rungs", Ladder),
        ("peers", "snapshots", Peers),
    ):
        if key in plain:
            return kind, _checked(path, kind, plain, form)
    raise KVZipError(
        f"{path} holds no result that a report shows; those of: {', '.join(_WRITTEN_BY.values())}"
    )


def _checked(path: Path, kind: str, plain: dict[str, Any], form: type[Any]) -> Any:
    try:
        found = msgspec.convert(plain, form)
    except msgspec.ValidationError as error:
        raise KVZipError(f"{path} is not a result of {_WRITTEN_BY[kind]}: {error}") from None
    figures: list[tuple[str, float]] = []
    if isinstance(found, Peers):
        figures = [
            (f"{row.title}: {field}", getattr(row, field))
            for row in found.rows
            for field in ("ratio", "encode_gbps", "decode_gbps")
        ]
    elif isinstance(found, Frontier):
        points = [point for run in found.runs for point in run.points]
        figures = [(f"{point.title}: bits", point.bits) for point in points]
        figures += [(f"{p.title}: share + 1", p.share + 1 if p.share >= 0 else -1) for p in points]
    elif isinstance(found, Ladder):
        figures = [
            (f"{r.name}: {f}", getattr(r, f)) for r in found.rungs for f in ("bits", "k", "v")
        ]
    if not figures:
        raise KVZipError(f"{path} has no figure in it")
    for name, value in figures:
        if not (math.isfinite(value) and value > 0):
            raise KVZipError(f"{path}: {name} is {value}; it must be above zero")
    return found
