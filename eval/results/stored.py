"""Results on disk: JSON, set to be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from kvzip.errors import KVZipError
from kvzip.files import replacing

T = TypeVar("T")


def save(result: msgspec.Struct, path: str | os.PathLike[str]) -> None:
    """Write a result, whole or not at all."""
    with replacing(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(result)) + b"\n")


def load(path: str | os.PathLike[str], form: type[T], command: str) -> T:
    """A stored result of `command`. Raises KVZipError when it is none."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=form)
    except OSError as error:
        raise KVZipError(f"{path}: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KVZipError(f"{path} is not a result of {command}: {error}") from None
