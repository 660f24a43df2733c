"""JSON and TOML that others have written, read so that no text does harm.

All of the library reads these two here: whatever the text is, its values have the form that is
asked for and nest no deeper than :data:`DEPTH`, or there is an error of ours. Numbers are the
nearest ones, however the thread rounds: neither msgspec nor Python sees to that.
"""

from __future__ import annotations

import tomllib
from functools import lru_cache
from inspect import cleandoc
from typing import Any, TypeVar, overload

import msgspec
import numpy as np

from kvzip.codecs import _native
from kvzip.errors import CorruptError, FormatError

T = TypeVar("T")

DEPTH = 128
"""Levels of lists and objects, at most. What the library writes has fewer (:mod:`kvzip.options`),
and code that follows values down, a call a level, comes to an end."""

_NO_MARKS = bytes(set(range(256)) - set(b'[]{}"'))
_PIECE = 1 << 20


@overload
def from_json(data: bytes | memoryview | str, form: type[T]) -> T: ...
@overload
def from_json(data: bytes | memoryview | str) -> Any: ...
def from_json(data: bytes | memoryview | str, form: Any = Any) -> Any:
    """The value that JSON text stands for, of the type `form`.

    Raises CorruptError for what is no JSON, FormatError for values of another type, or that nest
    too deep.
    """
    try:
        plain = data.encode() if isinstance(data, str) else bytes(data)
        nests = plain.lstrip()[:1] in (b"[", b"{")  # else it is no JSON, or nothing but a value
        if nests and plain.count(b"[") + plain.count(b"{") > DEPTH and _depth(plain) > DEPTH:
            raise _too_deep()
        try:
            with _native.DefaultEnvironment():
                return _decoder(form).decode(plain)
        except msgspec.ValidationError as error:
            msgspec.json.decode(plain)  # a type is told before the text has been read to its end
            raise FormatError(str(error)) from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise CorruptError(str(error)) from None
    except RecursionError:  # the caller itself is far down
        raise _too_deep() from None


@overload
def from_toml(data: bytes | str, form: type[T]) -> T: ...
@overload
def from_toml(data: bytes | str) -> dict[str, Any]: ...
def from_toml(data: bytes | str, form: Any = dict[str, Any]) -> Any:
    """The value that TOML text stands for, of the type `form`. Raises as :func:`from_json`."""
    try:
        with _native.DefaultEnvironment():
            plain = tomllib.loads(data if isinstance(data, str) else data.decode())
        if _is_deep(plain):
            raise _too_deep()
        return msgspec.convert(plain, form)
    except msgspec.ValidationError as error:
        raise FormatError(str(error)) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # also of Python's own, for numbers of thousands of digits
        raise CorruptError(str(error)) from None


@lru_cache(256)
def _decoder(form: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(form)


def _depth(data: bytes) -> int:
    """How many lists and objects of JSON text are open at once; of what is no JSON, any number."""
    unescaped = data.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = np.frombuffer(unescaped.translate(None, _NO_MARKS), np.uint8)
    deepest, open_now, quoted = 0, 0, np.False_
    for start in range(0, len(marks), _PIECE):  # little memory, however long the text is
        piece = marks[start : start + _PIECE]
        within = np.logical_xor.accumulate(piece == ord('"')) ^ quoted
        steps = 0x5C - (piece & 0x5F).astype(np.int64)  # 1 for [ and {, -1 for ] and }
        steps[within | (piece == ord('"'))] = 0
        levels = open_now + np.cumsum(steps)
        deepest = max(deepest, int(levels.max()))
        open_now, quoted = int(levels[-1]), within[-1]
    return deepest


def _is_deep(value: Any) -> bool:
    """Whether a value of dicts and lists nests too deep; that is found without a call a level."""
    level = [value]
    for _ in range(DEPTH):
        items = (i for held in level for i in (held.values() if isinstance(held, dict) else held))
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _too_deep() -> FormatError:
    return FormatError(
        f"it nests more than {DEPTH} levels deep, which no file for kvzip does: give another"
    )


def json_schema(form: Any) -> dict[str, Any]:
    """The JSON schema of values of the type `form`, the same by every msgspec: from 0.23 on it
    takes the indentation off docstrings, which descriptions are."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: plain(of) for key, of in value.items()}
            if isinstance(found.get("description"), str):
                found["description"] = cleandoc(found["description"])
            return found
        return [plain(of) for of in value] if isinstance(value, list | tuple) else value

    schema: dict[str, Any] = plain(msgspec.json.schema(form))
    return schema
