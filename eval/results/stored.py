"""Results on disk: JSON that a person can read, known by its kind and its version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvzip.errors import CorruptError, FormatError, KVZipError
from kvzip.eval.results.base import Result, kind_of
from kvzip.eval.results.bench import BenchResult
from kvzip.eval.results.demo import DemoResult
from kvzip.eval.results.entropy import EntropyResult
from kvzip.eval.results.exactness import ExactnessResult
from kvzip.eval.results.frontier import Frontier
from kvzip.eval.results.gpu import GpuResult
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.links import Links
from kvzip.eval.results.ratios import RatiosResult
from kvzip.eval.results.scaling import ScalingResult
from kvzip.eval.results.traffic import TrafficResult
from kvzip.eval.results.whole_frontier import WholeFrontier
from kvzip.files import replacing
from kvzip.parsing import from_json
from kvzip.reading import contents

_MOST = 1 << 30
"""Bytes of a result that is read."""
T = TypeVar("T")
R = TypeVar("R", bound=Result)

KINDS: dict[str, type[Result]] = {
    kind_of(form): form
    for form in (
        DemoResult,
        Inputs,
        ExactnessResult,
        BenchResult,
        GpuResult,
        EntropyResult,
        Frontier,
        Links,
        RatiosResult,
        ScalingResult,
        TrafficResult,
        WholeFrontier,
    )
}
"""Every kind of result, by its name in files."""


def save(result: msgspec.Struct, path: str | os.PathLike[str], table: str | None = None) -> None:
    """Write a result, whole or not at all. `table`: its figures as CSV, which go beside it."""
    with replacing(path, private=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    if table is not None:
        with replacing(Path(path).with_suffix(".csv"), private=False) as file:
            file.write(table.encode())


def load(path: str | os.PathLike[str], form: type[R]) -> R:
    """A stored result, checked. `form`: the kind that it must be of; `Result` takes all kinds.

    Raises KVZipError that says what to do when the file cannot be read, is of another kind, was
    made by a later or an older kvzip, or has a figure that cannot be.
    """
    plain: dict[str, Any] = read_json(path, dict)
    kind, version = plain.get("kind"), plain.get("version")
    if not isinstance(kind, str) or not isinstance(version, int):
        raise KVZipError(
            f"{path} has no kind and version: it is no stored result, or it was made by an older "
            "kvzip: measure again"
        )
    known = KINDS.get(kind)
    if known is None:
        raise KVZipError(
            f"{path} is of kind {kind!r}, which this kvzip does not know: read it with the kvzip "
            f"that made it; known are: {', '.join(KINDS)}"
        )
    if not issubclass(known, form):
        raise KVZipError(f"{path} is not a result of {form.writer}, but of {known.writer}")
    latest = _version(known)
    if version > latest:
        raise KVZipError(
            f"{path} is version {version} of a result of {known.writer}, and this kvzip reads "
            f"version {latest}: it was made by a later kvzip, install that"
        )
    if version < latest:
        raise KVZipError(
            f"{path} is version {version} of a result of {known.writer}, and this kvzip reads "
            f"version {latest}: it was made by an older kvzip: measure again"
        )
    try:
        found = msgspec.convert(plain, known)
    except msgspec.ValidationError as error:
        raise KVZipError(f"{path} is not a result of {known.writer}: {error}") from None
    try:
        found.check()
    except KVZipError as error:
        raise KVZipError(f"{path}: {error}") from None
    return found


def read_json(path: str | os.PathLike[str], form: type[T]) -> T:
    """A JSON file as an object of that type. Raises KVZipError that names the file."""
    try:
        return from_json(contents(path, _MOST), form)
    except OSError as error:
        raise KVZipError(f"{path}: {error.strerror or error}") from None
    except FormatError as error:
        raise KVZipError(f"{path} holds something else: {error}") from None
    except CorruptError as error:
        raise KVZipError(f"{path} is not JSON: {error}") from None


def _version(form: type[Result]) -> int:
    """The version that files of this class have now."""
    return next(int(f.default) for f in msgspec.structs.fields(form) if f.name == "version")
