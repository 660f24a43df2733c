"""The price book: what bytes, tokens and hours cost, each with unit, date and source.

`prices.toml` is the data; this module reads it, checks it, and puts the entries that a preset
names together into a :class:`PriceBase`. It computes nothing: formulas are in `economics.py`.
"""

from __future__ import annotations

import math
import os
import re
from functools import cache
from pathlib import Path

import msgspec

from kvzip.errors import KVZipError

UNITS = {
    "egress": "USD/GB",
    "device": "USD/h",
    "api_input": "USD/Mtok",
    "api_cached": "USD/Mtok",
    "link": "Gb/s",
    "compute": "TFLOP/s",
}
"""The one unit of each group of prices."""

_PACKAGED = Path(__file__).with_name("prices.toml")
_DATE = re.compile(r"\d{4}(-\d{2}){0,2}|(spring|summer|autumn|winter) \d{4}")


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One figure and where it comes from."""

    value: float
    unit: str
    date: str
    """When it was published or looked up: "2026", "2026-06", "2026-06-30" or "autumn 2026"."""
    source: str
    range: tuple[float, float] | None = None
    """Lowest and highest figure found, where `value` is one of several."""
    derived: bool = False
    """The source does not state it; it was worked out from figures that the source states."""
    utilisation: float = 1.0
    """For `compute`: the share of `value` that a prefill is taken to reach, in (0, 1]."""
    note: str = ""


class PrefillTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prefill times that somebody measured."""

    points: tuple[tuple[int, float], ...]
    """(tokens, seconds), by increasing length."""
    model: str
    device: str
    date: str
    source: str
    note: str = ""


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price base by the names of its entries."""

    title: str
    egress: str
    device: str
    device_name: str
    """What an hour of `device` buys; a measurement's device is compared with it."""
    api_input: str | None = None
    compute: str | None = None
    prefill: str | None = None


class PriceBase(msgspec.Struct, frozen=True):
    """A preset with its entries looked up: all that a verdict in dollars rests on."""

    name: str
    title: str
    egress: Price
    device: Price
    device_name: str
    api_input: Price | None = None
    compute: Price | None = None
    prefill: PrefillTimes | None = None


class PriceBook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All prices by group and name, and the presets."""

    egress: dict[str, Price]
    device: dict[str, Price]
    preset: dict[str, Preset]
    api_input: dict[str, Price] = {}
    api_cached: dict[str, Price] = {}
    link: dict[str, Price] = {}
    compute: dict[str, Price] = {}
    prefill: dict[str, PrefillTimes] = {}

    def base(self, name: str) -> PriceBase:
        """The price base of the preset called `name`. Raises KVZipError if there is none."""
        try:
            preset = self.preset[name]
        except KeyError:
            raise KVZipError(
                f"no price preset {name!r}; there are: {', '.join(self.preset)}"
            ) from None
        return PriceBase(
            name=name,
            title=preset.title,
            egress=self.egress[preset.egress],
            device=self.device[preset.device],
            device_name=preset.device_name,
            api_input=self.api_input[preset.api_input] if preset.api_input else None,
            compute=self.compute[preset.compute] if preset.compute else None,
            prefill=self.prefill[preset.prefill] if preset.prefill else None,
        )

    def bases(self) -> tuple[PriceBase, ...]:
        """The price bases of all presets, in the order of the file."""
        return tuple(self.base(name) for name in self.preset)


@cache
def default_prices() -> PriceBook:
    """The price book that comes with the library."""
    return load_prices(_PACKAGED)


def load_prices(path: str | os.PathLike[str]) -> PriceBook:
    """The price book in a TOML file, checked.

    Raises KVZipError that names the file and the entry when the file cannot be read, a field is
    missing or unknown, a unit is not its group's, a value is negative or not a number, or a preset
    names an entry that is not there.
    """
    try:
        book = msgspec.toml.decode(Path(path).read_bytes(), type=PriceBook)
        _check(book)
    except OSError as error:
        raise KVZipError(f"price book {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KVZipError(f"price book {path}: {error}") from error
    except KVZipError as error:
        raise KVZipError(f"price book {path}: {error}") from None
    return book


def _check(book: PriceBook) -> None:
    for group, unit in UNITS.items():
        for name, price in getattr(book, group).items():
            _check_price(f"{group}.{name}", price, unit)
    for name, times in book.prefill.items():
        entry = f"prefill.{name}"
        _check_provenance(entry, times.date, times.source)
        if not times.points:
            raise KVZipError(f"{entry} has no points")
        if not all(n > 0 and math.isfinite(s) and s > 0 for n, s in times.points):
            raise KVZipError(f"{entry}: tokens and seconds must be above zero")
        lengths = [n for n, _ in times.points]
        if lengths != sorted(set(lengths)):
            raise KVZipError(f"{entry}: points must go by increasing length")
    if not book.preset:
        raise KVZipError("there is no preset")
    for name, preset in book.preset.items():
        for group in ("egress", "device", "api_input", "compute", "prefill"):
            wanted = getattr(preset, group)
            if wanted is not None and wanted not in getattr(book, group):
                raise KVZipError(f"preset.{name} names {group}.{wanted}, which is not in the book")


def _check_price(entry: str, price: Price, unit: str) -> None:
    if price.unit != unit:
        raise KVZipError(f"{entry} is in {price.unit!r}; this group is in {unit!r}")
    if not (math.isfinite(price.value) and price.value >= 0):
        raise KVZipError(f"{entry} is {price.value}; it must be a number of zero or more")
    if price.range and not price.range[0] <= price.value <= price.range[1]:
        raise KVZipError(f"{entry}: {price.value} is not inside its range {list(price.range)}")
    if not 0 < price.utilisation <= 1:
        raise KVZipError(f"{entry}: utilisation is {price.utilisation}; it must be in (0, 1]")
    _check_provenance(entry, price.date, price.source)


def _check_provenance(entry: str, date: str, source: str) -> None:
    if not _DATE.fullmatch(date):
        raise KVZipError(f"{entry}: date {date!r}; write 2026-06 or autumn 2026")
    if not source.strip():
        raise KVZipError(f"{entry} has no source")
