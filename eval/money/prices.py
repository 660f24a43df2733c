"""The price book: what bytes, tokens and hours cost, each with unit, date and source.

`prices.toml` is the data; this module reads it, lets files of one's own go over it, checks all, and
puts the entries that a preset names together into a :class:`PriceBase`. It computes nothing:
formulas are in :mod:`kvzip.choice.cost`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvzip.errors import CorruptError, FormatError, KVZipError
from kvzip.parsing import from_toml
from kvzip.reading import contents

UNITS = {
    "egress": "USD/GB",
    "storage": "USD/GB-month",
    "device": "USD/h",
    "api_input": "USD/Mtok",
    "api_cached": "USD/Mtok",
    "api_write": "USD/Mtok",
    "api_storage": "USD/Mtok-h",
    "link": "Gb/s",
    "compute": "TFLOP/s",
    "decoder": "GB/s",
}
"""The one unit of each group of prices."""
HEADLINE = ("paper-m1pro", "h100-rented")
"""The presets of the two answers in dollars: the paper's own prices, and a prefill at cost."""

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
    basis: Literal["stated", "derived", "model", "measured", "target"] = "stated"
    """Stated by the source; worked out from what it states; assumed, as the source explains;
    measured by us; or what is hoped for, and nobody has measured."""
    utilisation: float = 1.0
    """The share of a `compute` value that a prefill is taken to reach, in (0, 1]: a model."""
    note: str = ""
    inside: Literal["", "machine", "data centre"] = ""
    """What a `link` does not leave: there is no egress price for bytes that cross it."""


class PrefillTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prefill times that somebody measured."""

    points: tuple[tuple[int, float], ...]
    """(tokens, seconds), by increasing length."""
    model: str
    device: str
    date: str
    source: str
    note: str = ""
    shape: str | None = None
    """The entry of `model` that it is of, by which other models' times are worked out."""


Family = Literal["gqa", "mla", "hybrid", "compressed"]
FAMILIES: dict[Family, str] = {
    "gqa": "keys and values of every layer",
    "mla": "one latent a token and layer",
    "hybrid": "most layers keep a state or a window",
    "compressed": "several tokens share one entry",
}
"""Families of models, by what they keep of a text."""


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model's cache and its prefill's operations follow from."""

    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int
    parameters: float
    """Those that multiply in a prefill; of a mixture of experts, those that a token uses."""
    date: str
    source: str
    note: str = ""
    family: Family = "gqa"
    token_numbers: float | None = None
    """Numbers that a token leaves in the cache, where these are not K and V of every layer and
    head."""
    fixed_numbers: float = 0.0
    """Numbers that a text leaves in the cache whatever its length: states, windows."""
    attention_layers: int | None = None
    """Layers whose attention grows with the square of the length; all, where this is not said."""
    gpus: int = 1
    """GPUs that prefill together, because one has no room for the weights."""
    utilisation: float | None = None
    """The share of their peak that a prefill is taken to reach, in (0, 1], where that is not the
    `compute` entry's."""
    kv_gbps: float | None = None
    """Gb/s of cache, in bf16, that `kv_gpus` of `kv_device` (an entry of `compute`) were seen to
    produce at `kv_tokens` tokens: `utilisation` follows from it."""
    kv_tokens: int = 0
    kv_gpus: int = 0
    kv_device: str = ""
    kv_source: str = ""

    @property
    def numbers_per_token(self) -> float:
        """Numbers that a token leaves in the cache."""
        if self.token_numbers is not None:
            return self.token_numbers
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def width(self) -> int:
        """Query heads x head dimension, for :func:`kvzip.choice.cost.prefill_flops`."""
        return self.query_heads * self.head_dim

    @property
    def square_layers(self) -> int:
        """Layers whose attention grows with the square of the length."""
        return self.layers if self.attention_layers is None else self.attention_layers


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price base by the names of its entries."""

    title: str
    egress: str
    device: str
    device_name: str
    """What an hour of `device` buys; a measurement's device is compared with it."""
    storage: str | None = None
    api_input: str | None = None
    api_cached: str | None = None
    compute: str | None = None
    prefill: str | None = None


_NAMED = ("egress", "device", "storage", "api_input", "api_cached", "compute", "prefill")
"""The fields of a preset that name an entry of the group of the same name."""


class PriceBase(msgspec.Struct, frozen=True):
    """A preset with its entries looked up: all that a verdict in dollars rests on."""

    name: str
    title: str
    egress: Price
    device: Price
    device_name: str
    storage: Price | None = None
    api_input: Price | None = None
    api_cached: Price | None = None
    compute: Price | None = None
    prefill: PrefillTimes | None = None


