"""The table of claims: what a row must say, and that our own rows say what stored results hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvzip.errors import CorruptError, FormatError, KVZipError
from kvzip.eval.results import stored
from kvzip.eval.results.base import Result
from kvzip.parsing import from_toml

Exact = Literal["bits", "rounded", "outputs", "ideal", "theory", "none"]
"""What comes back exactly; the data's first lines say what each word means."""
Checked = Literal["source", "part", "reported", "nowhere"]
"""Where the figures were read."""
EXACT: Mapping[Exact, str] = {
    "bits": "every bit",
    "rounded": "rounded numbers",
    "outputs": "the model's answers",
    "ideal": "ideal code length, no file",
    "theory": "theory, no cache",
    "none": "not compressed",
}
"""The words of a table for each."""
_NUMBER = re.compile(r"\d+\.\d+")


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of rows say, in the same fields."""

    name: str
    claim: str
    """The ratio, or what stands in its place, as it is claimed."""
    exact: Exact
    dtype: str
    """Of the cache that the ratio is of."""
    beside: str
    """What a reader needs beside the file."""
    speed: str
    measured_on: str
    """Model and text."""
    means: str
    """What the claim comes to, in plain words."""


class Published(Claim, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A claim of others."""

    least: float | None = None
    """The range of ratios that is claimed; None where no ratio is."""
    most: float | None = None
    source: str
    """Address; "no address" where none was found."""
    date: str
    """Of the claim: year, month and, where it is known, day."""
    checked: Checked
    read: str
    """What of the source was read."""
    reported_in: list[str] = []
    """Where the figures were read, if not in the source."""


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number of an own claim, and where a stored result has it."""

    says: str
    at: str
    """Fields with dots between; of a list, the item with given fields: rows[codec=raw].ratio"""


class Own(Claim, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A claim of this project."""

    stored: str
    """The stored result's file in the repository."""
    figures: list[Figure]


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole table."""

    checked_on: str
    published: list[Published]
    own: list[Own]

    def check(self) -> None:
        """Raise KVZipError that names the row which does not keep the table's rules."""
        names = [claim.name for claim in (*self.published, *self.own)]
        for claim in (*self.published, *self.own):
            for field in claim.__struct_fields__:
                if getattr(claim, field) == "":
                    raise KVZipError(f"{claim.name}: {field} is empty")
            if names.count(claim.name) > 1:
                raise KVZipError(f"two claims are called {claim.name}")
        for claim in self.published:
            _check_published(claim)
        for own in self.own:
            said = {figure.says for figure in own.figures}
            for number in _NUMBER.findall(f"{own.claim} {own.speed}"):
                if number not in said:
                    raise KVZipError(f"{own.name}: no stored figure is given for {number}")
            if not said:
                raise KVZipError(f"{own.name}: no stored figure is given")


def _check_published(claim: Published) -> None:
    """Raise KVZipError unless a claim says where it was read."""
    if not re.fullmatch(r"\d{4}-\d\d(-\d\d)?", claim.date):
        raise KVZipError(f"{claim.name}: the date is {claim.date!r}: write 2026-05 or 2026-05-08")
    if (claim.checked == "reported") != bool(claim.reported_in):
        raise KVZipError(f"{claim.name}: what is `reported`, and only that, names where")
    if (claim.checked == "nowhere") == claim.source.startswith("https://"):
        raise KVZipError(f"{claim.name}: {claim.source!r} was read nowhere, or is no address")
    if claim.least is not None and claim.most is not None and not 0 < claim.least <= claim.most:
        raise KVZipError(f"{claim.name}: {claim.least} to {claim.most} is no range")


def load() -> Claims:
    """The table that comes with the library, checked. Raises KVZipError as `parse` does."""
    return parse((files(__package__) / "claims.toml").read_text(encoding="utf-8"))


def parse(text: str) -> Claims:
    """A table of claims in TOML, checked. Raises KVZipError that names what is wrong."""
    try:
        found = from_toml(text, Claims)
    except (CorruptError, FormatError) as error:
        raise KVZipError(f"the table of claims: {error}") from None
    found.check()
    return found


def check_stored(claims: Sequence[Own], root: Path) -> int:
    """Compare every figure with its stored result; how many there are, which then all agree. Raises
    KVZipError that names the first claim whose figure is not that of its stored result.

    `root`: the repository. A figure agrees if the stored number, rounded to as many decimals, is
    what the claim says.
    """
    for claim in claims:
        path = root / claim.stored
        # A result of a kind and version that is known, with sound figures.
        stored.load(path, Result)
        result = stored.read_json(path, dict)
        for figure in claim.figures:
            value = look_up(result, figure.at)
            decimals = len(figure.says.partition(".")[2])
            if not isinstance(value, (int, float)) or f"{value:.{decimals}f}" != figure.says:
                raise KVZipError(
                    f"{claim.name} says {figure.says}, and {figure.at} of {claim.stored} is {value}"
                )
    return sum(len(claim.figures) for claim in claims)


def look_up(result: Any, at: str) -> Any:
    """The value at a place (see :class:`Figure`). Raises KVZipError for none, or several."""
    found = result
    for step in re.findall(r"(?:[^.\[]|\[[^\]]*\])+", at):
        name, bracket, wanted = step.partition("[")
        found = found.get(name) if isinstance(found, dict) else None
        if bracket and isinstance(found, list):
            pairs = [pair.partition("=")[::2] for pair in wanted.rstrip("]").split(",")]
            items = [item for item in found if all(str(item.get(k)) == v for k, v in pairs)]
            found = items[0] if len(items) == 1 else None
        if found is None:
            raise KVZipError(f"the result has nothing, or not one thing, at {step} of {at}")
    return found
