"""Keys as they are given to a program: in a file, or in a variable of its environment.

Settings are logged and kept, so they name where the key is and never hold it. No error here shows
what was read, nor a name that could be a key in the wrong place.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvzip.container.sealed import Key
from kvzip.errors import UsageError
from kvzip.reading import contents

_FORM = "32 random bytes, or 64 hexadecimal digits"
_DIGITS = re.compile(rb"[0-9a-fA-F]*")
_LIKE_A_KEY = re.compile(r"[0-9a-fA-F]{64}")


def key_in_file(path: Path) -> Key:
    """The key in a file, called by no name: 32 bytes, or 64 hexadecimal digits with or without
    space around them. Raises UsageError, which does not show it, and OSError."""
    found = _key(contents(path, 1024))
    if found is None:
        raise UsageError(f"{path} holds no key: {_FORM}")
    return found


def key_from(named: str | None) -> Key | None:
    """The key that a setting names, None where it names none: ``env:NAME``, a variable of the
    environment that holds 64 hexadecimal digits, or ``file:PATH``, as :func:`key_in_file` reads it.
    Raises UsageError."""
    if named is None:
        return None
    kind, _, where = named.partition(":")
    if kind not in ("env", "file") or not where or _LIKE_A_KEY.fullmatch(where.strip()):
        raise UsageError(
            "key_from says where the key is, as env:NAME or file:PATH. What it has is neither, "
            "and is not shown here: it may be a key, which has no place in settings"
        )
    if kind == "file":
        try:
            return key_in_file(Path(where))
        except OSError as error:
            raise UsageError(f"key_from: {where} cannot be read: {error.strerror}") from None
    if where not in os.environ:
        raise UsageError(f"key_from: the environment has no variable {where!r}")
    found = _key(os.environ[where].encode(errors="surrogateescape"))
    if found is None:
        raise UsageError(
            f"key_from: the variable {where!r} of the environment holds no key: "
            "64 hexadecimal digits"
        )
    return found


def _key(data: bytes) -> Key | None:
    """The key that these bytes are, or stand for; None if they are none."""
    if len(data) != 32:
        try:
            data = bytes.fromhex(data.decode("ascii"))
        except (UnicodeDecodeError, ValueError):
            return None
    # Digits that are 32 bytes are half a key.
    return None if len(data) != 32 or _DIGITS.fullmatch(data) else Key(data)
