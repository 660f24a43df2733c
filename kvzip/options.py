"""Arguments that callers give, checked where they come in: what is wrong is a UsageError."""

from __future__ import annotations

import math
import operator
from typing import Any

from kvzip.errors import UsageError


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int within [`least`, `most`]: Python's, numpy's, or anything else that is an
    integer by ``__index__``; True and False are none. Raises UsageError, which names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}: it must be an integer") from None
    if (least is not None and found < least) or (most is not None and found > most):
        raise UsageError(f"{name} is {found}: it must be {_within(least, most)}")
    return found


def seconds(name: str, value: Any, most: float = 1e9) -> float:
    """`value` as a number of seconds above zero. Raises UsageError, which names it."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {value!r}: it must be a number of seconds") from None
    if math.isnan(found) or not 0 < found <= most:
        raise UsageError(f"{name} is {found:g}: it must be above 0 and at most {most:g} seconds")
    return found


def _within(least: int | None, most: int | None) -> str:
    if least is None:
        return f"at most {most}"
    return f"at least {least}" if most is None else f"from {least} to {most}"
