"""Which points a sweep measures: a grid, and points one by one, from a TOML file."""

from __future__ import annotations

import itertools
import os
from typing import Any

import msgspec

from kvzip.errors import CorruptError, FormatError, KVZipError, UsageError
from kvzip.eval.sweep.kinds import KINDS, AnyPoint, KindName
from kvzip.parsing import from_toml
from kvzip.reading import contents


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep as its TOML file gives it."""

    kind: KindName = "codecs"
    """What is measured: codecs on caches, or traces on fleets."""
    grid: dict[str, list[Any]] = {}
    """A list of values for each field of a point: all their combinations are measured."""
    points: list[dict[str, Any]] = []
    """Points one by one, after the grid's."""
    repeats: int = 1
    """Measurements of each point."""


def read_config(path: str | os.PathLike[str]) -> list[AnyPoint]:
    """The points of a sweep's file, each once, in order: first all on one cache or trace, then the
    next.

    Raises UsageError that names the file, the field, and what is allowed.
    """
    kind: KindName = "codecs"
    try:
        config = from_toml(contents(path), Config)
        kind = config.kind
        return _points(config)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except (msgspec.ValidationError, CorruptError, FormatError) as error:
        raise UsageError(
            f"{path}: {error}; a sweep has kind, [grid] with lists, [[points]], repeats; fields of "
            f"a point: {', '.join(KINDS[kind].point.__struct_fields__)}"
        ) from None
    except KVZipError as error:
        raise UsageError(f"{path}: {error}") from None


def _points(config: Config) -> list[AnyPoint]:
    if config.repeats < 1:
        raise UsageError(f"repeats is {config.repeats}; it must be 1 or more")
    if "repeat" in config.grid or any("repeat" in p for p in config.points):
        raise UsageError("write repeats = N at the top instead of repeat in a point")
    form = KINDS[config.kind].point
    repeated = "repeat" in form.__struct_fields__
    if config.repeats > 1 and not repeated:
        raise UsageError(f"repeats is {config.repeats}; a replay gives the same every time")
    for name, values in config.grid.items():
        if not values:
            raise UsageError(f"grid.{name} is an empty list")
    combinations = itertools.product(*config.grid.values()) if config.grid else ()
    given = [dict(zip(config.grid, values, strict=True)) for values in combinations]
    found: dict[str, AnyPoint] = {}
    for fields in [*given, *config.points]:
        for repeat in range(config.repeats):
            numbered = {**fields, "repeat": repeat} if repeated else fields
            point = msgspec.convert(numbered, form)
            point.check()
            found.setdefault(point.id, point)
    if not found:
        raise UsageError("there is no point in it")
    return sorted(found.values(), key=lambda p: p.made_on)  # stable: within one, the file's order
