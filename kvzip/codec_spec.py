"""A codec's spec: its name and settings as one string, such as ``planes:mode=bit,coder=lz4``.

A spec, a config (the JSON object that a .kvz file keeps) and a part of a file's name can all stand
for one codec. This is the one place that turns one of them into another.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from kvzip.errors import UnsupportedError

_WHOLE = re.compile("-?[0-9]+")
_LONGEST = 20
"""Digits of the largest integer that JSON files keep, 2^64 - 1."""
_PLAIN = "".join(sorted({*string.punctuation} - {*"%,+/"}))
"""What stands as it is in a spec beside letters and digits; a slash is none of a file's name."""


def parse_spec(spec: str) -> dict[str, Any]:
    """The config that a spec stands for: the codec's name under "id", and the settings that are
    given, of which integers become int. In text ``%2C`` is a comma, and so on, as in a URL. Raises
    UnsupportedError for what is no setting, and for an integer too long for any."""
    name, _, given = spec.partition(":")
    config: dict[str, Any] = {"id": name}
    for item in filter(None, given.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key == "id":
            raise UnsupportedError(f"codec setting {item!r}: write name=value")
        if not _WHOLE.fullmatch(value):
            config[key] = unquote(value)
        elif len(value) <= _LONGEST:
            config[key] = int(value)
        else:
            found = f"{key}={value[:_LONGEST]}... of {len(value)} characters"
            raise UnsupportedError(f"codec setting {found}: a number has at most {_LONGEST}")
    return config


def format_spec(config: Mapping[str, Any]) -> str:
    """The spec that stands for a config; the inverse of :func:`parse_spec`."""
    settings = ",".join(f"{name}={_shown(v)}" for name, v in config.items() if name != "id")
    return f"{config['id']}:{settings}" if settings else str(config["id"])


def _shown(value: Any) -> str:
    """A setting's value as it stands in a spec: text that would be read as something else, with
    what stands in the way as in a URL."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return f"%{ord(value[0]):02X}{value[1:]}"
    return quote(str(value), safe=_PLAIN)


def split_specs(text: str) -> list[str]:
    """The specs of a list with commas between; within a spec, a plus stands for the comma."""
    return [spec.replace("+", ",") for spec in text.split(",")]


def file_stem(spec: str) -> str:
    """A spec as part of a file's name, such as ``planes-mode-bit,coder-lz4``."""
    return spec.replace(":", "-").replace("=", "-")