class PriceBook(msgspec.Struct, frozen=True):
    """All prices by group and name, and the presets."""

    egress: dict[str, Price]
    storage: dict[str, Price]
    device: dict[str, Price]
    api_input: dict[str, Price]
    api_cached: dict[str, Price]
    api_write: dict[str, Price]
    api_storage: dict[str, Price]
    link: dict[str, Price]
    compute: dict[str, Price]
    decoder: dict[str, Price]
    prefill: dict[str, PrefillTimes]
    model: dict[str, Shape]
    preset: dict[str, Preset]

    def base(self, name: str) -> PriceBase:
        """The price base of the preset called `name`. Raises KVZipError if there is none."""
        preset = pick("price preset", self.preset, name)
        found = {
            group: getattr(self, group)[entry]
            for group in _NAMED
            if (entry := getattr(preset, group)) is not None
        }
        return PriceBase(name=name, title=preset.title, device_name=preset.device_name, **found)

    def bases(self, names: tuple[str, ...] = ()) -> tuple[PriceBase, ...]:
        """The price bases of these presets, or of all, in the order of the book."""
        return tuple(self.base(name) for name in names or self.preset)


def pick(kind: str, entries: Mapping[Any, Any], name: str) -> Any:
    """The entry called `name`. Raises KVZipError that lists the names there are."""
    try:
        return entries[name]
    except KeyError:
        raise KVZipError(f"no {kind} {name!r}; there are: {', '.join(entries)}") from None


_GROUPS: dict[str, type[msgspec.Struct]] = {
    **dict.fromkeys(UNITS, Price),
    "prefill": PrefillTimes,
    "model": Shape,
    "preset": Preset,
}


@cache
def default_prices() -> PriceBook:
    """The price book that comes with the library."""
    return _book(_read(_PACKAGED))


def load_prices(*paths: str | os.PathLike[str]) -> PriceBook:
    """The library's price book with TOML files of one's own over it, later ones over earlier ones.

    A price, prefill, or model of the same name is replaced whole: a new value has its own date and
    source. A preset of the same name changes only in what the file says of it. Raises KVZipError
    that names the file, the entry, and what is allowed, when a file cannot be read, a group or
    field is unknown or missing, a unit is not its group's, a value is negative or not a number, or
    a preset names an entry that is nowhere.
    """
    entries = _read(_PACKAGED)
    for path in paths:
        for group, named in _read(Path(path)).items():
            for name, fields in named.items():
                old = entries[group].get(name, {}) if group == "preset" else {}
                entries[group][name] = old | fields
        try:
            book = _book(entries)
        except KVZipError as error:
            raise KVZipError(f"price book {path}: {error}") from None
    return book if paths else default_prices()


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The file's entries by group and name, its groups known, no entry looked at yet."""
    try:
        found = from_toml(contents(path))
    except OSError as error:
        raise KVZipError(f"price book {path}: {error.strerror or error}") from error
    except (CorruptError, FormatError) as error:
        raise KVZipError(f"price book {path}: {error}") from error
    for group, named in found.items():
        if group not in _GROUPS:
            raise KVZipError(
                f"price book {path}: there is no group {group!r}; the groups are: "
                + ", ".join(_GROUPS)
            )
        entries = named.values() if isinstance(named, dict) else [named]
        if not all(isinstance(entry, dict) for entry in entries):
            raise KVZipError(
                f"price book {path}: {group} holds entries: write [{group}.NAME], then its fields: "
                + ", ".join(_GROUPS[group].__struct_fields__)
            )
    return {group: dict(found.get(group, {})) for group in _GROUPS}


def _book(entries: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> PriceBook:
    made: dict[str, dict[str, Any]] = {}
    for group, form in _GROUPS.items():
        made[group] = {}
        for name, fields in entries[group].items():
            made[group][name] = _entry(f"{group}.{name}", fields, form)
    book = PriceBook(**made)
    _check(book)
    return book


def _entry(entry: str, fields: Mapping[str, Any], form: type[msgspec.Struct]) -> msgspec.Struct:
    try:
        return msgspec.convert(fields, form)
    except msgspec.ValidationError as error:
        allowed = ", ".join(form.__struct_fields__)
        raise KVZipError(f"{entry}: {error}; its fields are: {allowed}") from None


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
        if times.shape is not None:
            pick(f"model for {entry}", book.model, times.shape)
    for name, shape in book.model.items():
        _check_provenance(f"model.{name}", shape.date, shape.source)
        _check_shape(f"model.{name}", shape, book)
    for name, preset in book.preset.items():
        for group in _NAMED:
            wanted = getattr(preset, group)
            if wanted is not None and wanted not in getattr(book, group):
                raise KVZipError(
                    f"preset.{name} names {group}.{wanted}, which is not in the book; there are: "
                    + ", ".join(getattr(book, group))
                )


def _check_shape(entry: str, shape: Shape, book: PriceBook) -> None:
    above = ["layers", "kv_heads", "head_dim", "query_heads", "parameters", "gpus"]
    above += [f for f in ("token_numbers", "utilisation") if getattr(shape, f) is not None]
    if shape.kv_gbps is not None:
        above += ["kv_gbps", "kv_tokens", "kv_gpus"]
        pick(f"compute entry for {entry}", book.compute, shape.kv_device)
    for field in above:
        value = getattr(shape, field)
        if not (math.isfinite(value) and value > 0):
            raise KVZipError(f"{entry}: {field} is {value}; it must be above zero")
    for field in ("fixed_numbers", "square_layers"):
        value = getattr(shape, field)
        if not (math.isfinite(value) and value >= 0):
            raise KVZipError(f"{entry}: {field} is {value}; it must be zero or more")


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
