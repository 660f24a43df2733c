"""GGUF models unpacked, in the user's cache folder, as transformers writes models itself.

transformers unpacks a GGUF file at every load: it reads the file three times, and makes a map of
all its tensors' names for every module. Here that is done once for a file, a dtype, and versions of
the packages that take part; later loads read what it came to. Every byte of that is checked before
it is used, and what is damaged is made anew. Processes that come at the same time wait for the
first.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from kvzip import checksum
from kvzip.files import scratch_folder

_LIST = "kvzip.json"
_FORMAT = 1
_PACKAGES = ("gguf", "tokenizers", "torch", "transformers")
_PIECE = 64 << 20


def unpacked(identity: str, dtype: str, make: Callable[[Path], None], folder: Path) -> Path:
    """The folder within `folder` that holds a model, made by `make(empty folder)` if need be.

    `identity`: what pins the bytes of the file that the model is in. Where `folder` cannot be
    written to, OSError is raised, as by a full disk; what `make` raises comes through.
    """
    about = {
        "format": _FORMAT,
        "identity": identity,
        "dtype": dtype,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    name = hashlib.sha256(msgspec.json.encode(about)).hexdigest()[:32]
    target = folder / name
    if _whole(target, about):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / f"{name}.lock"):
        if _whole(target, about):
            return target  # another process has made it meanwhile
        with scratch_folder(folder) as made, scratch_folder(folder) as damaged:
            make(made)
            (made / _LIST).write_bytes(_list(made, about))
            if target.exists():
                target.rename(damaged / "damaged")
            made.rename(target)
    return target


def _whole(folder: Path, about: dict[str, Any]) -> bool:
    """Whether a folder holds every byte that was put there, and no other file."""
    with suppress(OSError):
        return (folder / _LIST).read_bytes() == _list(folder, about)
    return False


def _list(folder: Path, about: dict[str, Any]) -> bytes:
    """What a model is, and its files: sizes in bytes and XXH3-64."""
    return msgspec.json.encode(about | {"files": _files(folder)})


def _files(folder: Path) -> dict[str, list[int]]:
    return {path.name: [path.stat().st_size, _xxh3(path)] for path in _paths(folder)}


def _paths(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.name != _LIST)


def _xxh3(path: Path) -> int:
    """XXH3-64 of a file: of its pieces', if there are several."""
    found = []
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.append(checksum.of_bytes(piece))
    if len(found) == 1:
        return found[0]
    return checksum.of_bytes(b"".join(value.to_bytes(8, "little") for value in found))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is in this block; the lock ends with a process that is killed."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
