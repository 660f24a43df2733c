"""The settings of a fit, as callers give them, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvzip.errors import UsageError
from kvzip.files import name_of
from kvzip.options import boolean, integer, items

_NAMES = ("regions", "max_bytes", "token_table", "group", "calibration", "resume")
_MOST = 1 << 31


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with Python's own numbers. Raises UsageError for one that there is not, or that
    is of the wrong kind; whether it suits the documents, the fit says."""
    found = dict(settings)
    for name, value in settings.items():
        if name not in _NAMES:
            raise UsageError(f"predictive learns with {', '.join(_NAMES)}; {name!r} is given")
        if name == "regions":
            found[name] = _regions(value)
        elif name == "token_table":
            found[name] = boolean(name, value)
        elif name == "max_bytes" and value is not None:
            found[name] = integer(name, value, 0)
        elif value is not None:
            found[name] = name_of(value) if name == "resume" else _number(name, value)
    if found.get("max_bytes") is not None and found.get("regions", "auto") != "auto":
        raise UsageError("max_bytes says how many regions there may be: give it or regions")
    return found


def _regions(value: Any) -> int | str | list[int]:
    what = '"auto", a number, or one for each layer'
    if isinstance(value, (int, float, np.number)):
        return _number("regions", value)
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, (str, bytes, Mapping)):
        raise UsageError(f"regions is {value!r}: it must be {what}")
    return [_number("regions", each) for each in items("regions", value, what)]


def _number(name: str, value: Any) -> int:
    """An integer that can be told in few words, if the fit refuses it."""
    return integer(name, value, -_MOST, _MOST)
