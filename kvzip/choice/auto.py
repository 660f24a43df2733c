"""``codec="auto"``: the codec with which a cache is there soonest, over a given link.

The choice is that of :func:`kvzip.choice.cost.best`, on figures that were measured on a small model
and come with the library (`measured.json`, a result of ``kvzip eval inputs``); `kvzip advise`
chooses in the same way on figures and prices of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from kvzip.choice.cost import CodecFigures, Situation, best, number, options
from kvzip.choice.width import slowdown
from kvzip.codec import Codec, get_codec
from kvzip.codec_spec import parse_spec
from kvzip.errors import CorruptError, FormatError, KVZipError, UnsupportedError
from kvzip.parsing import from_json
from kvzip.snapshot import Layout

MEASURED = Path(__file__).with_name("measured.json")
LINK_GBPS = 5.0
"""The link that is meant when none is given, Gb/s: one connection to an object store."""
_KIND, _VERSION = "inputs", 1
"""What `measured.json` must say that it is (`kvzip.eval.results.inputs`, which stands above)."""
FALLBACK = "channel"
"""For a dtype that nothing was measured on."""


class _Row(msgspec.Struct, frozen=True):
    codec: str
    dtype: str
    tokens: int
    ratio: float
    decode_gbps: float


class _Machine(msgspec.Struct, frozen=True):
    simd: list[str] = []


class _Measured(msgspec.Struct, frozen=True):
    kind: str
    version: int
    machine: _Machine
    layers: int
    numbers_per_token: float
    rows: list[_Row]


def measured_figures(dtype: str, numbers: float | None = None) -> list[CodecFigures]:
    """Every codec on the longest cache of that dtype in `measured.json`; one thread. `numbers`: of
    a layer and token, of the cache that the speeds are for; by default of the measured one.

    Raises KVZipError when that file is not what this kvzip reads."""
    found = _kept()
    measured = found.numbers_per_token / found.layers
    able = [row for row in found.rows if row.dtype == dtype]
    longest = max((row.tokens for row in able), default=0)
    return [
        CodecFigures(
            row.codec,
            row.ratio,
            1e9
            * row.decode_gbps
            / slowdown(row.codec, numbers or measured, measured, found.machine.simd),
        )
        for row in able
        if row.tokens == longest
    ]


@cache
def _kept() -> _Measured:
    return _measured(MEASURED)


def _measured(path: Path) -> _Measured:
    """The figures of a file. Raises KVZipError when it holds something else, or another version."""
    try:
        found = from_json(path.read_bytes(), _Measured)
    except (CorruptError, FormatError) as error:
        raise KVZipError(f"{path} is not a result of kvzip eval inputs: {error}") from None
    if (found.kind, found.version) != (_KIND, _VERSION):
        raise KVZipError(
            f"{path} is of kind {found.kind!r}, version {found.version}, and this kvzip reads kind "
            f"{_KIND!r}, version {_VERSION}: install kvzip again, or measure again (make measured)"
        )
    return found


def resolve(
    codec: str | Codec | Mapping[str, Any], layout: Layout, profile: str | None = None
) -> Codec:
    """The codec that `codec` names; "auto" names the one that is best for a cache of that layout.

    "auto:gbps=10,threads=4" tells the link, in Gb/s, and the threads of the reader, which are taken
    to decode that many times as fast. `profile`: the codec that the profile is for, if there is
    one; others that need one take no part.
    Raises UnsupportedError for settings that auto does not have.
    """
    if not (isinstance(codec, str) and parse_spec(codec)["id"] == "auto"):
        return get_codec(codec)
    settings = _settings(codec)
    if not layout.raw_bytes:
        return get_codec(FALLBACK)
    figures = [
        CodecFigures(f.name, f.ratio, f.decode_rate * settings["threads"])
        for f in measured_figures(layout.dtype, _numbers(layout))
        if f.name == profile or not get_codec(f.name).needs_profile
    ]
    if not figures:
        return get_codec(FALLBACK)
    situation = Situation(
        raw_bytes=layout.raw_bytes,
        layers=len(layout.layers),
        bandwidth=1e9 * settings["gbps"],
    )
    return get_codec(best(options(situation, figures), "seconds").name)


def _numbers(layout: Layout) -> float:
    """Numbers of a token in the widest layer."""
    return max(
        sum(p.numbers / ((p.batch or 1) * p.tokens) for p in layer.parts.values() if p.tokens)
        for layer in layout.layers
    )


def _settings(spec: str) -> dict[str, float]:
    """The link in Gb/s and the threads that a spec gives, or what is usual."""
    settings = {"gbps": LINK_GBPS, "threads": 1.0}
    given = parse_spec(spec)
    del given["id"]
    for name, value in given.items():
        if name not in settings:
            raise UnsupportedError(
                f"codec 'auto' has no setting {name!r}; it has: {', '.join(settings)}"
            )
        try:
            settings[name] = number(f"auto: {name}", float(value), zero=False)
        except ValueError:
            raise UnsupportedError(f"codec 'auto': {name} is {value!r}; write a number") from None
    return settings
