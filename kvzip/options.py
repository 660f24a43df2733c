"""Arguments that callers give, checked where they come in: what is wrong is a UsageError."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from kvzip.codecs import _native
from kvzip.errors import CorruptError, FormatError, UsageError
from kvzip.parsing import from_json


def _shown(value: Any) -> str:
    """A value as an error says it. Python writes no integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    try:
        return repr(value)
    except ValueError:
        return f"a {type(value).__name__}"


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int within [`least`, `most`]: Python's, numpy's, or anything else that is an
    integer by ``__index__``; True and False are none. Raises UsageError, which names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {_shown(value)}: it must be an integer") from None
    found = int.__int__(found)  # without what a subclass has of its own
    if (least is not None and found < least) or (most is not None and found > most):
        raise UsageError(f"{name} is {_shown(found)}: it must be {_within(least, most)}")
    return found


def boolean(name: str, value: Any) -> bool:
    """`value` as a bool: Python's or numpy's. Raises UsageError, which names it."""
    if not isinstance(value, (bool, np.bool_)):
        raise UsageError(f"{name} is {_shown(value)}: it must be True or False")
    return bool(value)


def callback(name: str, value: Any) -> Any:
    """`value` if it can be called or is None. Raises UsageError, which names it."""
    if value is not None and not callable(value):
        raise UsageError(f"{name} is {_shown(value)}: it must be a function, or None")
    return value


def items(name: str, value: Any, what: str) -> list[Any]:
    """What `value` holds, one after the other. Raises UsageError, which names it and says `what`
    it must be."""
    try:
        return list(value)
    except TypeError:
        raise UsageError(f"{name} is {_shown(value)}: it must be {what}") from None


def pairs(name: str, value: Any) -> list[tuple[Any, Any]]:
    """`value` as a (K, V) pair for each layer. Raises UsageError, which names it."""
    found = []
    for i, given in enumerate(items(name, value, "a (K, V) pair for each layer")):
        try:
            k, v = given
        except (TypeError, ValueError):
            kind = type(given).__name__
            raise UsageError(
                f"{name} has a {kind} for layer {i}: it must be a (K, V) pair"
            ) from None
        found.append((k, v))
    return found


def seconds(name: str, value: Any, most: float = 1e9) -> float:
    """`value` as a number of seconds above zero. Raises UsageError, which names it."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {_shown(value)}: it must be a number of seconds") from None
    if math.isnan(found) or not 0 < found <= most:
        raise UsageError(f"{name} is {found:g}: it must be above 0 and at most {most:g} seconds")
    return found


def _within(least: int | None, most: int | None) -> str:
    if least is None:
        return f"at most {most}"
    return f"at least {least}" if most is None else f"from {least} to {most}"


def text(name: str, value: Any) -> str:
    """`value` as a str that UTF-8 can hold. Raises UsageError, which names it."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is {_shown(value)}: it must be a str")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{name} is {_shown(value)}, which is no valid text") from None
    return str.__str__(value)  # an Enum's own says another thing


_DEPTH = 64


def json_value(name: str, value: Any) -> Any:
    """`value` as JSON gives it back: None, bool, int of 64 bits, finite float, str, list, dict.

    Tuples become lists and numpy's numbers Python's. Raises UsageError, which names it, for all
    that JSON would change or cannot hold.
    """
    found = _native.json_copy(value, _DEPTH)
    return _json_value(name, value, 0) if found is NotImplemented else found


def _json_value(name: str, value: Any, depth: int) -> Any:
    """As :func:`json_value`, for what is not made of Python's own kinds, or is wrong."""
    kind = type(value)
    if kind is float or kind is int:
        if not (math.isfinite(value) if kind is float else -(2**63) <= value < 2**64):
            raise UsageError(f"{name} holds {_shown(value)}, which JSON files do not keep")
        return value
    if value is None or kind is bool:
        return value
    if isinstance(value, str):
        return text(name, value)
    if depth == _DEPTH:
        raise UsageError(f"{name} nests more than {_DEPTH} levels deep")
    if isinstance(value, (list, tuple)):
        return [_json_value(name, item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {
            text(f"a key of {name}", key): _json_value(f"{name}[{key!r}]", item, depth + 1)
            for key, item in value.items()
        }
    # numpy's scalars, and what else is a number by its methods.
    plain = value.item() if isinstance(value, np.generic) else value
    for number in (int, float):
        if isinstance(plain, number):
            own = getattr(number, f"__{number.__name__}__")
            return plain if isinstance(plain, bool) else _json_value(name, own(plain), depth)
    raise UsageError(f"{name} holds a {kind.__name__}, which JSON files do not keep")


def as_json(name: str, value: msgspec.Struct) -> bytes:
    """A struct as JSON. Raises UsageError, which names it, where JSON has no words for it: what a
    dict in it holds may have been changed since it was made."""
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{name} could not be written: {error}") from None


def same_from_json(name: str, value: msgspec.Struct) -> bytes:
    """A struct as JSON, from which the same is read. Raises UsageError, which names it, where
    that would be another one, or none."""
    data = as_json(name, value)
    try:
        found = from_json(data, type(value))
    except (CorruptError, FormatError) as error:
        raise UsageError(f"{name} could not be read again: {error}") from None
    if found != value:
        raise UsageError(f"{name} would be read as another one")
    return data
