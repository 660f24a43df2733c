"""What every stored result has: its kind, its version, and how it came to be."""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec

from kvzip.errors import KVZipError
from kvzip.eval.results.provenance import Machine


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """The base of all results that are stored as JSON.

    A subclass fixes its kind, the first key of its file, by `tag="..."`; it stands in
    :mod:`kvzip.eval.results.stored` under it. When the meaning of its fields changes, it gives
    `version` the next default, and files of the version before are refused.
    """

    writer: ClassVar[str]
    """The command that makes such a result, as it is typed."""

    version: int = 1
    """The version of the fields; each kind counts its own."""
    command: str
    """What was typed."""
    date: str
    """When it was finished: UTC, ISO 8601."""
    machine: Machine
    versions: dict[str, str]
    """The versions of kvzip, Python and the packages that took part."""

    @property
    def kind(self) -> str:
        return kind_of(type(self))

    def check(self) -> None:
        """Raise KVZipError that names the figure if one cannot be, or none is there."""


def kind_of(form: type[Result]) -> str:
    """The kind that results of this class have in their files."""
    return str(form.__struct_config__.tag)


def above_zero(name: str, value: float) -> None:
    """Raise KVZipError that says `name` unless the value is finite and above zero."""
    if not (math.isfinite(value) and value > 0):
        raise KVZipError(f"{name} is {value}; it must be above zero")


def not_below_zero(name: str, value: float) -> None:
    """Raise KVZipError that says `name` unless the value is finite and zero or above."""
    if not (math.isfinite(value) and value >= 0):
        raise KVZipError(f"{name} is {value}; it must not be below zero")
